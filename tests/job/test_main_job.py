"""The main job: two million matrices, on a local cluster and on one of separate processes, and after a kill -9."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

from dask_batchinv.job.worker.verify_tiles import residual_ratios
from tests.support.targets import read_target
from tests.support.targets import recorded as recorded_in

MATRICES, N, EACH = 2_000_000, 4, 1000
CHUNK = 10_000  # 200 tiles
COMMAND = [sys.executable, "-m", "dask_batchinv.cli"]
OPTIONS = ["--tile-size", str(CHUNK * N * N * 8)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The stack with its failures: the path, the matrices, and what info must be."""
    rng = np.random.default_rng(2026)
    a = rng.normal(size=(MATRICES, N, N))
    info = np.zeros(MATRICES, np.int32)
    singular, nan, infinite = np.split(rng.choice(MATRICES, 3 * EACH, replace=False), 3)
    # Exactly singular, at a pivot of our choice: everything from that pivot on is zero.
    pivot = rng.integers(1, N + 1, EACH)
    for i, k in zip(singular, pivot, strict=True):
        a[i] = 0
        a[i, range(k - 1), range(k - 1)] = 1
    info[singular] = pivot
    row, col = rng.integers(0, N, (2, EACH))
    a[nan, row, col] = np.nan
    a[infinite, row, col] = rng.choice([-np.inf, np.inf], EACH)
    info[np.concatenate([nan, infinite])] = -1
    path = tmp_path_factory.mktemp("main") / "source.zarr"
    zarr.create_array(path, shape=a.shape, chunks=(CHUNK, N, N), dtype=a.dtype)[...] = a
    return path, a, info


def chunks_of(target):
    """Every chunk of the three arrays, byte for byte."""
    return {
        str(path.relative_to(target)): path.read_bytes()
        for name in ("inverse", "info", "rcond")
        for path in (target / name).glob("c.*")
    }


@pytest.fixture(scope="module")
def local(planted):
    """The target that a local cluster makes, and its report."""
    source, _, _ = planted
    target = source.with_name("local.zarr")
    done = subprocess.run([*COMMAND, "run", source, target, *OPTIONS, "--json"], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    return target, json.loads(done.stdout)


def test_every_matrix_is_accounted_for(planted, local):
    _, a, want = planted
    target, report = local
    inverse, info, rcond = read_target(target)
    np.testing.assert_array_equal(info, want)
    good = want == 0
    assert np.isnan(inverse[~good]).all()
    assert residual_ratios(a[good], inverse[good]).max() <= 3
    assert (rcond[want > 0] == 0).all()
    assert np.isnan(rcond[want < 0]).all()
    assert report["failed"] == {
        "singular": EACH,
        "not_finite": 2 * EACH,
        "overflow": 0,
        "below_min_rcond": 0,
        "unreadable": 0,
    }
    assert report["first_failed"]["singular"] == [[i] for i in np.flatnonzero(want > 0)[:10].tolist()]
    assert report["matrices"] == report["matrices_done"] == MATRICES
    assert report["complete"]


@contextmanager
def separate_processes(folder, workers=2):
    """A scheduler and workers as a person would start them, each a process of its own."""
    dask = Path(sys.executable).with_name("dask")
    scheduler_file = folder / "scheduler.json"
    common = ["--scheduler-file", scheduler_file, "--no-dashboard"]
    host = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]

    def start(*arguments):
        started.append(subprocess.Popen([dask, *arguments], stderr=subprocess.DEVNULL, start_new_session=True))

    started = []
    start("scheduler", *host, "--port", "0", *common)
    try:
        while not scheduler_file.exists():
            assert started[0].poll() is None
            time.sleep(0.05)
        for _ in range(workers):
            start("worker", *host, *common, "--nthreads", "1", "--memory-limit", "2GiB", "--local-directory", folder)
        address = json.loads(scheduler_file.read_text())["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=60)
        yield address, started
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_cluster_of_separate_processes_makes_the_same_bytes(planted, local, tmp_path):
    source, _, _ = planted
    target = source.with_name("separate.zarr")
    with separate_processes(tmp_path) as (address, _):
        done = subprocess.run([*COMMAND, "run", source, target, *OPTIONS, "--scheduler", address], capture_output=True)
    assert done.returncode == 3, done.stderr
    assert chunks_of(target) == chunks_of(local[0])


def test_a_lost_scheduler_ends_the_run_and_the_same_command_continues(planted, local, tmp_path):
    source, _, _ = planted
    target = source.with_name("lost.zarr")
    with separate_processes(tmp_path) as (address, started):
        running = start_job(source, target, "--scheduler", address)
        wait_for_tiles(running, target, 20)
        os.killpg(started[0].pid, signal.SIGKILL)
        started.pop(0).wait()
        out, err = running.communicate(timeout=60)
    assert running.returncode == 1, err
    assert "the scheduler was lost" in out
    assert "run the same command again" in err
    finish(source, target)
    assert chunks_of(target) == chunks_of(local[0])


def start_job(source, target, *more):
    return subprocess.Popen(
        [*COMMAND, "run", source, target, *OPTIONS, *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_tiles(running, target, tiles):
    deadline = time.monotonic() + 60
    while len(list((target / "info").glob("c.*"))) < tiles:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(source, target):
    """Run the same command to its end and check that no recorded tile was computed again."""
    recorded = recorded_in(target)

    def stamps():
        return [(target / f"inverse/c.{tile}.0.0").stat().st_mtime_ns for tile in recorded]

    before = stamps()
    done = subprocess.run([*COMMAND, "run", source, target, *OPTIONS, "--json"], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["tiles_now"] == MATRICES // CHUNK - len(recorded)
    assert stamps() == before
    return len(recorded)


@pytest.mark.parametrize("tiles", [pytest.param(20, marks=pytest.mark.slow), 120])
def test_kill_9_of_the_whole_process_group_then_the_same_command(planted, local, tiles):
    source, _, _ = planted
    target = source.with_name(f"killed{tiles}.zarr")
    running = start_job(source, target)
    # Late enough that the ledger, written about once a second, has tiles.
    wait_for_tiles(running, target, tiles)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert zarr.open_group(target).attrs["complete"] == 0
    time.sleep(1)  # worker processes notice that their parent is gone
    assert finish(source, target) > 0
    assert chunks_of(target) == chunks_of(local[0])


def peak_memory():
    """Peak resident bytes of this process."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_worker_needs_no_more_memory_than_the_plan_said(tmp_path, threads):
    limit, n, chunk = 448 * 2**20, 16, 4096
    times = 10 if threads == 1 else 4  # as large as the limit
    matrices = times * limit // (n * n * 8) // chunk * chunk + chunk
    source = zarr.create_array(tmp_path / "s", shape=(matrices, n, n), chunks=(chunk, n, n), dtype="f8")
    block = np.random.default_rng(0).normal(size=(chunk, n, n))
    for start in range(0, matrices, chunk):
        source[start : start + chunk] = block
    assert source.nbytes >= times * limit
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=threads, memory_limit=limit, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        arguments = [tmp_path / "s", tmp_path / "t", "--scheduler", cluster.scheduler_address]
        plan = subprocess.run([*COMMAND, "plan", *arguments, "--json"], capture_output=True, check=True)
        projected = json.loads(plan.stdout)["projected_bytes_per_worker"]
        subprocess.run([*COMMAND, "run", *arguments, "--quiet"], check=True, timeout=240)
        peaks = list(client.run(peak_memory).values())
    assert len(peaks) == 2
    assert max(peaks) <= projected <= limit
    assert projected <= 2 * max(peaks)  # a projection that is always right because it is huge would be of no use
