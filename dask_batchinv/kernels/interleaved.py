"""One matrix per lane, in the first-level cache: for matrices that do not fit into registers.

The scratch holds a group of as many matrices as there are lanes, entry by entry: vector (i, j) has that entry of
all of them. The arithmetic is that of `registers`, in loops.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from dask_batchinv.kernels import definite as definite_inverse
from dask_batchinv.kernels import scaling
from dask_batchinv.kernels.emit import Emitter, Value, Variable
from dask_batchinv.kernels.numbers import Number
from dask_batchinv.kernels.traffic import Traffic, buffer_nbytes

#: Reals of a row that are kept in registers while the rows pass by.
_HELD = {64: 16, 32: 8, 16: 8}


def scratch_nbytes(n: int, itemsize: int, parts: int, lanes: int) -> int:
    """Bytes of scratch memory: the matrices, two rows of numbers, and the order of the columns for each lane."""
    vectors = (n + 2) * n * parts + n + lanes * -(-n * parts // lanes)
    return vectors * lanes * itemsize + buffer_nbytes(n * n * parts, lanes * itemsize)


def write(name: str, n: int, itemsize: int, parts: int, lanes: int, *, definite: bool) -> str:
    """Write the kernel; the parameters are those of `registers.write`."""
    e = Emitter(name, itemsize, lanes)
    g = _Group(e, n, parts)
    traffic = Traffic(e, g.size, g.buffer)
    with e.loop(0, e.arguments[4]) as group:
        finite, scale = _read(g, group, definite)
        norm = _scale_definite(g, scale) if definite else _scale(g, scale)
        failed = e.variable(e.integers(0))
        if definite:
            pauses = itertools.count()
            failed.set(_invert_definite(g, lambda: traffic.step(group, next(pauses), definite_inverse.pauses(n))))
        else:
            with e.loop(0, n) as k:
                traffic.step(group, k, n)
                _eliminate(g, k, failed)
        norm_of_inverse = _mirror(g) if definite else _norm(g)
        info = _judge(g, failed.get(), finite, scale, norm_of_inverse)
        at = group * lanes
        e.store(e.resize(info, e.int32), e.at(e.arguments[2], at, e.int32), align=4)
        e.store(scaling.rcond(e, info, finite, norm, norm_of_inverse), e.at(e.arguments[3], at))
        if definite:
            _write_as_it_is(g, traffic.place(group), scale)
        elif e.can_permute and n * parts <= 2 * lanes:
            _write_permuted(g, traffic.place(group), scale)
        else:
            _exchange_columns(g)
            _write_as_it_is(g, traffic.place(group), scale)
    traffic.finish(e.arguments[4])
    return e.finish()


class _Group:
    """The scratch of a group."""

    def __init__(self, e: Emitter, n: int, parts: int):
        self.e, self.n, self.parts = e, n, parts
        self.size = n * n * parts
        self.base = e.arguments[5]
        self.factors = self.vector(self.size)
        self.row = self.vector(self.size + n * parts)
        self.chosen = self.vector(self.size + 2 * n * parts)
        self.orders = self.vector(self.size + 2 * n * parts + n)
        self.buffer = self.vector(self.size + 2 * n * parts + n + e.lanes * -(-n * parts // e.lanes))

    def vector(self, index: Value | int, base: Value | None = None) -> Value:
        """Return the address of a vector."""
        index = self.e.integer(index) if isinstance(index, int) else index
        return self.e.at(base or self.base, index * self.e.lanes)

    def read(self, address: Value) -> Number:
        """Load the number at an address."""
        load, align = self.e.load, self.e.nbytes
        return Number(self.e, tuple(load(self.vector(p, address), align=align) for p in range(self.parts)))

    def keep(self, number: Number, address: Value) -> None:
        """Store a number at an address."""
        for p, part in enumerate(number.parts):
            self.e.store(part, self.vector(p, address), align=self.e.nbytes)

    def entry(self, i: Value, j: Value | int) -> Value:
        """Return the address of an entry of the matrices."""
        return self.vector((i * self.n + j) * self.parts)

    def item(self, table: Value, i: Value) -> Value:
        """Return the address of a number in `factors` or `row`."""
        return self.vector(i * self.parts, table)

    def mask_of(self, rows: Value, i: Value) -> Value:
        """Mask of the lanes where a vector of row numbers is i."""
        return rows.eq(self.e.splat(self.e.resize(i, self.e.word)))


# --- in ---------------------------------------------------------------------------------------------------------


def _read(g: _Group, group: Value, definite: bool) -> tuple[Value, scaling.Scale]:
    """Interleave the matrices, and find their scale."""
    e = g.e
    base = e.at(e.arguments[0], group * (e.lanes * g.size))
    largest, smallest = e.variable(e.integers(0)), e.variable(e.integers(-1))

    def look(entry: Value) -> None:
        bits = e.bits(e.absolute(entry))
        largest.set(e.unsigned("umax", largest.get(), bits))
        smallest.set(e.unsigned("umin", smallest.get(), bits - 1))

    def take(start: Value, count: int) -> None:
        entries = e.load_columns(lambda lane: e.at(base, start + lane * g.size), count)
        for q, entry in enumerate(entries):
            if not definite:
                look(entry)
            e.store(entry, g.vector(start + q), align=e.nbytes)

    _each_piece(g, take)
    if definite:
        for i, j in _upper(g):
            parts = g.read(g.entry(e.integer(i), j)).parts
            for part in parts if i < j else parts[:1]:
                look(part)
    return scaling.is_finite(e, largest.get()), scaling.unit_scale(e, largest.get(), smallest.get() + 1)


def _each_piece(g: _Group, body: object) -> None:
    """Run the body for pieces of the numbers of a matrix as they stand in memory; the last may overlap."""
    assert callable(body)
    piece = min(max(1, g.e.lanes // 2), g.size)
    with g.e.loop(0, g.size - g.size % piece, piece) as start:
        body(start, piece)
    if g.size % piece:
        body(g.e.integer(g.size - piece), piece)


def _upper(g: _Group) -> list[tuple[int, int]]:
    return [(i, j) for i in range(g.n) for j in range(i, g.n)]


def _scale(g: _Group, scale: scaling.Scale) -> Value:
    """Bring the matrices to unit size, and return their 1-norms."""
    e = g.e
    _multiply_rarely(g, scale)
    norm = e.variable(e.numbers(0.0))
    with e.loop(0, g.n) as j:
        total = e.numbers(0.0)
        for i in range(g.n):
            number = g.read(g.entry(e.integer(i), j)).times_real(scale.first)
            g.keep(number, g.entry(e.integer(i), j))
            total = number.modulus() if i == 0 else total + number.modulus()
        norm.set(scaling.larger_sum(e, total, norm.get()))
    return norm.get()


def _scale_definite(g: _Group, scale: scaling.Scale) -> Value:
    e = g.e
    _multiply_rarely(g, scale)
    sums = [e.numbers(0.0)] * g.n
    for i, j in _upper(g):
        number = g.read(g.entry(e.integer(i), j)).times_real(scale.first)
        if i == j:
            number = number.real_part()
        g.keep(number, g.entry(e.integer(i), j))
        _add_mirrored(sums, number, i, j)
    return _largest(e, sums)


def _add_mirrored(sums: list[Value], number: Number, i: int, j: int) -> None:
    """Add an entry of the upper triangle to the sums of its column, and of the one where its mirror image is."""
    modulus = number.modulus()
    sums[j] = sums[j] + modulus
    if i != j:
        sums[i] = sums[i] + modulus


def _largest(e: Emitter, sums: list[Value]) -> Value:
    norm = sums[0]
    for total in sums[1:]:
        norm = scaling.larger_sum(e, total, norm)
    return norm


def _multiply_rarely(g: _Group, scale: scaling.Scale) -> None:
    e = g.e
    with e.when(scale.is_long), e.loop(0, g.size) as at:
        e.store(e.load(g.vector(at), align=e.nbytes) * scale.second, g.vector(at), align=e.nbytes)


# --- general matrices -------------------------------------------------------------------------------------------


def _eliminate(g: _Group, k: Value, failed: Variable) -> None:
    """One step of Gauss-Jordan elimination, rows k and the pivot's exchanged on the way."""
    e, n = g.e, g.n
    pivot, rows = _choose(g, k, failed)
    old = g.read(g.entry(k, k))
    inverse = pivot.reciprocal()
    minus = -inverse
    with e.loop(0, k) as i:
        g.keep(g.read(g.entry(i, k)) * minus, g.item(g.factors, i))
    with e.loop(k + 1, n) as i:
        g.keep(old.where(g.mask_of(rows, i), g.read(g.entry(i, k))) * minus, g.item(g.factors, i))
    width = max(1, _HELD[e.nbytes] // g.parts)
    for start in range(0, n, width):
        columns = range(start, min(n, start + width))
        pivot_row = _pivot_row(g, k, rows, columns)
        with e.loop(0, k) as i:
            factor = g.read(g.item(g.factors, i))
            for j, number in zip(columns, pivot_row, strict=True):
                g.keep(g.read(g.entry(i, j)).plus_product(factor, number), g.entry(i, j))
        with e.loop(k + 1, n) as i:
            factor, here = g.read(g.item(g.factors, i)), g.mask_of(rows, i)
            for j, number in zip(columns, pivot_row, strict=True):
                before = g.read(g.entry(k, j)).where(here, g.read(g.entry(i, j)))
                g.keep(before.plus_product(factor, number), g.entry(i, j))
        for j, number in zip(columns, pivot_row, strict=True):
            g.keep(number * inverse, g.entry(k, j))
    g.keep(inverse, g.item(g.factors, k))
    with e.loop(0, n) as i:
        g.keep(g.read(g.item(g.factors, i)), g.entry(i, k))


def _choose(g: _Group, k: Value, failed: Variable) -> tuple[Number, Value]:
    """Find the largest number of column k from row k on; return it and the number of its row."""
    e = g.e
    first = g.read(g.entry(k, k))
    best, rows = e.variable(first.size()), e.variable(e.splat(e.resize(k, e.word)))
    pivot = [e.variable(part) for part in first.parts]
    with e.loop(k + 1, g.n) as i:
        number = g.read(g.entry(i, k))
        size = number.size()
        more = size > best.get()
        best.set(e.select(more, size, best.get()))
        rows.set(e.select(more, e.splat(e.resize(i, e.word)), rows.get()))
        for kept, part in zip(pivot, number.parts, strict=True):
            kept.set(e.select(more, part, kept.get()))
    e.store(rows.get(), g.vector(k, g.chosen), align=e.nbytes)
    count = e.splat(e.resize(k + 1, e.word))
    failed.set(e.select(best.get().eq(0.0) & failed.get().eq(0), count, failed.get()))
    return Number(e, tuple(part.get() for part in pivot)), rows.get()


def _pivot_row(g: _Group, k: Value, rows: Value, columns: range) -> list[Number]:
    """Collect the pivot rows, each lane from its own."""
    e = g.e
    kept = [[e.variable(part) for part in g.read(g.entry(k, j)).parts] for j in columns]
    with e.loop(k + 1, g.n) as i:
        here = g.mask_of(rows, i)
        for j, variables in zip(columns, kept, strict=True):
            for variable, part in zip(variables, g.read(g.entry(i, j)).parts, strict=True):
                variable.set(e.select(here, part, variable.get()))
    return [Number(e, tuple(variable.get() for variable in variables)) for variables in kept]


# --- positive definite matrices -----------------------------------------------------------------------------------


def _invert_definite(g: _Group, step: Callable[[], None]) -> Value:
    # Values are fetched where they are used: the compiler, left to itself, would rather keep more of them in
    # registers than there are.
    base = [g.base]

    def pause() -> None:
        base[0] = g.e.launder(g.base)
        step()

    def address(i: int, j: int) -> Value:
        return g.vector((i * g.n + j) * g.parts, base[0])

    def get(i: int, j: int) -> Number:
        return g.read(address(i, j))

    def put(i: int, j: int, number: Number) -> None:
        g.keep(number, address(i, j))

    return definite_inverse.invert(g.e, g.n, get, put, pause)


def _mirror(g: _Group) -> Value:
    """Make whole matrices of triangles, and return their 1-norms."""
    e = g.e
    sums = [e.numbers(0.0)] * g.n
    for i, j in _upper(g):
        number = g.read(g.entry(e.integer(i), j))
        if i != j:
            g.keep(number.conjugate(), g.entry(e.integer(j), i))
        _add_mirrored(sums, number, i, j)
    return _largest(e, sums)


# --- out --------------------------------------------------------------------------------------------------------


def _norm(g: _Group) -> Value:
    e = g.e
    norm = e.variable(e.numbers(0.0))
    with e.loop(0, g.n) as j:
        total = g.read(g.entry(e.integer(0), j)).modulus()
        for i in range(1, g.n):
            total = total + g.read(g.entry(e.integer(i), j)).modulus()
        norm.set(scaling.larger_sum(e, total, norm.get()))
    return norm.get()


def _judge(g: _Group, failed: Value, finite: Value, scale: scaling.Scale, norm: Value) -> Value:
    """Return ``info``, after putting NaN where it is not 0."""
    e = g.e
    overflow = e.variable(e.integers(0))
    with e.when(e.any(~(norm * scale.first * scale.second < float("inf")))):
        # The sum is too large; is one of its numbers?
        largest = e.variable(e.integers(0))
        with e.loop(0, g.size) as at:
            entry = e.load(g.vector(at), align=e.nbytes) * scale.first * scale.second
            largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(entry))))
        overflow.set(e.bit_words(~scaling.is_finite(e, largest.get())))
    info = scaling.outcome(e, failed, finite, ~overflow.get().eq(0))
    good = info.eq(0)
    with e.when(e.any(~good)), e.loop(0, g.size) as at:
        entry = e.load(g.vector(at), align=e.nbytes)
        e.store(e.select(good, entry, float("nan")), g.vector(at), align=e.nbytes)
    return info


def _write_as_it_is(g: _Group, base: Value, scale: scaling.Scale) -> None:
    e = g.e
    _multiply_rarely(g, scale)

    def give(start: Value, count: int) -> None:
        entries = [e.load(g.vector(start + q), align=e.nbytes) for q in range(count)]
        entries = [scaling.without_sign_of_zero(e, entry, scale.first) for entry in entries]
        e.store_columns(entries, lambda lane: e.at(base, start + lane * g.size))

    _each_piece(g, give)


def _exchange_columns(g: _Group) -> None:
    """Undo to columns what was done to rows."""
    e = g.e
    with e.loop(0, g.n) as row:
        for k in reversed(range(g.n)):
            chosen = e.load(g.vector(k, g.chosen), e.words, align=e.nbytes)
            mine = g.read(g.entry(row, k))
            for i in range(k + 1, g.n):
                here = chosen.eq(i)
                other = g.read(g.entry(row, i))
                g.keep(mine.where(here, other), g.entry(row, i))
                mine = other.where(here, mine)
            g.keep(mine, g.entry(row, k))


def _write_permuted(g: _Group, base: Value, scale: scaling.Scale) -> None:
    """Write row by row, putting the columns in order within the registers."""
    e, n, length = g.e, g.n, g.n * g.parts
    _multiply_rarely(g, scale)
    blocks = range(-(-length // e.lanes))
    # For each column of the inverse the column of the scratch where it is; then the same lane by lane.
    source = [e.integers(j) for j in range(n)]
    for k in reversed(range(n)):
        chosen = e.load(g.vector(k, g.chosen), e.words, align=e.nbytes)
        for i in range(k + 1, n):
            here = chosen.eq(i)
            source[k], source[i] = e.select(here, source[i], source[k]), e.select(here, source[k], source[i])
    order = [source[c // g.parts] * g.parts + c % g.parts if c < length else e.integers(0) for c in _lanes(e, blocks)]
    for b in blocks:
        orders = e.transpose([e.from_bits(index) for index in order[b * e.lanes :][: e.lanes]])
        for lane, value in enumerate(orders):
            e.store(value, g.vector(b * e.lanes + lane, g.orders), align=e.nbytes)
    with e.loop(0, n) as line:
        row = g.entry(line, 0)
        numbers = [
            scaling.without_sign_of_zero(e, e.load(g.vector(c, row), align=e.nbytes), scale.first)
            if c < length
            else e.numbers(0.0)
            for c in _lanes(e, blocks)
        ]
        turned = [e.transpose(numbers[b * e.lanes :][: e.lanes]) for b in blocks]
        for lane in range(e.lanes):
            for b in blocks:
                wanted = e.load(g.vector(b * e.lanes + lane, g.orders), e.words, align=e.nbytes)
                place = e.at(base, line * length + (lane * g.size + b * e.lanes))
                e.store_first(e.permute([block[lane] for block in turned], wanted), place, length - b * e.lanes)


def _lanes(e: Emitter, blocks: range) -> range:
    return range(len(blocks) * e.lanes)
