"""What runs tiles: the protocol, and its specification, which runs them here and now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from dask_batchinv.job.driver.retry import Retries
from dask_batchinv.job.events import Heartbeat
from dask_batchinv.job.results import TileResult

T = TypeVar("T")
#: ``work(task, span)`` does the tiles of a span and returns a result for each.
Work = Callable[[Any, range], list[TileResult[T]]]


class Executor(Protocol):
    """Runs tiles."""

    def run(
        self, work: Work[T], task: Any, spans: Iterable[range], *, attempts: int, holder: str | None = None
    ) -> Iterator[TileResult[T] | Heartbeat]:
        """Yield what ``work(task, span)`` returns for the tiles of all `spans`, each once.

        A tile that fails is tried again, `attempts` times in all. After a result that ``stops`` nothing new is begun.
        With `holder`, what the lock of the target says, no worker gets a tile that cannot see it there.
        """


class Serial:
    """Runs tiles one after the other in this process: what other executors do, without what makes it hard."""

    def run(
        self, work: Work[T], task: Any, spans: Iterable[range], *, attempts: int, holder: str | None = None
    ) -> Iterator[TileResult[T] | Heartbeat]:
        """Yield the results of all tiles."""
        retries = Retries(spans, attempts)
        while not retries.exhausted:
            span = retries.next_ready(now=float("inf"))  # without waiting
            if span is None:
                break
            for result in retries.on_results(span, work(task, span), now=0.0):
                yield result
                if result.stops:
                    retries.drain()
