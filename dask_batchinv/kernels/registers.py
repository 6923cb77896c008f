"""One matrix per lane, in registers: for the smallest matrices.

A vector of W lanes holds the same entry of W matrices, so that one instruction works on all of them. Everything is
unrolled. In place: general matrices by Gauss-Jordan elimination with partial pivoting, where exchanges of rows are
selections; positive definite ones as in `definite`.
"""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels import definite as definite_inverse
from dask_batchinv.kernels import scaling
from dask_batchinv.kernels.emit import Emitter, Value
from dask_batchinv.kernels.numbers import Number

Matrix = list[list[Number]]

#: How far ahead of the work memory is asked for; measured.
AHEAD_NBYTES = 4096


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
    source, target, info_target, rcond_target, count, _ = e.arguments
    size = n * n * parts
    with e.loop(0, count) as group:
        base = group * (lanes * size)
        _ask_ahead(e, source, target, base, size)
        entries = e.load_columns(lambda lane: e.at(source, base + lane * size), size)
        used = [_is_read(at, n, parts) or not definite for at in range(size)]
        finite, scale = _measure(e, [entry for entry, use in zip(entries, used, strict=True) if use])
        entries = _multiply(e, entries, scale)
        a = [[Number(e, tuple(entries[(i * n + j) * parts :][:parts])) for j in range(n)] for i in range(n)]
        if definite:
            _mirror(a)
        norm = _norm(e, a)
        pivot = _invert_definite(e, a) if definite else _eliminate(e, a)
        norm_of_inverse = _norm(e, a)
        entries = [part for row in a for number in row for part in number.parts]
        entries = [entry + 0.0 for entry in _multiply(e, entries, scale)]  # no negative zeros
        overflow = _overflow(e, entries, norm_of_inverse, scale)
        info = scaling.outcome(e, pivot, finite, overflow)
        e.store_columns(_nan_where_failed(e, entries, info), lambda lane: e.at(target, base + lane * size))
        at = group * lanes
        e.store(e.resize(info, e.int32), e.at(info_target, at, e.int32), align=4)
        e.store(scaling.rcond(e, info, finite, norm, norm_of_inverse), e.at(rcond_target, at))
    return e.finish()


def _ask_ahead(e: Emitter, source: Value, target: Value, base: Value, size: int) -> None:
    byte = ir.IntType(8)
    for at in range(0, e.lanes * size * e.itemsize, 64):
        e.prefetch(e.at(e.at(source, base), AHEAD_NBYTES + at, byte))
        e.prefetch(e.at(e.at(target, base), AHEAD_NBYTES + at, byte), write=True)


def _is_read(at: int, n: int, parts: int) -> bool:
    """Whether a number belongs to the upper triangle of a Hermitian matrix; imaginary parts of its diagonal do not."""
    (i, j), part = divmod(at // parts, n), at % parts
    return i < j or (i == j and part == 0)


def _measure(e: Emitter, entries: list[Value]) -> tuple[Value, scaling.Scale]:
    largest, smallest = e.integers(0), e.integers(-1)
    for entry in entries:
        bits = e.bits(e.absolute(entry))
        largest = e.unsigned("umax", largest, bits)
        smallest = e.unsigned("umin", smallest, bits - 1)  # zero becomes the largest of all
    return scaling.is_finite(e, largest), scaling.unit_scale(e, largest, smallest + 1)


def _multiply(e: Emitter, entries: list[Value], scale: scaling.Scale) -> list[Value]:
    variables = [e.variable(entry * scale.first) for entry in entries]
    with e.when(scale.is_long):
        for variable in variables:
            variable.set(variable.get() * scale.second)
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
    norm = sums[0]
    for total in sums[1:]:
        norm = scaling.larger_sum(e, total, norm)
    return norm


def _eliminate(e: Emitter, a: Matrix) -> Value:
    """Invert in place; return the number of the first pivot that is zero."""
    n = len(a)
    failed = e.integers(0)
    chosen = []
    for k in range(n):
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


def _invert_definite(e: Emitter, a: Matrix) -> Value:
    def put(i: int, j: int, number: Number) -> None:
        a[i][j] = number

    failed = definite_inverse.invert(e, len(a), lambda i, j: a[i][j], put, lambda: None)
    _mirror(a)
    return failed


def _overflow(e: Emitter, entries: list[Value], norm: Value, scale: scaling.Scale) -> Value:
    """Whether an entry is not finite; looked at one by one only where even their sum is not."""
    found = e.variable(e.bit_words(e.integers(0).eq(1)))
    bound = norm * scale.first * scale.second
    with e.when(e.any(~(bound < float("inf")))):
        largest = e.integers(0)
        for entry in entries:
            largest = e.unsigned("umax", largest, e.bits(e.absolute(entry)))
        found.set(e.bit_words(~scaling.is_finite(e, largest)))
    return ~found.get().eq(0)


def _nan_where_failed(e: Emitter, entries: list[Value], info: Value) -> list[Value]:
    good = info.eq(0)
    variables = [e.variable(entry) for entry in entries]
    with e.when(e.any(~good)):
        for variable in variables:
            variable.set(e.select(good, variable.get(), float("nan")))
    return [variable.get() for variable in variables]
