"""Vectors within a matrix: for positive definite matrices too large for a lane.

Sweeping index k of a Hermitian matrix (Goodnight 1979) makes, with d = a[k, k] and u = a[k, :],

    a[i, j] <- a[i, j] - conj(u[i]) u[j] / d,    a[k, j] <- u[j] / d,    a[k, k] <- -1 / d,

which is Hermitian again; after all of them stands minus the inverse. Only the upper triangle is kept up. Indices are
swept by panels, with u and u / d saved as each was at its turn, so that the other rows get the very sums that they
would get one by one: with the inverse of a whole panel's block the residual could grow with the condition number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llvmlite import ir

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
    each_vector_of_row,
    for_rows_outside,
    prefetch_next,
    report,
    settle,
)
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number, constant_number
from dask_batchinv.kernels.emit.transpose import exchange, load_columns, store_columns, transpose
from dask_batchinv.kernels.emit.values import Value, constant


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time."""
    return Shape.of(spec, together=1).workspace


def write(spec: KernelSpec) -> str:
    """Write the kernel: it inverts `count` positive definite matrices, one after the other."""
    s = Shape.of(spec, together=1)
    e = Emitter(spec.name, spec.itemsize, spec.lanes)
    a = WorkspaceMatrix(e, s, e.integer(0))
    with e.loop(0, e.count) as index:
        _measure(a, index)
        _read(a, index)

        def panel(k0: Value, width: int) -> None:
            prefetch_next(e, s, index, k0, k0, PANEL)
            _sweep_panel(a, k0, width)
            _update_others(a, index, k0, width)
            _put_panel(a, k0, width)

        each_block(e, s.n, PANEL, panel)
        _write(a, index)
        report(a, index, lambda size: size <= 0.0)
    return e.finish()


def _measure(a: WorkspaceMatrix, index: Value) -> None:
    """Find the scale of the upper triangle of a matrix."""
    e, s = a.e, a.s
    source = e.at(e.a, index * s.size)
    length = s.n * s.parts
    measure = scaling.Measure(e)
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
    settle(a, measure)


def _read(a: WorkspaceMatrix, index: Value) -> None:
    """Bring the upper triangle to unit size, and sum up its columns."""
    e, s = a.e, a.s
    source = e.at(e.a, index * s.size)
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

        each_vector_of_row(e, s.n, take)
    nothing = Number(e, tuple(e.numbers(0.0) for _ in range(s.parts)))
    with e.loop(s.n, s.length) as i:
        each_vector(e, s.vectors, lambda v: a.store(nothing, a.rows, i, v))
    _sum_up(a)
    e.store(e.lane(across(e, _norm(a), partial(larger_sum, e)), 0), a.norm)


def _sum_up(a: WorkspaceMatrix, *, finish: bool = False) -> None:
    """Sum up the columns of a matrix whose upper triangle is there; to finish, make it whole, and negate it."""
    e, s = a.e, a.s
    with e.loop(0, s.vectors) as v:
        e.store(e.numbers(0.0), e.at(a.saved, v * e.lanes), align=e.nbytes)

    def block(i: Value, v: Value) -> list[Number]:
        numbers = [a.load(a.rows, i * e.lanes + t, v) for t in range(e.lanes)]
        return [-number for number in numbers] if finish else numbers

    def turn(numbers: list[Number]) -> list[Number]:
        parts = [transpose(e, [number.parts[p] for number in numbers]) for p in range(s.parts)]
        return [Number(e, tuple(part[t] for part in parts)).conjugate() for t in range(e.lanes)]

    def put(numbers: list[Number], i: Value, v: Value) -> None:
        sums = e.at(a.saved, v * e.lanes)
        total = e.load(sums, align=e.nbytes)
        for t in range(0, e.lanes, 2):
            # In pairs, to wait half as often; there is no vector of one lane.
            total = total + (numbers[t].modulus() + numbers[t + 1].modulus())
        e.store(total, sums, align=e.nbytes)
        if finish:
            for t, number in enumerate(numbers):
                a.store(number, a.rows, i * e.lanes + t, v)

    with e.loop(0, s.vectors) as i:
        numbers = block(i, i)
        pairs = enumerate(zip(numbers, turn(numbers), strict=True))
        put([x.where(e.iota > t, x.real_part().where(e.iota.eq(t), y)) for t, (x, y) in pairs], i, i)
        with e.loop(i + 1, s.vectors) as v:
            numbers = block(i, v)
            put(numbers, i, v)
            put(turn(numbers), v, i)


def _norm(a: WorkspaceMatrix) -> Value:
    """Return the largest sums, lane by lane."""
    e = a.e
    norm = e.variable(e.numbers(0.0))
    each_vector(
        e,
        a.s.vectors,
        lambda v: norm.set(larger_sum(e, e.load(e.at(a.saved, v * e.lanes), align=e.nbytes), norm.get())),
    )
    return norm.get()


def _sweep_panel(a: WorkspaceMatrix, k0: Value, width: int) -> None:
    """Sweep the indices of a panel, in its own rows.

    What is left of the diagonal comes from the columns. The rows go to `panel_rows` as far as they are to become
    columns again, else back to their place.
    """
    e, s = a.e, a.s
    sweeps, block = _sweep_block(a, k0, width)
    last = _last_vector(a, k0)
    with e.loop(0, last + 1) as v:
        columns = [load_columns(e, _places(a, v * e.lanes, k0, p), width) for p in range(s.parts)]
        left = e.iota + e.splat(e.resize(v * e.lanes - k0, e.word))
        rows = []
        for q in range(width):
            column = Number(e, tuple(part[q] for part in columns)).conjugate()
            rows.append(column.where(left < q, a.load(a.rows, k0 + q, v)))
        for q, row in enumerate(_swept(a, sweeps, rows, v)):
            a.store(row, a.panel_rows, e.integer(q), v)
    with e.loop(last + 1, s.vectors) as v:
        for q, row in enumerate(_swept(a, sweeps, [a.load(a.rows, k0 + q, v) for q in range(width)], v)):
            a.store(row, a.rows, k0 + q, v)
    for q, number in enumerate(block):
        a.set_part_of_row(number, a.panel_rows, e.integer(q), k0, width)


def _last_vector(a: WorkspaceMatrix, k0: Value) -> Value:
    """Return the number of the last vector that the block of a panel is in."""
    e = a.e
    last = e.unsigned("umin", k0 + (PANEL - 1), e.integer(a.s.length - 1))
    return last >> (e.lanes.bit_length() - 1)


def _places(a: WorkspaceMatrix, row: Value, column: Value, part: int) -> Callable[[int], Value]:
    """Return where a column begins in each of the rows from one on."""
    return lambda lane: a.e.at(a.rows, (row + lane) * a.s.stride + column + part * a.s.length)


@dataclass(frozen=True)
class _Sweep:
    """What sweeping an index does to the rows of its panel."""

    inverse: Value
    """Of the pivot."""
    factors: list[Number | None]
    """What its row, divided by the pivot, is multiplied by, for each of the other rows."""


def _sweep_block(a: WorkspaceMatrix, k0: Value, width: int) -> tuple[list[_Sweep], list[Number]]:
    """Sweep the square block of a panel, a short vector for each row; return the sweeps, and the rows."""
    e, every = a.e, range(width)
    short = ir.VectorType(e.real, PANEL)
    nothing = constant_number(e, e.value(constant(short, 0.0)), a.s.parts)
    rows = [a.part_of_row(a.rows, k0 + q, k0, PANEL) if q < width else nothing for q in range(PANEL)]
    mirrored = [number.conjugate() for number in _turned(e, rows)]
    rows = [rows[q].where(e.mask([c >= q for c in range(PANEL)]), mirrored[q]) for q in every]
    sweeps = []
    for p in every:
        pivot = e.lane(rows[p].parts[0], p)
        e.store(pivot, e.at(a.pivot_sizes, k0 + p))
        inverse = e.like(pivot, 1.0) / pivot
        factors = [None if q == p else -rows[p].lane(q).conjugate() for q in every]
        own = e.mask([c == p for c in range(PANEL)])
        rows[p] = constant_number(e, e.splat(-inverse, PANEL), a.s.parts).where(
            own, rows[p].times_real(e.splat(inverse, PANEL))
        )
        for q, factor in enumerate(factors):
            if factor is not None:
                rows[q] = nothing.where(own, rows[q]).plus_product(factor.splat(PANEL), rows[p])
        sweeps.append(_Sweep(e.splat(inverse), [factor and factor.splat() for factor in factors]))
    return sweeps, rows


def _turned(e: Emitter, rows: list[Number]) -> list[Number]:
    """Transpose a square block of short vectors."""
    parts = [exchange(e, [row.parts[p] for row in rows], PANEL) for p in range(len(rows[0].parts))]
    return [Number(e, values) for values in zip(*parts, strict=True)]


def _swept(a: WorkspaceMatrix, sweeps: list[_Sweep], rows: list[Number], v: Value) -> list[Number]:
    """Return a vector of each row of a panel after the sweeps, but for the block; save what they are at their turns."""
    e = a.e
    for p, sweep in enumerate(sweeps):
        a.store(-rows[p].conjugate(), a.saved, e.integer(p), v)
        rows[p] = rows[p].times_real(sweep.inverse)
        a.store(rows[p], a.scaled, e.integer(p), v)
        rows = [
            row if factor is None else row.plus_product(factor, rows[p])
            for row, factor in zip(rows, sweep.factors, strict=True)
        ]
    return rows


def _update_others(a: WorkspaceMatrix, index: Value, k0: Value, width: int) -> None:
    """Update the rows outside the panel, from the diagonal on."""
    e, s = a.e, a.s

    def update(i: Value, count: int) -> None:
        prefetch_next(e, s, index, k0, i, count)
        factors = [[a.entry(a.saved, e.integer(p), i + t).splat() for p in range(width)] for t in range(count)]
        with e.loop(i >> (e.lanes.bit_length() - 1), s.vectors) as v:
            sums = [a.load(a.rows, i + t, v) for t in range(count)]
            for p in range(width):
                scaled = a.load(a.scaled, e.integer(p), v)
                sums = [total.plus_product(f[p], scaled) for f, total in zip(factors, sums, strict=True)]
            for t, total in enumerate(sums):
                a.store(total, a.rows, i + t, v)

    for_rows_outside(e, s, k0, width, update)


def _put_panel(a: WorkspaceMatrix, k0: Value, width: int) -> None:
    """Write a swept panel back to the columns above it, and its block to its rows."""
    e, s = a.e, a.s
    last = _last_vector(a, k0)
    with e.loop(0, last + 1) as v:
        columns = [a.load(a.panel_rows, e.integer(q), v).conjugate() for q in range(width)]
        for p in range(s.parts):
            values = [column.parts[p] for column in columns]
            store_columns(e, values, _places(a, v * e.lanes, k0, p))
    with e.loop(k0 >> (e.lanes.bit_length() - 1), last + 1) as v:
        for q in range(width):
            a.store(a.load(a.panel_rows, e.integer(q), v), a.rows, k0 + q, v)


def _write(a: WorkspaceMatrix, index: Value) -> None:
    e, s = a.e, a.s
    _sum_up(a, finish=True)
    norm = _norm(a)
    first, second = a.scale()
    target = e.at(e.inverse, index * s.size)
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

        each_vector_of_row(e, s.n, give)
    a.put_aside(largest.get(), norm)
