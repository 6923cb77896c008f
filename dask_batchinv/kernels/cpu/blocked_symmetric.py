"""Large symmetric and Hermitian matrices that need not be definite, by panels of sweeps as in `symmetric_pivots`.

Where the largest number stands that is left of the diagonal is known only after all earlier sweeps. So one thread finds
the pivots of a panel, and brings the rows that they stand in up to date, before all threads update the rest.
"""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_frame import PANEL, Frame
from dask_batchinv.kernels.cpu.blocked_rows import RowPanel
from dask_batchinv.kernels.cpu.blocked_steps import search
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.symmetric_pivots import Block, Symmetry, inverse_of_pair, stands_alone, wants_partner
from dask_batchinv.kernels.emit.number import Number, NumberVariable, constant_number
from dask_batchinv.kernels.emit.values import Value

#: Rows of "lower": the diagonal as it is now, and rows that are looked at.
_DIAGONAL, _FIRST, _SECOND = range(3)
ROWS = 3
#: Words of "pivots": how many rows have been swept in the panel, and how many altogether.
_WIDTH, _SWEPT = range(2)
WORDS = 2
#: Rows that a panel sweeps at most, for which tables have room; another number gives other roundings. Measured: with
#: more of them the search takes longer than the update gains.
SWEEPS = 40
assert SWEEPS <= PANEL


def write(spec: KernelSpec, module: ir.Module) -> None:
    """Write ``panel(table, k0, width)`` and ``update(table, k0, width, start, stop)``.

    The former sweeps as many rows as a panel has, wherever they are; the latter does their sweeps to the rows from
    `start` to `stop`. That must leave out no block, so that `k0` is the length of a row and `width` 0: how many rows
    were swept is in "pivots".
    """
    symmetry = Symmetry.of(spec.structure)
    _Panel(Frame(spec, "panel", 2, module), symmetry).write()
    panel = RowPanel(f := Frame(spec, "update", 4, module), symmetry)
    # Set after the blocks to leave out have been found from the argument.
    panel.width = f.get("pivots", f.e.integer(_WIDTH))
    with f.e.builder.if_then((panel.width > 0).raw):
        panel.update(*f.arguments[2:])
    f.e.finish()


class _Panel:
    """The function that finds the pivots of a panel."""

    def __init__(self, f: Frame, symmetry: Symmetry):
        self.f, self.e, self.symmetry, self.panel = f, f.e, symmetry, RowPanel(f, symmetry)
        self.zero = constant_number(f.e, f.e.numbers(0.0), f.parts)
        self.slot = f.e.variable(f.e.integer(0))
        """How many rows have been swept in this panel."""
        self.swept = f.e.variable(f.get("pivots", f.e.integer(_SWEPT)))
        self.has_room = f.e.variable(f.e.boolean(True))

    def write(self) -> None:
        """Write it."""
        f, e = self.f, self.e
        with e.builder.if_then(self.swept.get().eq(0).raw), e.loop(0, f["n"]) as i:
            f.set_entry(self.symmetry.diagonal(f.entry(f.row(i), i)), self._row(_DIAGONAL), i)
        with e.repeat(lambda: self.has_room.get() & (self.slot.get() < SWEEPS) & (self.swept.get() < f["n"])):
            self._step()
        f.set("pivots", e.integer(_WIDTH), self.slot.get())
        f.set("pivots", e.integer(_SWEPT), self.swept.get())
        e.finish()

    def _row(self, number: int) -> Value:
        return self.e.at(self.f["lower"], self.f["stride"] * number)

    def _mark(self, row: Value, *, used: bool) -> None:
        f, e = self.f, self.e
        word, bit = row >> (f.lanes.bit_length() - 1), e.integer(1) << (row & (f.lanes - 1))
        bits = f.get("used", word)
        f.set("used", word, bits | bit if used else bits & ~bit)

    def _step(self) -> None:
        """Sweep a row, or two; or none, where there is no room for two, or nothing to go on with."""
        f, e = self.f, self.e
        size, row = search(f, self._row(_DIAGONAL))
        with e.builder.if_else((size < 0.0).raw) as (nothing, something):
            with nothing:
                # What is left of the diagonal is NaN: there is no inverse to be found.
                self.swept.set(f["n"])
            with something:
                self._sweep(size, row)

    def _sweep(self, size: Value, row: Value) -> None:
        """Sweep a row, whose number on the diagonal has a size, alone or with another."""
        f, e = self.f, self.e
        self._mark(row, used=True)
        self._look(_FIRST, row)
        offside, partner = search(f, self._row(_FIRST))
        second = e.variable(e.integer(-1))
        with e.builder.if_then(wants_partner(size, offside).raw):
            self._mark(partner, used=True)
            self._look(_SECOND, partner)
            offside_of_partner, _ = search(f, self._row(_SECOND))
            alone = stands_alone(size, offside, e.larger(offside_of_partner, offside))
            second.set(e.select(alone, e.integer(-1), partner))
            with e.builder.if_then(alone.raw):
                self._mark(partner, used=False)
        is_pair = second.get() > -1
        # The next panel will find them again: this one never would find anything else.
        self.has_room.set(~(is_pair & self.slot.get().eq(SWEEPS - 1)))
        with e.builder.if_then((~self.has_room.get()).raw):
            self._mark(row, used=False)
            self._mark(second.get(), used=False)
        with e.builder.if_then((is_pair & self.has_room.get()).raw):
            self._note([row, second.get()])
        with e.builder.if_then((~is_pair).raw):
            e.store(size, e.at(f["sizes"], row))
            self._note([row])

    def _look(self, into: int, row: Value) -> None:
        """Put a row as it is now into one of the rows of "lower"."""
        f, e, own = self.f, self.e, row / self.f.block
        target, slot = self._row(into), self.slot.get()

        def bring_up(b: Value, numbers: list[Number]) -> None:
            sums = [NumberVariable(number) for number in numbers]
            with e.loop(0, slot) as p:
                factor, saved = self.panel.factor(row, p), f.saved(b, p)
                for v, total in enumerate(sums):
                    parts = f.saved_parts(saved, v * f.lanes)
                    number = Number(e, tuple(e.load(part, align=e.nbytes) for part in parts))
                    total.set(total.get().plus_product(factor, number))
            for total, place in zip(sums, self.panel.each_place(b), strict=True):
                f.store(total.get(), target, place)

        with e.loop(0, own + 1) as b:
            bring_up(b, [self._of_column(row, place) for place in self.panel.each_place(b)])
        with e.loop(own + 1, f["blocks"]) as b:
            bring_up(b, [f.load(f.row(row), place) for place in self.panel.each_place(b)])

    def _of_column(self, row: Value, place: Value) -> Number:
        """Load some entries of a row, of which some are across the diagonal."""
        f, e = self.f, self.e
        lanes = []
        for t in range(f.lanes):
            j = place + t
            number = f.entry(f.row(e.signed("smin", j, row)), e.signed("smax", j, row))
            lanes.append(number)
        parts = [e.gathered([lane.parts[p] for lane in lanes]) for p in range(f.parts)]
        number = Number(e, tuple(parts))
        left = (e.iota + e.splat(e.resize(place, e.word))) < e.splat(e.resize(row, e.word))
        return self.symmetry.across(number).where(left, number)

    def _note(self, rows: list[Value]) -> None:
        """Note in the tables the sweep of a row, or of two; and have zeros in their places."""
        f, e, symmetry, panel = self.f, self.e, self.symmetry, self.panel
        block = self._block(rows)
        slots = [self.slot.get() + t for t in range(len(rows))]
        # [u][t]: the factor of the t-th sweep for the u-th row.
        inverse = [[block.first, block.beside], [symmetry.across(block.beside), block.second]]
        for row in rows:
            with e.loop(0, self.slot.get()) as p:
                self._set_saved(f.constant(0.0), row, p)
                panel.set_factor(f.constant(0.0), row, p)
        with e.loop(0, f["blocks"]) as b:
            for v, place in enumerate(panel.each_place(b)):
                own = [f.load(self._row(number), place) for number in (_FIRST, _SECOND)[: len(rows)]]
                if len(rows) == 1:
                    factors = [symmetry.times(symmetry.across(own[0]), block.first)]
                else:
                    factors = list(block.factors(symmetry, own[0], own[1]))
                diagonal = f.load(self._row(_DIAGONAL), place)
                for slot, factor, number in zip(slots, factors, own, strict=True):
                    panel.keep_factors(-factor, place, slot)
                    for value, at in zip(number.parts, f.saved_parts(f.saved(b, slot), v * f.lanes), strict=True):
                        e.store(value, at, align=e.nbytes)
                    diagonal = symmetry.diagonal(diagonal.plus_product(-factor, number))
                f.store(diagonal, self._row(_DIAGONAL), place)
        for u, row in enumerate(rows):
            for t, slot in enumerate(slots):
                panel.set_factor(inverse[u][t].lane(0), row, slot)
                self._set_saved(f.constant(-1.0 if u == t else 0.0), row, slot)
            f.set_entry(-inverse[u][u].lane(0), self._row(_DIAGONAL), row)
            self._clear(row)
        self.slot.set(self.slot.get() + len(rows))
        self.swept.set(self.swept.get() + len(rows))

    def _block(self, rows: list[Value]) -> Block:
        """Return the inverse of the block of pivots."""
        f = self.f
        pivots = [f.entry(self._row(_DIAGONAL), row).splat() for row in rows]
        if len(rows) == 1:
            return Block(self.symmetry.reciprocal(pivots[0]), self.zero, self.zero)
        beside = f.entry(self._row(_FIRST), rows[1]).splat()
        return inverse_of_pair(self.symmetry, pivots[0], beside, pivots[1])

    def _set_saved(self, number: Number, row: Value, slot: Value) -> None:
        """Store what a sweep adds to others in the column of a row."""
        f, block = self.f, row / self.f.block
        places = f.saved_parts(f.saved(block, slot), row - block * f.block)
        for value, place in zip(number.parts, places, strict=True):
            self.e.store(value, place)

    def _clear(self, row: Value) -> None:
        """Put zeros into a row of the matrix, and into the column."""
        f, e = self.f, self.e
        with e.loop(row / f.block, f["blocks"]) as b:
            for place in self.panel.each_place(b):
                f.store(self.zero, f.row(row), place)
        with e.loop(0, row) as i:
            f.set_entry(f.constant(0.0), f.row(i), row)
