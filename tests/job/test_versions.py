"""Workers that run something else are refused before anything is written."""

import os
import subprocess
import sys

import pytest
from distributed import LocalCluster

from dask_batchinv import ClusterError, JobFailedError, invert_store
from dask_batchinv.job.driver import cluster
from dask_batchinv.job.driver import run as driver
from dask_batchinv.job.versions import differing, versions
from tests.support.stacks import conditioned


def test_differences_in_words():
    mine = {"zarr": "3.1.6", "numpy": "2.3.0"}
    assert differing(mine, mine) == ""
    assert differing(mine, {"zarr": "3.4.0", "numpy": "2.3.0"}) == "zarr is 3.4.0 there and 3.1.6 here"
    assert {"zarr", "numcodecs", "llvmlite", "numpy", "dask_batchinv", "python"} <= set(versions())


@pytest.fixture
def foreign(tmp_path):
    """A scheduler with a worker, a process of its own, that has another numcodecs: so its metadata say."""
    fake = tmp_path / "fake" / "numcodecs-99.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: numcodecs\nVersion: 99.0\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "fake")}
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as scheduler:
        address = scheduler.scheduler_address
        arguments = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nworkers", "1"]
        with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL) as worker:
            yield address
            worker.kill()


def test_a_worker_with_another_version_is_refused(foreign, make_source, tmp_path):
    source = make_source(conditioned(4, 3, 10))
    with pytest.raises(ClusterError, match=r"1 worker\(s\) have other versions, first tcp.*numcodecs is 99.0 there"):
        invert_store(source, tmp_path / "t", scheduler=foreign)
    assert not (tmp_path / "t").exists()


def test_a_worker_that_joins_later_stops_the_job_before_its_first_write(make_source, client, tmp_path, monkeypatch):
    source = make_source(conditioned(40, 3, 10))
    monkeypatch.setattr(cluster, "check_versions", lambda client: None)
    monkeypatch.setattr(driver, "versions", lambda: versions() | {"zarr": "99.0"})
    with pytest.raises(JobFailedError, match=r"has other versions than the driver: zarr is") as caught:
        invert_store(source, tmp_path / "t", client=client)
    assert "VersionError" in caught.value.report.stopped
    assert not [path for name in ("inverse", "info", "rcond") for path in (tmp_path / "t" / name).rglob("c")]
