"""The scratch of kernels that work within a matrix: rows of whole vectors, and tables beside them.

A few matrices are in work together, because one alone would leave the processor waiting for each pivot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from dask_batchinv.kernels.cpu import scaling
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.values import INT, Value

#: Columns eliminated together. Part of the arithmetic: another number gives other roundings.
PANEL = 4
#: Vectors of a row up to which loops over it are unrolled.
_UNROLLED = 4
#: Above this size of a matrix the processor's own prefetching is better.
_AHEAD_NBYTES = 2**18
#: Vectors of a row up to which the search for its largest number is unrolled.
_SEARCHED_AT_ONCE = 16
#: What is prefetched goes to the first-level cache up to this size, else to the second.
_FIRST_LEVEL_NBYTES = 2**14


@dataclass(frozen=True)
class Shape(KernelSpec):
    """Sizes of the matrices and of their scratch."""

    together: int
    """Matrices in work together."""

    @classmethod
    def of(cls, spec: KernelSpec, together: int) -> Shape:
        """Return the sizes for a kernel."""
        return cls(**vars(spec), together=together)

    @property
    def workspace(self) -> Workspace:
        """What the kernel works on at a time."""
        return Workspace(self.together, self.together * self.nbytes)

    @property
    def vectors(self) -> int:
        """Vectors of a row, for one part."""
        return -(-self.n // self.lanes)

    @property
    def length(self) -> int:
        """Reals of a row, for one part."""
        return self.vectors * self.lanes

    @property
    def stride(self) -> int:
        """Reals from row to row: an odd number of vectors, so that rows do not map to the same cache sets."""
        return self.lanes * (self.parts * self.vectors | 1)

    @property
    def nbytes(self) -> int:
        """Bytes of one matrix with its tables, in whole cache lines."""
        reals = self.length * self.stride + 3 * PANEL * self.stride + self.length
        return -(-(reals * self.itemsize + (2 * self.length + 2 * self.vectors + _STATES) * 8) // 64) * 64


FIRST, SECOND, FINITE, NORM = range(4)
_STATES = 4


class WorkspaceMatrix:
    """One matrix in the scratch."""

    def __init__(self, e: Emitter, s: Shape, index: Value):
        self.e, self.s = e, s
        base = e.at(e.scratch, index * s.nbytes, ir.IntType(8))
        self.rows = base
        """The matrix, or its transpose: `length` rows."""
        self.panel_rows = e.at(base, s.length * s.stride)
        """Rows of a panel as they change, where they cannot stay in place."""
        self.saved = e.at(self.panel_rows, PANEL * s.stride)
        """Rows of a panel as they were when it was their turn."""
        self.scaled = e.at(self.saved, PANEL * s.stride)
        """The same, divided by their pivots."""
        self.pivot_sizes = e.at(self.scaled, PANEL * s.stride)
        """What each pivot is judged by."""
        self.pivots = e.at(self.pivot_sizes, s.length)
        """The row of each pivot."""
        self.columns = e.at(self.pivots, s.length, INT)
        """For each row the column that it was the pivot of."""
        self.used = e.at(self.columns, s.length, INT)
        """Bits, a word for each vector: rows that have been pivots, and those that are no rows."""
        self.others = e.at(self.used, s.vectors, INT)
        """Bits of the rows that have not become pivots in this panel."""
        self.state = e.at(self.others, s.vectors, INT)

    def address(self, rows: Value, row: Value, vector: Value | int, part: int = 0) -> Value:
        """Return the address of a vector in a table of rows."""
        e, s = self.e, self.s
        vector = e.integer(vector) if isinstance(vector, int) else vector
        return e.at(rows, row * s.stride + vector * s.lanes + part * s.length)

    def load(self, rows: Value, row: Value, vector: Value | int) -> Number:
        """Load a vector of numbers."""
        addresses = [self.address(rows, row, vector, part) for part in range(self.s.parts)]
        return Number(self.e, tuple(self.e.load(address, align=self.e.nbytes) for address in addresses))

    def store(self, number: Number, rows: Value, row: Value, vector: Value | int) -> None:
        """Store a vector of numbers."""
        for part, value in enumerate(number.parts):
            self.e.store(value, self.address(rows, row, vector, part), align=self.e.nbytes)

    def entry(self, rows: Value, row: Value, index: Value) -> Number:
        """Load one number."""
        e, s = self.e, self.s
        first = e.at(rows, row * s.stride + index)
        return Number(e, tuple(e.load(e.at(first, part * s.length), e.real) for part in range(s.parts)))

    def set_entry(self, number: Number, rows: Value, row: Value, index: Value) -> None:
        """Store one number."""
        e, first = self.e, self.e.at(rows, row * self.s.stride + index)
        for part, value in enumerate(number.parts):
            e.store(value, e.at(first, part * self.s.length))

    def part_of_row(self, rows: Value, row: Value, index: Value, count: int) -> Number:
        """Load some adjacent numbers."""
        e, first = self.e, self.e.at(rows, row * self.s.stride + index)
        kind = ir.VectorType(e.real, count)
        return Number(e, tuple(e.load(e.at(first, part * self.s.length), kind) for part in range(self.s.parts)))

    def set_part_of_row(self, number: Number, rows: Value, row: Value, index: Value, count: int) -> None:
        """Store the first of some adjacent numbers."""
        e, first = self.e, self.e.at(rows, row * self.s.stride + index)
        for part, value in enumerate(number.parts):
            place = e.at(first, part * self.s.length)
            e.store(e.shuffle(value, None, range(count)), place)

    def get(self, table: Value, index: Value | int) -> Value:
        """Load an integer."""
        return self.e.load(self.e.at(table, index, INT), INT)

    def set(self, table: Value, index: Value | int, value: Value) -> None:
        """Store an integer."""
        self.e.store(value, self.e.at(table, index, INT))

    @property
    def norm(self) -> Value:
        """The address of the 1-norm."""
        return self.e.at(self.state, NORM, INT)

    def scale(self) -> tuple[Value, Value]:
        """Return the two factors by which the matrix, and then its inverse, is scaled."""
        first, second = (self.e.splat(self.e.load(self.e.at(self.state, i, INT), self.e.real)) for i in (FIRST, SECOND))
        return first, second

    def put_aside(self, *values: Value) -> None:
        """Keep some vectors until `aside` asks for them, when no panel is in work."""
        for i, value in enumerate(values):
            self.e.store(self.e.from_bits(value), self.e.at(self.panel_rows, i * self.e.lanes))

    def aside(self, index: int) -> Value:
        """Return a vector that was put aside."""
        return self.e.load(self.e.at(self.panel_rows, index * self.e.lanes), align=self.e.nbytes)


def each_block(e: Emitter, total: int, size: int, body: Callable[[Value, int], None]) -> None:
    """Run the body for each block of a range, with its start and length; the last may be shorter."""
    if total >= size:
        with e.loop(0, total - total % size, size) as start:
            body(start, size)
    if total % size:
        body(e.integer(total - total % size), total % size)


def each_vector_of_row(e: Emitter, n: int, body: Callable[[Value, int], None]) -> None:
    """Run the body for each vector of a row as it stands in memory, with its start and length."""
    if n <= 2 * _UNROLLED * e.lanes:
        for start in range(0, n, e.lanes):
            body(e.integer(start), min(e.lanes, n - start))
    else:
        each_block(e, n, e.lanes, body)


def each_vector(e: Emitter, count: int, body: Callable[[Value], None]) -> None:
    """Run the body for each vector of a row."""
    if count <= _UNROLLED:
        for number in range(count):
            body(e.integer(number))
    else:
        with e.loop(0, count) as v:
            body(v)


def across(e: Emitter, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Combine all lanes; every lane holds the result."""
    distance = e.lanes // 2
    while distance:
        vector = combine(vector, e.shuffle(vector, None, [i ^ distance for i in range(e.lanes)]))
        distance //= 2
    return vector


def first_lane(e: Emitter, masks: list[Value]) -> Value:
    """Return the number of the first lane that is set, counted through several masks; large if none is."""
    per = 64 // e.lanes
    first = e.integer(1 << 32)
    for start in reversed(range(0, len(masks), per)):
        bits = e.mask_bits(masks[start])
        for v in range(start + 1, min(start + per, len(masks))):
            bits = bits | (e.mask_bits(masks[v]) << ((v - start) * e.lanes))
        first = e.select(bits.eq(0), first, e.trailing_zeros(bits) + start * e.lanes)
    return first


def only(mask: Value, number: Number) -> Number:
    """Return a number where the mask is set, else zero."""
    return number.where(mask, Number(number.e, tuple(number.e.numbers(0.0) for _ in number.parts)))


def find_largest(a: WorkspaceMatrix, key: Callable[[Value], Value]) -> tuple[Value, Value]:
    """Return the largest of the keys in a row, in all lanes, and where it is first; the keys vector by vector."""
    e, s = a.e, a.s
    if s.vectors <= _SEARCHED_AT_ONCE:
        keys = [key(e.integer(v)) for v in range(s.vectors)]
        best = keys
        while len(best) > 1:
            best = [e.larger(*best[i : i + 2]) if i + 1 < len(best) else best[i] for i in range(0, len(best), 2)]
        largest = across(e, best[0], e.larger)
        place = first_lane(e, [key.eq(largest) for key in keys])
    else:
        kept, first = e.variable(e.numbers(-1.0)), e.variable(e.integer(s.length))
        with e.loop(0, s.vectors) as v:
            kept.set(e.larger(key(v), kept.get()))
        largest = across(e, kept.get(), e.larger)
        with e.loop(0, s.vectors) as v:
            found = first_lane(e, [key(v).eq(largest)]) + v * e.lanes
            first.set(e.unsigned("umin", first.get(), found))
        place = first.get()
    # Where overflow has made NaN of all keys, any will do.
    return largest, e.unsigned("umin", place, e.integer(s.n - 1))


def prefetch_next(e: Emitter, s: Shape, index: Value, k0: Value, i: Value, count: int) -> None:
    """Prefetch the next matrix to be in work, and where this inverse goes, while a panel updates `count` others.

    As large a part as that is of all updates: what is asked for at once comes late.
    """
    number = s.parts * s.itemsize
    if s.size * s.itemsize > _AHEAD_NBYTES:
        return
    level = 3 if s.size * s.itemsize * s.together <= _FIRST_LEVEL_NBYTES else 2
    byte = ir.IntType(8)
    offset = (k0 * s.n + i * PANEL) * number
    source = e.at(e.a, (index + s.together) * (s.size * s.itemsize) + offset, byte)
    target = e.at(e.inverse, index * (s.size * s.itemsize) + offset, byte)
    for at in range(0, count * PANEL * number, 64):
        e.prefetch(e.at(source, at, byte), level=level)
        e.prefetch(e.at(target, at, byte), write=True, level=level)


def settle(a: WorkspaceMatrix, measure: scaling.Measure) -> None:
    """Note whether a matrix is finite and by what it is scaled."""
    e = a.e
    finite, scale = measure.of_all()
    e.store(scale.first, e.at(a.state, FIRST, INT))
    e.store(scale.second, e.at(a.state, SECOND, INT))
    a.set(a.state, FINITE, e.number_of(finite))
    for v in range(a.s.vectors):
        e.store(e.numbers(1.0), e.at(a.pivot_sizes, v * e.lanes))


def for_rows_outside(e: Emitter, s: Shape, k0: Value, width: int, update: Callable[[Value, int], None]) -> None:
    """Update the rows outside a panel, as many at a time as let their factors stay in registers."""
    step = 16 // PANEL // s.parts
    with e.loop(0, k0, step) as i:
        update(i, step)
    if width == PANEL:
        rest = s.n % PANEL % step
        with e.loop(k0 + width, s.n - rest, step) as i:
            update(i, step)
        if rest:
            update(e.integer(s.n - rest), rest)


def report(a: WorkspaceMatrix, index: Value, failing: Callable[[Value], Value]) -> None:
    """Write info and rcond of a matrix, and NaN over its inverse where info is not 0.

    `failing` says which of the pivots' sizes are failures. Put aside are the bits of the largest numbers of the
    inverse, and the sums of its columns before scaling.
    """
    e, s = a.e, a.s
    largest = e.reduce("umax", e.bits(a.aside(0)))
    norm, norm_of_inverse = e.load(a.norm, e.real), e.lane(across(e, a.aside(1), partial(scaling.larger_sum, e)), 0)
    sizes = [e.load(e.at(a.pivot_sizes, v * e.lanes), align=e.nbytes) for v in range(s.vectors)]
    # What came after the first failure is of no use.
    pivot = first_lane(e, [failing(size) for size in sizes]) + 1
    pivot = e.select(pivot > s.n, e.integer(0), pivot)
    finite = ~a.get(a.state, FINITE).eq(0)
    info = scaling.info_of(e, pivot, finite, ~scaling.is_finite(e, largest))
    scaling.write_account(e, index, info, norm, norm_of_inverse, finite, s.parts)
    target = e.at(e.inverse, index * s.size)
    with e.when(~info.eq(0)):
        each_block(
            e, s.size, e.lanes, lambda start, count: e.store_first(e.numbers(float("nan")), e.at(target, start), count)
        )
