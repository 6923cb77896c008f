"""Large matrices of which one triangle is in work, and what there is to do, in which order, for each structure.

The functions are those of `blocked_sweep`, `blocked_substitution` and `blocked_symmetric`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
from llvmlite import ir

from dask_batchinv.kernels.cpu import (
    blocked_substitution,
    blocked_sweep,
    blocked_symmetric,
    blocked_triangle,
    blocked_work,
)
from dask_batchinv.kernels.cpu.aligned import aligned
from dask_batchinv.kernels.cpu.blocked_frame import CHUNK, PANEL, STEPS, block_of
from dask_batchinv.kernels.cpu.blocked_matrix import SPARE, Array, EliminatedMatrix, nbytes_of_rows, no_rows, row_shape
from dask_batchinv.kernels.cpu.blocked_schedule import TaskList
from dask_batchinv.kernels.cpu.blocked_work import Call, Task
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.values import Value

#: Pieces for each thread that the work is cut into.
_PIECES = 4


class _UpperMatrix(EliminatedMatrix):
    """A matrix in work of which only the upper triangle is kept up."""

    FUNCTIONS: ClassVar[Mapping[str, int]] = {"measure": 3, "read": 3, "work": 3, "give": 3}

    @classmethod
    def nbytes(cls, spec: KernelSpec) -> int:
        """Return the bytes of memory for a matrix of `spec.n` rows."""
        blocks, _ = row_shape(spec, spec.n)
        columns = 2 * blocks * block_of(spec) + STEPS
        return nbytes_of_rows(spec) + PANEL * columns * spec.parts * spec.itemsize

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]], **arrays: Array):
        super().__init__(spec, n, functions)
        #: With ones on the diagonal beyond the matrix, up to whole steps.
        self._whole = -(-n // STEPS) * STEPS
        self._saved = aligned((PANEL * spec.parts * self._length,), self._real)
        # Whole tiles, of which the last may reach beyond the last block.
        self._factors = aligned((PANEL * spec.parts * (self._length + STEPS),), self._real)
        self._held = arrays
        self._tables = [self._table(saved=self._saved, factors=self._factors, **arrays)]

    def _begin(self) -> None:
        super()._begin()
        beyond = np.arange(self.n, self._whole)
        self._rows[self.n :] = 0
        self._rows[beyond, beyond] = 1

    def _steps(self, threads: int) -> tuple[int, int]:
        """Return how many blocks and rows to take at a time, so that all threads end at about the same time."""
        if threads == 1:
            return self._blocks, self._whole
        pieces = _PIECES * threads
        return -(-self._blocks // pieces), -(-self._whole // pieces // CHUNK) * CHUNK


class _MatrixInOrder(_UpperMatrix):
    """A matrix in work whose panels are rows beside each other, one panel after the other."""

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]]):
        inverses = np.empty((n + SPARE) * spec.parts, f"f{spec.itemsize}")
        super().__init__(spec, n, functions, inverses=inverses)
        self._panels = range(0, self._whole, PANEL)

    def _cut(self, action: int, start: int, first: int, last: int, step: int) -> list[Task]:
        """Return the parts of what there is to do for the panel from `start` on."""
        return [self._task(action, start, at, min(at + step, last)) for at in range(first, last, step)]

    def _task(self, action: int, start: int, first: int = 0, last: int = 0) -> Task:
        return Task(0, action, self._tables[0].ctypes.data, 0, start, self._after(start) - start, first, last)

    def _after(self, start: int) -> int:
        """Return where the panel ends that begins at `start`."""
        return min(start + PANEL, self._whole)


def _square(call: Call, task: dict[str, Value]) -> None:
    call("square", task["table"], task["k0"], task["width"])


def _part(name: str, call: Call, task: dict[str, Value]) -> None:
    call(name, *(task[field] for field in ("table", "k0", "width", "start", "stop")))


_rows, _update = partial(_part, "rows"), partial(_part, "update")


def _advance(call: Call, task: dict[str, Value]) -> None:
    """Update the rows of the next panel, and sweep its square."""
    _update(call, task)
    call("square", task["table"], task["start"], task["stop"] - task["start"])


_ACTIONS = (_square, _rows, _update, _advance)
_SQUARE, _ROWS, _UPDATE, _ADVANCE = range(len(_ACTIONS))


class DefiniteMatrix(_MatrixInOrder):
    """A positive definite matrix in work."""

    @classmethod
    def write(cls, spec: KernelSpec, module: ir.Module) -> None:
        """Write the functions."""
        blocked_triangle.write(spec, module, is_minus=True)
        blocked_sweep.write(spec, module)
        blocked_work.write(spec, module, _ACTIONS)

    def _tasks(self, threads: int) -> list[Task]:
        blocks, rows = self._steps(threads)
        tasks = TaskList()
        tasks.add(self._task(_SQUARE, 0))
        for start in self._panels:
            tasks.add(*self._cut(_ROWS, start, 0, self._blocks, blocks))
            stop = self._after(start)
            tasks.add(
                *([self._task(_ADVANCE, start, stop, self._after(stop))] if stop < self._whole else []),
                *self._cut(_UPDATE, start, 0, start, rows),
                *self._cut(_UPDATE, start, self._after(stop), self._whole, rows),
            )
        return tasks.tasks

    @staticmethod
    def _failing(sizes: Array) -> Array:
        failing: Array = sizes <= 0
        return failing


def _panel(call: Call, task: dict[str, Value]) -> None:
    call("panel", task["table"], task["k0"], task["width"])


class SymmetricMatrix(_UpperMatrix):
    """A symmetric or Hermitian matrix in work."""

    @classmethod
    def write(cls, spec: KernelSpec, module: ir.Module) -> None:
        """Write the functions."""
        blocked_triangle.write(spec, module, is_minus=True)
        blocked_symmetric.write(spec, module)
        blocked_work.write(spec, module, [_panel, _update])

    @classmethod
    def nbytes(cls, spec: KernelSpec) -> int:
        """Return the bytes of memory for a matrix of `spec.n` rows."""
        return super().nbytes(spec) + blocked_symmetric.ROWS * row_shape(spec, spec.n)[1] * spec.itemsize

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]]):
        blocks, stride = row_shape(spec, n)
        self._lower = aligned((blocked_symmetric.ROWS, stride), np.dtype(f"f{spec.itemsize}"))
        self._counts, self._no_rows = np.empty(blocked_symmetric.WORDS, np.int64), no_rows(spec, n, blocks)
        self._used = self._no_rows.copy()
        super().__init__(spec, n, functions, lower=self._lower, pivots=self._counts, used=self._used)

    def _begin(self) -> None:
        super()._begin()
        self._lower[:], self._counts[:], self._used[:] = 0, 0, self._no_rows
        # Rows of pairs are not judged.
        self._sizes[:] = 1

    def _tasks(self, threads: int) -> list[Task]:
        find, update = range(2)
        _, rows = self._steps(threads)
        tasks, table = TaskList(), self._tables[0].ctypes.data
        # One less than a panel has, where there is no room for a pair.
        for _ in range(-(-self.n // (blocked_symmetric.SWEEPS - 1))):
            tasks.add(Task(0, find, table, 0, self._length, 0, 0, 0))
            tasks.add(
                *(
                    Task(0, update, table, 0, self._length, 0, start, min(start + rows, self._whole))
                    for start in range(0, self._whole, rows)
                )
            )
        return tasks.tasks


class TriangularMatrix(_MatrixInOrder):
    """A triangular matrix in work; a lower one is transposed."""

    @classmethod
    def write(cls, spec: KernelSpec, module: ir.Module) -> None:
        """Write the functions."""
        blocked_triangle.write(spec, module)
        blocked_substitution.write(spec, module)
        blocked_work.write(spec, module, _ACTIONS[:_ADVANCE])

    def _tasks(self, threads: int) -> list[Task]:
        blocks, rows = self._steps(threads)
        tasks = TaskList()
        tasks.add(*(self._task(_SQUARE, start) for start in self._panels))
        for start in self._panels:
            tasks.add(*self._cut(_ROWS, start, 0, self._blocks, blocks))
            tasks.add(*self._cut(_UPDATE, start, 0, start, rows))
        return tasks.tasks
