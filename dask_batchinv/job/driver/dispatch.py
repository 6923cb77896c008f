"""Runs tiles on a Dask cluster: which worker gets which, and what becomes of those of a worker that has gone.

We choose the worker of each tile ourselves. Dask would give what a dying worker held to the next one at once, and blame
all of it; so a tile that kills could take all workers with it, and innocent ones would be failed.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from distributed import Client, Future, KilledWorker
from distributed.client import CancelledError
from distributed.comm import CommClosedError

from dask_batchinv.job.driver.demand import MOST_WAITING, Demand
from dask_batchinv.job.driver.executor import ClusterLostError, Work, task_for
from dask_batchinv.job.driver.retry import SUSPICIOUS_DEATHS, Retries
from dask_batchinv.job.driver.roster import Roster
from dask_batchinv.job.events import HEARTBEAT, Heartbeat, WorkerEvent
from dask_batchinv.job.results import TileResult, WorkerFigures
from dask_batchinv.job.settings import settings
from dask_batchinv.job.worker.introduction import Introduction, place_of
from dask_batchinv.text import clean

T = TypeVar("T")
Results = Iterator[TileResult[Any] | Heartbeat]

#: A tile may take so many times longer than the slowest one before it, however short the patience.
SLOWEST_TIMES = 10
#: How often to look who is there.
LOOK_SECONDS = 1.0
#: How long to wait, where only workers of no use are left, for one that may come back.
RETURN_SECONDS = 30.0
#: How long to wait for a result that a worker says it has, and for a worker to restart.
RESULT_SECONDS = 5.0
RESTART_SECONDS = 30


@dataclass(frozen=True)
class Dispatcher:
    """Runs tiles on a cluster, a few at a time for each of its workers."""

    client: Client
    """The cluster."""
    introduction: Introduction
    """What a worker must find before it gets tiles."""
    room: Callable[[int, int | None], int]
    """How many tiles at a time a worker of so many threads and so much memory holds."""
    is_own: bool
    """Whether we started it: then nobody else uses it, and its workers may be restarted."""
    restart_stalled: bool = False
    """Whether workers that give no result may be restarted even if they are not ours."""
    only: Sequence[str] = ()
    """Patterns of those that may be used."""
    used: dict[str, WorkerFigures] = field(default_factory=dict)
    """What those workers did that got tiles, by their addresses."""

    def run(
        self, work: Work[T], task: Any, spans: Iterable[range], *, attempts: int, holder: str | None = None
    ) -> Iterator[TileResult[T] | Heartbeat]:
        """Yield the results of all tiles, what happens to workers, and a heartbeat every second.

        A tile on which workers die is tried alone once all else is done, and given up if they die again. Where nothing
        moves for ``batchinv.job.patience``, the tiles that were begun are taken from their workers, which are restarted
        if they are ours.

        Raises
        ------
        ClusterLostError
            If the scheduler is lost, or there are no workers for as long as the patience.
        """
        retries = Retries(spans, attempts)
        place = place_of(self.introduction.target) if holder is None else None
        introduction = replace(self.introduction, holder=holder, place=place)
        in_flight = _InFlight(self, introduction, work, task, retries)
        try:
            while not in_flight.idle or in_flight.isolate():
                in_flight.feed()
                for result in in_flight.collect():
                    yield result
                    if isinstance(result, TileResult) and result.stops:
                        retries.drain()
        finally:
            in_flight.cancel()


@dataclass(frozen=True)
class _Held:
    """A span that a worker has."""

    span: range
    address: str
    since: float


class _InFlight:
    """The spans that are on the cluster."""

    def __init__(
        self, dispatcher: Dispatcher, introduction: Introduction, work: Work[Any], task: Any, retries: Retries
    ):
        self._dispatcher, self._client = dispatcher, dispatcher.client
        self._work, self._task, self._retries = work, task, retries
        self._patience = settings().patience
        self._slowest = 0.0
        self._running: dict[Future, _Held] = {}
        # None where a worker has introduced itself.
        self._finished: queue.SimpleQueue[Future | None] = queue.SimpleQueue()
        self._moved = self._looked = time.monotonic()
        self._prefix = f"tiles-{uuid.uuid4().hex}"
        self._roster = Roster(
            self._client, introduction, self._prefix, is_own=dispatcher.is_own, only=dispatcher.only,
            room=dispatcher.room, on_answer=lambda _: self._finished.put(None),
        )  # fmt: skip
        self._demand = Demand(self._client, self._prefix)

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
        for address in self._roster.free():
            if (span := self._retries.next_ready(time.monotonic())) is None:
                return
            self._submit(span, address)

    def collect(self) -> Results:
        """Wait up to a second for tiles to finish, and yield those that are not to be tried again."""
        yield from self._roster.admit()
        if not (self._running or self._retries.exhausted) and any(self._roster.free()):
            return  # somebody was admitted just now
        with suppress(queue.Empty):
            news = [self._finished.get(timeout=self._wait())]
            while not self._finished.empty():
                news.append(self._finished.get())
            futures = [future for future in news if future in self._running]  # others were taken from their workers
            fetched = self._fetch(futures)
            for future in futures:
                self._moved = time.monotonic()
                yield from self._results_of(future, fetched)
        if self._client.status not in ("running", "connecting"):
            raise ClusterLostError("the connection to the scheduler was closed")
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            yield HEARTBEAT
            yield from self._look()

    def _wait(self) -> float:
        """Return how long to wait for a tile to finish."""
        wait = LOOK_SECONDS
        if (ready_at := self._retries.ready_at) is not None:
            wait = min(wait, max(0.01, ready_at - time.monotonic()))
        return wait

    def cancel(self) -> None:
        """Take back what is on the cluster."""
        self._demand.ask_for(0)
        if self._running and self._client.status == "running":
            with suppress(Exception):  # a scheduler that is gone needs no telling
                self._client.cancel(list(self._running), force=True)

    def _submit(self, span: range, address: str) -> None:
        future = self._client.submit(
            self._work,
            task_for(self._task, span),
            span,
            pure=False,
            key=f"{self._prefix}-{span.start}-{span.stop}-{uuid.uuid4().hex}",
            workers=[address],
            allow_other_workers=False,
        )
        self._running[future] = _Held(span, address, time.monotonic())
        self._roster.workers[address].spans += 1
        self._dispatcher.used.setdefault(address, WorkerFigures())
        future.add_done_callback(self._finished.put)

    def _take(self, future: Future) -> _Held:
        """Forget a future; return what it was."""
        held = self._running.pop(future)
        if worker := self._roster.workers.get(held.address):
            worker.spans -= 1
        return held

    def _fetch(self, futures: list[Future]) -> dict[Future, list[TileResult[Any]]]:
        """Return what workers have, in one request for all; nothing if one has gone: then each is asked for."""
        done = [future for future in futures if future.status == "finished"]

        async def gather() -> list[list[TileResult[Any]]]:
            found: Any = await self._client.gather(done, asynchronous=True)
            return list(found)

        if len(done) > 1:
            with suppress(Exception):
                return dict(zip(done, self._client.sync(gather, callback_timeout=RESULT_SECONDS), strict=True))
        return {}

    def _results_of(self, future: Future, fetched: dict[Future, list[TileResult[Any]]]) -> Results:
        if future.status in ("pending", "lost"):  # the worker has died with the result: that will be seen
            return
        held, now = self._take(future), time.monotonic()
        try:
            results = fetched[future] if future in fetched else future.result(timeout=RESULT_SECONDS)
        except (CancelledError, CommClosedError) as error:
            if self._client.status != "running":
                raise ClusterLostError("the scheduler was lost") from error
            if isinstance(error, CancelledError):  # somebody has restarted the whole cluster
                self._retries.requeue(held.span, now)
            else:
                yield from self._retries.on_failure(held.span, clean(f"{type(error).__name__}: {error}"), now)
            return
        except KilledWorker:  # a worker has come back under the address of one that died
            yield WorkerEvent("died", held.address, tiles=len(held.span))
            yield from self._retries.on_death(held.span, now, deaths=1, cause="the worker died")
            return
        except TimeoutError:  # the worker that has the result does not answer
            self._retries.requeue(held.span, now)
            return
        except Exception as error:  # not of the tiles' own making
            yield from self._retries.on_failure(held.span, clean(f"{type(error).__name__}: {error}"), now)
            return
        if astray := next((result.error for result in results if result.is_workers), None):
            self._roster.doubt(held.address)
            yield WorkerEvent("doubted", held.address, astray)
        self._dispatcher.used[held.address].add(results)
        self._slowest = max(self._slowest, now - held.since)
        yield from self._retries.on_results(held.span, results, now)

    def _look(self) -> Results:
        """See which workers have come and gone; and if nothing has moved for too long, make it move."""
        self._looked = time.monotonic()
        for event in self._roster.look():
            if event.kind == "died" and not (self._dispatcher.is_own or self._held_by({event.address})):
                continue  # one that had nothing of ours may go as it likes
            if event.kind == "died":
                yield from self._take_back(event, self._held_by({event.address}), deaths=1, cause="the worker died")
            else:
                yield event
        if not self._dispatcher.is_own:
            self._demand.ask_for(self._retries.count_left(MOST_WAITING))
        self._move_waiting()
        yield from self._look_for_stalled()

    def _held_by(self, addresses: set[str]) -> list[Future]:
        return [future for future, held in self._running.items() if held.address in addresses]

    def _move_waiting(self) -> None:
        """Take spans that were not begun, behind others' tasks or long ones of ours, to where threads wait."""
        room, now = self._roster.idle_threads(), time.monotonic()
        if not room or not self._retries.exhausted:
            return
        waiting = [future for future, held in self._running.items() if self._may_wait(held, now)]
        if not waiting:
            return
        begun, _ = self._roster.begun({self._running[future].address for future in waiting})
        movable = [future for future in waiting if future.key not in begun][:room]
        self._client.cancel(movable, force=True)
        for future in movable:
            self._retries.requeue(self._take(future).span, now)

    def _may_wait(self, held: _Held, now: float) -> bool:
        worker = self._roster.workers.get(held.address)
        return now - held.since > LOOK_SECONDS and (
            worker is None or worker.spans > worker.free_threads or not self._roster.may_have(worker)
        )

    def _look_for_stalled(self) -> Results:
        still = time.monotonic() - self._moved
        refusals = self._roster.refusals
        nobody = refusals and len(refusals) == len(self._roster.workers) and not self._running
        if nobody and still >= min(self._patience, RETURN_SECONDS):
            raise ClusterLostError(f"no worker is of use: {'; '.join(refusals[:3])}")
        if self.idle or still < max(self._patience, SLOWEST_TIMES * self._slowest):
            return
        if not any(map(self._roster.may_have, self._roster.workers.values())) and not self._running:
            why = "".join(f"; {why}" for why in (self._roster.paused + refusals)[:3])
            raise ClusterLostError(f"no workers for {still:.0f} s{why}")
        restarts = self._dispatcher.is_own or self._dispatcher.restart_stalled
        stalled = list(self._running)
        if not self._dispatcher.is_own:  # what was not begun waits for others, as long as it takes
            begun, silent = self._roster.begun({held.address for held in self._running.values()})
            stalled = [future for future in stalled if future.key in begun or self._running[future].address in silent]
        addresses = {self._running[future].address for future in stalled}
        cause = f"no result after {still:.0f} s"
        for address in addresses:
            taken = [future for future in self._held_by({address}) if restarts or future in stalled]
            if (worker := self._roster.workers.get(address)) and not restarts:
                worker.stuck += len(taken)
            event = WorkerEvent("restarted" if restarts else "given up", address, cause)
            yield from self._take_back(event, taken, deaths=SUSPICIOUS_DEATHS, cause=cause)
        if addresses and restarts:
            with suppress(Exception):
                self._client.restart_workers(list(addresses), timeout=RESTART_SECONDS, raise_for_error=False)
        self._moved = time.monotonic()

    def _take_back(self, event: WorkerEvent, held: list[Future], *, deaths: int, cause: str) -> Results:
        """Requeue spans of a worker that is gone, or that gives no result."""
        self._client.cancel(held, force=True)
        spans = [self._take(future).span for future in held]
        yield replace(event, tiles=sum(map(len, spans)))
        for span in spans:
            self._moved = time.monotonic()
            yield from self._retries.on_death(span, self._moved, deaths=deaths, cause=cause)
