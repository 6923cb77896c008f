"""How a stack is cut into tiles: which region each has, and under which keys its chunks lie. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

#: A job may have so many tiles: the ledger takes about 150 bytes of the driver's memory for each.
LARGEST_COUNT = 10_000_000
#: Which dimensions of a stack an array has: all, all but that of the columns, or none but those of the batch; or behind
#: these one for triangles, and last one for real and imaginary parts.
Extent = Literal["matrix", "row", "number", "triangle", "matrix, parts", "triangle, parts"]
#: What stands for those among the axes.
TRIANGLE, PARTS = -1, -2


def cuts(size: int, step: int) -> int:
    """Return into how many pieces of at most `step` a length is cut."""
    return -(-size // step)


def describe_tile(number: int, region: Iterable[tuple[int, int]]) -> str:
    """Return the number of a tile and where it begins and ends along each batch axis, for people.

    Examples
    --------
    >>> describe_tile(2, [(8, 10)])
    'tile 2 [8:10]'
    """
    return f"tile {number} [{', '.join(f'{start}:{stop}' for start, stop in region)}]"


@dataclass(frozen=True)
class StackShape:
    """The shape of a stack."""

    shape: tuple[int, ...]
    """Its shape, in the order stored."""
    core: tuple[int, int]
    """Axes of rows and columns."""

    @property
    def n(self) -> int:
        """Rows of one matrix."""
        return self.shape[self.core[0]]

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """Axes that are not core."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.core)

    @property
    def n_matrices(self) -> int:
        """Matrices in all."""
        return math.prod(self.shape[axis] for axis in self.batch)


@dataclass(frozen=True)
class Tiling(StackShape):
    """How a stack is cut into tiles."""

    tile: tuple[int, ...]
    """Shape of a tile (those at the end may be smaller): also the chunk shape of the target."""

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Tiles along each batch axis."""
        return tuple(cuts(self.shape[axis], self.tile[axis]) for axis in self.batch)

    @property
    def n_tiles(self) -> int:
        """Tiles in all."""
        return math.prod(self.grid)

    def axes(self, extent: Extent) -> tuple[int, ...]:
        """Return the axes of the stack that an array has, and `TRIANGLE` and `PARTS` where it has these.

        Examples
        --------
        >>> tiling = Tiling(shape=(10, 3, 3), core=(1, 2), tile=(4, 3, 3))
        >>> tiling.axes("row"), tiling.axes("triangle, parts"), tiling.shape_of("triangle, parts")
        ((0, 1), (0, -1, -2), (10, 6, 2))
        """
        kind, _, parts = extent.partition(", ")
        left_out = {"matrix": (), "row": self.core[1:]}.get(kind, self.core)
        axes = [axis for axis in range(len(self.shape)) if axis not in left_out]
        return *axes, *([TRIANGLE] if kind == "triangle" else []), *([PARTS] if parts else [])

    def _length(self, axis: int, sizes: tuple[int, ...]) -> int:
        if axis in (TRIANGLE, PARTS):
            return 2 if axis == PARTS else self.n * (self.n + 1) // 2
        return sizes[axis]

    def shape_of(self, extent: Extent) -> tuple[int, ...]:
        """Return the shape of an array."""
        return tuple(self._length(axis, self.shape) for axis in self.axes(extent))

    def chunk_of(self, extent: Extent) -> tuple[int, ...]:
        """Return the shape of a chunk of an array."""
        return tuple(self._length(axis, self.tile) for axis in self.axes(extent))

    def region(self, tiles: int | range, extent: Extent = "number") -> tuple[slice, ...]:
        """Return where a tile is, by its number in C order, or a span of tiles, in an array.

        Examples
        --------
        >>> tiling = Tiling(shape=(10, 3, 3), core=(1, 2), tile=(4, 3, 3))
        >>> tiling.n_tiles, tiling.region(2), tiling.region(range(0, 2))
        (3, (slice(8, 10, None),), (slice(0, 8, None),))
        """
        first, last = (tiles, tiles) if isinstance(tiles, int) else (tiles[0], tiles[-1])
        start, stop = self._position(first), self._position(last)
        return tuple(
            slice(start[axis] * self.tile[axis], min((stop[axis] + 1) * self.tile[axis], self.shape[axis]))
            if axis in start
            else slice(None)
            for axis in self.axes(extent)
        )

    def matrices(self) -> npt.NDArray[np.int64]:
        """Return the matrices in each tile, by number.

        Examples
        --------
        >>> Tiling(shape=(10, 3, 3), core=(1, 2), tile=(4, 3, 3)).matrices()
        array([4, 4, 2])
        """
        counts = np.ones(1, np.int64)
        for axis, cut in zip(self.batch, self.grid, strict=True):
            size, step = self.shape[axis], self.tile[axis]
            along = np.minimum(step, size - step * np.arange(cut))
            counts = np.multiply.outer(counts, along).reshape(-1)
        return counts

    def numbers_in(self, larger: Tiling) -> npt.NDArray[np.int64]:
        """Return the numbers that these tiles have in the tiling of a stack that has grown.

        Examples
        --------
        >>> small, large = (Tiling(shape=(10, size, 3, 3), core=(2, 3), tile=(5, 4, 3, 3)) for size in (4, 8))
        >>> small.numbers_in(large)
        array([0, 2])
        """
        places = np.unravel_index(np.arange(self.n_tiles), self.grid or (1,))
        return np.ravel_multi_index(places, larger.grid or (1,)).astype(np.int64)

    def _position(self, number: int) -> dict[int, int]:
        """Return where a tile is in the grid, by batch axis."""
        position = {}
        for axis, count in zip(reversed(self.batch), reversed(self.grid), strict=True):
            number, position[axis] = divmod(number, count)
        return position

    def place(self, number: int, extent: Extent) -> tuple[int, ...]:
        """Return where a tile's chunk is in the grid of those of an array.

        Examples
        --------
        >>> tiling = Tiling(shape=(10, 3, 3), core=(1, 2), tile=(4, 3, 3))
        >>> tiling.place(2, "matrix"), tiling.place(2, "number")
        ((2, 0, 0), (2,))
        """
        position = self._position(number)
        return tuple(position.get(axis, 0) for axis in self.axes(extent))

    def spans(self, numbers: Iterable[int], longest: int) -> Iterator[range]:
        """Yield `numbers`, which ascend, as ranges of tiles that lie side by side along the last axis.

        Examples
        --------
        >>> tiling = Tiling(shape=(2, 10, 3, 3), core=(2, 3), tile=(1, 2, 3, 3))
        >>> list(tiling.spans([0, 1, 2, 4, 5, 6], longest=2))
        [range(0, 2), range(2, 3), range(4, 5), range(5, 7)]
        """
        row = self.grid[-1] if self.grid else 1
        start = stop = -1
        for number in numbers:
            if number != stop or number - start == longest or number % row == 0:
                if start >= 0:
                    yield range(start, stop)
                start = number
            stop = number + 1
        if start >= 0:
            yield range(start, stop)
