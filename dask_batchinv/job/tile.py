"""What a worker does with one tile: read, invert, let go of the input, write, and tell in a few numbers."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv import storage
from dask_batchinv.job import target as targets
from dask_batchinv.job.ledger import CHECKSUMS, DEVICES
from dask_batchinv.job.plan import Tiling
from dask_batchinv.job.source import Missing, Source
from dask_batchinv.job.versions import VersionError, differing, versions
from dask_batchinv.kernels import invert_block
from dask_batchinv.kernels.device import device_for
from dask_batchinv.outcome import Info, TargetError
from dask_batchinv.place import Place, redact
from dask_batchinv.stack import AssumeA, Device, result_dtype
from dask_batchinv.storage import Chunk

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TileTask:
    """All that a worker needs to know of a job."""

    run: str
    """Unique to one run, so that arrays kept open by a worker are not those of an earlier target."""
    source: Source
    """Where to read."""
    target: Place
    """Where to write."""
    generation: str
    """Which target: another one may have taken its place since."""
    tiling: Tiling
    """Which region each tile has."""
    assume_a: AssumeA
    """Structure of the matrices."""
    device: Device
    """Where to invert."""
    min_rcond: float
    """Below it a matrix counts as failed."""
    missing: Missing
    """What a missing chunk of the source means."""
    durable: bool
    """Whether a tile counts as written only when it is on the disk."""
    versions: tuple[tuple[str, str], ...]
    """What the driver runs."""


@dataclass(frozen=True)
class TileResult:
    """What came of one tile."""

    number: int
    """Which tile."""
    row: dict[str, int] | None
    """Its row for the ledger; None if it failed."""
    error: str | None = None
    """Why it failed, without credentials."""
    stops: bool = False
    """Whether the cause would fail all other tiles too."""


def run_tiles(task: TileTask, numbers: range) -> list[TileResult]:
    """Do tiles that lie side by side. May be done again, by anyone: it writes the same bytes to the same keys."""
    if len(numbers) > 1:
        with suppress(Exception):  # one by one, each has an error of its own
            return _do(task, numbers)
    return [result for number in numbers for result in guarded(number, partial(_do, task, range(number, number + 1)))]


def guarded(number: int, work: Callable[[], list[TileResult]]) -> list[TileResult]:
    """Return what `work` makes of a tile; an exception becomes the error of the result."""
    try:
        return work()
    except Exception as error:  # a failure is data here: the driver decides what it means
        stops = isinstance(error, (VersionError, TargetError)) or (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        )
        return [TileResult(number, None, redact(f"{type(error).__name__}: {error}"), stops)]


def _do(task: TileTask, numbers: range) -> list[TileResult]:
    start = time.perf_counter()
    _check_versions(task.versions)
    device = device_for(None, task.device)
    room, results = _read_and_invert(task, numbers, device)
    _check_generation(task)
    arrays = {name: _open_target(task.run, task.target, name) for name in CHECKSUMS}
    rows: dict[int, dict[str, int]] = {}
    chunks: dict[str, dict[str, Chunk]] = {name: {} for name in CHECKSUMS}
    for number in numbers:
        parts = {name: _part(task.tiling, name, values, number, numbers) for name, values in results.items()}
        rows[number] = count(parts["info"], parts["rcond"]) | {"device": DEVICES.index(device)}
        for name, key in task.tiling.chunk_keys(number).items():
            rows[number][CHECKSUMS[name]] = -1
            if arrays[name].size:
                chunk = room if room and name == "inverse" else Chunk.of(arrays[name], parts[name])
                rows[number][CHECKSUMS[name]] = chunk.seal()
                chunks[name][key] = chunk
    for name, some in chunks.items():
        storage.write_chunks(arrays[name], some)
        if task.durable:
            for key in some:
                storage.sync_chunk(arrays[name], key)
    milliseconds = round(1000 * (time.perf_counter() - start) / len(numbers))
    return [TileResult(number, row | {"milliseconds": milliseconds}) for number, row in rows.items()]


def _part(tiling: Tiling, name: str, values: Array, number: int, numbers: range) -> Array:
    """Return what one tile has of the results of several."""
    if len(numbers) == 1:
        return values
    along = tiling.batch[-1]
    width = tiling.tile[along]
    axis = along if name == "inverse" else values.ndim - 1
    start = (number - numbers.start) * width
    return values[(slice(None),) * axis + (slice(start, start + width),)]


@lru_cache(maxsize=4)
def _check_versions(mine: tuple[tuple[str, str], ...]) -> None:
    """Workers may join at any time; they are looked at before the first write of each."""
    if found := differing(dict(mine), versions()):
        raise VersionError(f"a worker on {socket.gethostname()} has other versions than the driver: {found}")


def _check_generation(task: TileTask) -> None:
    """Hold back a worker that was cut off for so long that its target was replaced meanwhile."""
    if targets.generation_of(task.target) != task.generation:
        raise TargetError(f"{task.target.name} was removed or replaced while the job was running")


def read_stack(run: str, source: Source, missing: Missing, tiling: Tiling, tiles: int | range) -> Array:
    """Read tiles of the source, core dimensions last."""
    block = _open_source(run, source, missing)[tiling.index(tiles)]
    return np.moveaxis(np.asarray(block), tiling.core, (-2, -1))


def _read_and_invert(task: TileTask, numbers: range, device: Device) -> tuple[Chunk | None, dict[str, Array]]:
    """Return the results of tiles in the order stored; the inverses as a chunk where they are one as they come."""
    # A function of its own so that the input is gone before the output is encoded.
    stack = read_stack(task.run, task.source, task.missing, task.tiling, numbers)
    dtype = result_dtype(stack.dtype)
    whole = task.tiling.core == (stack.ndim - 2, stack.ndim - 1) and stack.shape == task.tiling.tile
    room = Chunk(stack.shape, dtype) if whole else None
    inverse, info, rcond = invert_block(
        stack,
        dtype=dtype,
        assume_a=task.assume_a,
        device=device,
        min_rcond=task.min_rcond,
        out=room.values if room else None,
    )
    return room, {"inverse": np.moveaxis(inverse, (-2, -1), task.tiling.core), "rcond": rcond, "info": info}


def count(info: Array, rcond: Array) -> dict[str, int]:
    """Return the counts of a tile for the ledger."""
    good = info == Info.GOOD
    smallest = np.float64(rcond[good].min() if good.any() else np.nan)
    return {
        "done": 1,
        "matrices": info.size,
        "singular": int((info > 0).sum()),
        "not_finite": int((info == Info.NOT_FINITE).sum()),
        "overflow": int((info == Info.OVERFLOW).sum()),
        "below_min_rcond": int((info == Info.BELOW_MIN_RCOND).sum()),
        "ill_conditioned": int((good & (rcond < np.finfo(rcond.dtype).eps)).sum()),
        "smallest_rcond_bits": int(smallest.view(np.int64)),
    }


@lru_cache(maxsize=8)
def _open_source(run: str, source: Source, missing: Missing) -> zarr.Array[Any]:
    return source.open(missing)


@lru_cache(maxsize=24)
def _open_target(run: str, target: Place, name: str) -> zarr.Array[Any]:
    return storage.open_array(target / name)
