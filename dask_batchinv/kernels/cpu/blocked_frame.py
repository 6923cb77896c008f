"""What the functions of the blocked layout share: n is known when they run, not when they are written.

The numbers of the matrix in work are laid out as `within` has them: row j is column j of the matrix, of whole vectors,
for complex numbers first the real parts of all and then the imaginary ones.
"""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.values import INT, Value

#: Columns that are eliminated step by step; by updates of a strip; and by updates of the whole matrix. Measured. Of
#: general matrices no bit depends on them; of definite and complex triangular ones they are a part of the
#: arithmetic: another number gives other roundings.
STEPS, STRIP, PANEL = 8, 32, 96
#: Columns that an update finds the factors of together: these stay in the second-level cache.
CHUNK = 32
#: What the table says of a matrix: addresses, and at last sizes.
PLACES = (
    "source",  # the matrix
    "target",  # its inverse
    "scale",  # the two factors that bring it to unit size, and its inverse back
    "rows",  # the numbers in work
    "saved",  # the columns of a panel as each was at its turn, block by block
    "lower",  # what they had in the rows of later pivots; of symmetric matrices some rows as they are now
    "pivots",  # the row of each pivot; of symmetric matrices how many rows have been swept
    "factors",  # of each step of a panel for every row; of general matrices the update finds them instead
    "inverses",  # of the pivots of a panel
    "columns",  # for each row the column that it was the pivot of
    "sizes",  # what each pivot is judged by
    "used",  # bits, a word for each vector: rows that have been pivots, and those that are no rows
    "found",  # what a function has to tell, two words for each part of the work
    "n",
    "blocks",  # of a row
    "stride",  # reals from row to row
)
_SIZES = PLACES[-3:]


def rows_of_tile(spec: KernelSpec) -> int:
    """Return how many rows an update has in registers together; measured."""
    return (8 if spec.lanes * spec.itemsize == 64 else 4) // spec.parts


def vectors_of_block(spec: KernelSpec) -> int:
    """Return how many vectors of each row of a tile are in registers; measured."""
    return 3 if spec.parts == 1 else 2


def rows_of_group(spec: KernelSpec) -> int:
    """Return how many rows have their factors beside each other, and are solved for together; whole tiles."""
    return max(rows_of_tile(spec), min(spec.lanes, STEPS))


def block_of(spec: KernelSpec) -> int:
    """Return the reals of a block."""
    return vectors_of_block(spec) * spec.lanes


class Frame:
    """A function for matrices of a dtype, and the matrix that it is at."""

    def __init__(self, spec: KernelSpec, name: str, integers: int, module: ir.Module):
        self.spec, self.parts, self.lanes = spec, spec.parts, spec.lanes
        self.vectors = vectors_of_block(spec)
        """Vectors of a block."""
        self.e = e = Emitter(f"{spec.name}_{name}", spec.itemsize, spec.lanes, integers=integers, module=module)
        table, *self.arguments = e.arguments
        self._places = {}
        for i, place in enumerate(PLACES):
            kind = INT if place in _SIZES else ir.PointerType()
            self._places[place] = e.load(e.at(table, i, INT), kind, align=8)
        self.length = self["blocks"] * self.block
        """Reals of a row, for one part."""

    def call(self, name: str, *integers: Value) -> None:
        """Call another of the functions, for the same matrix."""
        self.e.call(f"{self.spec.name}_{name}", ir.VoidType(), self.e.arguments[0], *integers)

    def __getitem__(self, place: str) -> Value:
        """Return what the table says of a place."""
        return self._places[place]

    @property
    def block(self) -> int:
        """Reals of a block."""
        return block_of(self.spec)

    def row(self, j: Value) -> Value:
        """Return the address of a row."""
        return self.e.at(self["rows"], j * self["stride"])

    def load(self, row: Value, index: Value) -> Number:
        """Load a vector of numbers of a row."""
        return Number(self.e, tuple(self.e.load(place, align=self.e.nbytes) for place in self._parts(row, index)))

    def store(self, number: Number, row: Value, index: Value) -> None:
        """Store a vector of numbers of a row."""
        for value, place in zip(number.parts, self._parts(row, index), strict=True):
            self.e.store(value, place, align=self.e.nbytes)

    def entry(self, row: Value, index: Value) -> Number:
        """Load one number of a row."""
        return Number(self.e, tuple(self.e.load(place, self.e.real) for place in self._parts(row, index)))

    def set_entry(self, number: Number, row: Value, index: Value) -> None:
        """Store one number of a row."""
        for value, place in zip(number.parts, self._parts(row, index), strict=True):
            self.e.store(value, place)

    def _parts(self, row: Value, index: Value) -> list[Value]:
        first = self.e.at(row, index)
        return [first, self.e.at(first, self.length)][: self.parts]

    def constant(self, real: float) -> Number:
        """Return a real constant as one number."""
        return Number(self.e, tuple(self.e.number(part) for part in (real, 0.0)[: self.parts]))

    def saved(self, block: Value, step: Value) -> Value:
        """Return where a step of the panel has a block of its column."""
        return self.e.at(self["saved"], (block * PANEL + step) * (self.parts * self.block))

    def saved_parts(self, address: Value, index: Value | int) -> list[Value]:
        """Return the addresses of a number in such a block."""
        first = self.e.at(address, index)
        return [first, self.e.at(first, self.block)][: self.parts]

    def lower(self, step: Value, earlier: Value) -> Value:
        """Return where what an earlier step had in the row of a pivot is kept."""
        return self.e.at(self["lower"], (step * PANEL + earlier) * self.parts)

    def get(self, place: str, index: Value) -> Value:
        """Load an integer of one of the places."""
        return self.e.load(self.e.at(self[place], index, INT), INT)

    def set(self, place: str, index: Value, value: Value) -> None:
        """Store an integer in one of the places."""
        self.e.store(value, self.e.at(self[place], index, INT), align=8)
