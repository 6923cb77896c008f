"""Worker processes that a job starts itself: whoever asks for them, and however that ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import dask
import psutil
import pytest

from dask_batchinv import ClusterError, JobFailedError, invert_store
from dask_batchinv.job.driver.cluster import connect
from dask_batchinv.job.driver.cluster_options import ClusterOptions
from tests.support.stacks import conditioned

#: A script as people write it first: it does its work when it is imported.
SCRIPT = """
import sys
import dask_batchinv
print("runs")
report = dask_batchinv.invert_store(sys.argv[1], sys.argv[2], workers=1, tile_size=720)
print("complete" if report.complete else "not complete")
"""


@pytest.fixture
def source(make_source):
    return make_source(conditioned(40, 3, 10), chunks=(10, 3, 3))


def python(*arguments, **options):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_script_without_a_guard(tmp_path, source):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = python(script, source, tmp_path / "t")
    assert (done.stdout.split("\n")[:2], done.stderr) == (["runs", "complete"], "")


def test_a_script_from_a_pipe(tmp_path, source):
    done = python("-", source, tmp_path / "t", input=SCRIPT)
    assert (done.stdout.split("\n")[:2], done.stderr) == (["runs", "complete"], "")


def test_modules_in_the_working_directory_are_not_imported(tmp_path, source):
    for name in ("distributed", "zarr", "numpy", "tornado"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not the one')")
    python("-P", "-c", SCRIPT, source, tmp_path / "t", cwd=tmp_path)


def invert(source, target):
    return invert_store(source, target, workers=1, tile_size=720).complete


def test_a_process_that_may_have_no_children(tmp_path, source):
    """As those of a pool, and of Celery."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(invert, (source, tmp_path / "t"))


def test_what_does_not_start_is_an_error_that_says_what_to_do(tmp_path, source, monkeypatch, capfd):
    (tmp_path / "broken.py").write_text("raise SystemExit('no room')")
    monkeypatch.setattr("dask_batchinv.job.driver.start_workers.__file__", str(tmp_path / "broken.py"))
    with pytest.raises(ClusterError, match=r"no worker processes could be started .* Use a running cluster"):
        invert(source, tmp_path / "t")
    assert "no room" in capfd.readouterr().err
    assert not (tmp_path / "t").exists()


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def begin(tmp_path, source):
    """Begin a job of many tiles in a process of its own, and return that once some are done."""
    code = (
        "import sys, time, dask_batchinv; dask_batchinv.invert_store(*sys.argv[1:], workers=1, tile_size=72, "
        "on_progress=lambda _: time.sleep(0.2))"
    )
    running = subprocess.Popen([sys.executable, "-c", code, source, tmp_path / "t"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "t" / "info" / "c.0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return running


def test_all_end_with_the_driver(tmp_path, source):
    with begin(tmp_path, source) as running:
        others = family(running)
        assert len(others) >= 2
        running.kill()
        gone, alive = psutil.wait_procs(others, timeout=20)
        assert (len(gone), alive) == (len(others), [])


def test_workers_that_lose_the_process_that_started_them_end_and_the_job_is_resumed(tmp_path, source):
    with connect(ClusterOptions(workers=1)) as (client, _):
        (worker,) = client.run(os.getpid).values()
        helper = psutil.Process(worker)
        while helper.ppid() != os.getpid():
            helper = helper.parent()
        helper.send_signal(signal.SIGKILL)
        psutil.wait_procs([psutil.Process(worker)] if psutil.pid_exists(worker) else [], timeout=20)
        assert not psutil.pid_exists(worker)
    killed = []

    def kill(progress):
        if progress.matrices_done and not killed:
            killed.extend(child for child in psutil.Process().children() if "start_workers" in str(child.cmdline()))
            for process in killed:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.05)

    waits = dask.config.set({"distributed.comm.timeouts.connect": "2s"})  # else half a minute for the lost scheduler
    with waits, pytest.raises(JobFailedError, match="scheduler"):
        invert_store(source, tmp_path / "t", workers=1, tile_size=72, on_progress=kill)
    assert invert(source, tmp_path / "t")
