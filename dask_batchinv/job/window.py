"""The bounded window of tiles on the cluster: what is tried again, what is tried alone, what is given up.

We choose the worker of each tile ourselves. Dask would give what a dying worker held to the next one at once, and blame
all of it; so a tile that kills could take all workers with it, and innocent ones would be failed.
"""

from __future__ import annotations

import heapq
import queue
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dask.config
from dask.utils import parse_timedelta
from distributed import Client, Future, KilledWorker, LocalCluster
from distributed.client import CancelledError
from distributed.comm import CommClosedError

from dask_batchinv.job.tile import TileResult
from dask_batchinv.place import redact

#: Spans per thread of a worker: one at work, one that keeps it from waiting for us.
PER_THREAD = 2
#: Seconds before a failed tile is tried again, doubled each time.
BACK_OFF_SECONDS = 0.25
#: A tile on which so many workers have died is tried alone, so that nothing else can be what kills them.
SUSPICIOUS_DEATHS = 3
#: A tile on which so many workers have died that had nothing else to do is given up.
FATAL_DEATHS = 3
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

Function = Callable[[Any, range], list[TileResult]]
Outcomes = Iterator[tuple[TileResult | None, int]]


class ClusterLostError(ConnectionError):
    """The scheduler, or every worker, was lost while a job was running."""


def run_on_cluster(
    client: Client, function: Function, task: Any, spans: Iterable[range], *, attempts: int | None = None
) -> Outcomes:
    """Run ``function(task, span)`` on the cluster for all `spans`, a few at a time.

    A tile that fails is tried again, `attempts` times in all; by default the Dask configuration
    ``batchinv.job.attempts`` says how often. One on which workers die is tried alone once all else is done, and given
    up if they die again. Where nothing moves for ``batchinv.job.patience``, the workers that hold tiles are restarted.

    Yields
    ------
    result, attempts
        What `function` returns for each tile, once, with how often it was tried; with an error if it failed every
        time. After a result that ``stops`` nothing new is begun. A result of None is a sign of life, yielded every
        second.

    Raises
    ------
    ClusterLostError
        If the scheduler is lost, or there are no workers for as long as the patience.
    """
    attempts = attempts or int(dask.config.get("batchinv.job.attempts"))
    window = _Window(client, function, task, spans, attempts)
    try:
        while not window.idle or window.take_suspect():
            window.feed()
            for result, tried in window.collect():
                yield result, tried
                if result is not None and result.stops:
                    window.begin_nothing_new()
    finally:
        window.cancel()


@dataclass
class _Worker:
    """A worker as we know it."""

    threads: int
    since: float
    spans: int = 0


class _Window:
    """The spans that are on the cluster, or wait to be tried again."""

    def __init__(self, client: Client, function: Function, task: Any, spans: Iterable[range], attempts: int):
        self._client = client
        self._function = function
        self._task = task
        self._todo = iter(spans)
        self._next = next(self._todo, None)
        self._attempts = attempts
        self._patience: float = parse_timedelta(dask.config.get("batchinv.job.patience"))
        self._slowest = 0.0
        self._tried: defaultdict[int, int] = defaultdict(int)
        self._deaths: defaultdict[range, int] = defaultdict(int)
        self._running: dict[Future, tuple[range, str]] = {}
        self._waiting: list[tuple[float, int, range]] = []
        self._suspects: deque[range] = deque()
        self._alone: range | None = None
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._moved = self._looked = time.monotonic()
        self._workers = {
            # Those that are here already are taken as settled.
            address: _Worker(threads, self._moved - SETTLING_SECONDS)
            for address, threads in self._ask_for_threads().items()
        }

    @property
    def idle(self) -> bool:
        """Whether nothing is left but tiles that are to be tried alone."""
        return not self._running and not self._waiting and self._next is None

    def feed(self) -> None:
        """Give spans to workers while they have room."""
        while (address := self._free_worker()) is not None:
            if self._waiting and self._waiting[0][0] <= time.monotonic():
                self._submit(heapq.heappop(self._waiting)[-1], address)
            elif self._next is not None:
                self._submit(self._next, address)
                self._next = next(self._todo, None)
            else:
                return

    def take_suspect(self) -> bool:
        """Let the next tile that is to be tried alone wait for a worker; return whether there is one."""
        if not self._suspects:
            return False
        self._alone = self._suspects.popleft()
        self._moved = time.monotonic()
        self._retry(self._alone)
        return True

    def begin_nothing_new(self) -> None:
        """Let what is on the cluster come to its end, and try nothing again."""
        self._next = None
        self._todo = iter(())
        self._waiting.clear()
        self._suspects.clear()
        self._attempts = 1

    def collect(self) -> Outcomes:
        """Wait up to a second for tiles to finish, and yield those that are not to be tried again."""
        patience = LOOK_SECONDS
        if self._waiting:
            patience = min(patience, max(0.01, self._waiting[0][0] - time.monotonic()))
        with suppress(queue.Empty):
            futures = [self._finished.get(timeout=patience)]
            while not self._finished.empty():
                futures.append(self._finished.get())
            for future in futures:
                if future in self._running:  # else it was taken from its worker
                    self._moved = time.monotonic()
                    yield from self._outcome(future)
        if self._client.status not in ("running", "connecting"):
            raise ClusterLostError("the connection to the scheduler was closed")
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            yield None, 0
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
            self._function,
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

    def _retry(self, span: range, after: float = 0.0) -> None:
        heapq.heappush(self._waiting, (time.monotonic() + after, span.start, span))

    def _outcome(self, future: Future) -> Outcomes:
        if future.status in ("pending", "lost"):  # the worker has died with the result: that will be seen
            return
        span = self._take(future)
        try:
            results: list[TileResult] = future.result(timeout=RESULT_SECONDS)
        except (CancelledError, CommClosedError) as error:
            raise ClusterLostError("the scheduler was lost") from error
        except KilledWorker:  # a worker has come back under the address of one that died
            yield from self._died(span, 1, "the worker died")
        except TimeoutError:  # the worker that has the result does not answer
            self._retry(span)
        except Exception as error:  # not of the tiles' own making
            text = redact(f"{type(error).__name__}: {error}")
            yield from self._judge([TileResult(number, None, text) for number in span])
        else:
            self._deaths.pop(span, None)
            yield from self._judge(results)

    def _judge(self, results: list[TileResult]) -> Outcomes:
        for result in results:
            self._tried[result.number] += 1
            tried = self._tried[result.number]
            if result.error is not None and not result.stops and tried < self._attempts:
                self._retry(range(result.number, result.number + 1), BACK_OFF_SECONDS * 2 ** (tried - 1))
                continue
            if result.row is not None:
                self._slowest = max(self._slowest, result.row.get("milliseconds", 0) / 1000)
            del self._tried[result.number]
            yield result, tried

    def _died(self, span: range, deaths: int, how: str) -> Outcomes:
        """Decide what becomes of tiles that were on a worker when it died: they may or may not have killed it."""
        self._deaths[span] += deaths
        if span == self._alone and self._deaths[span] >= FATAL_DEATHS:
            yield self._given_up(span, how)
        elif span == self._alone or self._deaths[span] < SUSPICIOUS_DEATHS:
            self._retry(span)
        elif len(span) > 1:
            del self._deaths[span]
            for number in span:
                self._retry(range(number, number + 1))
        else:
            # Anew: only those deaths count that it dies alone.
            del self._deaths[span]
            self._suspects.append(span)

    def _given_up(self, span: range, how: str) -> tuple[TileResult, int]:
        (number,) = span
        del self._deaths[span]
        text = f"{how} with this tile alone on it, after others that had it among more: it is left out"
        return TileResult(number, None, text), self._tried.pop(number, 0) + 1

    def _look(self) -> Outcomes:
        """See which workers have come and gone; and if nothing has moved for too long, make it move."""
        self._looked = time.monotonic()
        found = self._ask_for_threads()
        for address, threads in found.items():
            self._workers.setdefault(address, _Worker(threads, self._looked))
        for address in set(self._workers) - set(found):
            del self._workers[address]
            yield from self._bury(address, 1, "the worker died")
        self._revive()
        idle = time.monotonic() - self._moved
        if self.idle or idle < max(self._patience, SLOWEST_TIMES * self._slowest):
            return
        if not self._workers:
            raise ClusterLostError(f"there were no workers for {idle:.0f} s")
        stalled = [address for address, worker in self._workers.items() if worker.spans]
        for address in stalled:
            yield from self._bury(address, SUSPICIOUS_DEATHS, f"there was no end after {idle:.0f} s")
        with suppress(Exception):
            self._client.restart_workers(stalled, timeout=RESTART_SECONDS, raise_for_error=False)
        self._moved = time.monotonic()

    def _revive(self) -> None:
        """Start those workers of a local cluster anew that died while they started."""
        cluster = self._client.cluster
        if isinstance(cluster, LocalCluster) and len(self._workers) < len(cluster.worker_spec):
            cluster.scale(len(cluster.worker_spec))

    def _bury(self, address: str, deaths: int, how: str) -> Outcomes:
        """Take back what a worker had."""
        held = [future for future, (_, where) in self._running.items() if where == address]
        self._client.cancel(held, force=True)
        for future in held:
            self._moved = time.monotonic()
            yield from self._died(self._take(future), deaths, how)

    def _ask_for_threads(self) -> dict[str, int]:
        """Return the threads of each worker that is there."""
        try:
            found: dict[str, int] = self._client.sync(
                self._client.scheduler.ncores, workers=None, callback_timeout=ANSWER_SECONDS
            )
        except Exception as error:  # whatever a connection may raise
            raise ClusterLostError("the scheduler does not answer") from error
        return found
