"""The way in and out for large matrices of which one triangle says all, some columns at a time.

The functions are those of `blocked_ends`, but that rows of the scratch are rows of the matrix, or of the transpose of
a lower triangular one, and that only the upper triangle is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_ends import first_lanes, put, scale, tell
from dask_batchinv.kernels.cpu.blocked_frame import Frame
from dask_batchinv.kernels.cpu.scaling import Measure, larger_sum, without_sign_of_zero
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.symmetric_pivots import Symmetry
from dask_batchinv.kernels.cpu.within_workspace import across
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.transpose import transpose
from dask_batchinv.kernels.emit.values import Value

Block = list[Number]
"""As many vectors as they have lanes: a square of a matrix."""


@dataclass(frozen=True)
class Triangle:
    """Which triangle a function reads and writes, and what the other is."""

    is_lower: bool
    symmetry: Symmetry | None
    """What entries across the diagonal are; None if they are zeros."""

    @classmethod
    def of(cls, spec: KernelSpec) -> Triangle:
        """Return that of a structure."""
        symmetry = None if "triangular" in spec.structure else Symmetry.of(spec.structure)
        return cls(spec.structure == "lower triangular", symmetry)

    def on_diagonal(self, f: Frame, block: Block) -> Block:
        """Return a block on the diagonal with what its other triangle is."""
        e = f.e
        if self.symmetry is None:
            nothing = f.constant(0.0).splat()
            return [x.where(e.iota <= t if self.is_lower else e.iota >= t, nothing) for t, x in enumerate(block)]
        pairs = enumerate(zip(block, turned(f, block, self.symmetry), strict=True))
        return [x.where(e.iota > t, self.symmetry.diagonal(x).where(e.iota.eq(t), y)) for t, (x, y) in pairs]

    def each_block(
        self,
        f: Frame,
        c: Value,
        block: Callable[[Value, Value], Block],
        use: Callable[[Block, Value], None],
        use_other: Callable[[Block, Value], None],
    ) -> None:
        """Call ``use(block, r)`` for each block of the triangle in some columns from c on, `use_other` for all others.

        ``block(r, c)`` returns one of the triangle.
        """
        e, nothing = f.e, [f.constant(0.0).splat()] * f.lanes

        def other(r: Value) -> Block:
            return nothing if self.symmetry is None else turned(f, block(c, r), self.symmetry)

        with e.loop(0, c, f.lanes) as r:
            use_other(other(r), r) if self.is_lower else use(block(r, c), r)
        use(self.on_diagonal(f, block(c, c)), c)
        with e.loop(c + f.lanes, f["n"], f.lanes) as r:
            use(block(r, c), r) if self.is_lower else use_other(other(r), r)


def turned(f: Frame, block: Block, symmetry: Symmetry | None) -> Block:
    """Return the square block across the diagonal; for no symmetry, the transpose."""
    parts = [transpose(f.e, [number.parts[p] for number in block]) for p in range(f.parts)]
    numbers = [Number(f.e, values) for values in zip(*parts, strict=True)]
    return numbers if symmetry is None else [symmetry.across(number) for number in numbers]


def write(spec: KernelSpec, module: ir.Module, *, is_minus: bool = False) -> None:
    """Write ``measure(table, start, stop, part)``, and ``read`` and ``give`` likewise.

    What `give` finds in the scratch may be `is_minus` the inverse.
    """
    triangle = Triangle.of(spec)
    _write_measure(Frame(spec, "measure", 3, module), triangle)
    _write_read(Frame(spec, "read", 3, module), triangle)
    _write_give(Frame(spec, "give", 3, module), triangle, is_minus=is_minus)


def _write_measure(f: Frame, triangle: Triangle) -> None:
    """Measure the triangle."""
    e, measure = f.e, Measure(f.e)
    length, symmetry = f["n"] * f.parts, triangle.symmetry
    with e.loop(f.arguments[0], f.arguments[1]) as i:
        row, diagonal = e.at(f["source"], i * length), i * f.parts
        begin, end = (e.integer(0), diagonal + f.parts) if triangle.is_lower else (diagonal, length)
        with e.loop(begin, end, f.lanes) as c:
            counts = first_lanes(e, end - c)
            if f.parts == 2 and symmetry is not None and symmetry.is_hermitian:
                counts = counts & ~(e.iota + e.splat(e.resize(c - diagonal, e.word))).eq(1)
            measure.look(e.load_where(counts, e.at(row, c)))
    tell(f, *measure.bits_of_all())
    e.finish()


def _write_read(f: Frame, triangle: Triangle) -> None:
    """Scale the triangle, and sum up the columns."""
    e, factors = f.e, scale(f)
    norm = e.variable(e.numbers(0.0))
    with e.loop(f.arguments[0], f.arguments[1], f.lanes) as c:
        total = e.variable(e.numbers(0.0))

        def add(block: Block, r: Value) -> None:
            for number in block:
                total.set(total.get() + number.modulus())

        def use(block: Block, r: Value, c: Value = c) -> None:
            add(block, r)
            if triangle.is_lower:
                put_block(f, turned(f, block, None), c, r)
            else:
                put_block(f, block, r, c)

        other = add if triangle.symmetry else lambda block, r: None
        triangle.each_block(f, c, partial(_source, f, factors), use, other)
        norm.set(larger_sum(e, total.get(), norm.get()))
    largest = e.lane(across(e, norm.get(), partial(larger_sum, e)), 0)
    tell(f, e.bits(largest), e.bits(largest))
    e.finish()


def _source(f: Frame, factors: list[Value], r: Value, c: Value) -> Block:
    """Load a block of the matrix, scaled; zeros beyond it."""
    e, n = f.e, f["n"]
    inside = [first_lanes(e, (n - c) * f.parts - p * f.lanes) for p in range(f.parts)]
    block = []
    for t in range(f.lanes):
        there, place = e.splat((r + t) < n), e.at(f["source"], ((r + t) * n + c) * f.parts)
        parts = [e.load_where(mask & there, e.at(place, p * f.lanes)) for p, mask in enumerate(inside)]
        if f.parts == 2:
            parts = [e.shuffle(parts[0], parts[1], range(p, 2 * f.lanes, 2)) for p in range(2)]
        block.append(Number(e, tuple(part * factors[0] * factors[1] for part in parts)))
    return block


def block_at(f: Frame, r: Value, c: Value) -> Block:
    """Load a block of the scratch."""
    return [f.load(f.row(r + t), c) for t in range(f.lanes)]


def put_block(f: Frame, block: Block, r: Value, c: Value) -> None:
    """Store a block of the scratch."""
    for t, number in enumerate(block):
        f.store(number, f.row(r + t), c)


def _write_give(f: Frame, triangle: Triangle, *, is_minus: bool = False) -> None:
    """Write whole inverses, scaled back."""
    e, n = f.e, f["n"]
    first, second = scale(f)
    norm, largest = e.variable(e.numbers(0.0)), e.variable(e.integers(0))

    def load(r: Value, c: Value) -> Block:
        block = turned(f, block_at(f, c, r), None) if triangle.is_lower else block_at(f, r, c)
        return [-number for number in block] if is_minus else block

    with e.loop(f.arguments[0], f.arguments[1], f.lanes) as c:
        total = e.variable(e.numbers(0.0))

        def use(block: Block, r: Value, c: Value = c) -> None:
            for t, number in enumerate(block):
                with e.when((r + t) < n):
                    total.set(total.get() + number.modulus())
                    parts = [without_sign_of_zero(e, part * first, second) for part in number.parts]
                    for part in parts:
                        largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(part))))
                    _put_row(f, parts, r + t, c)

        def clear(block: Block, r: Value, c: Value = c) -> None:
            for t, number in enumerate(block):
                with e.when((r + t) < n):
                    _put_row(f, list(number.parts), r + t, c)

        triangle.each_block(f, c, load, use, use if triangle.symmetry else clear)
        norm.set(larger_sum(e, total.get(), norm.get()))
    tell(f, e.reduce("umax", largest.get()), e.bits(e.lane(across(e, norm.get(), partial(larger_sum, e)), 0)))
    e.finish()


def _put_row(f: Frame, parts: list[Value], r: Value, c: Value) -> None:
    """Store numbers of the inverse."""
    e, n, half = f.e, f["n"], f.lanes // 2
    if f.parts == 2:
        orders = [[b * half + at // 2 + at % 2 * f.lanes for at in range(f.lanes)] for b in range(2)]
        parts = [e.shuffle(parts[0], parts[1], order) for order in orders]
    place = e.at(f["target"], (r * n + c) * f.parts)
    for b, part in enumerate(parts):
        put(f, part, e.at(place, b * f.lanes), (n - c) * f.parts - b * f.lanes)
