"""Panels of rows of an upper triangle: what their elimination by sweeps and that of triangular matrices share.

A panel takes three functions, of which the last two are for several threads, which share the columns and then the
rows:

1. `square` eliminates the square block of the panel on the diagonal;
2. `rows` does to the rows of the panel, and to the columns above it, what that asks for. These columns are transposed
   to become the left parts of the rows. What each step is to add to the rows is saved; by what factors is kept;
3. `update` does so in the rows outside the panel, and puts the columns above it back.

Symmetric matrices take the tables and the update from here, but no more: the rows of their panels are anywhere
(`blocked_symmetric`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from dask_batchinv.kernels.cpu.blocked_frame import CHUNK, PANEL, STEPS, Frame, rows_of_group, rows_of_tile
from dask_batchinv.kernels.cpu.blocked_triangle import block_at, put_block, turned
from dask_batchinv.kernels.cpu.blocked_update import factors_of_step, update_tile
from dask_batchinv.kernels.cpu.symmetric_pivots import Symmetry
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.values import Value


class RowPanel:
    """The panel that a function works on: the rows from `k0` on, `width` of them, a multiple of `STEPS`."""

    def __init__(self, f: Frame, symmetry: Symmetry | None):
        self.f, self.e, self.symmetry = f, f.e, symmetry
        self.k0, self.width = f.arguments[:2]
        self.first = self.k0 / f.block
        """The first block of the square."""
        self.after = (self.k0 + self.width + (f.block - 1)) / f.block
        """The first block after it."""
        self.tile, self.group = rows_of_tile(f.spec), rows_of_group(f.spec)

    # --- factors, of a group of rows beside each other --------------------------------------------------------

    def factors(self, row: Value, step: Value) -> list[Value]:
        """Return where the factors for a group of rows begin, for each part, `row` the first of them."""
        return factors_of_step(self.f, self._of_group(row), step)

    def _of_group(self, row: Value) -> Value:
        return self.e.at(self.f["factors"], row * (PANEL * self.f.parts))

    def _factor(self, row: Value, step: Value) -> list[Value]:
        inside = row & (self.group - 1)
        return [self.e.at(place, inside) for place in self.factors(row - inside, step)]

    def factor(self, row: Value, step: Value) -> Number:
        """Return the factor of a row, in all lanes."""
        return self._load(self._factor(row, step))

    def factor_in_strip(self, strip: Value, i: int, step: Value) -> Number:
        """Return the factor of a row of a strip, in all lanes."""
        inside = i % self.group
        return self._load([self.e.at(place, inside) for place in self.factors(strip + (i - inside), step)])

    def _load(self, places: list[Value]) -> Number:
        return Number(self.e, tuple(self.e.load(place, self.e.real) for place in places)).splat()

    def set_factor(self, factor: Number, row: Value, step: Value) -> None:
        """Keep the factor of a row."""
        for value, place in zip(factor.parts, self._factor(row, step), strict=True):
            self.e.store(value, place)

    def keep_factors(self, number: Number, row: Value, step: Value) -> None:
        """Keep the factors of as many rows as there are lanes."""
        e, together = self.e, min(self.group, self.f.lanes)
        for at in range(0, self.f.lanes, together):
            for value, place in zip(number.parts, self._factor(row + at, step), strict=True):
                e.store(e.shuffle(value, None, range(at, at + together)), place)

    def add(self, b: Value, start: Value, stop: Value, p0: Value, width: Value | int) -> None:
        """Add what some steps from p0 on have saved to a block of the rows from `start` to `stop`, whole groups."""
        f, e = self.f, self.e
        skipped = p0 * (f.parts * self.group)
        with e.loop(start, stop, self.group) as j:
            for t in range(0, self.group, self.tile):
                update_tile(f, b, j + t, e.at(e.at(self._of_group(j), t), skipped), p0, width)

    # --- pivots -----------------------------------------------------------------------------------------------

    def judge(self, pivot: Number, size: Value, inverse: Number, step: Value) -> None:
        """Note what a pivot is judged by, and its inverse."""
        self.e.store(size, self.e.at(self.f["sizes"], self.k0 + step))
        for value, place in zip(inverse.parts, self._inverse(step), strict=True):
            self.e.store(value, place)

    def _inverse(self, step: Value) -> list[Value]:
        first = self.e.at(self.f["inverses"], (self.k0 + step) * self.f.parts)
        return [self.e.at(first, part) for part in range(self.f.parts)]

    def inverse(self, step: Value) -> Number:
        """Return the inverse of a pivot, in all lanes."""
        return self._load(self._inverse(step))

    # --- blocks -----------------------------------------------------------------------------------------------

    @contextmanager
    def each_outside(self, start: Value, stop: Value) -> Iterator[Value]:
        """Run the body for the blocks from `start` to `stop` but those of the square."""
        e, skipped = self.e, self.after - self.first
        before = e.signed("smin", e.signed("smax", self.first - start, 0), stop - start)
        begin = e.signed("smax", start, self.after)
        rest = e.signed("smax", stop - begin, 0)
        with e.loop(0, before + rest) as i:
            b = start + i
            yield e.select(i < before, b, e.select(before > 0, b + skipped, begin + i))

    def each_place(self, b: Value) -> list[Value]:
        """Return where the vectors of a block begin."""
        return [b * self.f.block + v * self.f.lanes for v in range(self.f.vectors)]

    def fetch(self, b: Value) -> None:
        """Transpose what stands above the panel, in the rows of a block, to the left of its rows."""
        e, f = self.e, self.f
        with e.loop(0, f.block, f.lanes) as at, e.loop(0, self.width, f.lanes) as q:
            column = b * f.block + at
            put_block(f, turned(f, block_at(f, column, self.k0 + q), self.symmetry), self.k0 + q, column)

    def put_back(self, start: Value, stop: Value) -> None:
        """Transpose that back, into the rows from `start` to `stop`."""
        e, f = self.e, self.f
        with e.loop(start, stop, f.lanes) as i, e.loop(0, self.width, f.lanes) as q:
            put_block(f, turned(f, block_at(f, self.k0 + q, i), self.symmetry), i, self.k0 + q)

    def sweep(
        self,
        b: Value,
        step: Callable[[Number, Value, Value], tuple[Number, Number]],
        follows: Callable[[int, int], bool],
        others: Callable[[Value], Iterable[tuple[Value | int, Value | int]]],
    ) -> None:
        """Eliminate the rows of the panel in a block of columns.

        ``step(number, p, column)`` takes what row p has at its turn, and returns what is saved, to be added to others
        with their factors, and what the row has from then on. In a strip of rows, row j is one of the others if
        ``follows(j, i)`` for row i; beyond it, those in the ranges of ``others(strip)`` are.
        """
        e, f, k0 = self.e, self.f, self.k0
        with e.loop(0, self.width, STEPS) as s:
            for v, column in enumerate(self.each_place(b)):
                rows = [f.load(f.row(k0 + s + i), column) for i in range(STEPS)]
                for i in range(STEPS):
                    saved, rows[i] = step(rows[i], s + i, column)
                    for value, place in zip(saved.parts, f.saved_parts(f.saved(b, s + i), v * f.lanes), strict=True):
                        e.store(value, place, align=e.nbytes)
                    for j in range(STEPS):
                        if j != i and follows(j, i):
                            rows[j] = rows[j].plus_product(self.factor_in_strip(k0 + s, j, s + i), saved)
                for i, number in enumerate(rows):
                    f.store(number, f.row(k0 + s + i), column)
            for begin, end in others(s):
                self.add(b, k0 + begin, k0 + end, s, STEPS)

    def update(self, start: Value, stop: Value, *, beyond: bool = False) -> None:
        """Add what the steps of the panel have saved to the rows from `start` to `stop`, from the diagonal on.

        Or, in rows above the panel, only to what lies `beyond` it.
        """
        e, f = self.e, self.f
        # A few rows at a time, which stay in the cache, and of which the processor knows the pages.
        with e.loop(start, stop, CHUNK) as first:
            last, begin = e.signed("smin", first + CHUNK, stop), self.after if beyond else first / f.block
            with self.each_outside(begin, f["blocks"]) as b:
                self.add(b, first, last, e.integer(0), self.width)
