"""The inverse of small positive definite matrices, one per lane, from the decomposition A = U^H D U.

Unit triangular U and diagonal D, then V = U^-1, then V D^-1 V^H: the steps of LAPACK's potrf and potri without square
roots. Only upper triangles are read and written. Everything is unrolled.
"""

from __future__ import annotations

from collections.abc import Callable

from dask_batchinv.kernels.emit import Emitter
from dask_batchinv.kernels.numbers import Number, constant_number
from dask_batchinv.kernels.values import Value

Get = Callable[[int, int], Number]
Put = Callable[[int, int, Number], None]


def invert(e: Emitter, n: int, get: Get, put: Put, pause: Callable[[], None]) -> Value:
    """Invert in place by way of `get` and `put`; return the order of the first leading minor that is not positive.

    `pause` is called, `pauses(n)` times, where values that wait for their turn had better wait in memory.
    """
    failed, inverses = _decompose(e, n, get, put, pause)
    # V over U: each row needs those below it, and its own from the left.
    for i in reversed(range(n - 1)):
        pause()
        row = {k: -get(i, k) for k in range(i + 1, n)}
        for j in reversed(range(i + 1, n)):
            total = row[j]
            for k in range(i + 1, j):
                total = total.plus_product(row[k], get(k, j))
            put(i, j, total)
    for i in range(n):
        pause()
        scaled = {k: get(i, k).times_real(inverses[k]) for k in range(i + 1, n)}
        for j in range(i, n):
            if j == i:
                total = constant_number(e, inverses[i], len(get(i, i).parts))
                for k in range(i + 1, n):
                    total = total.plus_product(scaled[k], get(i, k).conjugate())
                total = total.real_part()
            else:
                total = scaled[j]
                for k in range(j + 1, n):
                    total = total.plus_product(scaled[k], get(j, k).conjugate())
            put(i, j, total)
    return failed


def pauses(n: int) -> int:
    """Return how often `invert` pauses."""
    return 3 * n - 1


def _decompose(e: Emitter, n: int, get: Get, put: Put, pause: Callable[[], None]) -> tuple[Value, list[Value]]:
    """Put U in place of A; return what `invert` does, and the inverses of D."""
    failed = e.integers(0)
    inverses = []
    for k in range(n):
        pause()
        pivot = get(k, k).parts[0]
        # NaN is no failure of the matrix but of the arithmetic: what overflowed is noticed at the end.
        failed = e.select((pivot <= 0.0) & failed.eq(0), e.integers(k + 1), failed)
        inverses.append(e.like(pivot, 1.0) / pivot)
        row = {j: get(k, j) for j in range(k + 1, n)}
        for i in range(k + 1, n):
            factor = -row[i].conjugate().times_real(inverses[k])
            for j in range(i, n):
                put(i, j, get(i, j).plus_product(factor, row[j]))
            put(k, i, -factor.conjugate())
    return failed, inverses
