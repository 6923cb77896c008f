"""One matrix per lane, in registers: for the smallest matrices.

A vector of W lanes holds the same entry of W matrices, so that one instruction works on all of them. Everything is
unrolled. In place: general matrices by Gauss-Jordan elimination with partial pivoting, where exchanges of rows are
selections; positive definite ones as in `definite`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from dask_batchinv.kernels.cpu import registers_ldl, scaling
from dask_batchinv.kernels.cpu.streaming import Traffic
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.transpose import load_stack, store_stack
from dask_batchinv.kernels.emit.values import Value

Matrix = registers_ldl.Matrix


def write(name: str, n: int, itemsize: int, parts: int, lanes: int, *, definite: bool) -> str:
    """Write the kernel: it inverts `count` groups of as many matrices as there are lanes.

    Parameters
    ----------
    name : str
        The name of the function.
    n : int
        The size of a matrix.
    itemsize, parts, lanes : int
        Bytes of a real, reals of a number (2 if complex), reals in a vector.
    definite : bool
        Whether the matrices are positive definite: then only their upper triangles count.
    """
    e = Emitter(name, itemsize, lanes)
    source, _, info_target, rcond_target, count, scratch, _ = e.arguments
    size = n * n * parts
    traffic = Traffic(e, size, scratch)
    with e.loop(0, count) as group:
        entries = load_stack(e, e.at(source, group * (lanes * size)), size)
        measure = scaling.Measure(e)
        for place, entry in enumerate(entries):
            if not definite or _is_read(place, n, parts):
                measure.look(entry)
        finite, scale = measure.of_lanes()
        entries = _multiply(e, entries, scale)
        a = [[Number(e, tuple(entries[(i * n + j) * parts :][:parts])) for j in range(n)] for i in range(n)]
        if definite:
            _mirror(a)
        norm = _norm(e, a)
        if definite:
            pauses = itertools.count()
            pivot = registers_ldl.invert(e, a, lambda: traffic.step(group, next(pauses), registers_ldl.pauses(n)))
            _mirror(a)
        else:
            pivot = _eliminate(e, a, lambda k: traffic.step(group, k, n))
        norm_of_inverse = _norm(e, a)
        entries = _multiply(e, [part for row in a for number in row for part in number.parts], scale)
        info = e.variable(e.select(finite, pivot, -1))
        rcond = e.variable(e.numbers(1.0) / (norm * norm_of_inverse))
        with e.when(e.any(~(norm_of_inverse * scale.first * scale.second < float("inf")))):
            # The sum is too large; is one of its numbers?
            info.set(e.select(_is_finite(e, entries) | ~info.get().eq(0), info.get(), -2))
        variables = [e.variable(entry) for entry in entries]
        with e.when(e.any(~info.get().eq(0))):
            for variable in variables:
                variable.set(e.select(info.get().eq(0), variable.get(), float("nan")))
            rcond.set(scaling.rcond_of_failed(e, info.get(), finite, rcond.get()))
        store_stack(e, [variable.get() for variable in variables], traffic.place(group))
        at = group * lanes
        e.store(e.resize(info.get(), e.int32), e.at(info_target, at, e.int32), align=4)
        e.store(rcond.get(), e.at(rcond_target, at))
    traffic.finish(count)
    return e.finish()


def _is_read(at: int, n: int, parts: int) -> bool:
    """Whether a number belongs to the upper triangle of a Hermitian matrix; imaginary parts of its diagonal do not."""
    (i, j), part = divmod(at // parts, n), at % parts
    return i < j or (i == j and part == 0)


def _multiply(e: Emitter, entries: list[Value], scale: scaling.Scale) -> list[Value]:
    """Return entries scaled, with no negative zeros."""
    variables = [e.variable(scaling.without_sign_of_zero(e, entry, scale.first)) for entry in entries]
    with e.when(scale.is_long):
        for variable in variables:
            variable.set(scaling.without_sign_of_zero(e, variable.get(), scale.second))
    return [variable.get() for variable in variables]


def _mirror(a: Matrix) -> None:
    for i, row in enumerate(a):
        row[i] = row[i].real_part()
        for j in range(i):
            row[j] = a[j][i].conjugate()


def _norm(e: Emitter, a: Matrix) -> Value:
    """Return the 1-norm: the largest sum of a column."""
    sums = [row.modulus() for row in a[0]]
    for row in a[1:]:
        sums = [total + number.modulus() for total, number in zip(sums, row, strict=True)]
    return scaling.largest_sum(e, sums)


def _eliminate(e: Emitter, a: Matrix, before: Callable[[int], None]) -> Value:
    """Invert in place; return the number of the first pivot that is zero. `before` is called before each step."""
    n = len(a)
    failed = e.integers(0)
    chosen = []
    for k in range(n):
        before(k)
        best, row = a[k][k].size(), e.integers(k)
        for i in range(k + 1, n):
            size = a[i][k].size()
            more = size > best
            best, row = e.select(more, size, best), e.select(more, e.integers(i), row)
        failed = e.select(best.eq(0.0) & failed.eq(0), e.integers(k + 1), failed)
        chosen.append(row)
        pivot_row = a[k]
        for i in range(k + 1, n):
            here = row.eq(i)
            a[i], pivot_row = (
                [old.where(here, number) for old, number in zip(a[k], a[i], strict=True)],
                [number.where(here, best) for number, best in zip(a[i], pivot_row, strict=True)],
            )
        inverse = pivot_row[k].reciprocal()
        for i in range(n):
            if i != k:
                factor = -(a[i][k] * inverse)
                a[i] = [factor if j == k else a[i][j].plus_product(factor, pivot_row[j]) for j in range(n)]
        a[k] = [inverse if j == k else pivot_row[j] * inverse for j in range(n)]
    # What was done to rows has to be undone to columns.
    for k in reversed(range(n)):
        for i in range(k + 1, n):
            here = chosen[k].eq(i)
            for r in a:
                r[k], r[i] = r[i].where(here, r[k]), r[k].where(here, r[i])
    return failed


def _is_finite(e: Emitter, entries: list[Value]) -> Value:
    largest = e.integers(0)
    for entry in entries:
        largest = e.unsigned("umax", largest, e.bits(e.absolute(entry)))
    return scaling.is_finite(e, largest)
