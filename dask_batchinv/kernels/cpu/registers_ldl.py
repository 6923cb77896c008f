"""The inverse of small positive definite matrices, one per lane, from the factorization A = U^H D U.

Unit triangular U and diagonal D, then V = U^-1, then V D^-1 V^H: the steps of LAPACK's potrf and potri without square
roots. Only upper triangles are read and written. Everything is unrolled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dask_batchinv.kernels.cpu import registers
from dask_batchinv.kernels.cpu.registers import Matrix
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import constant_number
from dask_batchinv.kernels.emit.values import Value


def invert(e: Emitter, a: Matrix, between_steps: Callable[[], None]) -> Value:
    """Invert in place; return the order of the first leading minor that is not positive.

    `between_steps` is called 3n - 1 times.
    """
    n = len(a)
    failed, inverses = _factorize(e, a, between_steps)
    # V over U: each row needs those below it, and its own from the left.
    for i in reversed(range(n - 1)):
        between_steps()
        row = {k: -a[i][k] for k in range(i + 1, n)}
        for j in reversed(range(i + 1, n)):
            total = row[j]
            for k in range(i + 1, j):
                total = total.plus_product(row[k], a[k][j])
            a[i][j] = total
    for i in range(n):
        between_steps()
        scaled = {k: a[i][k].times_real(inverses[k]) for k in range(i + 1, n)}
        for j in range(i, n):
            if j == i:
                total = constant_number(e, inverses[i], len(a[i][i].parts))
                for k in range(i + 1, n):
                    total = total.plus_product(scaled[k], a[i][k].conjugate())
                total = total.real_part()
            else:
                total = scaled[j]
                for k in range(j + 1, n):
                    total = total.plus_product(scaled[k], a[j][k].conjugate())
            a[i][j] = total
    return failed


def _factorize(e: Emitter, a: Matrix, between_steps: Callable[[], None]) -> tuple[Value, list[Value]]:
    """Put U in place of A; return the first failing minor, and the inverses of D."""
    n, failed, inverses = len(a), e.integers(0), []
    for k in range(n):
        between_steps()
        pivot = a[k][k].parts[0]
        # NaN is no failure of the matrix but of the arithmetic: what overflowed is noticed at the end.
        failed = e.select((pivot <= 0.0) & failed.eq(0), e.integers(k + 1), failed)
        inverses.append(e.like(pivot, 1.0) / pivot)
        row = {j: a[k][j] for j in range(k + 1, n)}
        for i in range(k + 1, n):
            factor = -row[i].conjugate().times_real(inverses[k])
            for j in range(i, n):
                a[i][j] = a[i][j].plus_product(factor, row[j])
            a[k][i] = -factor.conjugate()
    return failed, inverses


def is_read(i: int, j: int, part: int) -> bool:
    """Whether a part of an entry belongs to the upper triangle; imaginary parts of the diagonal do not."""
    return i < j or (i == j and part == 0)


def mirror(a: Matrix) -> None:
    """Fill up the lower triangle of Hermitian matrices."""
    for i, row in enumerate(a):
        row[i] = row[i].real_part()
        for j in range(i):
            row[j] = a[j][i].conjugate()


write = partial(
    registers.write, registers.Algorithm(reads=is_read, complete=mirror, invert=invert, n_steps=lambda n: 3 * n - 1)
)
