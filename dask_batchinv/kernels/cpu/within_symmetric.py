"""Vectors within a matrix: for symmetric and Hermitian matrices too large for a lane.

They are swept as in `symmetric_pivots`, by panels of rows, and only the upper triangle is kept up. For each row that is
swept two tables have a row, R with the row of the pivot as it was at its turn and F with the factors for all rows, such
that at the end of the panel

    every entry:  a[i, j] <- (a[i, j], or 0 if i or j was swept) + the sum over the panel of F[p, i] R[p, j]

and until then the entries of a row that is looked at. A row that was swept has zeros in the tables of earlier turns.
"""

from __future__ import annotations

from dask_batchinv.kernels.cpu import within_triangle
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.cpu.symmetric_pivots import Block, Symmetry, inverse_of_pair, stands_alone, wants_partner
from dask_batchinv.kernels.cpu.within_workspace import (
    PANEL,
    Shape,
    WorkspaceMatrix,
    each_block,
    each_vector,
    find_largest,
    only,
    prefetch_next,
    report,
)
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number, constant_number
from dask_batchinv.kernels.emit.values import Value

#: Rows of `panel_rows`: what is left of the diagonal, and the rows that are looked at.
_DIAGONAL, _FIRST, _SECOND = range(3)


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time."""
    return Shape.of(spec, together=1).workspace


def write(spec: KernelSpec) -> str:
    """Write the kernel: it inverts `count` matrices, one after the other."""
    s, symmetry = Shape.of(spec, together=1), Symmetry.of(spec.structure)
    e = Emitter(spec.name, spec.itemsize, spec.lanes)
    a = WorkspaceMatrix(e, s, e.integer(0))
    with e.loop(0, e.count) as index:
        within_triangle.measure(a, index, symmetry)
        within_triangle.read(a, index, symmetry)
        sweeps = _Sweeps(a, symmetry)
        with e.repeat(lambda: sweeps.swept.get() < s.n):
            prefetch_next(e, s, index, e.unsigned("umin", sweeps.swept.get(), e.integer(s.n - 1)), e.integer(0), s.n)
            sweeps.panel()
        within_triangle.write(a, index, symmetry)
        report(a, index, lambda size: size.eq(0.0))
    return e.finish()


class _Sweeps:
    """The sweeps of a matrix."""

    def __init__(self, a: WorkspaceMatrix, symmetry: Symmetry):
        self.a, self.e, self.s, self.symmetry = a, a.e, a.s, symmetry
        e, s = a.e, a.s
        self.zero, self.minus_one = (constant_number(e, e.numbers(x), s.parts) for x in (0.0, -1.0))
        self.row_log = e.lanes.bit_length() - 1
        self.swept = e.variable(e.integer(0))
        """How many rows have been swept."""
        self.slot = e.variable(e.integer(0))
        """How many of them in this panel."""
        for v in range(s.vectors):
            rows = min(e.lanes, s.n - v * e.lanes)
            a.set(a.used, v, e.integer((1 << e.lanes) - (1 << rows)))
        with e.loop(0, s.n) as i:
            number = a.entry(a.rows, i, i)
            self._put_entry(_DIAGONAL, i, symmetry.diagonal(number))

    def _put_entry(self, row: int, index: Value, number: Number) -> None:
        a, e = self.a, self.e
        place = e.at(a.panel_rows, e.integer(row * self.s.stride) + index)
        for part, value in enumerate(number.parts):
            e.store(value, e.at(place, part * self.s.length))

    def panel(self) -> None:
        """Sweep up to as many rows as a panel has."""
        a, e, s = self.a, self.e, self.s
        for p in range(PANEL):

            def clear(v: Value, p: int = p) -> None:
                a.store(self.zero, a.saved, e.integer(p), v)
                a.store(self.zero, a.scaled, e.integer(p), v)

            each_vector(e, s.vectors, clear)
        for v in range(s.vectors):
            a.set(a.others, v, e.integer(-1))
        self.slot.set(e.integer(0))
        with e.loop(0, PANEL), e.when((self.slot.get() < PANEL) & (self.swept.get() < s.n)):
            self._step()
        self._update()

    def _step(self) -> None:
        """Choose the pivots of a step, and note their sweep in the tables."""
        a, e = self.a, self.e

        def key(v: Value) -> Value:
            size = a.load(a.panel_rows, e.integer(_DIAGONAL), v).size()
            return e.select(e.mask_from(a.get(a.used, v)), e.numbers(-1.0), size)

        size, row = find_largest(a, key)
        offside, partner = self._look(_FIRST, row)
        second = e.variable(e.integer(-1))
        with e.when(e.any(wants_partner(size, offside))):
            offside_of_partner, _ = self._look(_SECOND, partner)
            alone = e.any(stands_alone(size, offside, offside_of_partner))
            second.set(e.select(alone, e.integer(-1), partner))
        is_pair = second.get() > -1
        with e.when(is_pair & self.slot.get().eq(PANEL - 1)):
            # No room: it will be looked for again.
            self.slot.set(e.integer(PANEL))
        with e.when(self.slot.get() < PANEL):
            with e.when(is_pair):
                self._note([row, second.get()])
            with e.when(~is_pair):
                e.store(e.lane(size, 0), e.at(a.pivot_sizes, row))
                self._note([row])

    def _here(self, row: Value, v: Value) -> Value:
        """Mask of the lane of a vector in which a row is."""
        e = self.e
        return e.iota.eq(e.splat(e.resize(row - v * e.lanes, e.word)))

    def _look(self, into: int, row: Value) -> tuple[Value, Value]:
        """Put a row as it is now into a row of `panel_rows`; return its largest number but that of the diagonal."""
        a, e, s = self.a, self.e, self.s
        slots = [e.integer(p) for p in range(PANEL)]
        factors = [a.entry(a.saved, p, row).splat() for p in slots]
        numbers = [a.entry(a.scaled, p, row).splat() for p in slots]
        own = row >> self.row_log

        def of_row(v: Value) -> Number:
            total = only(e.mask_from(a.get(a.others, v)), a.load(a.rows, row, v))
            for p, factor in zip(slots, factors, strict=True):
                total = total.plus_product(factor, a.load(a.scaled, p, v))
            return total

        def of_column(v: Value) -> Number:
            lanes = [a.entry(a.rows, v * e.lanes + t, row) for t in range(e.lanes)]
            parts = [e.gathered([lane.parts[p] for lane in lanes]) for p in range(s.parts)]
            total = only(e.mask_from(a.get(a.others, v)), Number(e, tuple(parts)))
            for p, number in zip(slots, numbers, strict=True):
                total = total.plus_product(a.load(a.saved, p, v), number)
            return self.symmetry.across(total)

        with e.loop(0, own) as v:
            a.store(of_column(v), a.panel_rows, e.integer(into), v)
        left = e.iota < e.splat(e.resize(row - own * e.lanes, e.word))
        a.store(of_column(own).where(left, of_row(own)), a.panel_rows, e.integer(into), own)
        with e.loop(own + 1, s.vectors) as v:
            a.store(of_row(v), a.panel_rows, e.integer(into), v)

        def key(v: Value) -> Value:
            leave_out = e.mask_from(a.get(a.used, v)) | self._here(row, v)
            return e.select(leave_out, e.numbers(-1.0), a.load(a.panel_rows, e.integer(into), v).size())

        return find_largest(a, key)

    def _note(self, rows: list[Value]) -> None:
        """Note in the tables the sweep of a row, or of two."""
        a, e, s, symmetry = self.a, self.e, self.s, self.symmetry
        block = self._block(rows)
        slots = [self.slot.get() + t for t in range(len(rows))]
        # [u][t]: the factor of the t-th sweep for the u-th row.
        inverse = [[block.first, block.beside], [symmetry.across(block.beside), block.second]]

        for row in rows:
            for p in range(PANEL):
                for table in (a.saved, a.scaled):
                    a.set_entry(self.zero.lane(0), table, e.integer(p), row)

        def body(v: Value) -> None:
            here = [self._here(row, v) for row in rows]
            own = [a.load(a.panel_rows, e.integer(row), v) for row in (_FIRST, _SECOND)[: len(rows)]]
            if len(rows) == 1:
                factors = [symmetry.times(symmetry.across(own[0]), block.first)]
            else:
                factors = list(block.factors(symmetry, own[0], own[1]))
            diagonal = a.load(a.panel_rows, e.integer(_DIAGONAL), v)
            for t, slot in enumerate(slots):
                factor, number = -factors[t], own[t]
                for u, mask in enumerate(here):
                    factor = inverse[u][t].where(mask, factor)
                    number = (self.minus_one if u == t else self.zero).where(mask, number)
                a.store(factor, a.saved, slot, v)
                a.store(number, a.scaled, slot, v)
                diagonal = symmetry.diagonal(diagonal.plus_product(factor, number))
            a.store(diagonal, a.panel_rows, e.integer(_DIAGONAL), v)

        each_vector(e, s.vectors, body)
        for row in rows:
            with e.loop(row >> self.row_log, s.vectors) as v:
                a.store(self.zero, a.rows, row, v)
            word, bit = row >> self.row_log, e.integer(1) << (row & (e.lanes - 1))
            a.set(a.used, word, a.get(a.used, word) | bit)
            a.set(a.others, word, a.get(a.others, word) & ~bit)
        self.slot.set(self.slot.get() + len(rows))
        self.swept.set(self.swept.get() + len(rows))

    def _block(self, rows: list[Value]) -> Block:
        """Return the inverse of the block of pivots."""
        a, e = self.a, self.e
        diagonal = [a.entry(a.panel_rows, e.integer(_DIAGONAL), row).splat() for row in rows]
        if len(rows) == 1:
            return Block(self.symmetry.reciprocal(diagonal[0]), self.zero, self.zero)
        beside = a.entry(a.panel_rows, e.integer(_FIRST), rows[1]).splat()
        return inverse_of_pair(self.symmetry, diagonal[0], beside, diagonal[1])

    def _update(self) -> None:
        """Do the sweeps of a panel to the whole upper triangle."""
        a, e, s = self.a, self.e, self.s
        step = 16 // PANEL // s.parts

        def rows(i: Value, count: int) -> None:
            factors = [[a.entry(a.saved, e.integer(p), i + t).splat() for p in range(PANEL)] for t in range(count)]
            with e.loop(i >> self.row_log, s.vectors) as v:
                stay = e.mask_from(a.get(a.others, v))
                sums = [only(stay, a.load(a.rows, i + t, v)) for t in range(count)]
                for p in range(PANEL):
                    number = a.load(a.scaled, e.integer(p), v)
                    sums = [total.plus_product(f[p], number) for f, total in zip(factors, sums, strict=True)]
                for t, total in enumerate(sums):
                    a.store(total, a.rows, i + t, v)

        each_block(e, s.n, step, rows)
