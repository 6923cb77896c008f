"""One run at a time may work on a target, and a dead one holds nobody up."""

import json
import os
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from dask_batchinv import TargetError, TargetInUseError, invert_store
from dask_batchinv.job.target import lock
from dask_batchinv.job.target.lock import LOCK, locked
from dask_batchinv.location import Location, TakenOverError
from tests.support.stacks import conditioned
from tests.support.targets import tree


def test_a_busy_target_is_refused_before_workers_are_asked(tmp_path, make_source, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.driver.cluster.connect", None)
    source, target = make_source(conditioned(4, 3, 10)), tmp_path / "t"
    with locked(Location.parse(target)), pytest.raises(TargetInUseError, match="another run is writing"):
        invert_store(source, target, workers=1)
    target.mkdir()
    (target / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(TargetError, match="was not made by dask_batchinv"):
        invert_store(source, target, workers=1)


def test_a_second_run_is_refused_while_the_first_is_at_work(tmp_path, make_source, client):
    source = make_source(conditioned(40, 3, 10))
    seen = []

    def try_too(progress):
        if not seen:
            before = tree(tmp_path / "t")
            with pytest.raises(TargetError, match=r"another run is writing to .*process \d+ on") as caught:
                invert_store(source, tmp_path / "t", client=client)
            seen.append(str(caught.value))
            assert tree(tmp_path / "t") == before

    assert invert_store(source, tmp_path / "t", client=client, on_progress=try_too).complete
    assert f"process {os.getpid()}" in seen[0]
    assert not (tmp_path / "t" / LOCK).exists()


def test_two_runs_that_create_one_target(tmp_path, make_source, client):
    source, errors, reports = make_source(conditioned(40, 3, 10)), [], []

    def run():
        try:
            reports.append(invert_store(source, tmp_path / "t", client=client))
        except TargetError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) + len(errors) == 4
    assert all(report.complete for report in reports)
    assert invert_store(source, tmp_path / "t", client=client).tiles_now == 0


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    target = Location.parse(tmp_path / "t")
    code = (
        "import sys, time\n"
        "from dask_batchinv.job.target.lock import locked\n"
        "from dask_batchinv.location import Location\n"
        "with locked(Location.parse(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, target.url], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TargetError, match=f"process {holder.pid} on"), locked(target):
            pass
        holder.kill()
    assert (tmp_path / "t" / LOCK).exists()
    with locked(target):
        pass
    assert not (tmp_path / "t" / LOCK).exists()  # the folder was made by the one that was killed
    (tmp_path / "t").rmdir()
    with locked(target):
        pass
    assert not (tmp_path / "t").exists()  # nothing came of it


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "RENEWAL_SECONDS", 0.2)
    monkeypatch.setattr(lock, "_SETTLING_SECONDS", 0.05)


@pytest.fixture
def memory():
    location = Location.parse("memory://locked/t")
    yield location
    fs = fsspec.filesystem("memory")
    if fs.exists("/locked"):
        fs.rm("/locked", recursive=True)


def test_a_lease_is_renewed_and_given_back(impatient, memory):
    with locked(memory) as held:
        first = memory.read_json(LOCK)
        time.sleep(0.5)
        assert memory.read_json(LOCK)["renewed"] > first["renewed"]
        with pytest.raises(TargetError, match="another run is writing"), locked(memory):
            pass
        held.check()
    assert memory.read_json(LOCK) is None


def test_a_lease_that_nobody_renews_is_taken_over(impatient, memory):
    memory.write(LOCK, json.dumps({"run": "dead", "renewed": 7}).encode())
    start = time.monotonic()
    with locked(memory) as held:
        assert 0.5 < time.monotonic() - start < 5
        # And a holder that resumes sees it.
        memory.write(LOCK, json.dumps({"run": "other", "renewed": 0}).encode())
        time.sleep(0.5)
        with pytest.raises(TakenOverError):
            held.check()
    assert memory.read_json(LOCK)["run"] == "other"
