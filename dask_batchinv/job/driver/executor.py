"""What runs tiles: the protocol, its specification, which runs them here and now, and one that does on threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from dask_batchinv.job.driver.retry import Retries
from dask_batchinv.job.events import HEARTBEAT, Heartbeat
from dask_batchinv.job.results import TileResult, WorkerFigures
from dask_batchinv.text import CleanError, clean

T = TypeVar("T")
#: Spans per thread: one at work, one that keeps it from waiting for us.
PER_THREAD = 2
#: Seconds between two signs of life.
HEARTBEAT_SECONDS = 1.0
#: ``work(task, span)`` does the tiles of a span and returns a result for each.
Work = Callable[[Any, range], list[TileResult[T]]]


class ClusterLostError(CleanError, ConnectionError):
    """The scheduler, or every worker, was lost while a job was running."""


class Executor(Protocol):
    """Runs tiles."""

    @property
    def used(self) -> Mapping[str, WorkerFigures]:
        """What workers did that got some, by their addresses, if there are workers."""

    def run(
        self, work: Work[T], task: Any, spans: Iterable[range], *, attempts: int, holder: str | None = None
    ) -> Iterator[TileResult[T] | Heartbeat]:
        """Yield what ``work(task, span)`` returns for the tiles of all `spans`, each once.

        A tile that fails is tried again, `attempts` times in all. After a result that ``stops`` nothing new is begun.
        With `holder`, what the lock of the target says, no worker gets a tile that cannot see it there.
        """


def task_for(task: Any, span: range) -> Any:
    """Return what a worker needs of a task to do a span."""
    return task.for_span(span) if hasattr(task, "for_span") else task


class Serial:
    """Runs tiles one after the other in this process: what other executors do, without what makes it hard."""

    used: Mapping[str, WorkerFigures] = MappingProxyType({})

    def run(
        self, work: Work[T], task: Any, spans: Iterable[range], *, attempts: int, holder: str | None = None
    ) -> Iterator[TileResult[T] | Heartbeat]:
        """Yield the results of all tiles."""
        retries = Retries(spans, attempts)
        while not retries.exhausted:
            span = retries.next_ready(now=float("inf"))  # without waiting
            if span is None:
                break
            for result in retries.on_results(span, work(task_for(task, span), span), now=0.0):
                yield result
                if result.stops:
                    retries.drain()


class InProcess:
    """Runs tiles on threads of this process, for a job too small to need protection from itself.

    Parameters
    ----------
    threads : int
        How many.
    """

    used: Mapping[str, WorkerFigures] = MappingProxyType({})

    def __init__(self, threads: int):
        self._threads = threads

    def run(
        self, work: Work[T], task: Any, spans: Iterable[range], *, attempts: int, holder: str | None = None
    ) -> Iterator[TileResult[T] | Heartbeat]:
        """Yield the results of all tiles, and a heartbeat every second."""
        retries = Retries(spans, attempts)
        running: dict[Future[list[TileResult[T]]], range] = {}
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="dask_batchinv-tiles")
        try:
            while running or not retries.exhausted:
                while len(running) < PER_THREAD * self._threads:
                    if (span := retries.next_ready(time.monotonic())) is None:
                        break
                    running[pool.submit(work, task_for(task, span), span)] = span
                if not running:  # what failed waits to be tried again
                    time.sleep(min(HEARTBEAT_SECONDS, max(0.0, (retries.ready_at or 0.0) - time.monotonic())))
                for future in wait(running, HEARTBEAT_SECONDS, FIRST_COMPLETED).done:
                    for result in _results_of(future, running.pop(future), retries):
                        yield result
                        if result.stops:
                            retries.drain()
                yield HEARTBEAT
        finally:
            pool.shutdown(cancel_futures=True)


def _results_of(future: Future[list[TileResult[T]]], span: range, retries: Retries) -> Iterator[TileResult[T]]:
    try:
        results = future.result()
    except Exception as error:  # not of the tiles' own making
        yield from retries.on_failure(span, clean(f"{type(error).__name__}: {error}"), time.monotonic())
    else:
        yield from retries.on_results(span, results, time.monotonic())
