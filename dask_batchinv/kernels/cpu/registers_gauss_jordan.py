"""Gauss-Jordan elimination with partial pivoting of small general matrices, one per lane.

Exchanges of rows are selections. Everything is unrolled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dask_batchinv.kernels.cpu import registers
from dask_batchinv.kernels.cpu.registers import Matrix
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.values import Value


def invert(e: Emitter, a: Matrix, between_steps: Callable[[], None]) -> Value:
    """Invert in place; return the number of the first pivot that is zero. `between_steps` is called n times."""
    n = len(a)
    failed = e.integers(0)
    chosen = []
    for k in range(n):
        between_steps()
        best, row = a[k][k].size(), e.integers(k)
        for i in range(k + 1, n):
            size = a[i][k].size()
            more = size > best
            best, row = e.select(more, size, best), e.select(more, e.integers(i), row)
        failed = e.select(best.eq(0.0) & failed.eq(0), e.integers(k + 1), failed)
        chosen.append(row)
        pivot_row = a[k]
        for i in range(k + 1, n):
            here = row.eq(i)
            a[i], pivot_row = (
                [old.where(here, number) for old, number in zip(a[k], a[i], strict=True)],
                [number.where(here, best) for number, best in zip(a[i], pivot_row, strict=True)],
            )
        inverse = pivot_row[k].reciprocal()
        for i in range(n):
            if i != k:
                factor = -(a[i][k] * inverse)
                a[i] = [factor if j == k else a[i][j].plus_product(factor, pivot_row[j]) for j in range(n)]
        a[k] = [inverse if j == k else pivot_row[j] * inverse for j in range(n)]
    # What was done to rows has to be undone to columns.
    for k in reversed(range(n)):
        for i in range(k + 1, n):
            here = chosen[k].eq(i)
            for r in a:
                r[k], r[i] = r[i].where(here, r[k]), r[k].where(here, r[i])
    return failed


write = partial(
    registers.write,
    registers.Algorithm(reads=lambda i, j, part: True, complete=lambda a: None, invert=invert, n_steps=lambda n: n),
)
