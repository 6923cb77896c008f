"""Who does what when several threads invert one matrix. Any of them could do it all, should no other have time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

from dask_batchinv.kernels.threads import run_all


class Task(NamedTuple):
    """What one thread does."""

    work: Callable[[], object]
    """The work itself."""
    done: Callable[[], None] = lambda: None
    """Notes that it is done, while no other thread notes or takes anything."""


class Stage(Protocol):
    """Work that begins when all of the stage before is done."""

    def take(self) -> Task | None:
        """Return what can be done now, or None."""


class Pieces:
    """A stage of pieces that do not depend on each other."""

    def __init__(self, tasks: Iterable[Callable[[], object]]):
        self._left = deque(tasks)

    def take(self) -> Task | None:
        """Return what can be done now, or None."""
        return Task(self._left.popleft()) if self._left else None


class Elimination:
    """The stage in which panels are eliminated and update all other columns, which are cut into chunks.

    Panel k + 1 waits for the updates of its columns by panel k, and for those of all columns by panel k - 1, whose
    memory it takes. A chunk is updated by one panel after the other.

    Parameters
    ----------
    panels : int
        How many there are.
    split : int
        Chunks that the columns of a panel make.
    eliminate : callable
        ``eliminate(k)`` eliminates panel k.
    update : callable
        ``update(k, chunk)`` updates a chunk by panel k.
    """

    def __init__(
        self, panels: int, split: int, eliminate: Callable[[int], object], update: Callable[[int, int], object]
    ):
        self._panels, self._split, self._eliminate, self._update = panels, split, eliminate, update
        self._eliminated, self._begun = 0, 0
        #: How many panels each chunk has been updated by; -1 while it is.
        self._level = [0] * (panels * split)
        #: The chunks that each panel has still to begin with: first those that the next panel waits for.
        self._pending = [deque(self._chunks_from(k)) for k in range(panels)]
        self._unfinished = [len(pending) for pending in self._pending]

    def _own(self, k: int) -> range:
        return range(k * self._split, (k + 1) * self._split)

    def _chunks_from(self, k: int) -> list[int]:
        first, total = (k + 1) * self._split, self._panels * self._split
        return [i % total for i in range(first, first + total - self._split)]

    def take(self) -> Task | None:
        """Return what can be done now, or None."""
        k = self._begun
        has_memory = k < 2 or self._unfinished[k - 2] == 0
        if k == self._eliminated < self._panels and has_memory and all(self._level[i] == k for i in self._own(k)):
            self._begun += 1
            return Task(partial(self._eliminate, k), self._note_eliminated)
        for k in range(max(0, self._eliminated - 2), self._eliminated):
            for chunk in self._pending[k]:
                if self._level[chunk] == k:
                    self._pending[k].remove(chunk)
                    self._level[chunk] = -1
                    return Task(partial(self._update, k, chunk), partial(self._note, k, chunk))
        return None

    def _note_eliminated(self) -> None:
        for chunk in self._own(self._eliminated):
            self._level[chunk] += 1
        self._eliminated += 1

    def _note(self, k: int, chunk: int) -> None:
        self._level[chunk] = k + 1
        self._unfinished[k] -= 1


class Crew:
    """The threads that go through the stages together.

    Ctrl-C may come at any moment. A `threading.Condition` could stay locked then, for ever; a lock cannot.
    """

    def __init__(self, stages: Iterable[Stage]):
        self._stages = deque(stages)
        self._lock, self._running = threading.Lock(), 0
        #: For each thread that waits a lock that it has taken already.
        self._waiting: list[threading.Lock] = []

    def run(self, threads: int) -> None:
        """Go through all stages, with so many threads if they are free."""
        run_all(lambda _: self._work(), range(threads), threads)

    def end(self) -> None:
        """Begin nothing more."""
        self._stages.clear()
        with self._lock:
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            self._waiting.pop().release()

    def _work(self) -> None:
        try:
            while task := self._take():
                task.work()
                with self._lock:
                    self._running -= 1
                    task.done()
                    self._wake()
        except BaseException:
            self.end()
            raise

    def _take(self) -> Task | None:
        while self._stages:
            with self._lock:
                if not self._stages:
                    break
                if task := self._stages[0].take():
                    self._running += 1
                    return task
                if not self._running:
                    self._stages.popleft()
                    self._wake()
                    continue
                changed = threading.Lock()
                changed.acquire()
                self._waiting.append(changed)
            # Should the thread that was to wake this one have been broken off, all has ended.
            while not changed.acquire(timeout=1) and self._stages:
                pass
        return None
