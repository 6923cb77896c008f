"""Who is there: the workers of a cluster as the scheduler knows them, and which of them may get tiles, and how many.

A cluster may be shared: others' tasks come first on the threads that they have, and no worker is trusted before it has
shown that it runs what we run and sees what we see.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from distributed import Client

from dask_batchinv.job.driver.cluster_options import own_task
from dask_batchinv.job.driver.executor import PER_THREAD, ClusterLostError
from dask_batchinv.job.events import WorkerEvent
from dask_batchinv.job.worker.introduction import Introduction, introduce, tasks_begun

_TOO_SMALL = "its memory does not hold a tile"
#: A worker gets tiles only after so much of its life: a nanny whose worker dies while it starts gives up.
SETTLING_SECONDS = 1.0
#: How long to wait for a scheduler's answer, and for a worker's; and after how long a silent one is asked again.
ANSWER_SECONDS = 30.0
WORKER_SECONDS = 10.0
AGAIN_SECONDS = 15.0


async def ask_workers(client: Client, addresses: Iterable[str], function: Any, *arguments: Any) -> dict[str, Any]:
    """Return what a function returns on each worker, or raises; TimeoutError for those that do not answer."""

    async def one(address: str) -> Any:
        try:
            asked: Any = client.run(function, *arguments, workers=[address], on_error="return")
            return (await asyncio.wait_for(asked, WORKER_SECONDS)).get(address, TimeoutError("no answer"))
        except Exception as error:  # it has gone, or does not answer
            return error

    asked = list(addresses)
    return dict(zip(asked, await asyncio.gather(*map(one, asked)), strict=True))


def known_workers(client: Client, only: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the scheduler knows of its workers, by address: of all, or of those that match one of some patterns.

    Not by `Client.scheduler_info`: now and then a background task of the client puts an answer without workers in place
    of the one that it waited for.
    """
    found: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=ANSWER_SECONDS)
    return {address: facts for address, facts in found["workers"].items() if _is_wanted(address, facts, only)}


def _is_wanted(address: str, facts: dict[str, Any], only: Sequence[str]) -> bool:
    names = (str(facts.get("name")), address, str(facts.get("host")))
    return not only or any(
        pattern.partition(":")[2] in (facts.get("resources") or {})
        if pattern.startswith("resource:")
        else any(fnmatchcase(name, pattern) for name in names)
        for pattern in only
    )


@dataclass
class Worker:
    """A worker as we know it."""

    threads: int
    """Its threads."""
    room: int
    """Tiles that its memory holds at a time."""
    since: float
    """Since when it is known."""
    spans: int = 0
    """Spans of ours that it has."""
    others: int = 0
    """Tasks of others that it has."""
    stuck: int = 0
    """Threads on which a tile of ours gives no result."""
    is_running: bool = True
    """Whether it takes tasks: it is neither paused nor closing."""
    is_admitted: bool = False
    """Whether it may get tiles."""
    refused: str | None = None
    """Why it may not."""
    ask_at: float = 0.0
    """When it is asked next."""
    answer: concurrent.futures.Future[Any] | None = None
    """What it is being asked."""

    @property
    def free_threads(self) -> int:
        """Threads that nobody else uses, nor a tile that gives no result."""
        return max(0, self.threads - self.others - self.stuck)


def _load(worker: Worker) -> float:
    return (worker.spans + worker.others) / worker.threads


def _has_room(worker: Worker, all_busy: bool) -> bool:
    # What waits on a worker is begun as soon as it has a thread: of those that its memory does not hold, none may wait.
    most = PER_THREAD * worker.free_threads if worker.room >= worker.threads else min(worker.room, worker.free_threads)
    return worker.spans < (1 if all_busy else most)


class Roster:
    """The workers of a cluster.

    Parameters
    ----------
    client : Client
        The cluster.
    introduction : Introduction
        What each must find.
    prefix : str
        How the keys of our tasks begin, so that those of others are known.
    is_own : bool
        Whether we started the cluster, so that nobody else uses it.
    only : sequence of str
        Patterns of those that may be used.
    room : callable
        How many tiles at a time a worker of so many threads and so much memory holds.
    on_answer : callable
        What to call, in another thread, when a worker has answered: `admit` hears it.
    """

    def __init__(
        self,
        client: Client,
        introduction: Introduction,
        prefix: str,
        *,
        is_own: bool,
        only: Sequence[str],
        room: Callable[[int, int | None], int],
        on_answer: Callable[[concurrent.futures.Future[Any]], None],
    ):
        self._client, self._introduction = client, introduction
        self._prefix, self._is_own, self._only, self._room = prefix, is_own, only, room
        self._on_answer = on_answer
        self._own_task = own_task()
        self.workers: dict[str, Worker] = {}
        # Those that are here already are taken as settled.
        self._ask_scheduler(time.monotonic() - SETTLING_SECONDS)

    def look(self) -> Iterator[WorkerEvent]:
        """See who has come and gone, and who may get tiles; yield what is new, a death for each that has gone."""
        for address in self._ask_scheduler(time.monotonic()):
            yield WorkerEvent("died", address)
        yield from self.admit()

    def admit(self) -> Iterator[WorkerEvent]:
        """Ask those that were not asked yet, and hear who has answered; without waiting for anyone."""
        now = time.monotonic()
        for address, worker in self.workers.items():
            if worker.answer is None and now >= worker.ask_at and not worker.refused:
                if worker.stuck and not worker.spans:
                    worker.answer = self._begin_to_ask(address, tasks_begun, self._prefix)
                elif not worker.stuck and not worker.is_admitted:
                    worker.answer = self._begin_to_ask(address, introduce, self._introduction)
            if worker.answer is not None and worker.answer.done():
                yield from self._hear(address, worker)

    def free(self) -> Iterator[str]:
        """Yield the worker with the least to do of those that have room, as often as they have after what they got."""
        now = time.monotonic()
        usable = {
            address: worker
            for address, worker in self.workers.items()
            if self.may_have(worker) and now - worker.since >= SETTLING_SECONDS
        }
        # Where others keep all workers busy, a span waits for its turn on each like everybody's.
        all_busy = not any(worker.free_threads for worker in usable.values())
        room = [(_load(worker), address) for address, worker in usable.items() if _has_room(worker, all_busy)]
        heapq.heapify(room)
        while room:
            _, address = heapq.heappop(room)
            yield address
            if _has_room(worker := usable[address], all_busy):
                heapq.heappush(room, (_load(worker), address))

    def may_have(self, worker: Worker) -> bool:
        """Tell whether a worker may have tiles at all."""
        return worker.is_admitted and worker.is_running and worker.stuck < worker.threads

    def idle_threads(self) -> int:
        """Return how many threads wait for tiles."""
        now = time.monotonic()
        return sum(
            max(0, min(worker.free_threads, worker.room) - worker.spans)
            for worker in self.workers.values()
            if self.may_have(worker) and now - worker.since >= SETTLING_SECONDS
        )

    def doubt(self, address: str) -> None:
        """Have a worker introduce itself again."""
        if worker := self.workers.get(address):
            worker.is_admitted = False

    @property
    def refusals(self) -> list[str]:
        """Why those may not have tiles that may not."""
        return [f"{address}: {worker.refused}" for address, worker in self.workers.items() if worker.refused]

    @property
    def paused(self) -> list[str]:
        """Which workers would be of use, but take no tasks."""
        idle = [address for address, worker in self.workers.items() if not (worker.refused or worker.is_running)]
        return [f"{address}: paused, for its memory is full, or closing" for address in idle]

    def _begin_to_ask(self, address: str, *question: Any) -> concurrent.futures.Future[Any]:
        loop = self._client.loop.asyncio_loop
        answer = asyncio.run_coroutine_threadsafe(self._ask(address, *question), loop)
        answer.add_done_callback(self._on_answer)
        return answer

    async def _ask(self, address: str, function: Any, *arguments: Any) -> Any:
        """Return what a function returns on a worker, or raises; or that it did not answer."""
        return (await ask_workers(self._client, [address], function, *arguments))[address]

    def _hear(self, address: str, worker: Worker) -> Iterator[WorkerEvent]:
        found = worker.answer.result() if worker.answer else None
        worker.answer = None
        if is_silent(found):
            if not worker.ask_at:
                yield WorkerEvent("silent", address, "it gets no tiles until it does")
            worker.ask_at = time.monotonic() + AGAIN_SECONDS
        elif worker.stuck:
            worker.stuck = len(found) if isinstance(found, list) else worker.stuck
            worker.ask_at = time.monotonic() + AGAIN_SECONDS
        elif (why := self._introduction.why_useless(found) or _TOO_SMALL * (not worker.room) or None) is None:
            worker.is_admitted = True
        else:
            worker.refused = why
            yield WorkerEvent("left out", address, why)

    def _ask_scheduler(self, now: float) -> list[str]:
        """Bring what is known up to date; return who has gone."""
        try:
            found = known_workers(self._client, self._only)
            tasks: dict[str, list[Any]] = {}
            if not self._is_own:
                scheduler = self._client.scheduler
                tasks = self._client.sync(scheduler.processing, workers=None, callback_timeout=ANSWER_SECONDS)
        except Exception as error:  # whatever a connection may raise
            raise ClusterLostError("the scheduler does not answer") from error
        for address, facts in found.items():
            if address not in self.workers:
                room = self._room(facts["nthreads"], facts["memory_limit"] or None)
                self.workers[address] = Worker(facts["nthreads"], room, now)
            worker = self.workers[address]
            worker.is_running = facts.get("status", "running") == "running"
            keys = [str(key) for key in tasks.get(address, ()) if not str(key).startswith(self._prefix)]
            # What has seceded waits for others, and needs no thread; that of this very job it may not have told yet.
            counts = (facts.get("metrics") or {}).get("task_counts") or {}
            seceded = max(counts.get("long-running", 0), keys.count(self._own_task or ""))
            worker.others = max(0, len(keys) - seceded)
        gone = [address for address in self.workers if address not in found]
        for address in gone:
            if (answer := self.workers.pop(address).answer) is not None:
                answer.cancel()
        return gone

    def begun(self, addresses: set[str]) -> tuple[set[str], set[str]]:
        """Return those of our tasks that workers are at work on, and the workers that do not answer when asked."""

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*(self._ask(address, tasks_begun, self._prefix) for address in asked))

        asked = sorted(addresses)
        try:
            answers = self._client.sync(all_of_them, callback_timeout=ANSWER_SECONDS)
        except Exception as error:  # whatever a connection may raise
            raise ClusterLostError("the scheduler does not answer") from error
        begun = {key for found in answers if isinstance(found, list) for key in found}
        return begun, {address for address, found in zip(asked, answers, strict=True) if is_silent(found)}


def is_silent(answer: Any) -> bool:
    """Tell whether an answer of `ask_workers` is none."""
    return isinstance(answer, (TimeoutError, asyncio.TimeoutError, OSError))
