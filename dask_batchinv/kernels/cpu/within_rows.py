"""Rows of a matrix in the order of memory, in and out of the scratch for kernels that work within a matrix."""

from __future__ import annotations

from collections.abc import Callable

from dask_batchinv.kernels.cpu.scaling import without_sign_of_zero
from dask_batchinv.kernels.cpu.within_workspace import WorkspaceMatrix, each_vector, each_vector_of_row
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.values import Value


def read_rows(a: WorkspaceMatrix, index: Value, change: Callable[[Number, Value, Value], Number]) -> None:
    """Read the rows of a matrix; what goes into the scratch is ``change(number, i, v)`` of vector v of row i."""
    e, s = a.e, a.s
    source = e.at(e.a, index * s.size)
    with e.loop(0, s.n) as i:

        def take(c: Value, count: int, i: Value = i) -> None:
            place = e.at(source, (i * s.n + c) * s.parts)
            parts = [e.load_first(e.at(place, p * e.lanes), count * s.parts - p * e.lanes) for p in range(s.parts)]
            if s.parts == 2:
                parts = [e.shuffle(parts[0], parts[1], range(p, 2 * e.lanes, 2)) for p in range(2)]
            v = c / e.lanes
            a.store(change(Number(e, tuple(parts)), i, v), a.rows, i, v)

        each_vector_of_row(e, s.n, take)
    nothing = Number(e, tuple(e.numbers(0.0) for _ in range(s.parts)))
    with e.loop(s.n, s.length) as i:
        each_vector(e, s.vectors, lambda v: a.store(nothing, a.rows, i, v))


def write_rows(a: WorkspaceMatrix, index: Value) -> Value:
    """Write the rows of an inverse, scaled back; return the bits of their largest numbers, lane by lane."""
    e, s = a.e, a.s
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
    return largest.get()
