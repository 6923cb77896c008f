"""Vectors within a matrix: for general matrices too large for a lane.

The scratch holds the transposed matrix: its row j is column j of the matrix, so that the search for a pivot and
every update run along contiguous numbers. Gauss-Jordan elimination in place, by panels of columns. Rows of the
matrix are never exchanged: where the pivots stood decides where the results are written.

With P the column that takes the place of column k, and r its pivot's row, one step is

    every other column:  a[:, j] <- (a[:, j] with a[r, j] set to 0) + a[r, j] P

The columns outside a panel get the sums of all its steps at once, and they are the very sums that they would get one by
one: each P is saved as it is at its turn, and f, what a[r, j] is at its turn, is found beforehand. With P as the whole
panel leaves it, ‖AX - I‖ grows with the condition number: 10¹¹ times at 10¹⁵.
"""

from __future__ import annotations

from functools import partial

from dask_batchinv.kernels.cpu import scaling
from dask_batchinv.kernels.cpu.scaling import larger_sum, without_sign_of_zero
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.cpu.within_workspace import (
    PANEL,
    Shape,
    WorkspaceMatrix,
    across,
    each_block,
    each_vector,
    find_largest,
    for_rows_outside,
    only,
    prefetch_next,
    report,
    settle,
)
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number, constant_number
from dask_batchinv.kernels.emit.transpose import transpose
from dask_batchinv.kernels.emit.values import INT, Value


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time."""
    return _shape(spec).workspace


def _shape(spec: KernelSpec) -> Shape:
    """Return the sizes; the larger the matrices, the fewer together: less time is lost waiting for pivots; measured."""
    lines = -(-spec.n * spec.itemsize // 64) * spec.parts
    if lines <= (4 if spec.parts == 2 else 3):
        return Shape.of(spec, together=3)
    return Shape.of(spec, together=2 if lines <= (6 if spec.parts == 2 else 8) else 1)


def write(spec: KernelSpec) -> str:
    """Write the kernel: it inverts `count` groups of general matrices."""
    s = _shape(spec)
    e = Emitter(spec.name, spec.itemsize, spec.lanes)
    every = [e.integer(g) for g in range(s.together)]
    with e.loop(0, e.count) as group:
        first = group * s.together
        # Where the steps of one matrix wait for each other, they are written side by side for all.
        for each in every:
            _measure(WorkspaceMatrix(e, s, each), first + each)
        with e.loop(0, s.together) as g:
            _read(WorkspaceMatrix(e, s, g), first + g)

        def panel(k0: Value, width: int) -> None:
            panels = [_Panel(WorkspaceMatrix(e, s, g), k0) for g in every]
            for each in every:
                prefetch_next(e, s, first + each, k0, k0, PANEL)
            rows = [_search(panel, 0) for panel in panels]
            for p in range(width):
                steps = [_Step(panel, p, row) for panel, row in zip(panels, rows, strict=True)]
                # The next search waits for one column only: it runs while the others are updated.
                ahead = [p + 1] if p + 1 < width else []
                for step in steps:
                    step.apply(ahead, first=True)
                if ahead:
                    rows = [_search(panel, p + 1) for panel in panels]
                for step in steps:
                    step.apply([q for q in range(width) if q not in (p, p + 1)], first=False)
            with e.loop(0, s.together) as g:
                _update_others(_Panel(WorkspaceMatrix(e, s, g), k0), first + g, width)

        each_block(e, s.n, PANEL, panel)
        with e.loop(0, s.together) as g:
            _write(WorkspaceMatrix(e, s, g), first + g)
        for each in every:
            report(WorkspaceMatrix(e, s, each), first + each, lambda size: size.eq(0.0))
    return e.finish()


def modulus(e: Emitter, parts: int, row: Value) -> Value:
    """Return |z| of numbers as they stand in memory; of complex ones in both of their lanes."""
    if parts == 1:
        return e.absolute(row)
    square = row * row
    return e.sqrt(square + e.shuffle(square, None, [i ^ 1 for i in range(e.lanes)]))


def _measure(a: WorkspaceMatrix, index: Value) -> None:
    """Find the scale of a matrix."""
    e, s = a.e, a.s
    source = e.at(e.a, index * s.size)
    measure = scaling.Measure(e)

    def look(start: Value, count: int) -> None:
        for at in range(0, count, e.lanes):
            measure.look(e.load_first(e.at(source, start + at), count - at))

    each_block(e, s.size, 4 * e.lanes, look)
    settle(a, measure)


def _read(a: WorkspaceMatrix, index: Value) -> None:
    """Bring a matrix to unit size, sum up its columns, and transpose it."""
    e, s = a.e, a.s
    source = e.at(e.a, index * s.size)
    first, second = a.scale()
    norm = e.variable(e.numbers(0.0))

    def columns(c: Value, width: int) -> None:
        total = e.variable(e.numbers(0.0))

        def rows(r: Value, height: int) -> None:
            block = []
            for t in range(height):
                numbers = e.load_first(e.at(source, (r + t) * (s.n * s.parts) + c), width)
                block.append(numbers * first * second)
                total.set(total.get() + modulus(e, s.parts, block[-1]))
            turned = transpose(e, block + [e.numbers(0.0)] * (e.lanes - height))
            for q in range(width):
                row, part = c / s.parts + q // s.parts, q % s.parts
                e.store(turned[q], e.at(a.rows, row * s.stride + r + part * s.length), align=e.nbytes)

        each_block(e, s.n, e.lanes, rows)
        norm.set(larger_sum(e, total.get(), norm.get()))

    each_block(e, s.n * s.parts, e.lanes, columns)
    e.store(e.lane(across(e, norm.get(), partial(larger_sum, e)), 0), a.norm)
    for v in range(s.vectors):
        rows = min(e.lanes, s.n - v * e.lanes)
        a.set(a.used, v, e.integer((1 << e.lanes) - (1 << rows)))
    # Where overflow makes NaN, a row may be chosen twice: what no row is chosen for must still be within bounds.
    for start in range(0, s.length, 8):
        count = min(8, s.length - start)
        e.store(e.counting(start, count), e.at(a.columns, start, INT))


class _Panel:
    """Some columns of a matrix, from k0 on."""

    def __init__(self, a: WorkspaceMatrix, k0: Value):
        self.a, self.e, self.k0 = a, a.e, k0
        # Keeps LLVM from recomputing the address of each column.
        self.start = self.e.launder(a.address(a.rows, k0, 0))

    def load(self, q: int, vector: Value | int) -> Number:
        """Load a vector of column q of the panel."""
        return self.a.load(self.start, self.e.integer(q), vector)

    def store(self, number: Number, q: int, vector: Value | int) -> None:
        """Store a vector of column q of the panel."""
        self.a.store(number, self.start, self.e.integer(q), vector)

    def entry(self, q: int, row: Value) -> Number:
        """Load one number of column q of the panel, in all lanes."""
        return self.a.entry(self.start, self.e.integer(q), row).splat()

    def factors(self, q: int, pivots: list[Value]) -> list[Number]:
        """Return f of column q for each step of another panel, in all lanes."""
        a, e, found = self.a, self.e, list[Number]()
        for p, row in enumerate(pivots):
            number = a.entry(self.start, e.integer(q), row)
            for earlier, factor in enumerate(found):
                number = number.plus_product(factor, a.entry(a.scaled, e.integer(p), e.integer(earlier)))
            found.append(number)
        return [number.splat() for number in found]


def _search(panel: _Panel, q: int) -> Value:
    """Find the largest number of a column in rows that have not been pivots; note its size, return its row."""
    a, e = panel.a, panel.e

    def key(v: Value) -> Value:
        return e.select(e.mask_from(a.get(a.used, v)), e.numbers(-1.0), panel.load(q, v).size())

    largest, row = find_largest(a, key)
    e.store(e.lane(largest, 0), e.at(a.pivot_sizes, panel.k0 + q))
    return row


class _Step:
    """Step p of the elimination within a panel, with the pivot in a row."""

    def __init__(self, panel: _Panel, p: int, row: Value):
        a, e = panel.a, panel.e
        self.panel, self.p, self.row = panel, p, row
        k = panel.k0 + p
        a.set(a.pivots, k, row)
        a.set(a.columns, row, k)
        self.inverse = panel.entry(p, row).reciprocal()
        if p == 0:
            for v in range(a.s.vectors):
                a.set(a.others, v, e.integer(-1))
        for q in range(p):
            # For the rows of later pivots P becomes a part of their f.
            a.set_entry(a.entry(a.saved, e.integer(q), row), a.scaled, e.integer(p), e.integer(q))
            a.set_entry(constant_number(e, e.number(0.0), a.s.parts), a.saved, e.integer(q), row)
        word, bit = row >> (e.lanes.bit_length() - 1), e.integer(1) << (row & (e.lanes - 1))
        a.set(a.used, word, a.get(a.used, word) | bit)
        a.set(a.others, word, a.get(a.others, word) & ~bit)

    def apply(self, columns: list[int], *, first: bool) -> None:
        """Update some columns of the panel; the first time also make P of the pivot's own."""
        panel, e = self.panel, self.panel.e
        factors = [panel.entry(q, self.row) for q in columns]
        row = e.splat(e.resize(self.row, e.word))
        minus = -self.inverse

        def body(v: Value) -> None:
            here = (e.iota + e.splat(e.resize(v * e.lanes, e.word))).eq(row)
            replacing = panel.load(self.p, v)
            if first:
                replacing = self.inverse.where(here, replacing * minus)
                panel.store(replacing, self.p, v)
                panel.a.store(replacing, panel.a.saved, e.integer(self.p), v)
            for q, factor in zip(columns, factors, strict=True):
                panel.store(only(~here, panel.load(q, v)).plus_product(factor, replacing), q, v)

        each_vector(e, panel.a.s.vectors, body)


def _update_others(panel: _Panel, index: Value, width: int) -> None:
    """Update the columns outside the panel."""
    a, e, s, k0 = panel.a, panel.e, panel.a.s, panel.k0
    pivots = [a.get(a.pivots, k0 + p) for p in range(width)]

    def update(j: Value, count: int) -> None:
        prefetch_next(e, s, index, k0, j, count)
        columns = _Panel(a, j)
        factors = [columns.factors(t, pivots) for t in range(count)]

        def body(v: Value) -> None:
            stay = e.mask_from(a.get(a.others, v))
            sums = [only(stay, columns.load(t, v)) for t in range(count)]
            for p in range(width):
                replacing = a.load(a.saved, e.integer(p), v)
                sums = [total.plus_product(f[p], replacing) for f, total in zip(factors, sums, strict=True)]
            for t, total in enumerate(sums):
                columns.store(total, t, v)

        each_vector(e, s.vectors, body)

    for_rows_outside(e, s, k0, width, update)


def _write(a: WorkspaceMatrix, index: Value) -> None:
    """Turn the inverse back and write it, rows and columns in their order."""
    e, s = a.e, a.s
    target = e.at(e.inverse, index * s.size)
    first, second = a.scale()
    norm, largest = e.variable(e.numbers(0.0)), e.variable(e.integers(0))

    def columns(c: Value, width: int) -> None:
        total = e.variable(e.numbers(0.0))
        sources = []
        for q in range(width):
            row, part = a.get(a.columns, c / s.parts + q // s.parts), q % s.parts
            sources.append(e.at(a.rows, row * s.stride + part * s.length))

        def rows(r: Value, height: int) -> None:
            block = [e.load(e.at(source, r), align=e.nbytes) for source in sources]
            turned = transpose(e, block + [e.numbers(0.0)] * (e.lanes - width))
            for t in range(height):
                total.set(total.get() + modulus(e, s.parts, turned[t]))
                numbers = without_sign_of_zero(e, turned[t] * first, second)
                largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(numbers))))
                k = a.get(a.columns, r + t)
                e.store_first(numbers, e.at(target, k * (s.n * s.parts) + c), width)

        each_block(e, s.n, e.lanes, rows)
        norm.set(larger_sum(e, total.get(), norm.get()))

    each_block(e, s.n * s.parts, e.lanes, columns)
    a.put_aside(largest.get(), norm.get())
