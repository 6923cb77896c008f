"""The inverse of small symmetric and Hermitian matrices, one per lane, by sweeps as in `symmetric_pivots`.

Only upper triangles are kept up. Everything is unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

from dask_batchinv.kernels.cpu import registers
from dask_batchinv.kernels.cpu.registers import Matrix
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.symmetric_pivots import Block, Symmetry, inverse_of_pair, stands_alone, wants_partner
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number, NumberVariable, constant_number
from dask_batchinv.kernels.emit.values import Value


def write(spec: KernelSpec) -> str:
    """Write the kernel."""
    symmetry = Symmetry.of(spec.structure)

    def mirror(a: Matrix) -> None:
        for i, row in enumerate(a):
            row[i] = symmetry.diagonal(row[i])
            for j in range(i):
                row[j] = symmetry.across(a[j][i])

    def invert(e: Emitter, a: Matrix, between_steps: Callable[[], None]) -> Value:
        failed, used = e.integers(0), [e.mask([False] * e.lanes) for _ in a]
        for at in range(len(a)):
            between_steps()
            # In the last step there is at most one row left.
            step = _Step(symmetry, e, a, used, may_have_pairs=at < len(a) - 1)
            failed = e.select(step.is_zero & failed.eq(0), step.row + 1, failed)
            step.sweep()
            used = [was | now | too for was, now, too in zip(used, step.first, step.second, strict=True)]
        for i, row in enumerate(a):
            row[i:] = [-number for number in row[i:]]
        return failed

    return registers.write(registers.Algorithm(symmetry.reads, mirror, invert, n_steps=lambda n: n), spec)


class _Step:
    """The pivots of a step, lane by lane: a row, two, or none where all rows have been pivots."""

    def __init__(self, symmetry: Symmetry, e: Emitter, a: Matrix, used: list[Value], *, may_have_pairs: bool):
        self.symmetry, self.e, self.a, self.may_have_pairs = symmetry, e, a, may_have_pairs
        parts = len(a[0][0].parts)
        self.zero, self.one = (constant_number(e, e.numbers(number), parts) for number in (0.0, 1.0))
        self.diagonal = [row[i] for i, row in enumerate(a)]
        size, self.row = _largest(e, self.diagonal, used)
        active = size >= 0.0
        self.first = [self.row.eq(i) & active for i in range(len(a))]
        self.first_row = self._collect(self.first)
        own = _pick(self.first, self.diagonal, self.one)
        self.second, self.second_row = [e.mask([False] * e.lanes) for _ in a], [self.zero] * len(a)
        self.any_pair = e.boolean(False)
        self.block = Block(symmetry.reciprocal(own), self.zero, self.zero)
        self.is_zero = size.eq(0.0)
        if may_have_pairs:
            self._find_partners(used, active, size, own)

    def _find_partners(self, used: list[Value], active: Value, size: Value, own: Number) -> None:
        """Find what is swept together with the first rows, where they want it."""
        e, a, symmetry = self.e, self.a, self.symmetry
        offside, partner = _largest(e, self.first_row, [a | b for a, b in zip(used, self.first, strict=True)])
        wants = active & wants_partner(size, offside)
        self.is_zero = self.is_zero & ~wants
        pairs = e.variable(e.integers(0))
        block = [NumberVariable(x) for x in (self.block.first, self.block.beside, self.block.second)]
        rows = [NumberVariable(self.zero) for _ in a]
        with e.when(e.any(wants)):
            second = [partner.eq(i) & wants for i in range(len(a))]
            row = self._collect(second)
            is_pair = wants & ~stands_alone(
                size, offside, _largest(e, row, [a | b for a, b in zip(used, second, strict=True)])[0]
            )
            pairs.set(e.bit_words(is_pair))
            beside, other = (_pick(second, numbers, self.one) for numbers in (self.first_row, self.diagonal))
            pair = inverse_of_pair(symmetry, own, beside, other)
            for variable, number in zip(block, (pair.first, pair.beside, pair.second), strict=True):
                variable.set(number.where(is_pair, variable.get()))
            for variable, number in zip(rows, row, strict=True):
                variable.set(number.where(is_pair, self.zero))
        is_pair = ~pairs.get().eq(0)
        self.any_pair = e.any(is_pair)
        self.second = [partner.eq(i) & is_pair for i in range(len(a))]
        self.second_row = [variable.get() for variable in rows]
        self.block = Block(*(variable.get() for variable in block))

    def _collect(self, chosen: list[Value]) -> list[Number]:
        """Collect a row of each lane's own, of whole matrices; zeros where none is chosen."""
        a, across, every = self.a, self.symmetry.across, range(len(self.a))
        return [_pick(chosen, [a[i][j] if i <= j else across(a[j][i]) for i in every], self.zero) for j in every]

    def sweep(self) -> None:
        """Sweep the rows of the pivots."""
        e, every = self.e, range(len(self.a))
        if not self.may_have_pairs:
            for (i, j), number in self._swept(pairs=False).items():
                self.a[i][j] = number
            return
        entries = {(i, j): NumberVariable(self.a[i][j]) for i in every for j in every[i:]}
        for condition, pairs in ((~self.any_pair, False), (self.any_pair, True)):
            with e.when(condition):
                for at, number in self._swept(pairs=pairs).items():
                    entries[at].set(number)
        for (i, j), variable in entries.items():
            self.a[i][j] = variable.get()

    def _swept(self, *, pairs: bool) -> dict[tuple[int, int], Number]:
        """Return the upper triangles after the step, in which there may be pairs or not."""
        symmetry, block, every = self.symmetry, self.block, range(len(self.a))
        minus_one = -constant_number(self.e, self.e.numbers(1.0), len(self.zero.parts))
        # In the rows and columns of the pivots, set to zero, the same sums give what is to stand there.
        factors = [-symmetry.times(symmetry.across(number), block.first) for number in self.first_row]
        rows, gone = [minus_one.where(f, x) for f, x in zip(self.first, self.first_row, strict=True)], self.first
        if pairs:
            both = [block.factors(symmetry, p, q) for p, q in zip(self.first_row, self.second_row, strict=True)]
            factors, others = ([-pair[k] for pair in both] for k in range(2))
            rows = [self.zero.where(s, x) for s, x in zip(self.second, rows, strict=True)]
            other_rows = [
                minus_one.where(s, self.zero.where(f, x))
                for f, s, x in zip(self.first, self.second, self.second_row, strict=True)
            ]
            others = [
                block.second.where(s, block.beside.where(f, x))
                for f, s, x in zip(self.first, self.second, others, strict=True)
            ]
            factors = [symmetry.across(block.beside).where(s, x) for s, x in zip(self.second, factors, strict=True)]
            gone = [f | s for f, s in zip(self.first, self.second, strict=True)]
        factors = [block.first.where(f, x) for f, x in zip(self.first, factors, strict=True)]
        swept = {}
        for i in every:
            for j in every[i:]:
                number = self.zero.where(gone[i] | gone[j], self.a[i][j])
                if pairs:
                    number = number.plus_product(others[i], other_rows[j])
                number = number.plus_product(factors[i], rows[j])
                swept[i, j] = symmetry.diagonal(number) if i == j else number
        return swept


def _largest(e: Emitter, numbers: Sequence[Number], leave_out: Sequence[Value]) -> tuple[Value, Value]:
    """Return the largest size of numbers, -1 if all are left out, and which of them has it first."""
    sizes = [e.select(out, e.numbers(-1.0), number.size()) for number, out in zip(numbers, leave_out, strict=True)]
    best, at = sizes[0], e.integers(0)
    for i, size in enumerate(sizes[1:], 1):
        more = size > best
        best, at = e.select(more, size, best), e.select(more, e.integers(i), at)
    return best, at


def _pick(chosen: Sequence[Value], numbers: Sequence[Number], other: Number) -> Number:
    """Return in each lane the number that is chosen there."""
    return reduce(lambda kept, pair: pair[1].where(pair[0], kept), zip(chosen, numbers, strict=True), other)
