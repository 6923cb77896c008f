"""A large matrix in work: its memory, its scale, and the stages that every structure goes through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from dask_batchinv.kernels.cpu.aligned import aligned
from dask_batchinv.kernels.cpu.blocked_frame import CHUNK, PLACES, STEPS, block_of, vectors_of_block
from dask_batchinv.kernels.cpu.blocked_schedule import Crew, Stage, TaskRunner
from dask_batchinv.kernels.cpu.blocked_work import Task
from dask_batchinv.kernels.cpu.scaling import RCOND_UNKNOWN
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.outcome import Info

Array = npt.NDArray[Any]

#: Rows after the last, for functions that work on some at a time: as many as a vector has lanes at most.
SPARE = 16


class BlockedMatrix(ABC):
    """The memory for a matrix in work, and the functions that work on it.

    Parameters
    ----------
    spec : KernelSpec
        What the functions are written for.
    n : int
        Rows of the matrix.
    functions : sequence of callable
        Those of `FUNCTIONS`, compiled.
    rows : int, optional
        Rows of the scratch, if it is not for the whole matrix.
    """

    #: The functions that are called from here, and how many integers they take beside the table.
    FUNCTIONS: ClassVar[Mapping[str, int]]

    @classmethod
    @abstractmethod
    def write(cls, spec: KernelSpec, module: ir.Module) -> None:
        """Write the functions."""

    @classmethod
    @abstractmethod
    def nbytes(cls, spec: KernelSpec) -> int:
        """Return the bytes of memory for a matrix of `spec.n` rows."""

    @abstractmethod
    def _eliminate(self, threads: int) -> Iterator[Stage]:
        """Return the stages between the way in and the way out."""

    _tables: Sequence[Array]
    """Those that the functions are called with."""

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]], *, rows: int | None = None):
        self.n, self._parts = n, spec.parts
        self._call = dict(zip(self.FUNCTIONS, functions, strict=True))
        self._real = np.dtype(f"f{spec.itemsize}")
        self._blocks, self._stride = row_shape(spec, n)
        self._length = self._blocks * block_of(spec)
        self._rows = aligned((rows or n + SPARE, self._stride), self._real)
        self._rows[n:] = 0
        self._scale, self._sizes = np.ones(2, self._real), np.empty(n + SPARE, self._real)
        self._found = np.empty((-(-n // CHUNK), 2), np.int64)

    def _table(self, **arrays: Array) -> Array:
        """Return the table that the functions take, with arrays of the structure's own."""
        table = np.zeros(len(PLACES), np.int64)
        arrays |= {"scale": self._scale, "rows": self._rows, "sizes": self._sizes, "found": self._found}
        for place, array in arrays.items():
            table[PLACES.index(place)] = array.ctypes.data
        table[-3:] = self.n, self._blocks, self._stride
        return table

    def invert(self, a: Array, out: Array, threads: int) -> tuple[int, Any]:
        """Invert a matrix; return ``info`` and ``rcond``."""
        # Held on to, as all that works on them knows but their addresses.
        self._arrays: tuple[Array, ...] = a, out
        for table in self._tables:
            table[:2] = a.ctypes.data, out.ctypes.data
        self._info, self._norm = int(Info.GOOD), 0
        self._found[:] = 0
        self._crew = crew = Crew(
            [
                self._all_columns("measure", threads),
                Stage([self._prepare]),
                self._all_columns("read", threads),
                Stage([self._begin]),
                *self._eliminate(threads),
                self._all_columns("give", threads),
            ]
        )
        crew.run(threads)
        self._arrays = ()
        if self._info == int(Info.NOT_FINITE):
            return self._info, np.nan
        if self._info:
            return self._info, 0.0
        largest, norms = self._found.T
        if largest.max() >= self._infinity:
            return int(Info.OVERFLOW), np.nan
        limits, (norm, norm_of_inverse) = np.finfo(self._real), self._reals(self._norm, norms.max())
        with np.errstate(all="ignore"):
            product = limits.eps * norm * norm_of_inverse
            rcond = limits.eps / product
        # As `scaling.marked` has it.
        known = product < np.inf and (
            self._parts == 1 or norm_of_inverse >= 2.0 ** ((limits.minexp + limits.nmant + 1) // 2 + 1)
        )
        return int(Info.GOOD) if known else RCOND_UNKNOWN, rcond

    def _all_columns(self, name: str, threads: int) -> Stage:
        """Return the pieces of a call of one of the functions for all columns, a few for each thread."""
        address = self._tables[0].ctypes.data
        count = min(len(self._found), 2 * threads if threads > 1 else 1)
        step = -(-self.n // count // CHUNK) * CHUNK
        return Stage(
            partial(self._call[name], address, start, min(start + step, self.n), part)
            for part, start in enumerate(range(0, self.n, step))
        )

    def _prepare(self) -> None:
        """Find the scale, as `scaling.unit_scale` has it, or that there is nothing to invert."""
        largest, smallest = int(self._found[:, 0].max()), self._found[:, 1]
        if largest >= self._infinity or largest == 0:
            self._info = int(Info.NOT_FINITE) if largest else 1
            self._crew.end()
            return
        least, limits = int(smallest[smallest > 0].min()), np.finfo(self._real)
        lowest, one = int(limits.minexp), 1 << int(limits.nmant)
        if one <= largest < (2 - 2 * lowest) * one and least - largest >= (lowest + 2) * one:
            self._scale[:] = self._reals((2 - 2 * lowest) * one - (largest & -one))[0], 1
        else:
            exponent = partial(_exponent, lowest=lowest, digits=int(limits.nmant))
            shift = max(-exponent(largest), min(lowest + 1 - exponent(least), 0))
            near = min(max(shift, lowest), 1 - lowest)
            self._scale[:] = np.ldexp(self._real.type(1), near), np.ldexp(self._real.type(1), shift - near)
        for part in range(self._parts):
            self._rows[:, part * self._length + self.n : (part + 1) * self._length] = 0

    def _begin(self) -> None:
        """Note the norm, and prepare what the elimination needs."""
        self._norm = self._found[:, 1].max()

    @property
    def _infinity(self) -> int:
        return int(np.array(np.inf, self._real).view(f"i{self._real.itemsize}"))

    def _reals(self, *bits: int) -> Array:
        return np.array(bits, np.int64).astype(f"i{self._real.itemsize}").view(self._real)

    def _check(self) -> None:
        """End the work if one of the pivots is a failure; what came after the first is of no use."""
        failed = np.flatnonzero(self._failing(self._sizes[: self.n]))
        if len(failed):
            self._info = int(failed[0]) + 1
            self._crew.end()

    @staticmethod
    def _failing(sizes: Array) -> Array:
        """Return which pivots are failures, from what they are judged by."""
        failing: Array = sizes == 0
        return failing


class EliminatedMatrix(BlockedMatrix):
    """A matrix in work that is eliminated by a list of tasks."""

    @abstractmethod
    def _tasks(self, threads: int) -> list[Task]:
        """Return what there is to do, cut for so many threads."""

    _memory_nbytes: int = 0
    """Bytes of memory that each thread needs for itself meanwhile."""

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]]):
        super().__init__(spec, n, functions)
        self._runners: dict[int, TaskRunner] = {}

    def _eliminate(self, threads: int) -> Iterator[Stage]:
        """Return the stages between the way in and the way out."""
        if threads not in self._runners:
            self._runners[threads] = TaskRunner(self._call["work"], self._tasks(threads), self._memory_nbytes)
        runner = self._runners[threads]
        yield Stage([runner.begin])
        yield Stage([partial(runner.run, lambda: self._crew.has_ended)] * threads)
        yield Stage([self._check])


def row_shape(spec: KernelSpec, n: int) -> tuple[int, int]:
    """Return the blocks of a row, with space for a few numbers more than there are, and the reals from row to row."""
    blocks = (n + STEPS - 1) // block_of(spec) + 1
    # An odd number of vectors, so that rows do not map to the same cache sets.
    return blocks, spec.lanes * (spec.parts * blocks * vectors_of_block(spec) | 1)


def no_rows(spec: KernelSpec, n: int, blocks: int) -> Array:
    """Return a word of bits for each vector of a row of so many blocks: set beyond the matrix."""
    beyond = np.arange(blocks * block_of(spec)).reshape(-1, spec.lanes) >= n
    bits: Array = (beyond * (1 << np.arange(spec.lanes))).sum(axis=1)
    return bits


def nbytes_of_rows(spec: KernelSpec, rows: int | None = None) -> int:
    """Return the bytes of memory for the numbers of a matrix, in so many rows, and of small tables."""
    blocks, stride = row_shape(spec, spec.n)
    return (rows or spec.n + SPARE) * stride * spec.itemsize + 8 * (spec.n + 3 * blocks * block_of(spec)) + 2**16


def _exponent(bits: int, *, lowest: int, digits: int) -> int:
    """Return the exponent of a number from its bits, as `Emitter.exponent` does."""
    return (bits >> digits) + lowest - 1 if bits >> digits else lowest - digits + bits.bit_length()
