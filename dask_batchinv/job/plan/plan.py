"""The plan of a job: a pure function of shapes, chunks, dtypes and limits. It touches no store and no cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dask.utils import format_bytes

from dask_batchinv.job.tiling import LARGEST_COUNT, StackShape, Tiling, cuts
from dask_batchinv.outcome import PlanError

#: Resident memory of a worker process that holds no data: measured 135 MiB before and 150 MiB after its first tile.
IDLE_WORKER_NBYTES = 192 * 2**20
#: What Zarr needs for each chunk that it is asked for at once, beside its data: measured 1.7 KiB.
CHUNK_NBYTES = 2048
#: A read unit up to this many times the wished tile is not cut, because each part would decode it again.
LARGEST_TILE = 4
#: Tiles smaller than this are done several at a time, because each time costs milliseconds.
SPAN_NBYTES = 2**20
#: But not more, so that little is done again when a worker dies.
LARGEST_SPAN = 256
#: Temporary arrays of a number for each matrix, while they are counted.
MASKS_NBYTES = 24
#: Copies of a decoded tile that are alive at once while Xarray decodes it, and bytes of masks per number: measured.
DECODING_COPIES, DECODING_MASKS = 2, 2
#: Dask stops giving tasks to a worker at 80 % of its limit (distributed.worker.memory.pause).
USABLE = 0.8


@dataclass(frozen=True)
class StackLayout(StackShape):
    """What the plan needs to know of the source and the target."""

    read_unit: tuple[int, ...]
    """Shape of what must be decoded whole."""
    itemsize_in: int
    """Bytes of an element of the source."""
    itemsize_out: int
    """Bytes of an element of the target."""
    nbytes_per_matrix: int
    """Bytes of a matrix in the outputs without core dimensions."""
    needs_copy: bool
    """Whether a block must be copied to another dtype or order before it can be inverted."""
    itemsize_decoded: int = 0
    """Bytes of an element once decoded, where numbers are packed; else 0."""
    itemsize_held: int = 0
    """Bytes alive at once for an element of a chunk that is being decoded; 0 for twice `itemsize_in`."""


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
    compile_nbytes: int = 0
    """What the kernel takes before its first use, per process."""


@dataclass(frozen=True)
class Workers:
    """What the workers of a cluster have."""

    count: int
    """How many there are."""
    threads: int
    """Threads of the one with the most."""
    memory: int | None
    """Bytes of the one with the least; None if unlimited."""
    gpus: int = 0
    """Workers with a GPU that the job may use."""


@dataclass(frozen=True)
class Plan:
    """The tiles of a job, and what they cost."""

    tiling: Tiling
    """The tiles."""
    projected_nbytes: int
    """Peak memory of a worker in bytes."""
    limits: Limits
    """What it was planned for."""
    nbytes_in: int
    """Bytes of the whole source, decoded."""
    nbytes_out: int
    """Bytes of the whole target."""
    read_amplification: float
    """How many times the source is decoded; above 1 where tiles are smaller than its chunks."""
    tiles_per_task: int
    """Tiles that a worker does at a time."""

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a tile of the target, about."""
        return self.nbytes_out // max(1, self.tiling.n_tiles)

    def describe(self) -> str:
        """Return the plan for people."""
        limit = "unlimited" if self.limits.memory is None else format_bytes(self.limits.memory)
        tiling = self.tiling
        lines = [
            f"matrices            {tiling.n_matrices:,} of {tiling.n} x {tiling.n}",
            f"tiles               {tiling.n_tiles:,} of shape {tiling.tile}",
            f"to read             {format_bytes(self.nbytes_in)}"
            + (f", decoded {self.read_amplification:.1f} times" if self.read_amplification > 1.05 else ""),
            f"to write            {format_bytes(self.nbytes_out)}",
            f"memory per worker   {format_bytes(self.projected_nbytes)} projected at its peak, {limit} allowed, "
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
            "source_decoded_times": self.read_amplification,
            "projected_bytes_per_worker": self.projected_nbytes,
            "allowed_bytes_per_worker": self.limits.memory,
            "threads_per_worker": self.limits.threads,
        }


def make_plan(layout: StackLayout, limits: Limits, *, tile_nbytes: int, tile: tuple[int, ...] | None = None) -> Plan:
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
        If not even the smallest tile fits, or there were too many tiles, with the numbers and what to change.
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
    tiling = Tiling(layout.shape, layout.core, shape)
    if tiling.n_tiles > LARGEST_COUNT:
        raise PlanError(_too_many(tiling, begun=tile is not None))
    return Plan(
        tiling=tiling,
        projected_nbytes=need,
        limits=limits,
        nbytes_in=math.prod(layout.shape) * layout.itemsize_in,
        nbytes_out=math.prod(layout.shape) * layout.itemsize_out + layout.n_matrices * layout.nbytes_per_matrix,
        read_amplification=_read_amplification(layout, shape),
        tiles_per_task=count_per_task(layout, shape),
    )


def count_per_task(layout: StackLayout, tile: tuple[int, ...]) -> int:
    """Return how many tiles are done at a time."""
    if not layout.batch:
        return 1
    along = layout.batch[-1]
    nbytes = max(1, layout.itemsize_out * math.prod(tile))
    return max(1, min(SPAN_NBYTES // nbytes, LARGEST_SPAN, cuts(layout.shape[along], tile[along])))


def project_memory(layout: StackLayout, limits: Limits, tile: tuple[int, ...]) -> int:
    """Return the peak memory of a worker, in bytes: a plain sum of everything alive at once.

    The task lets go of its input before it writes, so the peak is that of the worst of four moments.
    """
    if (several := count_per_task(layout, tile)) > 1:
        along = layout.batch[-1]
        tile = (*tile[:along], min(several * tile[along], layout.shape[along]), *tile[along + 1 :])
    elements = math.prod(tile)
    source, result = elements * layout.itemsize_in, elements * layout.itemsize_out
    units = math.prod(
        min(cuts(size, unit) + bool(size % unit and unit % size), cuts(whole, unit))
        for size, unit, whole in zip(tile, layout.read_unit, layout.shape, strict=True)
    )
    in_flight = units if limits.read_concurrency is None else min(units, limits.read_concurrency)
    # A unit in flight stands in memory encoded, decoded, and as one codec gives it to the next.
    held = math.prod(layout.read_unit) * (layout.itemsize_held or 2 * layout.itemsize_in)
    reading = source + in_flight * held + units * CHUNK_NBYTES
    decoding = source + elements * (DECODING_COPIES * layout.itemsize_decoded + DECODING_MASKS)
    stack = elements * (layout.itemsize_decoded or layout.itemsize_in)
    inverting = stack + result * (2 if layout.needs_copy else 1) + limits.scratch
    # The inverse, and in the order stored with its checksum.
    writing = 2 * result
    per_matrix = (layout.nbytes_per_matrix + MASKS_NBYTES) * elements // max(1, layout.n**2)
    task = max(reading, decoding if layout.itemsize_decoded else 0, inverting, writing) + per_matrix
    return IDLE_WORKER_NBYTES + limits.compile_nbytes + limits.threads * task


def _tile_of(layout: StackLayout, nbytes: int) -> tuple[int, ...]:
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


def _shrunk(layout: StackLayout, tile: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return a tile of about half the size, or None if it is one matrix already."""
    for axis in layout.batch:  # the slowest axis first, for the same reason
        size, unit = tile[axis], layout.read_unit[axis]
        if size > 1:
            half = size // 2 // unit * unit if size >= 2 * unit else _divisor_near(min(size, unit), max(1, size // 2))
            return (*tile[:axis], half, *tile[axis + 1 :])
    return None


def _divisor_near(size: int, wanted: int) -> int:
    """Return the largest divisor of `size` in [wanted / 2, wanted], so that tiles keep the bounds of read units."""
    for parts in range(cuts(size, wanted), size // max(1, wanted // 2) + 1):
        if size % parts == 0:
            return size // parts
    return wanted


def _read_amplification(layout: StackLayout, tile: tuple[int, ...]) -> float:
    """Return how many times the average read unit is decoded."""
    times = 1.0
    for axis in layout.batch:
        size, unit, step = layout.shape[axis], layout.read_unit[axis], tile[axis]
        if size:
            # Every tile but those that begin where a read unit does cuts one.
            cut = cuts(size, step) - cuts(size, math.lcm(step, unit))
            times *= 1 + cut / cuts(size, unit)
    return times


def _does_not_fit(layout: StackLayout, limits: Limits, tile: tuple[int, ...], need: int) -> str:
    assert limits.memory is not None
    unit = math.prod(layout.read_unit) * layout.itemsize_in
    return (
        f"this job does not fit the memory of a worker: {format_bytes(need)} are needed ("
        f"{format_bytes(IDLE_WORKER_NBYTES + limits.compile_nbytes)} for the process and "
        f"{limits.threads} thread(s) with a tile of shape "
        f"{tile} each, and with source chunks of {format_bytes(unit)} that must be decoded whole), but only "
        f"{format_bytes(USABLE * limits.memory)} of the {format_bytes(limits.memory)} allowed are usable, because Dask "
        f"pauses a worker at {USABLE:.0%}. Raise --memory-limit to {format_bytes(need / USABLE)}, or lower "
        "--threads-per-worker"
    )


def _too_many(tiling: Tiling, *, begun: bool) -> str:
    way_out = (
        "the tiles of a target that is there stay as they are: choose another target and a larger --tile-size"
        if begun
        else "pass a larger --tile-size, with more --memory-limit where that is what keeps tiles small, or rechunk the "
        "source if its chunks are very large"
    )
    return (
        f"this job has {tiling.n_tiles:,} tiles of shape {tiling.tile}, but the account of them is kept in memory and "
        f"may have {LARGEST_COUNT:,}: {way_out}"
    )
