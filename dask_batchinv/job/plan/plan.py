"""The plan of a job: a pure function of shapes, chunks, dtypes and limits. It touches no store and no cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dask.utils import format_bytes

from dask_batchinv.job.tiling import LARGEST_COUNT, StackShape, Tiling, cuts
from dask_batchinv.outcome import PlanError
from dask_batchinv.shown import Row, Shown, counted
from dask_batchinv.text import public

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
#: Where stores make us wait, so many times as many tiles are read ahead as are done at a time, or fewer where memory is
#: short or it takes more than so many bytes for each thread; and a task has so many times as many.
MOST_AHEAD, MOST_AHEAD_NBYTES, AHEAD_PER_TASK = 8, 2**30, 2
#: A worker gets about so many bytes of tiles at a time, which take it some tenths of a second.
TASK_NBYTES = 2**28
#: Temporary arrays of a number for each matrix, while they are counted.
MASKS_NBYTES = 24
#: Copies of a decoded tile that are alive at once while Xarray decodes it, and bytes of masks per number: measured.
DECODING_COPIES, DECODING_MASKS = 2, 2
#: What Zarr's codecs need for what they encode: measured 1.9 copies of it, compressed, and 3.3 in shards.
ENCODING_COPIES = 4
#: From so many times on it is worth a word that chunks are decoded several times.
NOTEWORTHY = 1.05
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
    """Bytes of a matrix in all outputs."""
    nbytes_beside: int
    """The same without the inverse, where that is stored as it is computed."""
    needs_copy: bool
    """Whether a block must be copied to another dtype or order before it can be inverted."""
    itemsize_decoded: int = 0
    """Bytes of an element once decoded, where numbers are packed; else 0."""
    itemsize_held: int = 0
    """Bytes alive at once for an element of a chunk that is being decoded; 0 for twice `itemsize_in`."""
    direct_nbytes: int | None = None
    """Bytes that a chunk has at most as it is stored, if it is decoded to where it is wanted; None if Zarr reads."""
    start: tuple[int, ...] = ()
    """Where in its array the stack begins; empty for its beginning."""
    mask_nbytes: int = 0
    """Bytes that chunks of a mask take which are decoded at a time; 0 if there is none."""
    fixed: Mapping[int, int] = field(default_factory=dict)
    """How long tiles are along axes, where the user says so."""
    multiples: Mapping[int, int] = field(default_factory=dict)
    """Of what their lengths are multiples along axes, where the user says so."""
    is_encoded: bool = False
    """Whether chunks of the target are not stored as they are made."""
    in_part: bool = False
    """Whether some rows of a read unit, along its first axis, can be read without the others."""
    waits: bool = False
    """Whether source or target are in a store that makes us wait, so that much is read and written at a time."""

    @property
    def begins(self) -> tuple[int, ...]:
        """How far into a read unit the stack begins, along each axis."""
        return tuple(at % unit for at, unit in zip(self.start or (0,) * len(self.shape), self.read_unit, strict=True))


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
    are_ours: bool = True
    """Whether workers are started for the job, and so are as the user wants them."""


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
    are_ours: bool = True
    """Whether they are started for the job; else they run already."""


@public
@dataclass(frozen=True)
class Plan(Shown):
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
    together: int
    """Tiles that a worker does at a time."""
    ahead: int = 0
    """How many times as many it reads ahead meanwhile, and writes behind."""
    per_unit: int = 1
    """Tiles, one after the other, that a read unit is cut into, and that one worker does, which decodes it once."""
    where: str = "worker processes of its own"
    """Where the job runs, in words."""
    advice: str | None = None
    """How to avoid that chunks of the source are decoded several times."""

    @property
    def tiles_per_task(self) -> int:
        """Tiles that a worker gets at a time, at most."""
        together = max(1, self.together * self.tile_nbytes)
        count = self.together * max(1, AHEAD_PER_TASK * self.ahead, TASK_NBYTES // together)
        return max(self.together, min(count, LARGEST_SPAN))

    def room(self, threads: int, memory: int | None) -> int:
        """Return how many tiles a worker of so many threads and bytes of memory can work on at a time."""
        if memory is None:
            return threads
        fixed = IDLE_WORKER_NBYTES + self.limits.compile_nbytes
        per_thread = max(1, (self.projected_nbytes - fixed) // max(1, self.limits.threads))
        return max(0, min(threads, int(USABLE * memory - fixed) // per_thread))

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a tile of the target, about."""
        return self.nbytes_out // max(1, self.tiling.n_tiles)

    def rows(self) -> list[Row]:
        """Return the plan for people."""
        limit = "unlimited" if self.limits.memory is None else format_bytes(self.limits.memory)
        tiling = self.tiling
        times = f", decoded {self.read_amplification:.1f} times" if self.read_amplification > NOTEWORTHY else ""
        memory = f"{format_bytes(self.projected_nbytes)} projected at its peak, {limit} allowed"
        return [
            ("matrices", f"{tiling.n_matrices:,} of {tiling.n} x {tiling.n}"),
            ("tiles", f"{tiling.n_tiles:,} of shape {tiling.tile}"),
            ("to read", f"{format_bytes(self.nbytes_in)}{times}"),
            ("to write", format_bytes(self.nbytes_out)),
            ("memory per worker", f"{memory}, {counted(self.limits.threads, 'thread')}"),
            ("runs in", self.where),
            *([] if self.advice is None else [("advice", self.advice)]),
        ]

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
            "advice": self.advice,
            "projected_bytes_per_worker": self.projected_nbytes,
            "allowed_bytes_per_worker": self.limits.memory,
            "threads_per_worker": self.limits.threads,
            "where": self.where,
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
    shape = tuple(layout.multiples.get(axis, 1) * cuts(size, layout.multiples.get(axis, 1))
                  for axis, size in enumerate(shape))  # fmt: skip
    usable = math.inf if limits.memory is None else USABLE * limits.memory
    while (need := project_memory(layout, limits, shape)) > usable:
        smaller = None if tile or layout.multiples else _shrunk(layout, shape)
        if smaller is None:
            raise PlanError(_does_not_fit(layout, limits, shape, need))
        shape = smaller
    tiling = Tiling(layout.shape, layout.core, shape)
    if tiling.n_tiles > LARGEST_COUNT:
        raise PlanError(_too_many(tiling, begun=tile is not None))
    per_unit = _count_per_unit(layout, tiling)
    ahead, need = _look_ahead(layout, limits, shape, usable) if per_unit == 1 else (0, need)
    times = 1.0 if per_unit > 1 else _read_amplification(layout, shape)
    return Plan(
        tiling=tiling,
        projected_nbytes=need,
        limits=limits,
        nbytes_in=math.prod(layout.shape) * layout.itemsize_in,
        nbytes_out=layout.n_matrices * layout.nbytes_per_matrix,
        read_amplification=times,
        advice=_advice(layout, limits, shape, begun=tile is not None) if times > NOTEWORTHY else None,
        together=count_per_task(layout, shape),
        ahead=ahead,
        per_unit=per_unit,
    )


def _advice(layout: StackLayout, limits: Limits, tile: tuple[int, ...], *, begun: bool) -> str:
    """Return how to avoid that read units are decoded several times."""
    if begun:
        return "tiles of this target cut chunks of the source; a target that is begun anew may have others"
    if layout.fixed or layout.multiples:
        return "the wished chunks cut those of the source: choose multiples of these"
    if any(layout.begins):
        return "what is selected begins within chunks of the source: select from where one begins"
    whole = [max(1, min(size, unit)) for size, unit in zip(layout.shape, layout.read_unit, strict=True)]
    for axis in layout.core:
        whole[axis] = layout.n
    nbytes = math.prod(whole) * layout.itemsize_out
    need = math.ceil(project_memory(layout, limits, tuple(whole)) / USABLE)
    way_out = f"`tile_size='{_in_mib(nbytes)}'`"
    if limits.memory is None or need <= limits.memory:
        way_out += " avoids that"
    elif limits.are_ours:
        way_out += f" and `memory_limit='{_in_mib(need)}'` avoid that"
    else:
        way_out += f" and workers with {_in_mib(need)} of memory avoid that"
    return f"chunks of the source are cut by tiles: {way_out}"


def _in_mib(nbytes: int) -> str:
    return f"{cuts(nbytes, 2**20)}MiB"


def count_per_task(layout: StackLayout, tile: tuple[int, ...]) -> int:
    """Return how many tiles are done at a time."""
    if not layout.batch:
        return 1
    along = layout.batch[-1]
    nbytes = max(1, layout.itemsize_out * math.prod(tile))
    return max(1, min(SPAN_NBYTES // nbytes, LARGEST_SPAN, cuts(layout.shape[along], tile[along])))


def _count_per_unit(layout: StackLayout, tiling: Tiling) -> int:
    """Return how many tiles, one after the other, are cut from a read unit; 1 where they are not cut so."""
    parts = [
        unit // step if unit % step == 0 else 0
        for unit, step in (
            (min(layout.read_unit[axis], layout.shape[axis]), tiling.tile[axis]) for axis in layout.batch
        )
    ]
    cut = [axis for axis, count in enumerate(parts) if count != 1]
    is_one = len(cut) == 1 and all(count == 1 for count in tiling.grid[cut[0] + 1 :])
    # Tiles are counted on from one row to the next: units begin at their multiples only if rows hold whole ones.
    is_one = is_one and (math.prod(tiling.grid[: cut[0]]) <= 1 or tiling.grid[cut[0]] % max(1, parts[cut[0]]) == 0)
    whole = all(layout.read_unit[axis] >= layout.shape[axis] for axis in layout.core)
    direct = layout.direct_nbytes is not None and not any(layout.begins) and not layout.in_part
    return max(1, parts[cut[0]]) if direct and whole and is_one else 1


def _look_ahead(layout: StackLayout, limits: Limits, tile: tuple[int, ...], usable: float) -> tuple[int, int]:
    """Return how far to read ahead, as far as there is memory, and what that takes of it."""
    ahead = MOST_AHEAD if layout.waits else 0
    while ahead and project_memory(layout, limits, tile, ahead) > min(usable, MOST_AHEAD_NBYTES * limits.threads):
        ahead //= 2
    return ahead, project_memory(layout, limits, tile, ahead)


def project_memory(layout: StackLayout, limits: Limits, tile: tuple[int, ...], ahead: int = 0) -> int:
    """Return the peak memory of a worker, in bytes: a plain sum of everything alive at once.

    It has buffers that it keeps, and beside them what the worst of four moments takes: reading, decoding packed
    numbers, inverting, and writing.
    """
    if (several := count_per_task(layout, tile)) > 1:
        along = layout.batch[-1]
        tile = (*tile[:along], min(several * tile[along], layout.shape[along]), *tile[along + 1 :])
    elements = math.prod(tile)
    source, result = elements * layout.itemsize_in, elements * layout.itemsize_out
    units = math.prod(
        min(cuts(size, unit) + bool(begin or (size % unit and unit % size)), cuts(begin + whole, unit))
        for size, unit, whole, begin in zip(tile, layout.read_unit, layout.shape, layout.begins, strict=True)
    )
    unit = math.prod(layout.read_unit)
    # What is inverted to where it is written needs no copy in the order stored.
    copied = 0 if _is_stored_as_inverted(layout, tile) and several == 1 else result
    if layout.direct_nbytes is None:
        in_flight = units if limits.read_concurrency is None else min(units, limits.read_concurrency)
        # A unit in flight stands in memory encoded, decoded, and as one codec gives it to the next.
        held = unit * (layout.itemsize_held or 2 * layout.itemsize_in)
        kept, read, reading = result, source, source + in_flight * held
        kept += ahead * (reading + result)
    else:  # what is decoded, one unit after the other, stays for the next tile
        rows = min(tile[0], layout.read_unit[0]) / layout.read_unit[0] if layout.in_part else 1
        cut = int(rows * unit) * layout.itemsize_in if _cuts_units(layout, tile) else 0
        fetched = layout.direct_nbytes * (units if layout.waits else 1)
        kept, read, reading = result + source + fetched + cut + ahead * (fetched + result), 0, 0
    if layout.waits:  # what is on its way to a store is there twice
        kept += (ahead + 1) * result
    decoding = read + elements * (DECODING_COPIES * layout.itemsize_decoded + DECODING_MASKS)
    stack = elements * layout.itemsize_decoded or read
    inverting = stack + copied + (result if layout.needs_copy else 0) + limits.scratch
    own = layout.nbytes_beside + MASKS_NBYTES * (2 if layout.mask_nbytes else 1)
    per_matrix = own * elements // max(1, layout.n**2)
    writing = copied + ENCODING_COPIES * result * layout.is_encoded
    moments = reading + units * CHUNK_NBYTES, decoding if layout.itemsize_decoded else 0, inverting, writing
    task = kept + max(moments) + per_matrix + layout.mask_nbytes
    return IDLE_WORKER_NBYTES + limits.compile_nbytes + limits.threads * task


def _is_stored_as_inverted(layout: StackLayout, tile: tuple[int, ...]) -> bool:
    """Tell whether every tile has the shape of a chunk of the target, core dimensions last."""
    last = layout.core == (len(tile) - 2, len(tile) - 1)
    return last and not any(size % step for size, step in zip(layout.shape, tile, strict=True) if step)


def _cuts_units(layout: StackLayout, tile: tuple[int, ...]) -> bool:
    """Tell whether a read unit does not lie in one piece in a tile, but must be copied there, or a part of it."""
    pairs = list(zip(tile, layout.read_unit, layout.shape, strict=True))
    return (
        any(layout.begins)
        or pairs[0][2] % pairs[0][1] != 0
        or pairs[0][0] % pairs[0][1] != 0
        or any(not size == unit == whole for size, unit, whole in pairs[1:])
    )


def _tile_of(layout: StackLayout, nbytes: int) -> tuple[int, ...]:
    """Return the tile of at least one read unit, and of more up to `nbytes`."""
    tile = [max(1, min(size, unit)) for size, unit in zip(layout.shape, layout.read_unit, strict=True)]
    for axis in layout.core:
        tile[axis] = max(1, layout.n)
    for axis, size in layout.fixed.items():
        tile[axis] = max(1, min(size, layout.shape[axis]))
    room = nbytes / (math.prod(tile) * layout.itemsize_out)
    for axis in reversed(layout.batch):  # the fastest axis first: what is read together lies together
        if room >= 2 and axis not in layout.fixed:
            larger = max(1, min(tile[axis] * int(room), layout.shape[axis]))
            room *= tile[axis] / larger
            tile[axis] = larger
    return tuple(tile)


def _shrunk(layout: StackLayout, tile: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return a tile of about half the size, or None if it is one matrix already."""
    for axis in layout.batch:  # the slowest axis first, for the same reason
        size, unit = tile[axis], layout.read_unit[axis]
        if size > 1 and axis not in layout.fixed:
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
        if axis == 0 and layout.in_part:
            continue
        size, unit, step, begin = layout.shape[axis], layout.read_unit[axis], tile[axis], layout.begins[axis]
        if size:
            # Every tile but the first cuts one, unless it begins where a read unit does.
            cut = cuts(size, step) - 1 - _count_on_bounds(cuts(size, step), step, unit, begin)
            times *= 1 + cut / cuts(begin + size, unit)
    return times


def _count_on_bounds(count: int, step: int, unit: int, begin: int) -> int:
    """Return how many of the numbers ``begin + k step`` are multiples of `unit`, for 0 < k < count.

    Examples
    --------
    >>> _count_on_bounds(10, step=4, unit=6, begin=0), _count_on_bounds(10, step=4, unit=6, begin=2)
    (3, 3)
    """
    common = math.gcd(step, unit)
    if begin % common:
        return 0
    period = unit // common
    first = -begin // common * pow(step // common, -1, period) % period
    return (count - 1) // period if first == 0 else max(0, (count - 1 - first) // period + 1)


def _does_not_fit(layout: StackLayout, limits: Limits, tile: tuple[int, ...], need: int) -> str:
    assert limits.memory is not None
    unit, wanted = math.prod(layout.read_unit) * layout.itemsize_in, format_bytes(need / USABLE)
    if limits.are_ours:
        way_out = f"Raise `memory_limit=` to {wanted}" + (", or lower `threads_per_worker=`" * (limits.threads > 1))
    else:
        way_out = f"Start its workers with at least {wanted} of memory" + ", or with fewer threads" * (
            limits.threads > 1
        )
    return (
        f"this job does not fit the memory of a worker: {format_bytes(need)} are needed ("
        f"{format_bytes(IDLE_WORKER_NBYTES + limits.compile_nbytes)} for the process and "
        f"{counted(limits.threads, 'thread')} with a tile of shape "
        f"{tile} each, and with source chunks of {format_bytes(unit)} that must be decoded whole), but only "
        f"{format_bytes(USABLE * limits.memory)} of the {format_bytes(limits.memory)} allowed are usable, because Dask "
        f"pauses a worker at {USABLE:.0%}. {way_out}"
    )


def _too_many(tiling: Tiling, *, begun: bool) -> str:
    way_out = (
        "the tiles of a target that is there stay as they are: choose another target and a larger `tile_size=`"
        if begun
        else "pass a larger `tile_size=`, to workers with more memory where that is what keeps tiles small, or rechunk "
        "the source if its chunks are very large"
    )
    return (
        f"this job has {tiling.n_tiles:,} tiles of shape {tiling.tile}, but the account of them is kept in memory and "
        f"may have {LARGEST_COUNT:,}: {way_out}"
    )
