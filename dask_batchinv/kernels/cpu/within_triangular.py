"""Vectors within a matrix: for triangular matrices too large for a lane, by blocks of rows.

With T the triangle, the rows of its inverse are

    x[i, :] = (e[i, :] - the sum over the other k of t[i, k] x[k, :]) / t[i, i],

from the last row up for upper triangles, from the first row down for lower ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dask_batchinv.kernels.cpu import scaling
from dask_batchinv.kernels.cpu.scaling import larger_sum
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.cpu.within_rows import read_rows, write_rows
from dask_batchinv.kernels.cpu.within_workspace import (
    PANEL,
    Shape,
    WorkspaceMatrix,
    across,
    each_vector,
    only,
    prefetch_next,
    report,
    settle,
)
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number, NumberVariable, constant_number
from dask_batchinv.kernels.emit.values import Value

#: Vectors of the rows of a block whose sums are kept in registers, by parts of a number.
_VECTORS = {1: 2, 2: 1}


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time."""
    return Shape.of(spec, together=1).workspace


def write(spec: KernelSpec) -> str:
    """Write the kernel: it inverts `count` triangular matrices, one after the other."""
    s = Shape.of(spec, together=1)
    e = Emitter(spec.name, spec.itemsize, spec.lanes)
    a = WorkspaceMatrix(e, s, e.integer(0))
    triangle = _Triangle(a, spec.structure == "upper triangular")
    with e.loop(0, e.count) as index:
        triangle.read(index)
        triangle.invert(index)
        norm = triangle.norm()
        a.put_aside(write_rows(a, index), norm)
        report(a, index, lambda size: size.eq(0.0))
    return e.finish()


class _Triangle:
    """The triangles in the scratch; the others hold zeros."""

    def __init__(self, a: WorkspaceMatrix, is_upper: bool):
        self.a, self.e, self.s, self.is_upper = a, a.e, a.s, is_upper
        self.zero, self.one = (constant_number(a.e, a.e.numbers(x), a.s.parts) for x in (0.0, 1.0))

    def _distance(self, i: Value, v: Value) -> Value:
        """Return how far right of the diagonal the lanes of a vector of row i are."""
        e = self.e
        return e.iota + e.splat(e.resize(v * e.lanes - i, e.word))

    def read(self, index: Value) -> None:
        """Read the triangle, bring it to unit size, and note its norm and pivots."""
        a, e, s = self.a, self.e, self.s
        measure = scaling.Measure(e)

        def keep(number: Number, i: Value, v: Value) -> Number:
            distance = self._distance(i, v)
            number = only(distance > -1 if self.is_upper else distance < 1, number)
            for part in number.parts:
                measure.look(part)
            return number

        read_rows(a, index, keep)
        settle(a, measure)
        first, second = a.scale()

        def scaled(number: Number, i: Value, v: Value) -> Number:
            number = Number(e, tuple(part * first * second for part in number.parts))
            a.store(number, a.rows, i, v)
            return number

        e.store(e.lane(across(e, self.norm(scaled), partial(larger_sum, e)), 0), a.norm)
        with e.loop(0, s.n) as i:
            e.store(a.entry(a.rows, i, i).size(), e.at(a.pivot_sizes, i))

    def norm(self, change: Callable[[Number, Value, Value], Number] = lambda number, i, v: number) -> Value:
        """Return the largest sums of columns, lane by lane, of what `change` makes of the numbers."""
        a, e, s = self.a, self.e, self.s
        norm = e.variable(e.numbers(0.0))

        def column(v: Value) -> None:
            total = e.variable(e.numbers(0.0))
            with e.loop(0, s.n) as i:
                total.set(total.get() + change(a.load(a.rows, i, v), i, v).modulus())
            norm.set(larger_sum(e, total.get(), norm.get()))

        each_vector(e, s.vectors, column)
        return norm.get()

    def invert(self, index: Value) -> None:
        """Put the inverse in place of the triangle."""
        e, s = self.e, self.s
        blocks, rest = s.n // PANEL, s.n % PANEL
        with e.loop(0, blocks) as b:
            self._block(index, s.n - (b + 1) * PANEL if self.is_upper else b * PANEL, PANEL)
        if rest:
            self._block(index, e.integer(0 if self.is_upper else s.n - rest), rest)

    def _block(self, index: Value, i0: Value, count: int) -> None:
        """Invert some rows, those that they need being done."""
        a, e, s = self.a, self.e, self.s
        prefetch_next(e, s, index, i0, e.integer(0), s.n)
        order = range(count)
        order = order[::-1] if self.is_upper else order
        pivots = [a.entry(a.rows, i0 + t, i0 + t).splat().reciprocal() for t in range(count)]
        beside = {(t, u): -a.entry(a.rows, i0 + t, i0 + u).splat() for at, t in enumerate(order) for u in order[:at]}

        def columns(v: Value, width: int) -> None:
            units = [
                [self.one.where(self._distance(i0 + t, v + w).eq(0), self.zero) for w in range(width)]
                for t in range(count)
            ]
            sums = [[NumberVariable(unit) for unit in row] for row in units]
            if self.is_upper:
                first, last = i0 + count, e.signed("smin", (v + width) * e.lanes, s.n)
            else:
                first, last = v * e.lanes, i0
            with e.loop(first, last) as k:
                row = [a.load(a.rows, k, v + w) for w in range(width)]
                for t, totals in enumerate(sums):
                    factor = -a.entry(a.rows, i0 + t, k).splat()
                    for total, number in zip(totals, row, strict=True):
                        total.set(total.get().plus_product(factor, number))
            for w in range(width):
                done: dict[int, Number] = {}
                for t in order:
                    sum_ = sums[t][w].get()
                    for u, number in done.items():
                        sum_ = sum_.plus_product(beside[t, u], number)
                    done[t] = sum_ * pivots[t]
                    a.store(done[t], a.panel_rows, e.integer(t), v + w)

        start, stop = self._vectors(i0, count)
        width = _VECTORS[s.parts]
        whole = stop - ((stop - start) & (width - 1))
        with e.loop(start, whole, width) as v:
            columns(v, width)
        if width > 1:
            with e.loop(whole, stop) as v:
                columns(v, 1)
        with e.loop(start, stop) as v:
            for t in range(count):
                a.store(a.load(a.panel_rows, e.integer(t), v), a.rows, i0 + t, v)

    def _vectors(self, i0: Value, count: int) -> tuple[Value, Value]:
        """Return where the vectors of some rows begin and end."""
        e, log = self.e, self.e.lanes.bit_length() - 1
        if self.is_upper:
            return i0 >> log, e.integer(self.s.vectors)
        return e.integer(0), ((i0 + (count - 1)) >> log) + 1
