"""Vectors within a matrix: for positive definite matrices too large for a lane.

Sweeping index k of a Hermitian matrix makes, with d = a[k, k] and u = a[k, :],

    a[i, j] <- a[i, j] - conj(u[i]) u[j] / d,    a[k, j] <- u[j] / d,    a[k, k] <- -1 / d,

which is Hermitian again; after all of them stands minus the inverse. Only the upper triangle is kept up. Indices are
swept by panels, with u and u / d saved as each was at its turn, so that the other rows get the very sums that they
would get one by one: with the inverse of a whole panel's block the residual could grow with the condition number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dask_batchinv.kernels.emit import Emitter, Value
from dask_batchinv.kernels.numbers import Number, constant_number
from dask_batchinv.kernels.scaling import larger_sum, without_sign_of_zero
from dask_batchinv.kernels.scratch import (
    PANEL,
    Matrix,
    Measure,
    Shape,
    across,
    ask_ahead,
    each_block,
    each_vector,
    report,
)


def write(name: str, s: Shape) -> str:
    """Write the kernel: it inverts `count` groups of ``s.together`` positive definite matrices."""
    e = Emitter(name, s.itemsize, s.lanes)
    with e.loop(0, e.arguments[4]) as group:
        first = group * s.together
        every = [e.integer(g) for g in range(s.together)]
        for each in every:
            _measure(Matrix(e, s, each), first + each)
        with e.loop(0, s.together) as g:
            _read(Matrix(e, s, g), first + g)

        def panel(k0: Value, width: int) -> None:
            with e.loop(0, s.together) as g:
                _take_panel(Matrix(e, s, g), k0, width)
            for p in range(width):
                ask_ahead(e, s, first, k0 + p)
                for at in range(s.together):
                    _sweep_panel(Matrix(e, s, e.integer(at)), k0, p, width)
            with e.loop(0, s.together) as g:
                _update_others(Matrix(e, s, g), k0, width)
                _put_panel(Matrix(e, s, g), k0, width)

        each_block(e, s.n, PANEL, panel)
        with e.loop(0, s.together) as g:
            _write(Matrix(e, s, g), first + g)
        for each in every:
            report(Matrix(e, s, each), first + each, lambda size: size <= 0.0)
    return e.finish()


def _measure(a: Matrix, index: Value) -> None:
    """Find the scale of the upper triangle of a matrix."""
    e, s = a.e, a.s
    source = e.at(e.arguments[0], index * s.size)
    length = s.n * s.parts
    measure = Measure(e)
    with e.loop(0, s.n) as i:
        diagonal = i * s.parts

        def look(c: Value, count: int, i: Value = i, diagonal: Value = diagonal) -> None:
            numbers = e.load_first(e.at(source, i * length + c), count)
            at = e.iota + e.splat(e.resize(c - diagonal, e.word))
            read = at > -1 if s.parts == 1 else (at > -1) & ~at.eq(1)
            measure.look(e.select(read, numbers, 0.0))

        whole = length - length % e.lanes
        with e.loop(diagonal & -e.lanes, whole, e.lanes) as c:
            look(c, e.lanes)
        if length % e.lanes:
            look(e.integer(whole), length % e.lanes)
    measure.settle(a)


def _read(a: Matrix, index: Value) -> None:
    """Bring the upper triangle to unit size, and mirror it."""
    e, s = a.e, a.s
    source = e.at(e.arguments[0], index * s.size)
    length = s.n * s.parts
    first, second = a.scale()
    with e.loop(0, s.n) as i:

        def take(c: Value, count: int, i: Value = i) -> None:
            place = e.at(source, i * length + c * s.parts)
            parts = [e.load_first(e.at(place, p * e.lanes), count * s.parts - p * e.lanes) for p in range(s.parts)]
            if s.parts == 2:
                parts = [e.shuffle(parts[0], parts[1], range(p, 2 * e.lanes, 2)) for p in range(2)]
            number = Number(e, tuple(part * first * second for part in parts))
            a.store(number, a.rows, i, c / e.lanes)

        each_block(e, s.n, e.lanes, take)
    nothing = Number(e, tuple(e.numbers(0.0) for _ in range(s.parts)))
    with e.loop(s.n, s.length) as i:
        each_vector(e, s.vectors, lambda v: a.store(nothing, a.rows, i, v))
    _mirror(a, negative=False)
    e.store(e.lane(across(e, _norm(a), partial(larger_sum, e)), 0), a.norm)


def _mirror(a: Matrix, *, negative: bool) -> None:
    """Make a Hermitian matrix of its upper triangle, or of what is minus that."""
    e, s = a.e, a.s

    def block(i: Value, v: Value) -> list[Number]:
        numbers = [a.load(a.rows, i * e.lanes + t, v) for t in range(e.lanes)]
        return [-number for number in numbers] if negative else numbers

    def turn(numbers: list[Number]) -> list[Number]:
        parts = [e.transpose([number.parts[p] for number in numbers]) for p in range(s.parts)]
        return [Number(e, tuple(part[t] for part in parts)).conjugate() for t in range(e.lanes)]

    with e.loop(0, s.vectors) as i:
        numbers = block(i, i)
        for t, (number, mirrored) in enumerate(zip(numbers, turn(numbers), strict=True)):
            number = number.where(e.iota > t, number.real_part().where(e.iota.eq(t), mirrored))
            a.store(number, a.rows, i * e.lanes + t, i)
        with e.loop(i + 1, s.vectors) as v:
            numbers = block(i, v)
            for t, (number, mirrored) in enumerate(zip(numbers, turn(numbers), strict=True)):
                if negative:
                    a.store(number, a.rows, i * e.lanes + t, v)
                a.store(mirrored, a.rows, v * e.lanes + t, i)


def _norm(a: Matrix) -> Value:
    e, s = a.e, a.s
    norm = e.variable(e.numbers(0.0))

    def column(v: Value) -> None:
        total = e.variable(e.numbers(0.0))
        with e.loop(0, s.n) as i:
            total.set(total.get() + a.load(a.rows, i, v).modulus())
        norm.set(larger_sum(e, total.get(), norm.get()))

    each_vector(e, s.vectors, column)
    return norm.get()


def _take_panel(a: Matrix, k0: Value, width: int) -> None:
    """Copy rows of a panel, what is left of the diagonal from the columns."""
    e, s = a.e, a.s
    middle = k0 >> (e.lanes.bit_length() - 1)
    with e.loop(0, middle + 1) as v:
        columns = [e.load_columns(_places(a, v * e.lanes, k0, p), width) for p in range(s.parts)]
        left = e.iota + e.splat(e.resize(v * e.lanes - k0, e.word))
        for q in range(width):
            column = Number(e, tuple(part[q] for part in columns)).conjugate()
            a.store(column.where(left < q, a.load(a.rows, k0 + q, v)), a.panel, e.integer(q), v)
    with e.loop(middle + 1, s.vectors) as v:
        for q in range(width):
            a.store(a.load(a.rows, k0 + q, v), a.panel, e.integer(q), v)


def _places(a: Matrix, row: Value, column: Value, part: int) -> Callable[[int], Value]:
    """Return where a column begins in each of the rows from one on."""
    return lambda lane: a.e.at(a.rows, (row + lane) * a.s.stride + column + part * a.s.length)


def _sweep_panel(a: Matrix, k0: Value, p: int, width: int) -> None:
    """Sweep index k0 + p within the panel."""
    e = a.e
    k = k0 + p
    pivot = a.entry(a.panel, e.integer(p), k).parts[0]
    e.store(pivot, e.at(a.pivot_sizes, k))
    pivots = e.splat(pivot)
    inverse = e.like(pivots, 1.0) / pivots
    others = [q for q in range(width) if q != p]
    factors = [-a.entry(a.panel, e.integer(p), k0 + q).splat().conjugate() for q in others]
    swept = constant_number(e, -inverse, a.s.parts)
    nothing = Number(e, tuple(e.numbers(0.0) for _ in range(a.s.parts)))
    column = e.splat(e.resize(k, e.word))

    def body(v: Value) -> None:
        here = (e.iota + e.splat(e.resize(v * e.lanes, e.word))).eq(column)
        row = a.load(a.panel, e.integer(p), v)
        scaled = swept.where(here, row.times_real(inverse))
        a.store(row, a.saved, e.integer(p), v)
        a.store(scaled, a.scaled, e.integer(p), v)
        a.store(scaled, a.panel, e.integer(p), v)
        for q, factor in zip(others, factors, strict=True):
            old = nothing.where(here, a.load(a.panel, e.integer(q), v))
            a.store(old.plus_product(factor, scaled), a.panel, e.integer(q), v)

    each_vector(e, a.s.vectors, body)


def _update_others(a: Matrix, k0: Value, width: int) -> None:
    """Update the rows outside the panel, from the diagonal on."""
    e, s = a.e, a.s

    def update(i: Value, count: int) -> None:
        factors = [
            [-a.entry(a.saved, e.integer(p), i + t).splat().conjugate() for p in range(width)] for t in range(count)
        ]
        with e.loop(i >> (e.lanes.bit_length() - 1), s.vectors) as v:
            sums = [a.load(a.rows, i + t, v) for t in range(count)]
            for p in range(width):
                scaled = a.load(a.scaled, e.integer(p), v)
                sums = [total.plus_product(f[p], scaled) for f, total in zip(factors, sums, strict=True)]
            for t, total in enumerate(sums):
                a.store(total, a.rows, i + t, v)

    step = 16 // PANEL // s.parts
    with e.loop(0, k0, step) as i:
        update(i, step)
    if width == PANEL:
        rest = s.n % PANEL % step
        with e.loop(k0 + width, s.n - rest, step) as i:
            update(i, step)
        if rest:
            update(e.integer(s.n - rest), rest)


def _put_panel(a: Matrix, k0: Value, width: int) -> None:
    """Write a swept panel back, to the columns above it and to its rows."""
    e, s = a.e, a.s
    middle = k0 >> (e.lanes.bit_length() - 1)
    with e.loop(0, middle + 1) as v:
        columns = [a.load(a.panel, e.integer(q), v).conjugate() for q in range(width)]
        for p in range(s.parts):
            values = [column.parts[p] for column in columns]
            e.store_columns(values, _places(a, v * e.lanes, k0, p))
    with e.loop(middle, s.vectors) as v:
        for q in range(width):
            a.store(a.load(a.panel, e.integer(q), v), a.rows, k0 + q, v)


def _write(a: Matrix, index: Value) -> None:
    e, s = a.e, a.s
    _mirror(a, negative=True)
    norm = _norm(a)
    first, second = a.scale()
    target = e.at(e.arguments[1], index * s.size)
    largest = e.variable(e.integers(0))
    with e.loop(0, s.n) as i:

        def give(c: Value, count: int, i: Value = i) -> None:
            numbers = a.load(a.rows, i, c / e.lanes).parts
            parts = [without_sign_of_zero(e, part * first, second) for part in numbers]
            for part in parts:
                largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(part))))
            if s.parts == 2:
                half = e.lanes // 2
                parts = [
                    e.shuffle(parts[0], parts[1], [b * half + at // 2 + at % 2 * e.lanes for at in range(e.lanes)])
                    for b in range(2)
                ]
            place = e.at(target, (i * s.n + c) * s.parts)
            for b, part in enumerate(parts):
                if count * s.parts > b * e.lanes:
                    e.store_first(part, e.at(place, b * e.lanes), count * s.parts - b * e.lanes)

        each_block(e, s.n, e.lanes, give)
    a.put_aside(largest.get(), norm)
