"""The scratch of a group of interleaved matrices: one matrix per lane, entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.cpu.streaming import buffer_nbytes
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.values import Value


def workspace(spec: KernelSpec, more: Sequence[int] = ()) -> Workspace:
    """Return what a kernel with a matrix per lane works on at a time; with the lengths of its own tables in vectors."""
    vector_nbytes = spec.lanes * spec.itemsize
    return Workspace(spec.lanes, _tables(spec, more)[-1] * vector_nbytes + buffer_nbytes(spec.size, vector_nbytes))


def _tables(spec: KernelSpec, more: Sequence[int]) -> list[int]:
    """Return where the tables begin and end, in vectors: entries, two of factors, sums, chosen, orders, and others."""
    n, row = spec.n, spec.n * spec.parts
    ends = [0]
    for length in (n * row, row, row, n, n, spec.lanes * -(-row // spec.lanes), *more):
        ends.append(ends[-1] + length)
    return ends


class Group:
    """As many matrices as there are lanes: vector (i, j) has that entry of all of them."""

    def __init__(self, e: Emitter, spec: KernelSpec, more: Sequence[int] = ()):
        self.e, self.n, self.parts, self.size = e, spec.n, spec.parts, spec.size
        self.base = e.scratch
        starts = [self.vector(start) for start in _tables(spec, more)]
        self.factors = starts[1:3]
        """What the rows of two pivots are multiplied by, for each row."""
        self.sums = starts[3]
        """Sums over columns."""
        self.chosen = starts[4]
        """For each step the row that its pivot was in."""
        self.orders = starts[5]
        """Matrix by matrix, where in a row of the scratch the numbers of a row of the inverse are."""
        self.more = starts[6:-1]
        """Tables of a kernel's own."""
        self.buffer = starts[-1]
        """Inverses on their way."""

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

    def entry(self, i: Value | int, j: Value | int) -> Value:
        """Return the address of an entry of the matrices."""
        i = self.e.integer(i) if isinstance(i, int) else i
        return self.vector((i * self.n + j) * self.parts)

    def each_piece(self, body: Callable[[Value, int], None]) -> None:
        """Run the body for pieces of the numbers of a matrix as they stand in memory; the last may overlap."""
        e = self.e
        piece = min(max(1, e.lanes // 2), self.size)
        with e.loop(0, self.size - self.size % piece, piece) as start:
            body(start, piece)
        if self.size % piece:
            body(e.integer(self.size - piece), piece)

    def item(self, table: Value, i: Value) -> Value:
        """Return the address of a number in a table of factors."""
        return self.vector(i * self.parts, table)

    def mask_of(self, rows: Value, i: Value) -> Value:
        """Mask of the lanes where a vector of row numbers is i."""
        return rows.eq(self.row_number(i))

    def row_number(self, i: Value) -> Value:
        """Return a row's number in all lanes."""
        return self.e.splat(self.e.resize(i, self.e.word))
