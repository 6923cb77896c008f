"""A cluster that others use, too: nobody's work is touched, nobody is waited for, and ours is done."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import dask
import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster

from dask_batchinv import ClusterError, JobFailedError, invert_store, verify_store
from dask_batchinv.job.driver import roster
from dask_batchinv.job.driver.cluster import connect
from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.worker import invert_tiles
from tests.support.stacks import conditioned

OPTIONS = {"tile_size": 720, "max_failed": None}


@pytest.fixture
def source(make_source, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.plan.plan.LARGEST_SPAN", 1)
    return make_source(conditioned(400, 3, 10), chunks=(10, 3, 3))


@pytest.fixture
def shared():
    """A cluster of two workers, its owner, and a client of somebody else's."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as owner,
        Client(cluster.scheduler_address, set_as_default=False) as guest,
    ):
        yield owner, guest


def workers_of(client):
    return list(client.sync(client.scheduler.identity, n_workers=-1)["workers"])


def test_a_worker_that_others_keep_busy_is_neither_waited_for_nor_harmed(tmp_path, source, shared):
    owner, guest = shared
    busy, _ = workers_of(owner)
    kept = owner.submit(np.ones, 1000, workers=[busy], key="kept")
    kept.result()
    held = owner.submit(time.sleep, 30, workers=[busy])
    pids = owner.run(os.getpid)
    start = time.monotonic()
    with dask.config.set({"batchinv.job.patience": "3s"}):
        report = invert_store(source, tmp_path / "t", client=guest, **OPTIONS)
    assert time.monotonic() - start < 20
    assert (report.exit_code, report.deaths, report.restarts) == (0, 0, 0)
    assert (held.status, kept.status) == ("pending", "finished")
    assert owner.run(os.getpid) == pids
    held.cancel()


def test_a_tile_that_waits_behind_others_moves(tmp_path, source, shared):
    """It had been given to the worker before the other one's task came."""
    owner, guest = shared
    busy, _ = workers_of(owner)
    held = []

    def interfere(progress):
        if not held:
            held.extend(owner.submit(time.sleep, 25, workers=[busy], priority=100, pure=False) for _ in range(2))
        time.sleep(0.02)

    start = time.monotonic()
    report = invert_store(source, tmp_path / "t", client=guest, on_progress=interfere, **OPTIONS)
    assert report.exit_code == 0
    assert time.monotonic() - start < 20
    assert all(task.status == "pending" for task in held)
    for task in held:
        task.cancel()


def test_a_job_gets_its_turn_where_others_keep_all_busy(tmp_path, source, shared):
    owner, guest = shared
    tasks = [owner.submit(time.sleep, 0.3, pure=False) for _ in range(20)]
    report = invert_store(source, tmp_path / "t", client=guest, **OPTIONS)
    assert report.exit_code == 0
    assert all(task.status != "error" for task in tasks)


def hang_at(number, once=None):
    """Have a tile hang, whoever does it; with `once`, a file that is made then, only the first time."""
    original = invert_tiles.do_span

    def do_span(task, numbers, kept=None):
        if number in numbers and not (once and once.exists()):
            if once:
                once.touch()
            time.sleep(1000)
        return original(task, numbers, kept)

    invert_tiles.do_span = do_span


def test_a_tile_without_result_is_given_up_and_no_worker_of_others_restarted(tmp_path, source, shared):
    owner, guest = shared
    kept = [owner.submit(np.ones, 1000, workers=[address], pure=False) for address in workers_of(owner)]
    owner.gather(kept)
    owner.run(hang_at, 7)
    pids = owner.run(os.getpid)
    with dask.config.set({"batchinv.job.patience": "2s"}), pytest.raises(JobFailedError) as caught:
        invert_store(source, tmp_path / "t", client=guest, **OPTIONS)
    report = caught.value.report
    assert [tile.number for tile in report.failed_tiles] == [7]
    assert "with this tile alone on it" in report.failed_tiles[0].cause
    assert (report.deaths, report.restarts, report.tiles_done) == (0, 0, 39)
    assert sum("was given up: no result after" in event for event in report.worker_events) == 2
    assert report.retries > 0
    assert owner.run(os.getpid) == pids
    assert all(task.status == "finished" for task in kept)


def test_workers_are_restarted_where_users_say_so(tmp_path, source, shared):
    owner, guest = shared
    owner.run(hang_at, 7, tmp_path / "hung")
    pids = owner.run(os.getpid)
    with dask.config.set({"batchinv.job.patience": "2s"}):
        report = invert_store(source, tmp_path / "t", client=guest, restart_stalled=True, **OPTIONS)
    assert report.exit_code == 0
    assert report.restarts >= 1
    assert any("was restarted: no result after" in event for event in report.worker_events)
    assert owner.run(os.getpid) != pids


def test_a_frozen_worker_is_passed_over_and_comes_back(tmp_path, source, shared, monkeypatch):
    monkeypatch.setattr(roster, "WORKER_SECONDS", 4.0)
    monkeypatch.setattr(roster, "AGAIN_SECONDS", 0.5)
    owner, guest = shared
    frozen = psutil.Process(next(iter(owner.run(os.getpid).values())))
    frozen.send_signal(signal.SIGSTOP)
    try:
        report = invert_store(source, tmp_path / "t", client=guest, **OPTIONS)
        assert report.exit_code == 0
        assert any("did not answer" in event for event in report.worker_events)
        for process in owner.run(os.getpid, workers=workers_of(owner)[1:]).values():
            psutil.Process(process).send_signal(signal.SIGSTOP)
        with pytest.raises(ClusterError, match="none of 2 worker"):
            invert_store(source, tmp_path / "u", client=guest, **OPTIONS)
    finally:
        for child in psutil.Process().children(recursive=True):
            child.send_signal(signal.SIGCONT)
    assert verify_store(tmp_path / "t", source=source, client=guest).ok


def test_a_worker_that_dies_is_counted_and_named(tmp_path, source, shared):
    owner, guest = shared
    address, _ = workers_of(owner)
    dead = []

    def kill(progress):
        if progress.matrices_done >= 50 and not dead:
            dead.extend(owner.run(os.getpid, workers=[address]).values())
            os.kill(dead[0], signal.SIGKILL)
        time.sleep(0.05)

    report = invert_store(source, tmp_path / "t", client=guest, on_progress=kill, **OPTIONS)
    assert report.exit_code == 0
    assert report.deaths == 1
    assert any(f"worker {address} died" in event and "to be done again" in event for event in report.worker_events)
    assert "died" in str(report)
    assert report.retries >= 1


def test_an_asynchronous_client_is_refused_at_once(tmp_path, source):
    class Asynchronous:
        asynchronous = True

    with pytest.raises(ClusterError, match="is asynchronous, but the call waits"):
        invert_store(source, tmp_path / "t", client=Asynchronous(), **OPTIONS)


#: What another user of this machine would try: to speak to any port, as a worker or client does, encrypted or not.
INTRUDER = """
import asyncio, ssl, sys, urllib.request
from distributed.comm import connect
anyone = ssl.create_default_context()
anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
async def main():
    for port in sys.argv[1:]:
        for scheme, options in ("tcp", {}), ("tls", {"ssl_context": anyone, "require_encryption": True}):
            try:
                await asyncio.wait_for(connect(f"{scheme}://127.0.0.1:{port}", **options), 0.5)
                print("in by", scheme)
            except Exception as error:
                print("refused")
        for page in "health", "info/main/workers.html", "metrics", "json/counts.json", "statics/css/base.css", "":
            try:
                print("served", urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=1).status)
            except Exception as error:
                print("refused")
asyncio.run(main())
"""


def test_workers_are_found_whatever_the_client_last_heard(tmp_path, make_source, client, monkeypatch):
    """A background task of the client asks the scheduler, but for no workers, and may be the last to be answered."""
    identity = client.sync(client.scheduler.identity, n_workers=0)
    monkeypatch.setattr(type(client), "scheduler_info", lambda self, **_: identity)
    assert invert_store(make_source(conditioned(40, 3, 10)), tmp_path / "t", client=client).complete


def listening():
    """The ports on which this process and its children listen, and their command lines."""
    ports, commands = set(), []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # one that was there for a moment only
            commands += process.cmdline()
            found = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            ports |= {str(connection.laddr.port) for connection in found}
    return ports, " ".join(commands)


def intrude(ports):
    arguments = [sys.executable, "-c", INTRUDER, *sorted(ports)]
    return set(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines())


def test_nobody_else_can_take_part_in_our_own_cluster():
    """Anyone on this machine may connect to the loopback interface: that must not suffice."""
    before, _ = listening()
    with connect(ClusterOptions(workers=1)) as (client, _):
        assert client.submit(sum, [1, 2]).result() == 3
        ports, commands = listening()
        assert len(ports - before) >= 4  # of scheduler, nanny and worker, and their HTTP servers
        assert "PRIVATE KEY" not in commands
        assert intrude(ports - before) == {"refused"}


def test_the_intruder_gets_in_where_it_could(shared):
    owner, _ = shared
    assert "in by tcp" in intrude([owner.scheduler.address.rpartition(":")[2]])
