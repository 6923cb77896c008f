"""The plan of a job: a pure function of shapes, chunks, dtypes and limits. It touches no store and no cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from dask.utils import format_bytes

from dask_batchinv.outcome import PlanError

#: Resident memory of a worker process that holds no data: measured 135 MiB before and 150 MiB after its first tile.
IDLE_WORKER_NBYTES = 192 * 2**20
#: What Zarr needs for each chunk that it is asked for at once, beside its data: measured 1.7 KiB.
CHUNK_NBYTES = 2048
#: A read unit up to this many times the wished tile is not cut, because each part would decode it anew.
LARGEST_TILE = 4
#: Tiles smaller than this are done several at a time, because each time costs milliseconds.
SPAN_NBYTES = 2**20
#: But not more, so that little is done again when a worker dies.
LARGEST_SPAN = 256
#: Dask stops giving tasks to a worker at 80 % of its limit (distributed.worker.memory.pause).
USABLE = 0.8


@dataclass(frozen=True)
class Layout:
    """What the plan needs to know of the source and the target."""

    shape: tuple[int, ...]
    """Shape of the stack, in the order stored."""
    core: tuple[int, int]
    """Axes of rows and columns."""
    read_unit: tuple[int, ...]
    """Shape of what must be decoded whole."""
    itemsize_in: int
    """Bytes of an element of the source."""
    itemsize_out: int
    """Bytes of an element of the target."""
    itemsize_rcond: int
    """Bytes of an rcond."""
    converts: bool
    """Whether a block must be copied to another dtype or order before it can be inverted."""

    @property
    def n(self) -> int:
        """Rows of one matrix."""
        return self.shape[self.core[0]]

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """Axes that are not core."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.core)


@dataclass(frozen=True)
class Limits:
    """What a worker has."""

    memory: int | None
    """Bytes per worker; None if unlimited."""
    threads: int
    """Tiles a worker works on at once."""
    scratch: int
    """Working memory of the kernel, per thread."""
    read_concurrency: int | None
    """Chunks that Zarr reads at once, per thread; None if it may be all of a tile."""
    compiling: int = 0
    """What the kernel takes before its first use, per process."""


@dataclass(frozen=True)
class Tiling:
    """How a stack is cut into tiles."""

    shape: tuple[int, ...]
    """Shape of the stack, in the order stored."""
    core: tuple[int, int]
    """Axes of rows and columns."""
    tile: tuple[int, ...]
    """Shape of a tile (those at the end may be smaller): also the chunk shape of the target."""

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """Axes that are not core."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.core)

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Tiles along each batch axis."""
        return tuple(_cuts(self.shape[axis], self.tile[axis]) for axis in self.batch)

    @property
    def n_tiles(self) -> int:
        """Tiles in all."""
        return math.prod(self.grid)

    @property
    def n_matrices(self) -> int:
        """Matrices in all."""
        return math.prod(self.shape[axis] for axis in self.batch)

    def region(self, tiles: int | range) -> tuple[slice, ...]:
        """Return the batch region of a tile, by its number in C order, or of a span of tiles.

        Examples
        --------
        >>> tiling = Tiling(shape=(10, 3, 3), core=(1, 2), tile=(4, 3, 3))
        >>> tiling.n_tiles, tiling.region(2), tiling.region(range(0, 2))
        (3, (slice(8, 10, None),), (slice(0, 8, None),))
        """
        first, last = (tiles, tiles) if isinstance(tiles, int) else (tiles[0], tiles[-1])
        return tuple(
            slice(i * self.tile[axis], min((k + 1) * self.tile[axis], self.shape[axis]))
            for i, k, axis in zip(self.where(first), self.where(last), self.batch, strict=True)
        )

    def index(self, tiles: int | range) -> tuple[slice, ...]:
        """Return the region of a tile or a span in the whole stack, core dimensions included."""
        index = [slice(None)] * len(self.shape)
        for axis, span in zip(self.batch, self.region(tiles), strict=True):
            index[axis] = span
        return tuple(index)

    def where(self, number: int) -> tuple[int, ...]:
        """Return the place of a tile in the grid."""
        return tuple(map(int, np.unravel_index(number, self.grid))) if self.grid else ()

    def chunk_keys(self, number: int) -> dict[str, str]:
        """Return under which key each array of the target has a tile.

        Examples
        --------
        >>> Tiling(shape=(10, 3, 3), core=(1, 2), tile=(4, 3, 3)).chunk_keys(2)
        {'inverse': 'c.2.0.0', 'rcond': 'c.2', 'info': 'c.2'}
        """
        where = self.where(number)
        whole = [0] * len(self.shape)
        for axis, k in zip(self.batch, where, strict=True):
            whole[axis] = k
        batch = ".".join(["c", *map(str, where)])
        return {"inverse": ".".join(["c", *map(str, whole)]), "rcond": batch, "info": batch}

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


@dataclass(frozen=True)
class Plan:
    """The tiles of a job, and what they cost."""

    tiling: Tiling
    """The tiles."""
    projected: int
    """Peak memory of a worker in bytes."""
    limits: Limits
    """What it was planned for."""
    nbytes_in: int
    """Bytes of the whole source, decoded."""
    nbytes_out: int
    """Bytes of the whole target."""
    reads: float
    """How many times the source is decoded; above 1 where tiles are smaller than its chunks."""
    span: int
    """Tiles that a worker does at a time."""

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a tile of the target, about."""
        return self.nbytes_out // max(1, self.tiling.n_tiles)

    def describe(self) -> str:
        """Return the plan for people."""
        limit = "unlimited" if self.limits.memory is None else format_bytes(self.limits.memory)
        tiling = self.tiling
        n = tiling.shape[tiling.core[0]]
        lines = [
            f"matrices            {tiling.n_matrices:,} of {n} x {n}",
            f"tiles               {tiling.n_tiles:,} of shape {tiling.tile}",
            f"to read             {format_bytes(self.nbytes_in)}"
            + (f", decoded {self.reads:.1f} times" if self.reads > 1.05 else ""),
            f"to write            {format_bytes(self.nbytes_out)}",
            f"memory per worker   {format_bytes(self.projected)} projected at its peak, {limit} allowed, "
            f"{self.limits.threads} thread(s)",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the plan for machines."""
        return {
            "shape": self.tiling.shape,
            "tile": self.tiling.tile,
            "tiles": self.tiling.n_tiles,
            "matrices": self.tiling.n_matrices,
            "bytes_in": self.nbytes_in,
            "bytes_out": self.nbytes_out,
            "source_decoded_times": self.reads,
            "projected_bytes_per_worker": self.projected,
            "allowed_bytes_per_worker": self.limits.memory,
            "threads_per_worker": self.limits.threads,
        }


def make_plan(layout: Layout, limits: Limits, *, tile_nbytes: int, tile: tuple[int, ...] | None = None) -> Plan:
    """Choose the tiles of a job.

    A tile begins as one read unit of the source, core dimensions whole, and grows by whole read units up to
    `tile_nbytes`. It becomes smaller than a read unit, which then is decoded several times, only where it would be
    more than four times `tile_nbytes`, or a worker could not hold as many tiles as it has threads.

    Parameters
    ----------
    layout, limits
        What there is to do and to do it with.
    tile_nbytes : int
        About how many bytes of the target a tile should have.
    tile : tuple of int, optional
        The tile of a job already begun, which stays.

    Raises
    ------
    PlanError
        If not even the smallest tile fits, with the numbers and what to change.
    """
    shape = tile or _tile_of(layout, tile_nbytes)
    while not tile and layout.itemsize_out * math.prod(shape) > LARGEST_TILE * tile_nbytes:
        if (smaller := _shrunk(layout, shape)) is None:
            break
        shape = smaller
    usable = math.inf if limits.memory is None else USABLE * limits.memory
    while (need := project_memory(layout, limits, shape)) > usable:
        smaller = None if tile else _shrunk(layout, shape)
        if smaller is None:
            raise PlanError(_does_not_fit(layout, limits, shape, need))
        shape = smaller
    n_matrices = math.prod(layout.shape[axis] for axis in layout.batch)
    return Plan(
        tiling=Tiling(layout.shape, layout.core, shape),
        projected=need,
        limits=limits,
        nbytes_in=math.prod(layout.shape) * layout.itemsize_in,
        nbytes_out=math.prod(layout.shape) * layout.itemsize_out + n_matrices * (4 + layout.itemsize_rcond),
        reads=_reads(layout, shape),
        span=longest_span(layout, shape),
    )


def longest_span(layout: Layout, tile: tuple[int, ...]) -> int:
    """Return how many tiles are done at a time."""
    if not layout.batch:
        return 1
    along = layout.batch[-1]
    nbytes = max(1, layout.itemsize_out * math.prod(tile))
    return max(1, min(SPAN_NBYTES // nbytes, LARGEST_SPAN, _cuts(layout.shape[along], tile[along])))


def project_memory(layout: Layout, limits: Limits, tile: tuple[int, ...]) -> int:
    """Return the peak memory of a worker, in bytes: a plain sum of everything alive at once.

    The task lets go of its input before it writes, so the peak is that of the worst of three moments.
    """
    if (several := longest_span(layout, tile)) > 1:
        along = layout.batch[-1]
        tile = (*tile[:along], min(several * tile[along], layout.shape[along]), *tile[along + 1 :])
    elements = math.prod(tile)
    source, result = elements * layout.itemsize_in, elements * layout.itemsize_out
    units = math.prod(
        min(_cuts(size, unit) + bool(size % unit and unit % size), _cuts(whole, unit))
        for size, unit, whole in zip(tile, layout.read_unit, layout.shape, strict=True)
    )
    in_flight = units if limits.read_concurrency is None else min(units, limits.read_concurrency)
    # A unit in flight stands in memory encoded and decoded.
    reading = source + in_flight * 2 * math.prod(layout.read_unit) * layout.itemsize_in + units * CHUNK_NBYTES
    inverting = source + result * (2 if layout.converts else 1) + limits.scratch
    # The inverse, and in the order stored with its checksum.
    writing = 2 * result
    per_matrix = 3 * 12 * elements // max(1, layout.n**2)
    task = max(reading, inverting, writing) + per_matrix
    return IDLE_WORKER_NBYTES + limits.compiling + limits.threads * task


def _tile_of(layout: Layout, nbytes: int) -> tuple[int, ...]:
    """Return the tile of at least one read unit, and of more up to `nbytes`."""
    tile = [max(1, min(size, unit)) for size, unit in zip(layout.shape, layout.read_unit, strict=True)]
    for axis in layout.core:
        tile[axis] = max(1, layout.n)
    room = nbytes / (math.prod(tile) * layout.itemsize_out)
    for axis in reversed(layout.batch):  # the fastest axis first: what is read together lies together
        if room >= 2:
            larger = max(1, min(tile[axis] * int(room), layout.shape[axis]))
            room *= tile[axis] / larger
            tile[axis] = larger
    return tuple(tile)


def _shrunk(layout: Layout, tile: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return a tile of about half the size, or None if it is one matrix already."""
    for axis in layout.batch:  # the slowest axis first, for the same reason
        size, unit = tile[axis], layout.read_unit[axis]
        if size > 1:
            half = size // 2 // unit * unit if size >= 2 * unit else _divisor_near(min(size, unit), max(1, size // 2))
            return (*tile[:axis], half, *tile[axis + 1 :])
    return None


def _divisor_near(size: int, wanted: int) -> int:
    """Return the largest divisor of `size` in [wanted / 2, wanted], so that tiles keep the bounds of read units."""
    for candidate in range(wanted, max(1, wanted // 2) - 1, -1):
        if size % candidate == 0:
            return candidate
    return wanted


def _cuts(size: int, step: int) -> int:
    return -(-size // step)


def _reads(layout: Layout, tile: tuple[int, ...]) -> float:
    """Return how many times the average read unit is decoded."""
    times = 1.0
    for axis in layout.batch:
        size, unit, step = layout.shape[axis], layout.read_unit[axis], tile[axis]
        if size:
            cuts = sum(1 for start in range(0, size, step) if start % unit) if step % unit else 0
            times *= 1 + cuts / _cuts(size, unit)
    return times


def _does_not_fit(layout: Layout, limits: Limits, tile: tuple[int, ...], need: int) -> str:
    assert limits.memory is not None
    unit = math.prod(layout.read_unit) * layout.itemsize_in
    return (
        f"this job does not fit the memory of a worker: {format_bytes(need)} are needed ("
        f"{format_bytes(IDLE_WORKER_NBYTES + limits.compiling)} for the process and "
        f"{limits.threads} thread(s) with a tile of shape "
        f"{tile} each, and with source chunks of {format_bytes(unit)} that must be decoded whole), but only "
        f"{format_bytes(USABLE * limits.memory)} of the {format_bytes(limits.memory)} allowed are usable, because Dask "
        f"pauses a worker at {USABLE:.0%}. Raise --memory-limit to {format_bytes(need / USABLE)}, or lower "
        "--threads-per-worker"
    )
