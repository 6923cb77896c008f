"""Which tiles are next, what is tried again, what is tried alone, what is given up: pure, without a clock of its own.

A tile that fails is tried again, with pauses that double. A tile on which workers die may be what kills them, or stand
beside it: spans are taken apart, and a tile on which `SUSPICIOUS_DEATHS` workers have died is tried alone once all else
is done. If `FATAL_DEATHS` workers die of it even then, it is given up.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from dask_batchinv.job.results import TileResult

#: Seconds before a failed tile is tried again, doubled each time.
BACK_OFF_SECONDS = 0.25
#: A tile on which so many workers have died is tried alone, so that nothing else can be what kills them.
SUSPICIOUS_DEATHS = 3
#: A tile on which so many workers have died that had nothing else to do is given up.
FATAL_DEATHS = 3


class Retries:
    """What is known of each tile that is not done.

    Parameters
    ----------
    spans : iterable of range
        The tiles, as they are done at a time.
    attempts : int
        How often a tile that fails is tried.
    """

    def __init__(self, spans: Iterable[range], attempts: int):
        self._todo = iter(spans)
        self._coming = deque(islice(self._todo, 1))
        self._attempts = attempts
        self._waiting: list[tuple[float, int, range]] = []
        self._tried: defaultdict[int, int] = defaultdict(int)
        self._deaths: defaultdict[range, int] = defaultdict(int)
        self._suspects: deque[range] = deque()
        self._isolated: range | None = None

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to begin but tiles that are to be tried alone."""
        return not self._waiting and not self._coming

    def count_left(self, most: int) -> int:
        """Return how many spans are left to begin, as far as that is of interest."""
        self._coming.extend(islice(self._todo, max(0, most - len(self._coming))))
        return min(most, len(self._coming) + len(self._waiting) + len(self._suspects))

    @property
    def ready_at(self) -> float | None:
        """When the next of those is ready that wait to be tried again."""
        return self._waiting[0][0] if self._waiting else None

    def next_ready(self, now: float) -> range | None:
        """Return the next span to begin, or None if there is none now."""
        if self._waiting and self._waiting[0][0] <= now:
            return heapq.heappop(self._waiting)[-1]
        span = self._coming.popleft() if self._coming else None
        if not self._coming:
            self._coming.extend(islice(self._todo, 1))
        return span

    def next_isolated(self, now: float) -> bool:
        """Make the next tile ready that is to be tried alone; return whether there is one."""
        if not self._suspects:
            return False
        self._isolated = self._suspects.popleft()
        self.requeue(self._isolated, now)
        return True

    def requeue(self, span: range, at: float) -> None:
        """Have a span tried again, at no fault of its own."""
        heapq.heappush(self._waiting, (at, span.start, span))

    def on_results(self, span: range, results: Iterable[TileResult[Any]], now: float) -> Iterator[TileResult[Any]]:
        """Note the results of a span; yield those that are final, with how often their tiles were tried."""
        self._deaths.pop(span, None)
        yield from self._judge(results, now)

    def on_failure(self, span: range, error: str, now: float) -> Iterator[TileResult[Any]]:
        """Note that a span failed as a whole, not by its tiles' own making; yield those results that are final."""
        yield from self._judge([TileResult(number, None, error) for number in span], now)

    def _judge(self, results: Iterable[TileResult[Any]], now: float) -> Iterator[TileResult[Any]]:
        for result in results:
            tried = self._tried.pop(result.number, 0) + 1
            may_succeed = not (result.stops or result.is_final)
            if result.error is not None and may_succeed and tried < self._attempts:
                self._tried[result.number] = tried
                tile = range(result.number, result.number + 1)
                self.requeue(tile, now + BACK_OFF_SECONDS * 2 ** (tried - 1))
            else:
                yield result if result.attempts == tried else replace(result, attempts=tried)

    def on_death(self, span: range, now: float, *, deaths: int, cause: str) -> Iterator[TileResult[Any]]:
        """Note that a worker died with a span, or as good as several; yield the result of a tile that is given up."""
        self._deaths[span] += deaths
        if span == self._isolated and self._deaths[span] >= FATAL_DEATHS:
            del self._deaths[span]
            text = f"{cause} with this tile alone on it, as others had before with more tiles: it is left out"
            yield TileResult(span.start, None, text, attempts=self._tried.pop(span.start, 0) + 1)
        elif span == self._isolated or self._deaths[span] < SUSPICIOUS_DEATHS:
            self.requeue(span, now)
        else:
            # From here on only those deaths count that a tile dies alone.
            del self._deaths[span]
            if len(span) == 1:
                self._suspects.append(span)
            else:
                for number in span:
                    self.requeue(range(number, number + 1), now)

    def drain(self) -> None:
        """Begin nothing new, and try nothing again."""
        self._todo = iter(())
        self._coming.clear()
        self._waiting.clear()
        self._suspects.clear()
        self._attempts = 1
