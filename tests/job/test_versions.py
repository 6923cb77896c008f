"""Workers that run something else are refused before anything is written."""

import os
import subprocess
import sys
import time

import pytest
from distributed import Client, LocalCluster

from dask_batchinv import ClusterError, invert_store
from dask_batchinv.job.versions import differing, versions
from tests.support.stacks import conditioned


def test_differences_in_words():
    mine = {"zarr": "3.1.6", "numpy": "2.3.0"}
    assert differing(mine, mine) == ""
    assert differing(mine, {"zarr": "3.4.0", "numpy": "2.3.0"}) == "zarr is 3.4.0 there and 3.1.6 here"
    assert {"zarr", "numcodecs", "llvmlite", "numpy", "dask_batchinv", "python"} <= set(versions())


def fake_numcodecs(folder):
    """Have Python believe that it has another numcodecs: so its metadata say."""
    fake = folder / "fake" / "numcodecs-99.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: numcodecs\nVersion: 99.0\n")
    return fake.parent


def without_the_package(folder):
    """Have Python find no dask_batchinv."""
    (folder / "bare").mkdir()
    (folder / "bare" / "sitecustomize.py").write_text("import sys\nsys.modules['dask_batchinv'] = None\n")
    return folder / "bare"


def start_worker(address, path):
    arguments = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nworkers", "1"]
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)


@pytest.fixture
def foreign(tmp_path):
    """A scheduler with a worker, a process of its own, that has another numcodecs."""
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as scheduler:
        address = scheduler.scheduler_address
        with start_worker(address, fake_numcodecs(tmp_path)) as worker:
            yield address
            worker.kill()


def test_a_worker_with_another_version_is_refused(foreign, make_source, tmp_path):
    source = make_source(conditioned(4, 3, 10))
    with pytest.raises(
        ClusterError, match=r"1 worker of no use, first tcp.*: it has other versions: numcodecs is 99.0 there"
    ):
        invert_store(source, tmp_path / "t", scheduler=foreign)
    assert not (tmp_path / "t").exists()


def test_workers_that_join_later_are_left_out_and_named(tmp_path, make_source, monkeypatch):
    """One has another version, one no dask_batchinv at all: the job is done by the others, and harms neither."""
    source = make_source(conditioned(400, 3, 10), chunks=(10, 3, 3))
    monkeypatch.setattr("dask_batchinv.job.plan.plan.LARGEST_SPAN", 1)
    late = []

    def invite(progress):
        if not late:
            late.extend(start_worker(cluster.scheduler_address, path) for path in paths)
            client.wait_for_workers(3, timeout=60)
        time.sleep(0.1)

    paths = [fake_numcodecs(tmp_path), without_the_package(tmp_path)]
    with (
        LocalCluster(n_workers=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        report = invert_store(source, tmp_path / "t", client=client, tile_size=720, on_progress=invite)
        assert all(worker.poll() is None for worker in late)
        for worker in late:
            worker.kill()
            worker.wait()
    assert report.complete
    events = " ".join(event for event in report.worker_events if "was left out" in event)
    assert "numcodecs is 99.0 there" in events
    assert "cannot run dask_batchinv" in events
