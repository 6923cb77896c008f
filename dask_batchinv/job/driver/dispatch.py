"""Runs tiles on a Dask cluster: which worker gets which, who is there, and who has come or gone.

We choose the worker of each tile ourselves. Dask would give what a dying worker held to the next one at once, and blame
all of it; so a tile that kills could take all workers with it, and innocent ones would be failed.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import dask.config
from dask.utils import parse_timedelta
from distributed import Client, Future, KilledWorker, LocalCluster
from distributed.client import CancelledError
from distributed.comm import CommClosedError

from dask_batchinv.job.driver.executor import HEARTBEAT, Heartbeat, Work
from dask_batchinv.job.driver.retry import SUSPICIOUS_DEATHS, Retries
from dask_batchinv.job.results import TileResult
from dask_batchinv.text import redact

T = TypeVar("T")
Results = Iterator[TileResult[Any] | Heartbeat]

#: Spans per thread of a worker: one at work, one that keeps it from waiting for us.
PER_THREAD = 2
#: A worker gets tiles only after so much of its life: a nanny whose worker dies while it starts gives up.
SETTLING_SECONDS = 1.0
#: A tile may take so many times longer than the slowest one before it, however short the patience.
SLOWEST_TIMES = 10
#: How often to look who is there.
LOOK_SECONDS = 1.0
#: How long to wait for a result that a worker says it has, for a scheduler's answer, and for a worker to restart.
RESULT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
RESTART_SECONDS = 30


class ClusterLostError(ConnectionError):
    """The scheduler, or every worker, was lost while a job was running."""


@dataclass(frozen=True)
class Dispatcher:
    """Runs tiles on a cluster, a few at a time for each of its workers."""

    client: Client
    """The cluster."""

    def run(
        self, work: Work[T], task: Any, spans: Iterable[range], *, attempts: int
    ) -> Iterator[TileResult[T] | Heartbeat]:
        """Yield the results of all tiles, and a heartbeat every second.

        A tile on which workers die is tried alone once all else is done, and given up if they die again. Where nothing
        moves for ``batchinv.job.patience``, the workers that hold tiles are restarted.

        Raises
        ------
        ClusterLostError
            If the scheduler is lost, or there are no workers for as long as the patience.
        """
        retries = Retries(spans, attempts)
        in_flight = _InFlight(self.client, work, task, retries)
        try:
            while not in_flight.idle or in_flight.isolate():
                in_flight.feed()
                for result in in_flight.collect():
                    yield result
                    if isinstance(result, TileResult) and result.stops:
                        retries.drain()
        finally:
            in_flight.cancel()


@dataclass
class _Worker:
    """A worker as we know it."""

    threads: int
    since: float
    spans: int = 0


class _InFlight:
    """The spans that are on the cluster."""

    def __init__(self, client: Client, work: Work[Any], task: Any, retries: Retries):
        self._client, self._work, self._task, self._retries = client, work, task, retries
        self._patience: float = parse_timedelta(dask.config.get("batchinv.job.patience"))
        self._slowest = 0.0
        self._running: dict[Future, tuple[range, str]] = {}
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._moved = self._looked = time.monotonic()
        self._workers = {
            # Those that are here already are taken as settled.
            address: _Worker(threads, self._moved - SETTLING_SECONDS)
            for address, threads in self._ask_for_threads().items()
        }

    @property
    def idle(self) -> bool:
        """Whether nothing is on the cluster, and nothing is left but tiles that are to be tried alone."""
        return not self._running and self._retries.exhausted

    def isolate(self) -> bool:
        """Let the next tile that is to be tried alone wait for a worker; return whether there is one."""
        self._moved = time.monotonic()
        return self._retries.next_isolated(self._moved)

    def feed(self) -> None:
        """Give spans to workers while they have room."""
        while (address := self._free_worker()) is not None:
            if (span := self._retries.next_ready(time.monotonic())) is None:
                return
            self._submit(span, address)

    def collect(self) -> Results:
        """Wait up to a second for tiles to finish, and yield those that are not to be tried again."""
        wait = LOOK_SECONDS
        if (ready_at := self._retries.ready_at) is not None:
            wait = min(wait, max(0.01, ready_at - time.monotonic()))
        with suppress(queue.Empty):
            futures = [self._finished.get(timeout=wait)]
            while not self._finished.empty():
                futures.append(self._finished.get())
            for future in futures:
                if future in self._running:  # else it was taken from its worker
                    self._moved = time.monotonic()
                    yield from self._results_of(future)
        if self._client.status not in ("running", "connecting"):
            raise ClusterLostError("the connection to the scheduler was closed")
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            yield HEARTBEAT
            yield from self._look()

    def cancel(self) -> None:
        """Take back what is on the cluster."""
        if self._running and self._client.status == "running":
            with suppress(Exception):  # a scheduler that is gone needs no telling
                self._client.cancel(list(self._running), force=True)

    def _free_worker(self) -> str | None:
        """Return the worker with the least to do of those that have room."""
        now = time.monotonic()
        free = [
            (worker.spans / worker.threads, address)
            for address, worker in self._workers.items()
            if worker.spans < PER_THREAD * worker.threads and now - worker.since >= SETTLING_SECONDS
        ]
        return min(free)[1] if free else None

    def _submit(self, span: range, address: str) -> None:
        future = self._client.submit(
            self._work,
            self._task,
            span,
            pure=False,
            key=f"tiles-{span.start}-{span.stop}-{uuid.uuid4().hex}",
            workers=[address],
            allow_other_workers=False,
        )
        self._running[future] = span, address
        self._workers[address].spans += 1
        future.add_done_callback(self._finished.put)

    def _take(self, future: Future) -> range:
        """Forget a future; return its span."""
        span, address = self._running.pop(future)
        if address in self._workers:
            self._workers[address].spans -= 1
        return span

    def _results_of(self, future: Future) -> Results:
        if future.status in ("pending", "lost"):  # the worker has died with the result: that will be seen
            return
        span, now = self._take(future), time.monotonic()
        try:
            results: list[TileResult[Any]] = future.result(timeout=RESULT_SECONDS)
        except (CancelledError, CommClosedError) as error:
            raise ClusterLostError("the scheduler was lost") from error
        except KilledWorker:  # a worker has come back under the address of one that died
            yield from self._retries.on_death(span, now, deaths=1, cause="the worker died")
            return
        except TimeoutError:  # the worker that has the result does not answer
            self._retries.requeue(span, now)
            return
        except Exception as error:  # not of the tiles' own making
            yield from self._retries.on_failure(span, redact(f"{type(error).__name__}: {error}"), now)
            return
        self._slowest = max(self._slowest, *(result.milliseconds / 1000 for result in results), 0.0)
        yield from self._retries.on_results(span, results, now)

    def _look(self) -> Results:
        """See which workers have come and gone; and if nothing has moved for too long, make it move."""
        self._looked = time.monotonic()
        found = self._ask_for_threads()
        for address, threads in found.items():
            self._workers.setdefault(address, _Worker(threads, self._looked))
        for address in set(self._workers) - set(found):
            del self._workers[address]
            yield from self._take_back(address, deaths=1, cause="the worker died")
        self._restart_missing()
        still = time.monotonic() - self._moved
        if self.idle or still < max(self._patience, SLOWEST_TIMES * self._slowest):
            return
        if not self._workers:
            raise ClusterLostError(f"no workers for {still:.0f} s")
        stalled = [address for address, worker in self._workers.items() if worker.spans]
        for address in stalled:
            yield from self._take_back(address, deaths=SUSPICIOUS_DEATHS, cause=f"no result after {still:.0f} s")
        with suppress(Exception):
            self._client.restart_workers(stalled, timeout=RESTART_SECONDS, raise_for_error=False)
        self._moved = time.monotonic()

    def _restart_missing(self) -> None:
        """Start those workers of a local cluster again that died while they started."""
        cluster = self._client.cluster
        if isinstance(cluster, LocalCluster) and len(self._workers) < len(cluster.worker_spec):
            cluster.scale(len(cluster.worker_spec))

    def _take_back(self, address: str, *, deaths: int, cause: str) -> Results:
        """Requeue the spans of a worker that is gone."""
        held = [future for future, (_, where) in self._running.items() if where == address]
        self._client.cancel(held, force=True)
        for future in held:
            self._moved = time.monotonic()
            yield from self._retries.on_death(self._take(future), self._moved, deaths=deaths, cause=cause)

    def _ask_for_threads(self) -> dict[str, int]:
        """Return the threads of each worker that is there."""
        try:
            found: dict[str, int] = self._client.sync(
                self._client.scheduler.ncores, workers=None, callback_timeout=ANSWER_SECONDS
            )
        except Exception as error:  # whatever a connection may raise
            raise ClusterLostError("the scheduler does not answer") from error
        return found
