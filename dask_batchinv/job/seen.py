"""What a store says of the chunks that tiles are made of: one number for each tile, which changes when a chunk does.

On a disk size and times of each file are looked at, by its name; of other stores one listing tells of a thousand.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_batchinv.job.tiling import Extent, Tiling, cuts
from dask_batchinv.known import Known
from dask_batchinv.location import Location

#: Of what a store says of a tile that was never looked at, or just now written.
UNKNOWN = 0
#: So many files are added up at a time.
_TOGETHER = 2**16
#: A file that is as young as this may be written to again at the same time: the clocks of file systems tick, and some
#: only every second, or every other.
_TICK_NS, _COARSE_TICK_NS = 50_000_000, 2_000_000_000
_SECOND_NS = 10**9

_NUMBER = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ChunkGrid:
    """Where the stored chunks of an array are: a shard is one where there are shards."""

    shape: tuple[int, ...]
    """Shape of the array."""
    chunk: tuple[int, ...]
    """Shape of a stored chunk."""
    prefix: str
    """What the keys of its chunks begin with."""
    separator: str
    """What is between the numbers in them."""

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(map(cuts, self.shape, self.chunk))

    def keys(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield all keys that there can be, and the place of each.

        Examples
        --------
        >>> list(ChunkGrid((10, 3), (5, 3), "c/", "/").keys())
        [('c/0/0', (0, 0)), ('c/1/0', (1, 0))]
        """
        for place in itertools.product(*map(range, self.counts)):
            yield self.prefix + self.separator.join(map(str, place)), place

    def place_of(self, key: str) -> tuple[int, ...] | None:
        """Return the place of a key; None if it is not one of a chunk.

        Examples
        --------
        >>> grid = ChunkGrid((10, 3), (5, 3), "c/", "/")
        >>> grid.place_of("c/1/0"), grid.place_of("c/2/0"), grid.place_of("zarr.json")
        ((1, 0), None, None)
        """
        if not self.shape:
            return () if key == self.prefix else None
        parts = key.removeprefix(self.prefix).split(self.separator)
        if not key.startswith(self.prefix) or len(parts) != len(self.shape) or not all(map(_NUMBER.fullmatch, parts)):
            return None
        place = tuple(map(int, parts))
        return place if all(at < count for at, count in zip(place, self.counts, strict=True)) else None


class _Files(NamedTuple):
    """Some stored chunks."""

    places: Numbers
    """Where they are in the grid: a row for each."""
    sizes: Numbers
    """Their bytes; -1 where that is not known."""
    marks: npt.NDArray[np.uint64]
    """A number for what the store says of each."""
    unsure: Flags
    """Whether they may have been written to since without a trace."""


@dataclass
class Seen:
    """What a store says of all tiles."""

    marks: Numbers
    """A number for each tile, never `UNKNOWN`."""
    unsure: Flags
    """Whether something could be written to a tile since, and leave it the same number."""
    tells: bool = True
    """Whether the store tells when a chunk changes; else its numbers mean nothing."""
    count: int = 0
    """Chunks that are there."""
    whole: Flags = field(default_factory=lambda: np.zeros(0, bool))
    """Of a target: whether every chunk of a tile is there, as long as it must be."""

    def also(self, other: Seen) -> Seen:
        """Return what is known of tiles that are made of two arrays."""
        marks = _never_unknown(self.marks.view(np.uint64) + other.marks.view(np.uint64))
        return Seen(marks, self.unsure | other.unsure, self.tells and other.tells, self.count)

    @property
    def recorded(self) -> Numbers:
        """What to record of each tile."""
        return np.where(self.unsure, UNKNOWN, self.marks) if self.tells else np.full_like(self.marks, UNKNOWN)

    def differs(self, recorded: Numbers) -> Flags:
        """Return of which tiles other numbers are recorded, or none."""
        differs: Flags = self.marks != recorded
        return differs


def look_at_source(
    location: Location,
    grid: ChunkGrid,
    tiling: Tiling,
    axes: tuple[int, ...],
    start: tuple[int, ...],
    *,
    meaning: str = "",
    may_be_empty: bool = False,
) -> Seen:
    """Return what the store of a source says of what each tile is read from.

    The array has these `axes` of the stack, which begins at `start` in it. Its chunks mean something else where their
    `meaning` is another one; none may be there if it `may_be_empty`.
    One request for a thousand chunks; of a web server, which lists nothing, one for each.

    Raises
    ------
    OSError
        If the store cannot be read.
    """
    sums, unsure = np.zeros(tiling.n_tiles, np.uint64), np.zeros(tiling.n_tiles, bool)
    tells, count = True, 0
    for files, all_tell in _files(location, grid, ""):
        tells, count = tells and all_tell, count + len(files.places)
        for numbers, which in tiles_of(files.places, grid, tiling, axes, start):
            np.add.at(sums, numbers, files.marks[which])
            np.logical_or.at(unsure, numbers, files.unsure[which])
    if any(start) or meaning:
        # What moves within a chunk, or is decoded otherwise, leaves its file as it was.
        sums += np.uint64(mark_of(f"{start}", meaning, Known(None, "", None)))
    # A listing with nothing in it may be that of a server which lists nothing.
    is_listed = location.is_local or count > 0 or may_be_empty or not len(sums)
    return Seen(_never_unknown(sums), unsure, tells and is_listed, count)


@dataclass(frozen=True)
class Written:
    """An array of a target."""

    name: str
    """Its name."""
    extent: Extent
    """Which dimensions it has."""
    grid: ChunkGrid
    """Where its stored chunks are."""
    key: Callable[[int], str]
    """The key of the chunk of a tile."""
    most: int
    """Bytes that a chunk has at most."""
    is_exact: bool
    """Whether it always has as many."""

    def fits(self, nbytes: Any) -> Any:
        """Tell whether a chunk, or each of an array of them, can have so many bytes."""
        return nbytes == self.most if self.is_exact else (nbytes > 0) & (nbytes <= self.most)


def look_at_target(location: Location, arrays: Iterable[Written], tiling: Tiling) -> Seen:
    """Return what the store of a target says of the chunks of each tile.

    Nothing is called lost because a listing, which may be late, does not have it: it is asked for by its key.
    """
    sums, unsure = np.zeros(tiling.n_tiles, np.uint64), np.zeros(tiling.n_tiles, bool)
    whole = np.ones(tiling.n_tiles, bool)
    for array in arrays:
        inside = location / array.name
        found = np.zeros(tiling.n_tiles, bool)
        for files, _ in _files(inside, array.grid, array.name):
            for numbers, which in tiles_of(files.places, array.grid, tiling, tiling.axes(array.extent)):
                np.add.at(sums, numbers, files.marks[which])
                found[numbers] = array.fits(files.sizes[which])
        for number in map(int, np.flatnonzero(~found)):
            unsure[number] = True
            whole[number] &= bool(array.fits(inside.nbytes(array.key(number)) or 0))
    return Seen(_never_unknown(sums), unsure, whole=whole)


def _never_unknown(sums: npt.NDArray[np.uint64]) -> Numbers:
    marks = sums.view(np.int64)
    marks[marks == UNKNOWN] = 1
    return marks


def mark_of(array: str, key: str, says: Known) -> int:
    """Return a number for what a store says of a chunk of an array."""
    text = f"{array}/{key} {says.size} {says.version}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mark_of_files(target: Location, keys: dict[str, str]) -> int:
    """Return the number for the chunks of a tile that were just written on a disk: a key for each array.

    `UNKNOWN` where they are not on a disk: what was written there is only known by asking.
    """
    if not target.is_local:
        return UNKNOWN
    sums = np.zeros(1, np.uint64)
    paths = [(f"{array}/{key}", (array, key)) for array, key in keys.items()]
    for _, named, says in target.look(lambda: paths):
        assert named is not None
        sums += np.uint64(mark_of(*named, says))
    return int(_never_unknown(sums)[0])


def _files(location: Location, grid: ChunkGrid, array: str) -> Iterator[tuple[_Files, bool]]:
    """Yield what is known of stored chunks, many at a time, and whether it says when they change."""
    now = time.time_ns()
    known = location.look(grid.keys)
    placed = ((key, grid.place_of(key) if place is None else place, says) for key, place, says in known)
    chunks = ((key, place, says) for key, place, says in placed if place is not None)
    while part := list(itertools.islice(chunks, _TOGETHER)):
        files = _Files(
            np.array([place for _, place, _ in part], np.int64),
            np.array([-1 if says.size is None else says.size for _, _, says in part], np.int64),
            np.array([mark_of(array, key, says) for key, _, says in part], np.uint64),
            np.array([_is_young(says, now) for _, _, says in part], bool),
        )
        yield files, all(says.version for _, _, says in part)


def _is_young(says: Known, now: int) -> bool:
    """Tell whether a file could be written to at the time that it has already."""
    if says.changed is None:
        return False
    return now - says.changed < (_TICK_NS if says.changed % _SECOND_NS else _COARSE_TICK_NS)


def tiles_of(
    places: Numbers, grid: ChunkGrid, tiling: Tiling, axes: tuple[int, ...], origin: tuple[int, ...] = ()
) -> Iterator[tuple[Numbers, npt.NDArray[np.intp]]]:
    """Yield numbers of tiles that chunks are in, and which chunks those are: one is in several if they are smaller."""
    tile = np.array([tiling.tile[axis] for axis in tiling.batch], np.int64)
    shape = np.array([tiling.shape[axis] for axis in tiling.batch], np.int64)
    start, chunk = np.zeros((len(places), len(shape)), np.int64), shape.copy()  # as along axes that it does not have
    for place, axis in enumerate(tiling.batch):
        if axis in axes:
            column = axes.index(axis)
            chunk[place] = grid.chunk[column]
            start[:, place] = places[:, column] * chunk[place] - (origin[column] if origin else 0)
    first, last = np.maximum(start, 0) // tile, (np.minimum(start + chunk, shape) - 1) // tile
    strides = np.array([math.prod(tiling.grid[axis + 1 :]) for axis in range(len(tile))], np.int64)
    for offset in itertools.product(*map(range, (last - first).max(axis=0, initial=0) + 1)):
        which = np.flatnonzero((first + offset <= last).all(axis=1))
        yield (first[which] + np.array(offset, np.int64)) @ strides, which
