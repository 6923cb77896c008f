"""Large symmetric and Hermitian matrices that need not be definite: eliminated as general ones, and made symmetric.

Twice as much work as symmetry asks for, but all of it products of matrices; pivots that keep symmetry would have to be
searched for one after the other in what has not been updated yet. Of both residuals, X A - I and A X - I, elimination
with the sums of `within_gauss_jordan` keeps either small, and so does the mean of X and what is across its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from dask_batchinv.kernels.cpu import blocked_ends
from dask_batchinv.kernels.cpu.blocked_ends import scale
from dask_batchinv.kernels.cpu.blocked_frame import PLACES, Frame
from dask_batchinv.kernels.cpu.blocked_general import GeneralMatrix
from dask_batchinv.kernels.cpu.blocked_schedule import Stage
from dask_batchinv.kernels.cpu.blocked_triangle import (
    Triangle,
    put_block,
    source_block,
    turned,
    write_give,
    write_measure,
    write_read,
)
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.number import Number

Array = npt.NDArray[Any]


class SymmetricMatrix(GeneralMatrix):
    """A symmetric or Hermitian matrix in work."""

    FUNCTIONS: ClassVar[Mapping[str, int]] = {"measure": 3, "read": 3, "work": 3, "put": 3, "merge": 3, "give": 3}

    @classmethod
    def write(cls, spec: KernelSpec, module: ir.Module) -> None:
        """Write the functions."""
        triangle = Triangle.of(spec)
        write_measure(Frame(spec, "measure", 3, module), triangle)
        write_read(Frame(spec, "read", 3, module), triangle, whole=True)
        cls._write_elimination(spec, module)
        blocked_ends.write_give(Frame(spec, "put", 3, module))
        _write_merge(Frame(spec, "merge", 3, module), triangle)
        write_give(Frame(spec, "give", 3, module), triangle)

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]]):
        super().__init__(spec, n, functions)
        #: For what goes by way of the array for the inverse: nothing is scaled there.
        self._by_way, self._ones = self._tables[0].copy(), np.ones(2, self._real)
        self._by_way[PLACES.index("scale")] = self._ones.ctypes.data

    def invert(self, a: Array, out: Array, threads: int) -> tuple[int, Any]:
        """Invert a matrix; return ``info`` and ``rcond``."""
        self._by_way[:2] = out.ctypes.data
        return super().invert(a, out, threads)

    def _eliminate(self, threads: int) -> Iterator[Stage]:
        yield from super()._eliminate(threads)
        yield self._all_columns("put", threads, self._by_way)
        yield self._all_columns("merge", threads, self._by_way)


def _write_merge(f: Frame, triangle: Triangle) -> None:
    """Write ``merge(table, start, stop, part)``: the mean of X and X^H becomes the upper triangle in the scratch.

    The source is the transpose of X: what was eliminated were the rows of A, as if they were its columns.
    """
    e, factors = f.e, scale(f)
    across = triangle.symmetry.across if triangle.symmetry else None
    assert across is not None
    with e.loop(f.arguments[0], f.arguments[1], f.lanes) as c, e.loop(0, c + f.lanes, f.lanes) as r:
        mirrored, x = source_block(f, factors, r, c), turned(f, source_block(f, factors, c, r), None)
        pairs = [(number.parts, across(other).parts) for number, other in zip(x, mirrored, strict=True)]
        block = [Number(e, tuple(p * 0.5 + q * 0.5 for p, q in zip(*pair, strict=True))) for pair in pairs]
        put_block(f, block, r, c)
    e.finish()
