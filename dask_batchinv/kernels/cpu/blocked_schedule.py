"""Who does what when several threads invert one matrix. Any of them could do it all, should no other have time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_batchinv.kernels.cpu.aligned import aligned
from dask_batchinv.kernels.cpu.blocked_work import COUNTERS, OWN, Task
from dask_batchinv.kernels.threads import run_all

Array = npt.NDArray[Any]


class Stage:
    """Pieces of work that do not depend on each other; they begin when all of the stage before is done."""

    def __init__(self, pieces: Iterable[Callable[[], object]]):
        self._left = deque(pieces)

    def take(self) -> Callable[[], object] | None:
        """Return what can be done now, or None."""
        return self._left.popleft() if self._left else None


class TaskList:
    """Tasks of which any may be done at the same time that need the same ones."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def add(self, *tasks: Task) -> None:
        """Add tasks that need all which are there."""
        needs = len(self.tasks)
        self.tasks += [task._replace(needs=needs) for task in tasks]


class TaskRunner:
    """A list of tasks, which threads go through in the machine code of `blocked_work`; for one matrix at a time.

    Parameters
    ----------
    work : callable
        The function of that name.
    tasks : sequence of Task
        The list.
    nbytes : int
        What each thread needs as memory of its own.
    """

    def __init__(self, work: Callable[[int, int, int, int], None], tasks: Sequence[Task], nbytes: int):
        self._work, self._tasks, self._nbytes = work, np.array(tasks, np.int64), nbytes
        self._counters = aligned((COUNTERS[-1] + 1,), np.dtype(np.int64))

    def begin(self) -> None:
        """Begin from the first task."""
        self._counters[:] = 0

    def run(self, has_ended: Callable[[], bool]) -> None:
        """Do tasks, in a thread, until none is left, or all has ended since another thread was broken off."""
        own = aligned((8 * OWN + self._nbytes,), np.dtype(np.uint8))
        number = own[:8].view(np.int64)
        number[0] = -1
        count = len(self._tasks)
        addresses = self._tasks.ctypes.data, count, self._counters.ctypes.data, own.ctypes.data
        self._work(*addresses)
        while number[0] < count and not has_ended():
            # Another thread is at what this one needs.
            time.sleep(0)
            self._work(*addresses)


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
        run_all(lambda _: self._work(), range(threads), threads, end=self.end)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to begin."""
        return not self._stages

    def end(self) -> None:
        """Begin nothing more."""
        with self._lock:
            self._stages.clear()
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            self._waiting.pop().release()

    def _work(self) -> None:
        try:
            while work := self._take():
                work()
                with self._lock:
                    self._running -= 1
                    self._wake()
        except Exception:
            self.end()
            raise

    def _take(self) -> Callable[[], object] | None:
        while self._stages:
            with self._lock:
                if not self._stages:
                    break
                if work := self._stages[0].take():
                    self._running += 1
                    return work
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
