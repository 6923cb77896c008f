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

from llvmlite import ir

from dask_batchinv.kernels.cpu import within_triangle
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.cpu.symmetric_pivots import Symmetry
from dask_batchinv.kernels.cpu.within_workspace import (
    PANEL,
    Shape,
    WorkspaceMatrix,
    each_block,
    for_rows_outside,
    prefetch_next,
    report,
)
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number, constant_number
from dask_batchinv.kernels.emit.transpose import exchange, load_columns, store_columns
from dask_batchinv.kernels.emit.values import Value, constant

_HERMITIAN = Symmetry(is_hermitian=True)


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time."""
    return Shape.of(spec, together=1).workspace


def write(spec: KernelSpec) -> str:
    """Write the kernel: it inverts `count` positive definite matrices, one after the other."""
    s = Shape.of(spec, together=1)
    e = Emitter(spec.name, spec.itemsize, spec.lanes)
    a = WorkspaceMatrix(e, s, e.integer(0))
    with e.loop(0, e.count) as index:
        within_triangle.measure(a, index, _HERMITIAN)
        within_triangle.read(a, index, _HERMITIAN)

        def panel(k0: Value, width: int) -> None:
            prefetch_next(e, s, index, k0, k0, PANEL)
            _sweep_panel(a, k0, width)
            _update_others(a, index, k0, width)
            _put_panel(a, k0, width)

        each_block(e, s.n, PANEL, panel)
        within_triangle.write(a, index, _HERMITIAN)
        report(a, index, lambda size: size <= 0.0)
    return e.finish()


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
