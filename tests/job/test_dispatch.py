"""Tiles on a cluster: nothing is left out, whoever comes and goes."""

import time

import dask
import pytest

from dask_batchinv.job.driver import roster
from dask_batchinv.job.driver.dispatch import ClusterLostError, Dispatcher
from dask_batchinv.job.driver.executor import Serial
from dask_batchinv.job.driver.roster import Roster
from dask_batchinv.job.events import Heartbeat
from dask_batchinv.job.results import TileResult
from dask_batchinv.job.versions import versions
from dask_batchinv.job.worker.introduction import Introduction
from dask_batchinv.location import Location


def work(task, span):
    return [TileResult(number, "done") for number in span]


def numbers(results):
    return sorted(result.number for result in results if not isinstance(result, Heartbeat))


@pytest.fixture
def dispatcher(client, tmp_path):
    return Dispatcher(
        client, Introduction(versions(), None, Location.parse(tmp_path / "t")), lambda threads, _: threads, is_own=True
    )


@pytest.fixture(params=["serial", "dispatcher"])
def executor(request, dispatcher):
    return Serial() if request.param == "serial" else dispatcher


def test_every_tile_comes_once(executor):
    spans = [range(0, 3), range(3, 4), range(7, 9)]
    assert numbers(executor.run(work, None, spans, attempts=3)) == [0, 1, 2, 3, 7, 8]
    assert numbers(executor.run(work, None, [], attempts=3)) == []


def test_a_tile_that_fails_is_tried_again_and_then_given_up(executor, tmp_path, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.driver.retry.BACK_OFF_SECONDS", 0.01)

    def fails(log, span):
        with log.open("a") as file:
            file.write(f"{span}\n")
        return [TileResult(number, None, "broken") if number == 1 else TileResult(number, "done") for number in span]

    found = executor.run(fails, tmp_path / "log", [range(0, 3)], attempts=3)
    results = sorted((r.number, r.value, r.error, r.attempts) for r in found if not isinstance(r, Heartbeat))
    assert results == [(0, "done", None, 1), (1, None, "broken", 3), (2, "done", None, 1)]
    assert (tmp_path / "log").read_text().splitlines() == ["range(0, 3)", "range(1, 2)", "range(1, 2)"]


def test_tiles_wait_for_workers_that_are_not_there_yet(dispatcher, monkeypatch):
    """Where every worker has died, nothing is on the cluster and nothing waits: but tiles are still to be done."""
    start = time.monotonic()
    ask = Roster._ask_scheduler

    def late(self, now):
        return ask(self, now) if time.monotonic() - start > 2 else []

    monkeypatch.setattr(Roster, "_ask_scheduler", late)
    assert numbers(dispatcher.run(work, None, [range(0, 1), range(1, 2)], attempts=3)) == [0, 1]


def test_a_cluster_without_workers_is_given_up(dispatcher, monkeypatch):
    monkeypatch.setattr(Roster, "_ask_scheduler", lambda self, now: [])
    monkeypatch.setitem(dask.config.config["batchinv"]["job"], "patience", 1.5)
    with pytest.raises(ClusterLostError, match="no workers for"):
        numbers(dispatcher.run(work, None, [range(0, 1)], attempts=3))


def test_a_cluster_whose_workers_are_all_paused_is_given_up(dispatcher, monkeypatch):
    known = roster.known_workers
    monkeypatch.setattr(
        roster,
        "known_workers",
        lambda *asked: {address: facts | {"status": "paused"} for address, facts in known(*asked).items()},
    )
    monkeypatch.setitem(dask.config.config["batchinv"]["job"], "patience", 1.5)
    with pytest.raises(ClusterLostError, match=r"no workers for [0-9]+ s; .*: paused, for its memory is full"):
        numbers(dispatcher.run(work, None, [range(0, 1)], attempts=3))


def test_what_would_fail_all_others_too_stops_them(executor):
    def full(task, span):
        return [TileResult(span.start, None, "OSError: [Errno 28] No space left on device", stops=True)]

    found = numbers(executor.run(full, None, [range(i, i + 1) for i in range(100)], attempts=3))
    assert 1 <= len(found) <= 10
