"""The inverse of a group of interleaved symmetric or Hermitian matrices, by sweeps as in `symmetric_pivots`.

Only upper triangles are kept up, and each lane has pivots of its own. Up to two rows are swept at a time, with one load
and one store of each entry: two by themselves, one after the other, or a pair. For each of them a table R has the rows
of the pivots as they were at their turn and a table F the factors for all rows, such that afterwards

    every entry:  a[i, j] <- (a[i, j], or 0 if i or j was swept) + F1[i] R1[j] + F2[i] R2[j].

Diagonals stand apart, and are always up to date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from dask_batchinv.kernels.cpu import interleaved, interleaved_group, scaling
from dask_batchinv.kernels.cpu.interleaved import Inverted, multiply_rarely, write_as_it_is
from dask_batchinv.kernels.cpu.interleaved_group import Group
from dask_batchinv.kernels.cpu.interleaved_tables import Row, Table, each_row, gathered, rows_of_lanes
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.cpu.symmetric_pivots import Block, Symmetry, inverse_of_pair, stands_alone, wants_partner
from dask_batchinv.kernels.emit.number import Number, constant_number
from dask_batchinv.kernels.emit.values import INT, Value

#: Rows that are updated together. Right of the diagonal the last row of an odd number has nothing to update.
_ROWS = 2


def write(spec: KernelSpec) -> str:
    """Write the kernel."""
    symmetry = Symmetry.of(spec.structure)

    def invert(g: Group, scale: scaling.Scale, between_steps: Callable[[Value], None]) -> Inverted:
        multiply_rarely(g, scale)
        sweeps = _Sweeps(g, symmetry)
        norm = sweeps.scale(scale.first)
        failed = sweeps.run(between_steps)
        norm_of_inverse = sweeps.complete()

        def store(target: Value) -> Value:
            write_as_it_is(g, target, scale)
            return norm_of_inverse

        return Inverted(failed, norm, store)

    part: Literal["upper", "upper Hermitian"] = "upper Hermitian" if symmetry.is_hermitian else "upper"
    return interleaved.write(interleaved.Algorithm(part, invert, n_steps=_n_steps, tables=_tables(spec)), spec)


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time."""
    return interleaved_group.workspace(spec, _tables(spec))


def _n_steps(n: int) -> int:
    return (n + 1) // 2


#: The tables, and how many parts their numbers have if not as many as others.
_TABLES = {
    "first rows": 0,
    "second rows": 0,
    "first factors": 0,
    "second factors": 0,
    "diagonals": 0,
    "left": 1,
    "stays": 1,
    "sums": 1,
}


def _tables(spec: KernelSpec) -> list[int]:
    """Return the lengths of the tables in vectors, and at last of one with an integer for each entry."""
    places = -(-spec.n * spec.n * 4 // (spec.lanes * spec.itemsize))
    return [(spec.n + 1) * (parts or spec.parts) for parts in _TABLES.values()] + [places]


class _Sweeps:
    """The sweeps of a group."""

    def __init__(self, g: Group, symmetry: Symmetry):
        self.g, self.e, self.symmetry = g, g.e, symmetry
        e, n, parts = g.e, g.n, g.parts
        self.zero, self.minus_one = (constant_number(e, e.numbers(x), parts) for x in (0.0, -1.0))
        self.none = e.integers(n)
        """The number of a row where there is none."""
        *starts, self.places = g.more
        """The last: where each entry is, or the one across the diagonal that stands for it."""
        tables = {
            name: Table(g, start, parts or g.parts)
            for (name, parts), start in zip(_TABLES.items(), starts, strict=True)
        }
        self.rows = [tables["first rows"], tables["second rows"]]
        self.factors = [tables["first factors"], tables["second factors"]]
        self.diagonal, self.sums = tables["diagonals"], tables["sums"]
        self.left = tables["left"]
        """Which bits of a number count in a search: all but the sign in rows that are left, none in others."""
        self.stays = tables["stays"]
        """All bits, but none in rows that are swept in this step."""
        self.failed, self.swept = e.variable(e.integers(0)), e.variable(e.integers(0))
        """``info`` of the pivots, and how many rows have been swept."""
        self.largest, self.row = e.variable(e.numbers(0.0)), e.variable(e.integers(0))
        """The largest number left of the diagonals, and where it is first."""
        with e.loop(0, n) as i, e.loop(0, n) as j:
            place = (e.unsigned("umin", i, j) * n + e.unsigned("umax", i, j)) * (parts * e.lanes)
            e.store(e.resize(place, e.int32), e.at(self.places, i * n + j, e.int32), align=4)

    def _each(self, body: Callable[[Row], None], start: Value | int = 0) -> None:
        """Run the body for each row."""
        each_row(self.e, start, self.g.n, body)

    def _bits(self, bits: int) -> Number:
        return Number(self.e, (self.e.from_bits(self.e.integers(bits)),))

    @property
    def _absolute(self) -> Number:
        return self._bits((1 << (8 * self.e.itemsize - 1)) - 1)

    # --- in and out -------------------------------------------------------------------------------------------

    def scale(self, factor: Value) -> Value:
        """Bring the triangles to unit size, and put their diagonals apart; return the 1-norms."""
        g = self.g

        def take(i: Row, j: Row) -> Number:
            number = g.read(g.entry(i.scalar, j.scalar)).times_real(factor)
            g.keep(number, g.entry(i.scalar, j.scalar))
            return number

        def take_diagonal(i: Row) -> Number:
            number = self.symmetry.diagonal(g.read(g.entry(i.scalar, i.scalar)).times_real(factor))
            self.diagonal.set(i, number)
            # Not to be used; but what is not read of it must not be there where a row is collected for nothing.
            g.keep(number, g.entry(i.scalar, i.scalar))
            self.left.set(i, self._absolute)
            self.stays.set(i, self._bits(-1))
            return number

        return self._norm(take_diagonal, take)

    def complete(self) -> Value:
        """Change all signs and fill up the lower triangles; return the 1-norms."""
        g, across = self.g, self.symmetry.across

        def give(i: Row, j: Row) -> Number:
            number = -g.read(g.entry(i.scalar, j.scalar))
            g.keep(number, g.entry(i.scalar, j.scalar))
            g.keep(across(number), g.entry(j.scalar, i.scalar))
            return number

        def give_diagonal(i: Row) -> Number:
            number = -self.diagonal.get(i)
            g.keep(number, g.entry(i.scalar, i.scalar))
            return number

        return self._norm(give_diagonal, give)

    def _norm(self, diagonal: Callable[[Row], Number], other: Callable[[Row, Row], Number]) -> Value:
        """Return the 1-norms of matrices whose upper triangles are passed through."""
        e, sums = self.e, self.sums
        norm = e.variable(e.numbers(0.0))
        self._each(lambda i: sums.set(i, Number(e, (e.numbers(0.0),))))

        def row(i: Row) -> None:
            total = e.variable(sums.get(i).parts[0] + diagonal(i).modulus())

            def entry(j: Row) -> None:
                modulus = other(i, j).modulus()
                total.set(total.get() + modulus)
                sums.set(j, Number(e, (sums.get(j).parts[0] + modulus,)))

            self._each(entry, i.scalar + 1)
            norm.set(scaling.larger_sum(e, total.get(), norm.get()))

        self._each(row)
        return norm.get()

    # --- sweeps -----------------------------------------------------------------------------------------------

    def run(self, between_steps: Callable[[Value], None]) -> Value:
        """Sweep all rows; return the numbers of the first pivots that are zero."""
        g, e = self.g, self.e
        self._begin_search()
        self._each(lambda j: self._search(self.diagonal.get(j), j))
        step = e.variable(e.integer(0))
        with e.repeat(lambda: e.any(self.swept.get() < g.n)):
            with e.builder.if_then((step.get() < _n_steps(g.n)).raw):
                between_steps(step.get())
            step.set(step.get() + 1)
            self._step()
        with e.loop(step.get(), _n_steps(g.n)) as rest:
            # Where what overflowed has ended the sweeps before their time.
            between_steps(rest)
        return self.failed.get()

    def _step(self) -> None:
        """Sweep two rows; in some lanes one, or none."""
        e, none = self.e, self.none
        first, pivot = self._next()
        self.left.put(first, self._bits(0))
        offside = self._collect(0, first)
        wants = wants_partner(pivot.size(), offside) & ~first.eq(none)
        # A zero that wants a partner gets one.
        self._account(first, pivot, wants)
        partners = e.variable(none)
        with e.when(e.any(wants)):
            partners.set(self._partners(pivot.size(), offside, wants))
        is_pair = ~partners.get().eq(none)
        single = e.select(is_pair, none, first)
        # In lanes with pairs 0, so that factors are, too, and nothing changes there before `_sweep_pairs`.
        inverse = self._reciprocal(pivot, single)
        self._sweep_single(0, single, inverse)

        second, other_pivot = self._next()
        second = e.select(is_pair, partners.get(), second)
        self.left.put(second, self._bits(0))
        factor = self.zero.where(second.eq(none), self.factors[0].pick(second))
        offside = self._collect(1, second, factor)
        # In the column of the first row stands what was there before its sweep.
        self.rows[1].put(single, -factor)
        wants = wants_partner(other_pivot.size(), offside) & ~second.eq(none) & ~is_pair
        # Pairs that there is no room for will be found again.
        self.left.put(e.select(wants, second, none), self._absolute)
        second = e.select(wants, none, second)
        self._account(second, other_pivot, is_pair)
        other_inverse = self._reciprocal(other_pivot, second)
        any_pair = e.any(is_pair)
        with e.when(any_pair):
            self._sweep_pairs(is_pair, first, second, pivot, (inverse, other_inverse))
        with e.builder.if_then((~any_pair).raw):
            self._sweep_single(1, second, other_inverse)
            for table in (self.factors[0], self.rows[0]):
                table.put(second, self.zero)
        for rows in (first, second):
            self.stays.put(rows, self._bits(0))
        self._update()
        for rows in (first, second):
            self.stays.put(rows, self._bits(-1))

    def _reciprocal(self, pivot: Number, rows: Value) -> Number:
        """Return 1 / pivots; 0 where there is none."""
        return self.zero.where(rows.eq(self.none), self.symmetry.reciprocal(pivot))

    def _account(self, rows: Value, pivot: Number, is_no_failure: Value) -> None:
        """Account for rows that will have been swept."""
        e, is_swept = self.e, ~rows.eq(self.none)
        fails = pivot.size().eq(0.0) & is_swept & ~is_no_failure & self.failed.get().eq(0)
        self.failed.set(e.select(fails, rows + 1, self.failed.get()))
        self.swept.set(self.swept.get() - e.bit_words(is_swept))

    # --- which rows -------------------------------------------------------------------------------------------

    def _begin_search(self) -> None:
        self.largest.set(self.e.numbers(0.0))
        self.row.set(self.e.integers(0))

    def _search(self, diagonal: Number, j: Row) -> None:
        """Look at the diagonals' numbers in one row after the other, for the largest that are left."""
        e, size = self.e, self._size_if_left(diagonal, j)
        self.row.set(e.select(size > self.largest.get(), j.vector, self.row.get()))
        self.largest.set(e.larger(size, self.largest.get()))

    def _size_if_left(self, number: Number, j: Row) -> Value:
        """Return the size of a number in a row that is left; 0 in others."""
        e, left = self.e, self.left.get(j).parts[0]
        parts = [e.from_bits(e.bits(part) & e.bits(left)) for part in number.parts]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]

    def _next(self) -> tuple[Value, Number]:
        """Return the row of the largest number that is left of each diagonal, and this number."""
        e, n = self.e, self.g.n
        with e.when(e.any((self.swept.get() < n) & self.largest.get().eq(0.0))):
            self._search_zeros()
        rows = e.select(self.swept.get() < n, self.row.get(), self.none)
        return rows, self.diagonal.pick(rows)

    def _search_zeros(self) -> None:
        """Find the first row that is left where all are zero; where all are NaN there is nothing to go on with."""
        e, n = self.e, self.g.n
        first = e.variable(self.none)

        def look(j: Row) -> None:
            found = self.diagonal.get(j).size().eq(0.0) & ~e.bits(self.left.get(j).parts[0]).eq(0)
            first.set(e.select(found & first.get().eq(n), j.vector, first.get()))

        self._each(look)
        is_zero = self.largest.get().eq(0.0)
        self.row.set(e.select(is_zero, first.get(), self.row.get()))
        self.swept.set(e.select(is_zero & first.get().eq(n), self.none, self.swept.get()))

    def _partners(self, size: Value, offside: Value, wants: Value) -> Value:
        """Return the rows that are swept together with the first ones."""
        e = self.e
        found = e.variable(self.none)

        def look(j: Row) -> None:
            here = self._size_if_left(self.rows[0].get(j), j).eq(offside) & wants
            found.set(e.select(here, j.vector, found.get()))

        self._each(look)
        partners = found.get()
        self.left.put(partners, self._bits(0))
        alone = stands_alone(size, offside, e.larger(self._collect(1, partners), offside))
        self.left.put(e.select(alone, partners, self.none), self._absolute)
        return e.select(alone, self.none, partners)

    def _collect(self, slot: int, rows: Value, factor: Number | None = None) -> Value:
        """Collect a row in each lane; with a factor, as it is after the first sweep. Return the largest of its sizes.

        The row itself must have left `left`: what stands on its diagonal there is old.
        """
        e, largest = self.e, self.e.variable(self.e.numbers(0.0))
        read = self._reader(rows)

        def body(j: Row) -> None:
            number = read(j)
            if self.symmetry.is_hermitian:
                number = number.conjugate().where(j.vector < rows, number)
            if factor is not None:
                number = number.plus_product(factor, self.rows[0].get(j))
            self.rows[slot].set(j, number)
            largest.set(e.larger(self._size_if_left(number, j), largest.get()))

        self._each(body)
        return largest.get()

    def _reader(self, rows: Value) -> Callable[[Row], Number]:
        """Return what reads an entry of each lane's row, as it stands in the upper triangle."""
        e, g = self.e, self.g
        lasts = [e.unsigned("umin", row, e.integer(g.n - 1)) for row in rows_of_lanes(e, rows)]
        tops = [e.at(self.places, last * g.n, e.int32) for last in lasts]

        def read(j: Row) -> Number:
            inside = [e.resize(e.load(e.at(top, j.scalar, e.int32), e.int32, align=4), INT) for top in tops]
            return gathered(e, [e.at(e.at(g.base, lane), place) for lane, place in enumerate(inside)], g.parts)

        return read

    # --- sweeps of rows ---------------------------------------------------------------------------------------

    def _sweep_single(self, slot: int, rows: Value, inverse: Number) -> None:
        """Fill tables for rows that are swept by themselves, and sweep the diagonals."""
        symmetry, minus = self.symmetry, -inverse
        self._begin_search()

        def body(j: Row) -> None:
            number = self.rows[slot].get(j)
            factor = symmetry.times(symmetry.across(number), minus)
            self.factors[slot].set(j, factor)
            self._sweep_diagonal(j, [(factor, number)])

        self._each(body)
        for table, number in ((self.factors[slot], inverse), (self.rows[slot], self.minus_one), (self.diagonal, minus)):
            table.put(rows, number)

    def _sweep_diagonal(self, j: Row, products: list[tuple[Number, Number]]) -> None:
        number = self.diagonal.get(j)
        for factor, other in products:
            number = number.plus_product(factor, other)
        number = self.symmetry.diagonal(number)
        self.diagonal.set(j, number)
        self._search(number, j)

    def _sweep_pairs(
        self, is_pair: Value, first: Value, second: Value, pivot: Number, inverses: tuple[Number, Number]
    ) -> None:
        """Fill tables for pairs and, in other lanes, for second rows; and sweep the diagonals."""
        symmetry = self.symmetry
        of_pair = inverse_of_pair(symmetry, pivot, self.rows[0].pick(second), self.diagonal.pick(second))
        block = Block(
            of_pair.first.where(is_pair, inverses[0]),
            of_pair.beside.where(is_pair, self.zero),
            of_pair.second.where(is_pair, inverses[1]),
        )
        self._begin_search()

        def body(j: Row) -> None:
            numbers = [table.get(j) for table in self.rows]
            # The first factors of single rows come out as they are, but for signs of zeros, which make no difference.
            factors = [-factor for factor in block.factors(symmetry, numbers[0], numbers[1])]
            for table, factor in zip(self.factors, factors, strict=True):
                table.set(j, factor)
            self._sweep_diagonal(j, [(factors[0].where(is_pair, self.zero), numbers[0]), (factors[1], numbers[1])])

        self._each(body)
        first = self.e.select(is_pair, first, self.none)
        for rows, factors, numbers, diagonal in (
            (first, (block.first, block.beside), (self.minus_one, self.zero), block.first),
            (second, (symmetry.across(block.beside), block.second), (self.zero, self.minus_one), block.second),
        ):
            for table, number in zip((*self.factors, *self.rows), (*factors, *numbers), strict=True):
                table.put(rows, number)
            self.diagonal.put(rows, -diagonal)

    def _update(self) -> None:
        """Do the sweeps to the triangles above the diagonals."""
        g, e = self.g, self.e

        def do(i: Value, count: int) -> None:
            rows = [Row(i + t, self.none) for t in range(count)]
            factors = [[table.get(row) for table in self.factors] for row in rows]
            masks = [e.bits(self.stays.get(row).parts[0]) for row in rows]

            def column(j: Row, count: int) -> None:
                numbers, mask = [table.get(j) for table in self.rows], e.bits(self.stays.get(j).parts[0])
                for row, own, factor in zip(rows[:count], masks, factors, strict=False):
                    place, stays = g.entry(row.scalar, j.scalar), mask & own
                    total = Number(e, tuple(e.from_bits(e.bits(part) & stays) for part in g.read(place).parts))
                    for f, number in zip(factor, numbers, strict=True):
                        total = total.plus_product(f, number)
                    g.keep(total, place)

            for t in range(1, count):
                column(rows[t], t)
            self._each(lambda j: column(j, count), i + count)

        with e.loop(0, g.n - g.n % _ROWS, _ROWS) as start:
            do(start, _ROWS)
