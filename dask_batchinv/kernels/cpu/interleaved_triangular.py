"""The inverse of a group of interleaved triangular matrices, row by row.

With rows and columns counted from the other end, an upper triangle is a lower one: one way serves both. The numbers of
a row, divided by minus its pivot, are what the rows before it are multiplied by; sums of a few columns are kept in
registers. The other triangle holds zeros, so that sums need not stop at the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from dask_batchinv.kernels.cpu import interleaved, scaling
from dask_batchinv.kernels.cpu.interleaved import Inverted, multiply_rarely, write_as_it_is
from dask_batchinv.kernels.cpu.interleaved_group import Group
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.number import NumberVariable, constant_number
from dask_batchinv.kernels.emit.values import Value

#: Columns whose sums are kept in registers, by parts of a number.
_WIDTH = {1: 8, 2: 4}


def write(spec: KernelSpec) -> str:
    """Write the kernel."""
    is_upper = spec.structure == "upper triangular"

    def invert(g: Group, scale: scaling.Scale, between_steps: Callable[[Value], None]) -> Inverted:
        multiply_rarely(g, scale)
        triangle = _Triangle(g, is_upper)
        failed, norm = triangle.scale(scale.first)
        with g.e.loop(0, g.n) as i:
            between_steps(i)
            triangle.invert_row(i)
        norm_of_inverse = triangle.norm()

        def store(target: Value) -> Value:
            write_as_it_is(g, target, scale)
            return norm_of_inverse

        return Inverted(failed, norm, store)

    part: Literal["upper", "lower"] = "upper" if is_upper else "lower"
    return interleaved.write(interleaved.Algorithm(part, invert, n_steps=lambda n: n), spec)


class _Triangle:
    """Lower triangles, or upper ones counted from their ends."""

    def __init__(self, g: Group, is_upper: bool):
        self.g, self.e, self.is_upper = g, g.e, is_upper
        self.zero = constant_number(g.e, g.e.numbers(0.0), g.parts)

    def _row(self, i: Value) -> Value:
        return self.g.n - 1 - i if self.is_upper else i

    def _entry(self, i: Value, j: Value) -> Value:
        return self.g.entry(self._row(i), self._row(j))

    def scale(self, factor: Value) -> tuple[Value, Value]:
        """Bring the triangles to unit size and clear the others; return the first zero pivots' numbers, and norms."""
        e, g = self.e, self.g
        failed, norm = e.variable(e.integers(0)), e.variable(e.numbers(0.0))
        with e.loop(0, g.n) as j:
            with e.loop(0, j) as i:
                g.keep(self.zero, self._entry(i, j))
            total = e.variable(e.numbers(0.0))
            with e.loop(j, g.n) as i:
                number = g.read(self._entry(i, j)).times_real(factor)
                g.keep(number, self._entry(i, j))
                total.set(total.get() + number.modulus())
            norm.set(scaling.larger_sum(e, total.get(), norm.get()))
            found = g.read(self._entry(j, j)).size().eq(0.0)
            if not self.is_upper:  # of those the last that is met is the first
                found = found & failed.get().eq(0)
            failed.set(e.select(found, g.row_number(self._row(j) + 1), failed.get()))
        return failed.get(), norm.get()

    def invert_row(self, i: Value) -> None:
        """Put the inverse's row in place of a row, those before it being done."""
        e, g, width = self.e, self.g, _WIDTH[self.g.parts]
        inverse = g.read(self._entry(i, i)).reciprocal()
        g.keep(inverse, self._entry(i, i))
        minus = -inverse
        with e.loop(0, i) as k:
            g.keep(g.read(self._entry(i, k)) * minus, self._entry(i, k))
        whole = i & -width
        with e.loop(0, whole, width) as j:
            self._sums(i, j, width)
        rest = width
        start = whole
        while rest > 1:
            rest //= 2
            after = e.variable(start)
            with e.when(~((i - whole) & rest).eq(0)):
                self._sums(i, start, rest)
                after.set(start + rest)
            start = after.get()

    def _sums(self, i: Value, j: Value, width: int) -> None:
        """Find some numbers of a row, from the j-th on."""
        e, g = self.e, self.g
        sums = [NumberVariable(self.zero) for _ in range(width)]
        with e.loop(j, i) as k:
            factor = g.read(self._entry(i, k))
            for q, total in enumerate(sums):
                total.set(total.get().plus_product(factor, g.read(self._entry(k, j + q))))
        for q, total in enumerate(sums):
            g.keep(total.get(), self._entry(i, j + q))

    def norm(self) -> Value:
        """Return the 1-norms of what stands there."""
        e, g = self.e, self.g
        norm = e.variable(e.numbers(0.0))
        with e.loop(0, g.n) as j:
            total = e.variable(e.numbers(0.0))
            with e.loop(j, g.n) as i:
                total.set(total.get() + g.read(self._entry(i, j)).modulus())
            norm.set(scaling.larger_sum(e, total.get(), norm.get()))
        return norm.get()
