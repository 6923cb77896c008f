"""`status` knows that a run is at work, and what the last ones did; reports say what each worker did."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
import zarr
from click.testing import CliRunner
from distributed import Client

from dask_batchinv import invert_store
from dask_batchinv.cli import main
from dask_batchinv.job.report.freshness import status_of
from dask_batchinv.job.target.holder import LOCK
from dask_batchinv.location import Location
from tests.support.stacks import conditioned


@pytest.fixture
def source(tmp_path):
    a = conditioned(100, 3, 10)
    zarr.create_array(tmp_path / "s", shape=a.shape, dtype=a.dtype, chunks=(10, 3, 3))[...] = a
    return tmp_path / "s"


def status(target):
    ran = CliRunner().invoke(main, ["status", str(target), "--json"])
    return ran.exit_code, json.loads(ran.stdout)


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_while_a_run_is_at_work(source, tmp_path, place):
    target = tmp_path / "t" if place == "disk" else f"memory://{tmp_path.name}/t"
    seen = []

    def look(progress):
        if progress.activity == "inverting":
            time.sleep(0.02)
            seen.append(status_of(Location.parse(target)))

    invert_store(source, target, tile_size=720, on_progress=look)
    during = seen[-1]
    assert during.exit_code == 6
    assert f"process {os.getpid()} on" in during.at_work.holder
    since, now = datetime.fromisoformat(during.at_work.since), datetime.now(UTC)
    assert 0 <= (now - since).total_seconds() < 60
    assert during.at_work.where.startswith("this process")
    assert during.at_work.matrices_per_second >= 0
    assert "at work          process" in str(during)
    after = status_of(Location.parse(target))
    assert (after.exit_code, after.at_work) == (0, None)
    assert after.runs[-1]["tiles_now"] == 10
    assert "last run         2" in str(after)


def test_another_process_sees_it_and_does_not_see_one_that_was_killed(source, tmp_path):
    code = f"""if True:
        import time
        from dask_batchinv import invert_store
        def wait(progress):
            if progress.matrices_done >= 50:
                print("half", flush=True)
                time.sleep(100)
        invert_store({str(source)!r}, {str(tmp_path / "t")!r}, tile_size=720, on_progress=wait)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "half\n"
        exit_code, found = status(tmp_path / "t")
        assert exit_code == 6
        assert str(run.pid) in found["at_work"]["holder"]
        assert found["matrices_done"] > 0
        # To ask does not disturb: another run is refused as before, and this one goes on.
        refused = CliRunner().invoke(main, ["run", str(source), str(tmp_path / "t"), "--tile-size", "720"])
        assert refused.exit_code == 2
        assert "another run is writing" in refused.output
        run.kill()
    exit_code, found = status(tmp_path / "t")
    assert (exit_code, found["at_work"]) == (4, None)
    assert (tmp_path / "t" / LOCK).exists()
    assert invert_store(source, tmp_path / "t", tile_size=720).complete
    assert status(tmp_path / "t")[0] == 0


def test_what_each_worker_did(source, tmp_path):
    with Client(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", set_as_default=False) as client:
        report = invert_store(source, tmp_path / "t", tile_size=720, client=client)
    assert 1 <= len(report.per_worker) <= report.workers == 2
    assert sum(figures.tiles for figures in report.per_worker.values()) == 10
    assert sum(figures.failed for figures in report.per_worker.values()) == 0
    assert report.cpu_seconds == pytest.approx(sum(f.cpu_seconds for f in report.per_worker.values()), abs=0.01)
    # Ten chunks of the source, and of three arrays of the target.
    assert report.requests == sum(figures.requests for figures in report.per_worker.values()) == 40
    assert report.started <= report.ended
    kept = status(tmp_path / "t")[1]["runs"][-1]
    assert kept["per_worker"].keys() == report.per_worker.keys()
    assert kept["cpu_seconds"] == report.cpu_seconds
    here = invert_store(source, tmp_path / "u", tile_size=720)
    assert (here.requests, here.per_worker) == (40, {})


def test_an_interrupted_run_leaves_its_record(source, tmp_path):
    def stop(progress):
        if progress.matrices_done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert_store(source, tmp_path / "t", tile_size=720, on_progress=stop)
    found = status(tmp_path / "t")[1]
    (run,) = found["runs"]
    assert (run["stopped"], found["at_work"]) == ("interrupted", None)
    assert 0 < run["tiles_now"] <= found["tiles_done"] <= 10
