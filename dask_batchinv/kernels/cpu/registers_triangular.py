"""The inverse of small triangular matrices, one per lane, row by row. Everything is unrolled."""

from __future__ import annotations

from collections.abc import Callable

from dask_batchinv.kernels.cpu import registers
from dask_batchinv.kernels.cpu.registers import Matrix
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import constant_number
from dask_batchinv.kernels.emit.values import Value


def write(spec: KernelSpec) -> str:
    """Write the kernel."""
    is_upper = spec.structure == "upper triangular"

    def reads(i: int, j: int, part: int) -> bool:
        return i <= j if is_upper else i >= j

    def clear(a: Matrix) -> None:
        e = a[0][0].e
        for i, row in enumerate(a):
            row[:] = [
                number if reads(i, j, 0) else constant_number(e, e.numbers(0.0), spec.parts)
                for j, number in enumerate(row)
            ]

    def invert(e: Emitter, a: Matrix, between_steps: Callable[[], None]) -> Value:
        n, failed = len(a), e.integers(0)
        for i in reversed(range(n)):
            failed = e.select(a[i][i].size().eq(0.0), e.integers(i + 1), failed)
        # With rows and columns counted from the other end, an upper triangle is a lower one.
        order = list(reversed(range(n))) if is_upper else list(range(n))
        for t, i in enumerate(order):
            between_steps()
            a[i][i] = a[i][i].reciprocal()
            minus = -a[i][i]
            factors = {k: a[i][k] * minus for k in order[:t]}
            for s, j in enumerate(order[:t]):
                total = factors[j] * a[j][j]
                for k in order[s + 1 : t]:
                    total = total.plus_product(factors[k], a[k][j])
                a[i][j] = total
        return failed

    return registers.write(registers.Algorithm(reads, clear, invert, n_steps=lambda n: n), spec)
