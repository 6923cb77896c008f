"""Gauss-Jordan elimination with partial pivoting, in place, for a group of interleaved general matrices.

Two steps are done at a time, with one load and one store of each entry. Each lane has pivot rows of its own: they are
collected by selection, and what stood in their places before is selected while the rows pass by. Every entry gets the
operations of single steps, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dask_batchinv.kernels.cpu import interleaved, scaling
from dask_batchinv.kernels.cpu.interleaved import Inverted, multiply_rarely, scaled_back, write_as_it_is
from dask_batchinv.kernels.cpu.interleaved_group import Group
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.transpose import transpose
from dask_batchinv.kernels.emit.values import Value, Variable

#: Columns whose numbers in two pivot rows, and in the rows whose places they took, are kept in registers: by parts of
#: a number, for 32 registers and for 16; measured.
_HELD = {1: {64: 5, 32: 3, 16: 3}, 2: {64: 3, 32: 1, 16: 1}}


def invert(g: Group, scale: scaling.Scale, between_steps: Callable[[Value | int], None]) -> Inverted:
    """Invert general matrices; put the columns in order on the way out."""
    norm = _scale(g, scale)
    failed = _eliminate(g, between_steps)

    def store(target: Value) -> Value:
        if g.e.can_permute:
            return _write_permuted(g, target, scale)
        _exchange_columns(g)
        norm_of_inverse = _norm(g)
        write_as_it_is(g, target, scale)
        return norm_of_inverse

    return Inverted(failed, norm, store)


def _eliminate(g: Group, between_steps: Callable[[Value | int], None]) -> Value:
    """Invert but for the order of the columns; return the number of the first pivot that is zero."""
    e, n = g.e, g.n
    failed = e.variable(e.integers(0))
    with e.loop(0, n - n % 2, 2) as k:
        between_steps(k)
        _two_steps(g, k, failed, lambda: between_steps(k + 1))
    if n % 2:
        between_steps(n - 1)
        _last_step(g, failed)
    return failed.get()


@dataclass(frozen=True)
class _Pivot:
    """The pivots of a step."""

    rows: Value
    """Their rows."""
    old: Number
    """The numbers whose places they took."""
    inverse: Number
    factors: Value
    """The table of what the pivot rows are multiplied by."""


def _choose(g: Group, k: Value, failed: Variable, factors: Value) -> _Pivot:
    """Find the largest numbers of column k from row k on."""
    e = g.e
    old = g.read(g.entry(k, k))
    best, rows = e.variable(old.size()), e.variable(g.row_number(k))
    pivot = [e.variable(part) for part in old.parts]
    with e.loop(k + 1, g.n) as i:
        number = g.read(g.entry(i, k))
        size = number.size()
        more = size > best.get()
        best.set(e.select(more, size, best.get()))
        rows.set(e.select(more, g.row_number(i), rows.get()))
        for kept, part in zip(pivot, number.parts, strict=True):
            kept.set(e.select(more, part, kept.get()))
    e.store(rows.get(), g.vector(k, g.chosen), align=e.nbytes)
    failed.set(e.select(best.get().eq(0.0) & failed.get().eq(0), g.row_number(k + 1), failed.get()))
    return _Pivot(rows.get(), old, Number(e, tuple(part.get() for part in pivot)).reciprocal(), factors)


def _two_steps(g: Group, k: Value, failed: Variable, between: Callable[[], None]) -> None:
    """Steps k and k + 1."""
    e, n, after = g.e, g.n, k + 1
    one = _choose(g, k, failed, g.factors[0])
    _first_factors(g, k, one)
    between()
    two = _choose(g, after, failed, g.factors[1])
    old_factor = g.read(g.item(one.factors, after))
    pivot_factor = _second_factors(g, after, one, two, old_factor)
    width = _HELD[g.parts][e.nbytes]
    strips = -(-(n - 2) // width)
    for strip in range(strips):
        numbers = range((n - 2) * strip // strips, (n - 2) * (strip + 1) // strips)
        # All columns but these two, from the next one on around to the first of them.
        columns = [e.select(k + 2 + t < n, k + 2 + t, k + 2 + t - n) for t in numbers]
        _strip(g, k, one, two, pivot_factor, [_Column(g, column) for column in columns])
    with e.loop(0, n) as i:
        first, second = (g.read(g.item(pivot.factors, i)) for pivot in (one, two))
        g.keep(first.plus_product(second, pivot_factor), g.entry(i, k))
        g.keep(second, g.entry(i, after))
    second = g.read(g.item(two.factors, k))
    g.keep(one.inverse.plus_product(second, pivot_factor), g.entry(k, k))
    g.keep(pivot_factor * two.inverse, g.entry(after, k))
    g.keep(two.inverse, g.entry(after, after))


def _first_factors(g: Group, k: Value, one: _Pivot) -> None:
    """Find the factors of the first step, and do it for the column of the second."""
    e = g.e
    minus, old = -one.inverse, g.read(g.entry(k, k + 1))
    of_pivot = _collect(g, one.rows, k + 1, [_Column(g, k + 1)], [old])[0]

    def do(i: Value, number: Number, next_number: Number) -> None:
        factor = number * minus
        g.keep(factor, g.item(one.factors, i))
        g.keep(next_number.plus_product(factor, of_pivot), g.entry(i, k + 1))

    with e.loop(0, k) as i:
        do(i, g.read(g.entry(i, k)), g.read(g.entry(i, k + 1)))
    with e.loop(k + 1, g.n) as i:
        here = g.mask_of(one.rows, i)
        do(i, one.old.where(here, g.read(g.entry(i, k))), old.where(here, g.read(g.entry(i, k + 1))))
    g.keep(of_pivot * one.inverse, g.entry(k, k + 1))


def _second_factors(g: Group, after: Value, one: _Pivot, two: _Pivot, old_factor: Number) -> Number:
    """Find the factors of the second step; exchange those of the first as its rows are; return that of its pivot."""
    e, minus = g.e, -two.inverse
    with e.loop(0, after) as i:
        g.keep(g.read(g.entry(i, after)) * minus, g.item(two.factors, i))
    taken = [e.variable(part) for part in old_factor.parts]
    with e.loop(after + 1, g.n) as i:
        here = g.mask_of(two.rows, i)
        g.keep(two.old.where(here, g.read(g.entry(i, after))) * minus, g.item(two.factors, i))
        place = g.item(one.factors, i)
        factor = g.read(place)
        for variable, part in zip(taken, factor.parts, strict=True):
            variable.set(e.select(here, part, variable.get()))
        # Not a masked store, which is slow on some processors.
        g.keep(old_factor.where(here, factor), e.launder(place))
    return Number(e, tuple(variable.get() for variable in taken))


class _Column:
    """A column of the matrices, by the address of its first entry."""

    def __init__(self, g: Group, number: Value):
        self.g = g
        # Keeps LLVM from recomputing the address.
        self.top = g.e.launder(g.entry(0, number))

    def read(self, row: Value) -> Number:
        """Load an entry."""
        return self.g.read(self._entry(row))

    def keep(self, number: Number, row: Value) -> None:
        """Store an entry."""
        self.g.keep(number, self._entry(row))

    def _entry(self, row: Value) -> Value:
        return self.g.vector(row * (self.g.n * self.g.parts), self.top)


def _strip(g: Group, k: Value, one: _Pivot, two: _Pivot, pivot_factor: Number, columns: list[_Column]) -> None:
    """Do both steps in some of the other columns."""
    e, after = g.e, k + 1
    upper, lower = ([column.read(row) for column in columns] for row in (k, after))
    # Where the first pivots are in the row of the second, there stands now what was in the row of the first.
    here = g.mask_of(one.rows, after)
    first = [a.where(here, b) for a, b in zip(lower, upper, strict=True)]
    lower = [b.where(here, a) for a, b in zip(lower, upper, strict=True)]
    first = _collect(g, one.rows, after + 1, columns, first)
    second = _collect(g, two.rows, after + 1, columns, lower)
    # And where both are in one row, the second finds there what the first has put there.
    same = one.rows.eq(two.rows)
    second = [b.where(same, a).plus_product(pivot_factor, r) for a, b, r in zip(second, upper, first, strict=True)]

    def do(i: Value, before: list[Number]) -> None:
        factors = [g.read(g.item(pivot.factors, i)) for pivot in (one, two)]
        for column, number, p, q in zip(columns, before, first, second, strict=True):
            column.keep(number.plus_product(factors[0], p).plus_product(factors[1], q), i)

    with e.loop(0, k) as i:
        do(i, [column.read(i) for column in columns])
    with e.loop(after + 1, g.n) as i:
        masks = [g.mask_of(pivot.rows, i) for pivot in (one, two)]
        numbers = [a.where(masks[0], column.read(i)) for a, column in zip(upper, columns, strict=True)]
        do(i, [b.where(masks[1], number) for b, number in zip(lower, numbers, strict=True)])
    factor = g.read(g.item(two.factors, k))
    for column, p, q in zip(columns, first, second, strict=True):
        column.keep((p * one.inverse).plus_product(factor, q), k)
        column.keep(q * two.inverse, after)


def _collect(g: Group, rows: Value, start: Value, columns: list[_Column], first: list[Number]) -> list[Number]:
    """Collect a row of each lane's own, from `first` or below."""
    e = g.e
    kept = [[e.variable(part) for part in number.parts] for number in first]
    with e.loop(start, g.n) as i:
        here = g.mask_of(rows, i)
        for column, variables in zip(columns, kept, strict=True):
            for variable, part in zip(variables, column.read(i).parts, strict=True):
                variable.set(e.select(here, part, variable.get()))
    return [Number(e, tuple(variable.get() for variable in variables)) for variables in kept]


def _last_step(g: Group, failed: Variable) -> None:
    """Step n - 1, for which no row is left to choose."""
    e, k = g.e, g.e.integer(g.n - 1)
    pivot = g.read(g.entry(k, k))
    failed.set(e.select(pivot.size().eq(0.0) & failed.get().eq(0), e.integers(g.n), failed.get()))
    inverse = pivot.reciprocal()
    minus = -inverse
    with e.loop(0, k) as i:
        g.keep(g.read(g.entry(i, k)) * minus, g.entry(i, k))
    width = 2 * _HELD[g.parts][e.nbytes]
    for start in range(0, g.n - 1, width):
        columns = range(start, min(g.n - 1, start + width))
        row = [g.read(g.entry(k, j)) for j in columns]
        with e.loop(0, k) as i:
            factor = g.read(g.entry(i, k))
            for j, number in zip(columns, row, strict=True):
                g.keep(g.read(g.entry(i, j)).plus_product(factor, number), g.entry(i, j))
        for j, number in zip(columns, row, strict=True):
            g.keep(number * inverse, g.entry(k, j))
    g.keep(inverse, g.entry(k, k))


# --- in and out ---------------------------------------------------------------------------------------------------


def _scale(g: Group, scale: scaling.Scale) -> Value:
    """Bring the matrices to unit size, and return their 1-norms."""
    e = g.e
    multiply_rarely(g, scale)
    norm = e.variable(e.numbers(0.0))
    with e.loop(0, g.n) as j:
        total = e.numbers(0.0)
        for i in range(g.n):
            number = g.read(g.entry(e.integer(i), j)).times_real(scale.first)
            g.keep(number, g.entry(e.integer(i), j))
            total = number.modulus() if i == 0 else total + number.modulus()
        norm.set(scaling.larger_sum(e, total, norm.get()))
    return norm.get()


def _norm(g: Group) -> Value:
    e = g.e
    norm = e.variable(e.numbers(0.0))
    with e.loop(0, g.n) as j:
        total = g.read(g.entry(e.integer(0), j)).modulus()
        for i in range(1, g.n):
            total = total + g.read(g.entry(e.integer(i), j)).modulus()
        norm.set(scaling.larger_sum(e, total, norm.get()))
    return norm.get()


def _exchange_columns(g: Group) -> None:
    """Undo to columns what was done to rows."""
    e = g.e
    with e.loop(0, g.n) as row:
        for k in reversed(range(g.n - 1)):
            chosen = e.load(g.vector(k, g.chosen), e.words, align=e.nbytes)
            mine = g.read(g.entry(row, k))
            for i in range(k + 1, g.n):
                here = chosen.eq(i)
                other = g.read(g.entry(row, i))
                g.keep(mine.where(here, other), g.entry(row, i))
                mine = other.where(here, mine)
            g.keep(mine, g.entry(row, k))


def _write_permuted(g: Group, target: Value, scale: scaling.Scale) -> Value:
    """Write row by row, putting the columns in order within the registers; return the 1-norms before scaling."""
    e, n, length = g.e, g.n, g.n * g.parts
    blocks = range(-(-length // e.lanes))
    _find_orders(g, blocks)
    # Square roots are slow, but leave time for shuffling.
    on_the_way = g.parts == 2
    for j in range(n if on_the_way else 0):
        e.store(e.numbers(0.0), g.vector(j, g.sums), align=e.nbytes)
    norm = None if on_the_way else _norm(g)
    with e.loop(0, n) as line:
        numbers = [g.read(g.entry(line, j)) for j in range(n)]
        for j, number in enumerate(numbers if on_the_way else []):
            total = e.load(g.vector(j, g.sums), align=e.nbytes) + number.modulus()
            e.store(total, g.vector(j, g.sums), align=e.nbytes)
        parts = [scaled_back(e, part, scale) for number in numbers for part in number.parts]
        parts += [e.numbers(0.0)] * (len(blocks) * e.lanes - length)
        turned = [transpose(e, parts[b * e.lanes :][: e.lanes]) for b in blocks]
        for lane in range(e.lanes):
            for b in blocks:
                order = e.load(g.vector(b * e.lanes + lane, g.orders), e.words, align=e.nbytes)
                place = e.at(target, line * length + (lane * g.size + b * e.lanes))
                e.store_first(e.permute([block[lane] for block in turned], order), place, length - b * e.lanes)
    return norm or scaling.largest_sum(e, [e.load(g.vector(j, g.sums), align=e.nbytes) for j in range(n)])


def _find_orders(g: Group, blocks: range) -> None:
    """Find for each number in a row of the inverse where in a row of the scratch it is, matrix by matrix."""
    e = g.e
    # For each column of the inverse the column of the scratch; then the same lane by lane.
    source = [e.integers(j) for j in range(g.n)]
    for k in reversed(range(g.n - 1)):
        chosen = e.load(g.vector(k, g.chosen), e.words, align=e.nbytes)
        for i in range(k + 1, g.n):
            here = chosen.eq(i)
            source[k], source[i] = e.select(here, source[i], source[k]), e.select(here, source[k], source[i])
    orders = [column * g.parts + p for column in source for p in range(g.parts)]
    orders += [e.integers(0)] * (len(blocks) * e.lanes - len(orders))
    for b in blocks:
        turned = transpose(e, [e.from_bits(order) for order in orders[b * e.lanes :][: e.lanes]])
        for lane, value in enumerate(turned):
            e.store(value, g.vector(b * e.lanes + lane, g.orders), align=e.nbytes)


write = partial(interleaved.write, interleaved.Algorithm(part="all", invert=invert, n_steps=lambda n: n))
