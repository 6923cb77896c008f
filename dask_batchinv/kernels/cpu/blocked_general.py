"""Large general matrices: Gauss-Jordan elimination by panels, which update the others as one product of matrices.

The sums are those of one-by-one elimination, as in `within_gauss_jordan`: how the work is cut, and which thread does
what, changes no bit. While one thread updates the columns of the next panel and eliminates it, the others update the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
from llvmlite import ir

from dask_batchinv.kernels.cpu import blocked_ends, blocked_panel, blocked_steps, blocked_update, blocked_work
from dask_batchinv.kernels.cpu.aligned import aligned
from dask_batchinv.kernels.cpu.blocked_frame import CHUNK, PANEL, STEPS, block_of
from dask_batchinv.kernels.cpu.blocked_matrix import EliminatedMatrix, nbytes_of_rows, no_rows, row_shape
from dask_batchinv.kernels.cpu.blocked_schedule import TaskList
from dask_batchinv.kernels.cpu.blocked_work import Call, Task
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.values import Value

#: Pieces for each thread that the other columns are cut into, so that all threads end at about the same time.
_PIECES = 4


def _panel(call: Call, task: dict[str, Value]) -> None:
    call("panel", task["table"], task["start"], task["stop"], task["memory"])


def _update(call: Call, task: dict[str, Value]) -> None:
    k0, width, start, stop, memory = (task[name] for name in ("k0", "width", "start", "stop", "memory"))
    # By all steps of the panel, from the first on.
    call("update", task["table"], k0, k0 - k0, width, start, stop, memory)


def _advance(call: Call, task: dict[str, Value]) -> None:
    """Update the columns of the next panel, and eliminate it."""
    _update(call, task)
    _panel(call, task | {"table": task["next_table"]})


class GeneralMatrix(EliminatedMatrix):
    """A general matrix in work."""

    FUNCTIONS: ClassVar[Mapping[str, int]] = {"measure": 3, "read": 3, "work": 3, "give": 3}

    @classmethod
    def write(cls, spec: KernelSpec, module: ir.Module) -> None:
        """Write the functions."""
        for part in (blocked_ends, blocked_steps, blocked_update, blocked_panel):
            part.write(spec, module)
        blocked_work.write(spec, module, [_panel, _update, _advance])

    @classmethod
    def nbytes(cls, spec: KernelSpec) -> int:
        """Return the bytes of memory for a matrix of `spec.n` rows."""
        blocks, _ = row_shape(spec, spec.n)
        return nbytes_of_rows(spec) + 2 * PANEL * (blocks * block_of(spec) + PANEL) * spec.parts * spec.itemsize

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]]):
        super().__init__(spec, n, functions)
        self._pivots, self._columns = np.empty(n + STEPS, np.int64), np.empty(self._length, np.int64)
        self._used = np.empty(self._length // spec.lanes, np.int64)
        self._no_rows = no_rows(spec, n, self._blocks)
        # A panel is eliminated while another is still needed.
        self._saved = aligned((2, PANEL * spec.parts * self._length), self._real)
        self._lower = aligned((2, PANEL * PANEL * spec.parts), self._real)
        tables = {"pivots": self._pivots, "columns": self._columns, "used": self._used}
        self._tables = [self._table(saved=self._saved[i], lower=self._lower[i], **tables) for i in range(2)]
        self._memory_nbytes = blocked_update.factors_nbytes(spec)

    def _begin(self) -> None:
        super()._begin()
        self._pivots[:], self._columns[:], self._used[:] = self.n, np.arange(self._length), self._no_rows

    def _tasks(self, threads: int) -> list[Task]:
        n, addresses = self.n, [table.ctypes.data for table in self._tables]
        step = -(-n // (_PIECES * threads) // CHUNK) * CHUNK if threads > 1 else n
        eliminate, update, advance = range(3)
        tasks = TaskList()
        tasks.add(Task(0, eliminate, addresses[0], 0, 0, 0, 0, min(PANEL, n)))
        for k, start in enumerate(range(0, n, PANEL)):
            stop, after = min(start + PANEL, n), min(start + 2 * PANEL, n)
            panel = addresses[k % 2], addresses[(k + 1) % 2], start, stop - start
            tasks.add(
                *([Task(0, advance, *panel, stop, after)] if stop < n else []),
                *(
                    Task(0, update, *panel, at, min(at + step, last))
                    for first, last in ((after, n), (0, start))
                    for at in range(first, last, step)
                ),
            )
        return tasks.tasks
