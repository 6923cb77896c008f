"""Matrices beyond the other layouts: eliminated by panels, which update the others as one product of matrices.

Gauss-Jordan elimination as in `within_gauss_jordan`, with the very sums of one-by-one
elimination: how the work is cut, and which thread does what, changes no bit. While one thread updates the columns of
the next panel and eliminates it, the others update the rest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from dask_batchinv.kernels.cpu import blocked_ends, blocked_panel, blocked_steps, blocked_update
from dask_batchinv.kernels.cpu.aligned import aligned
from dask_batchinv.kernels.cpu.blocked_frame import BLOCK, CHUNK, PANEL, PLACES, STEPS
from dask_batchinv.kernels.cpu.blocked_schedule import Crew, Elimination, Pieces
from dask_batchinv.kernels.cpu.scaling import RCOND_UNKNOWN
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.outcome import Info

Array = npt.NDArray[Any]

#: The size of the matrices that a kernel is tested with: two panels, strips and what is left.
TESTED = PANEL + CHUNK + 5
#: Rows after the last, for functions that work on some at a time.
_SPARE = 16
#: The functions that are called from here, and how many integers they take beside the table.
_FUNCTIONS = {"measure": 3, "read": 3, "panel": 3, "update": 6, "give": 3}


def signatures(spec: KernelSpec) -> dict[str, Any]:
    """Return the ctypes prototypes of the functions, by their names."""
    return {
        f"{spec.name}_{name}": ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * count)
        for name, count in _FUNCTIONS.items()
    }


def write(spec: KernelSpec) -> str:
    """Write the functions for matrices of a dtype and any size."""
    module = ir.Module(spec.name)
    for part in (blocked_ends, blocked_steps, blocked_update, blocked_panel):
        part.write(spec, module)
    return str(module)


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time."""
    blocks, stride = _row(spec, spec.n)
    saved = 2 * PANEL * (blocks * BLOCK * spec.lanes + PANEL) * spec.parts * spec.itemsize
    integers = 8 * (spec.n + 3 * blocks * BLOCK * spec.lanes)
    return Workspace(1, (spec.n + _SPARE) * stride * spec.itemsize + saved + integers + 2**16)


def _row(spec: KernelSpec, n: int) -> tuple[int, int]:
    """Return the blocks of a row, one number more than there are at least, and the reals from row to row."""
    blocks = n // (BLOCK * spec.lanes) + 1
    # An odd number of vectors, so that rows do not map to the same cache sets.
    return blocks, spec.lanes * (spec.parts * blocks * BLOCK | 1)


class BlockedKernel:
    """The functions for matrices of a dtype and any size."""

    def __init__(self, spec: KernelSpec, functions: Sequence[Callable[..., None]]):
        self.workspace, self._spec, self._functions = Workspace(1, 0), spec, functions

    def run(
        self, a: Array, out: Array, info: Array, rcond: Array, *, nontemporal: bool = False, threads: int = 1
    ) -> None:
        """Invert a block whose arrays are contiguous, one matrix after the other, each by so many threads."""
        if len(a) == 0:
            return
        matrix = BlockedMatrix(self._spec, a.shape[-1], self._functions)
        for i in range(len(a)):
            info[i], rcond[i] = matrix.invert(a[i], out[i], threads)
            if info[i] not in (int(Info.GOOD), RCOND_UNKNOWN):
                out[i] = np.nan if out.dtype.kind == "f" else complex(np.nan, np.nan)


class BlockedMatrix:
    """The memory for a matrix in work, and the functions that work on it."""

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]]):
        self.n, self._parts = n, spec.parts
        self._call = dict(zip(_FUNCTIONS, functions, strict=True))
        self._real = np.dtype(f"f{spec.itemsize}")
        self._factors_nbytes = blocked_update.factors_nbytes(spec)
        block, (blocks, stride) = BLOCK * spec.lanes, _row(spec, n)
        self._length = blocks * block
        self._rows = aligned((n + _SPARE, stride), self._real)
        self._rows[n:] = 0
        self._scale, self._sizes = np.ones(2, self._real), np.empty(n, self._real)
        self._pivots, self._columns = np.empty(n + STEPS, np.int64), np.empty(self._length, np.int64)
        self._used, self._found = np.empty(blocks * BLOCK, np.int64), np.empty((-(-n // CHUNK), 2), np.int64)
        beyond = np.arange(self._length).reshape(-1, spec.lanes) >= n
        self._no_rows = (beyond * (1 << np.arange(spec.lanes))).sum(axis=1)
        arrays = {"scale": self._scale, "rows": self._rows, "pivots": self._pivots, "columns": self._columns}
        arrays |= {"sizes": self._sizes, "used": self._used, "found": self._found}
        # A panel is eliminated while another is still needed.
        saved = [aligned((blocks * PANEL * spec.parts * block,), self._real) for _ in range(2)]
        lower = [aligned((PANEL * PANEL * spec.parts,), self._real) for _ in range(2)]
        self._kept = saved, lower
        self._tables = np.zeros((2, len(PLACES)), np.int64)
        for i, table in enumerate(self._tables):
            for place, array in (arrays | {"saved": saved[i], "lower": lower[i]}).items():
                table[PLACES.index(place)] = array.ctypes.data
            table[-3:] = n, blocks, stride
        self._addresses = [table.ctypes.data for table in self._tables]

    def invert(self, a: Array, out: Array, threads: int) -> tuple[int, Any]:
        """Invert a matrix; return ``info`` and ``rcond``."""
        self._arrays = a, out
        self._tables[:, 0], self._tables[:, 1] = a.ctypes.data, out.ctypes.data
        self._info, self._norm = int(Info.GOOD), 0
        self._found[:] = 0
        panels = -(-self.n // PANEL)
        # As few as let all threads have some, and end at about the same time.
        split = 1 if panels >= 3 * threads else PANEL // CHUNK
        crew = Crew(
            [
                self._all_columns("measure", threads),
                Pieces([self._prepare]),
                self._all_columns("read", threads),
                Pieces([self._note_norm]),
                Elimination(panels, split, self._panel, lambda k, chunk: self._update(k, chunk, PANEL // split)),
                self._all_columns("give", threads),
            ]
        )
        self._end = crew.end
        crew.run(threads)
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

    def _all_columns(self, name: str, threads: int) -> Pieces:
        """Return the pieces of a call of one of the functions for all columns, a few for each thread."""
        count = min(len(self._found), 2 * threads if threads > 1 else 1)
        step = -(-self.n // count // CHUNK) * CHUNK
        return Pieces(
            partial(self._call[name], self._addresses[0], start, min(start + step, self.n), part)
            for part, start in enumerate(range(0, self.n, step))
        )

    def _prepare(self) -> None:
        """Find the scale, as `scaling.unit_scale` has it, or that there is nothing to invert."""
        largest, smallest = int(self._found[:, 0].max()), self._found[:, 1]
        if largest >= self._infinity or largest == 0:
            self._info = int(Info.NOT_FINITE) if largest else 1
            self._end()
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
        self._pivots[:], self._columns[:], self._used[:] = self.n, np.arange(self._length), self._no_rows

    def _note_norm(self) -> None:
        self._norm = self._found[:, 1].max()

    @property
    def _infinity(self) -> int:
        return int(np.array(np.inf, self._real).view(f"i{self._real.itemsize}"))

    def _reals(self, *bits: int) -> Array:
        return np.array(bits, np.int64).astype(f"i{self._real.itemsize}").view(self._real)

    def _panel(self, k: int) -> None:
        start, stop = k * PANEL, min((k + 1) * PANEL, self.n)
        memory = aligned((self._factors_nbytes,), np.dtype(np.uint8))
        self._call["panel"](self._addresses[k % 2], start, stop, memory.ctypes.data)
        zero = np.flatnonzero(self._sizes[start:stop] == 0)
        if len(zero):
            self._info = start + int(zero[0]) + 1
            self._end()

    def _update(self, k: int, chunk: int, columns: int) -> None:
        memory = aligned((self._factors_nbytes,), np.dtype(np.uint8))
        first, width = k * PANEL, min(PANEL, self.n - k * PANEL)
        start, stop = (min(i * columns, self.n) for i in (chunk, chunk + 1))
        self._call["update"](self._addresses[k % 2], first, 0, width, start, stop, memory.ctypes.data)


def _exponent(bits: int, *, lowest: int, digits: int) -> int:
    """Return the exponent of a number from its bits, as `Emitter.exponent` does."""
    return (bits >> digits) + lowest - 1 if bits >> digits else lowest - digits + bits.bit_length()
