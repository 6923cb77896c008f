"""The policy of retries: tables, and a simulated cluster on which tiles fail, kill and hang."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_batchinv.job.driver.retry import BACK_OFF_SECONDS, FATAL_DEATHS, SUSPICIOUS_DEATHS, Retries
from dask_batchinv.job.results import TileResult


def done(*numbers):
    return [TileResult(number, "done") for number in numbers]


def broken(number, **options):
    return TileResult(number, None, "broken", **options)


def test_spans_come_in_their_order():
    retries = Retries([range(0, 2), range(5, 6)], attempts=3)
    assert [retries.next_ready(0.0) for _ in range(3)] == [range(0, 2), range(5, 6), None]
    assert retries.exhausted


def test_a_failed_tile_waits_twice_as_long_each_time_and_is_given_up():
    retries, now = Retries([range(0, 2)], attempts=3), 100.0
    assert [r.number for r in retries.on_results(retries.next_ready(now), [*done(0), broken(1)], now)] == [0]
    for wait in (BACK_OFF_SECONDS, 2 * BACK_OFF_SECONDS):
        assert retries.ready_at == now + wait
        assert retries.next_ready(now + 0.99 * wait) is None
        assert not retries.exhausted
        now += wait
        results = list(retries.on_results(retries.next_ready(now), [broken(1)], now))
    assert [(r.number, r.error, r.attempts) for r in results] == [(1, "broken", 3)]
    assert retries.exhausted


def test_what_waits_and_is_ready_comes_before_what_was_never_tried():
    retries = Retries([range(0, 1), range(1, 2)], attempts=2)
    assert list(retries.on_results(retries.next_ready(0.0), [broken(0)], 0.0)) == []
    assert retries.next_ready(BACK_OFF_SECONDS) == range(0, 1)


def test_what_stops_is_not_tried_again_and_nothing_is_after_a_drain():
    retries = Retries([range(0, 1), range(1, 2), range(2, 3)], attempts=3)
    first, second = retries.next_ready(0.0), retries.next_ready(0.0)
    assert [r.number for r in retries.on_results(first, [broken(0, stops=True)], 0.0)] == [0]
    retries.drain()
    assert [r.attempts for r in retries.on_results(second, [broken(1)], 0.0)] == [1]
    assert retries.exhausted
    assert not retries.next_isolated(0.0)


@pytest.mark.parametrize(("length", "then"), [(3, [range(7, 8), range(8, 9), range(9, 10)]), (1, [])])
def test_after_some_deaths_a_span_is_taken_apart_and_a_tile_set_aside(length, then):
    span = range(7, 7 + length)
    retries = Retries([span], attempts=3)
    for _ in range(SUSPICIOUS_DEATHS):
        assert retries.next_ready(0.0) == span
        assert list(retries.on_death(span, 0.0, deaths=1, cause="the worker died")) == []
    assert [retries.next_ready(0.0) for _ in then] == then
    assert retries.exhausted
    assert retries.next_isolated(0.0) == (length == 1)


def test_a_tile_alone_is_given_up_after_as_many_deaths_more():
    tile = range(4, 5)
    retries = Retries([tile], attempts=3)
    assert list(retries.on_death(retries.next_ready(0.0), 0.0, deaths=SUSPICIOUS_DEATHS, cause="no end")) == []
    assert retries.next_isolated(0.0)
    for death in range(FATAL_DEATHS):
        assert retries.next_ready(0.0) == tile
        results = list(retries.on_death(tile, 0.0, deaths=1, cause="the worker died"))
        assert len(results) == (death == FATAL_DEATHS - 1)
    assert results[0].error.startswith("the worker died with this tile alone on it")
    assert not retries.next_isolated(0.0)


def test_a_tile_alone_that_is_done_after_all_is_done():
    tile = range(0, 1)
    retries = Retries([tile], attempts=3)
    list(retries.on_death(retries.next_ready(0.0), 0.0, deaths=SUSPICIOUS_DEATHS, cause=""))
    assert retries.next_isolated(0.0)
    assert [r.value for r in retries.on_results(retries.next_ready(0.0), done(0), 0.0)] == ["done"]


@st.composite
def clusters(draw):
    """Spans, what is wrong with some tiles, workers, and a source of chance."""
    lengths = draw(st.lists(st.integers(1, 4), max_size=8))
    spans, start = [], 0
    for length in lengths:
        spans.append(range(start, start + length))
        start += length
    faults = draw(st.dictionaries(st.integers(0, max(0, start - 1)), st.sampled_from(["kills", "fails", "fails once"])))
    return spans, faults, draw(st.integers(1, 3)), draw(st.randoms(use_true_random=False))


@given(clusters())
def test_every_tile_ends_once_and_only_those_are_given_up_that_deserve_it(cluster):
    """Workers hold two spans each, as on a real cluster, so that innocent ones are there when one dies."""
    spans, faults, workers, chance = cluster
    retries, now, results, tried = Retries(spans, attempts=3), 0.0, [], set()
    held = {worker: [] for worker in range(workers)}
    for _ in range(10_000):
        if not any(held.values()) and retries.exhausted and not retries.next_isolated(now):
            break
        now = max(now, retries.ready_at or now)
        for at_hand in held.values():
            while len(at_hand) < 2 and (span := retries.next_ready(now)) is not None:
                at_hand.append(span)
        worker = chance.choice([worker for worker, at_hand in held.items() if at_hand])
        span = held[worker][0]
        if any(faults.get(number) == "kills" for number in span):
            for lost in held[worker]:
                results += retries.on_death(lost, now, deaths=1, cause="the worker died")
            held[worker] = []
            continue
        found = []
        for number in held[worker].pop(0):
            fails = faults.get(number) == "fails" or (faults.get(number) == "fails once" and number not in tried)
            tried.add(number)
            found.append(broken(number) if fails else TileResult(number, "done"))
        results += retries.on_results(span, found, now)
    else:
        raise AssertionError("it does not end")
    assert Counter(result.number for result in results) == Counter(number for span in spans for number in span)
    for result in results:
        fault = faults.get(result.number)
        assert (result.error is not None) == (fault in ("kills", "fails"))
        assert result.attempts == {"fails": 3, "fails once": 2}.get(fault, 1)
