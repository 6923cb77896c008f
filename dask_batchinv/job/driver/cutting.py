"""How tiles are cut into what workers get at a time: pure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dask_batchinv.job.plan.plan import Plan
from dask_batchinv.job.seen import Numbers
from dask_batchinv.job.target.ledger import ROWS_PER_CHUNK

#: A task has so many times less than its share of what is left to do.
TASKS_PER_THREAD = 2
#: The first have about so many bytes, which take a tenth of a second or more: a task itself costs some milliseconds.
FIRST_TASK_NBYTES = 2**27
#: Tiles of at most so many bytes are read back at a time.
READ_BACK_NBYTES = 2**26


def tasks_of(numbers: Numbers, plan: Plan, threads: int) -> Iterator[range]:
    """Yield ascending tile numbers as workers get them: all of a read unit that is cut, else so that all are busy."""
    units = numbers // plan.per_unit if plan.per_unit > 1 else np.zeros_like(numbers)
    left, threads, count = len(numbers), max(1, threads), 0
    first = max(plan.together, FIRST_TASK_NBYTES // max(1, plan.tile_nbytes))
    for part in np.split(numbers, np.flatnonzero((np.diff(numbers) > 1) | (np.diff(units) > 0)) + 1):
        start = 0
        while start < len(part):
            if plan.ahead:  # as long as can be, for at its end a task waits for its last writes
                longest = min(plan.tiles_per_task, -(-len(numbers) // threads))
            elif plan.per_unit == 1:
                # Few at first, for nobody knows how long they take, and at the end, so that none waits for another.
                longest = min(plan.tiles_per_task, -(-left // (TASKS_PER_THREAD * threads)))
                longest = min(longest, first << min(20, count // (TASKS_PER_THREAD * threads)))
            else:
                longest = min(plan.per_unit, -(-len(numbers) // threads))
            task = part[start : start + max(plan.together, longest)]
            yield range(int(task[0]), int(task[-1]) + 1)
            start, left, count = start + len(task), left - len(task), count + 1


def spans_to_read_back(numbers: np.ndarray[tuple[int], np.dtype[np.int64]], tile_nbytes: int) -> Iterator[range]:
    """Yield ascending tile numbers, many at a time, none of them from two chunks of the ledger."""
    longest = max(1, min(ROWS_PER_CHUNK, READ_BACK_NBYTES // max(1, tile_nbytes)))
    cuts = np.flatnonzero((np.diff(numbers) > 1) | (np.diff(numbers // ROWS_PER_CHUNK) > 0)) + 1
    for part in np.split(numbers, cuts):
        for start in range(0, len(part), longest):
            some = part[start : start + longest]
            yield range(int(some[0]), int(some[-1]) + 1)
