"""The window of tiles: nothing is left out, whoever comes and goes."""

import time

import pytest

from dask_batchinv.job import window
from dask_batchinv.job.tile import TileResult
from dask_batchinv.job.window import ClusterLostError, run_on_cluster


def work(task, span):
    return [TileResult(number, {"milliseconds": 0}) for number in span]


def numbers(results):
    return sorted(result.number for result, _ in results if result is not None)


def test_every_tile_comes_once(client):
    spans = [range(0, 3), range(3, 4), range(7, 9)]
    assert numbers(run_on_cluster(client, work, None, spans)) == [0, 1, 2, 3, 7, 8]
    assert numbers(run_on_cluster(client, work, None, [])) == []


def test_tiles_wait_for_workers_that_are_not_there_yet(client, monkeypatch):
    """Where every worker has died, nothing is on the cluster and nothing waits: but tiles are still to be done."""
    start = time.monotonic()
    threads = window._Window._ask_for_threads

    def late(self):
        return threads(self) if time.monotonic() - start > 2 else {}

    monkeypatch.setattr(window._Window, "_ask_for_threads", late)
    assert numbers(run_on_cluster(client, work, None, [range(0, 1), range(1, 2)])) == [0, 1]


def test_a_cluster_without_workers_is_given_up(client, monkeypatch):
    monkeypatch.setattr(window._Window, "_ask_for_threads", lambda self: {})
    monkeypatch.setattr(window, "parse_timedelta", lambda text: 1.5)
    with pytest.raises(ClusterLostError, match="there were no workers for"):
        numbers(run_on_cluster(client, work, None, [range(0, 1)]))


def test_what_would_fail_all_others_too_stops_them(client):
    def full(task, span):
        return [TileResult(span.start, None, "OSError: [Errno 28] No space left on device", stops=True)]

    found = numbers(run_on_cluster(client, full, None, [range(i, i + 1) for i in range(100)]))
    assert 1 <= len(found) <= 10
