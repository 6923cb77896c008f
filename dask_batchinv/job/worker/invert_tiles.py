"""Inverts tiles on a worker: read, invert, let go of the input, write, and return an account of each."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import zarr

from dask_batchinv.job.options import JobOptions, Missing
from dask_batchinv.job.outputs import OUTPUTS, Output
from dask_batchinv.job.results import (
    Array,
    LostArrayError,
    LostTargetError,
    TileResult,
    TileRow,
    as_results,
    content_checksum,
)
from dask_batchinv.job.seen import mark_of_files
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.target.chunks import Chunk, open_array, write_chunks
from dask_batchinv.job.target.holder import holder_of
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.kernels import invert_block
from dask_batchinv.kernels.device import device_for
from dask_batchinv.location import Location
from dask_batchinv.stack import Device, result_dtype


@dataclass(frozen=True)
class TileTask:
    """All that a worker needs to know of a job."""

    run: str
    """Unique to one run, so that arrays kept open by a worker are not those of an earlier target."""
    source: Source
    """Where to read."""
    target: Location
    """Where to write."""
    holder: str
    """Which run holds the target: another one may have taken its place since."""
    tiling: Tiling
    """Which region each tile has."""
    options: JobOptions
    """How to invert."""


def invert_tiles(task: TileTask, numbers: range) -> list[TileResult[TileRow]]:
    """Do tiles that lie side by side. May be done again, by anyone: it writes the same bytes to the same keys."""
    if len(numbers) > 1:
        with suppress(Exception):  # one by one, each has an error of its own
            return do_span(task, numbers)
    spans = (range(number, number + 1) for number in numbers)
    return [result for span in spans for result in as_results(span.start, partial(do_span, task, span))]


def do_span(task: TileTask, numbers: range) -> list[TileResult[TileRow]]:
    """Do tiles that lie side by side at a time."""
    start = time.perf_counter()
    device = device_for(None, task.options.device)
    whole, results, sources = _read_and_invert(task, numbers, device)
    _check_holder(task)
    parts = {output.name: _split(task.tiling, results[output.name], numbers, core=output.core) for output in OUTPUTS}
    checksums = {output.name: _write(task, output, parts[output.name], whole) for output in OUTPUTS}
    rows = {
        number: TileRow.of(
            parts["info"][number],
            parts["rcond"][number],
            {output.name: checksums[output.name][number] for output in OUTPUTS},
            device,
            count_filled(task.run, task.source, task.options.missing, task.tiling, number),
            sources[number],
            mark_of_files(task.target, _keys(task.tiling, number)),
        )
        for number in numbers
    }
    milliseconds = round(1000 * (time.perf_counter() - start) / len(numbers))
    return [TileResult(number, row, milliseconds=milliseconds) for number, row in rows.items()]


def _keys(tiling: Tiling, number: int) -> dict[str, str]:
    """Return the key of a tile's chunk in each output; none where it has no numbers."""
    outputs = (output for output in OUTPUTS if 0 not in (tiling.shape[axis] for axis in tiling.axes(output.core)))
    return {output.name: tiling.chunk_key(number, core=output.core) for output in outputs}


def count_filled(run: str, source: Source, missing: Missing, tiling: Tiling, number: int) -> int:
    """Return how many chunks of the source were not there."""
    if missing == "error":
        return 0
    return source.count_missing(open_source_once(run, source, "fill"), tiling.region(number, core=True))


def _read_and_invert(
    task: TileTask, numbers: range, device: Device
) -> tuple[Chunk | None, dict[str, Array], dict[int, int]]:
    """Return the results of tiles in the order stored, and the checksums of what they were made from.

    The inverses as a chunk too, where they are one as they come.
    """
    # A function of its own so that the input is gone before the output is encoded.
    stored = read_stored(task.run, task.source, task.options.missing, task.tiling, numbers)
    sources = {n: content_checksum(part) for n, part in _split(task.tiling, stored, numbers, core=True).items()}
    stack = np.moveaxis(task.source.decode(stored), task.tiling.core, (-2, -1))
    del stored
    dtype = result_dtype(stack.dtype)
    is_chunk = task.tiling.core == (stack.ndim - 2, stack.ndim - 1) and stack.shape == task.tiling.tile
    whole = Chunk(stack.shape, dtype) if is_chunk else None
    results = invert_block(
        stack,
        dtype=dtype,
        assume_a=task.options.assume_a,
        lower=task.options.lower,
        device=device,
        min_rcond=task.options.min_rcond,
        out=whole.values if whole else None,
    )
    named = results._asdict()
    return whole, {
        output.name: np.moveaxis(named[output.name], (-2, -1), task.tiling.core) if output.core else named[output.name]
        for output in OUTPUTS
    }, sources  # fmt: skip


def read_stored(run: str, source: Source, missing: Missing, tiling: Tiling, tiles: int | range) -> Array:
    """Read tiles of the source as they are stored."""
    return source.read_stored(open_source_once(run, source, missing), tiling.region(tiles, core=True))


def read_stack(run: str, source: Source, missing: Missing, tiling: Tiling, tile: int) -> Array:
    """Read a tile of the source, core dimensions last."""
    block = source.read_block(open_source_once(run, source, missing), tiling.region(tile, core=True))
    return np.moveaxis(block, tiling.core, (-2, -1))


def _check_holder(task: TileTask) -> None:
    """Hold back a worker that was cut off for so long that its target was taken over meanwhile, or sees another one."""
    if holder_of(task.target) != task.holder:
        raise LostTargetError(f"{task.target.name} was removed, replaced, or is another place on this worker")


def _split(tiling: Tiling, values: Array, numbers: range, *, core: bool) -> dict[int, Array]:
    """Return what each of several tiles has of an array with the core dimensions or without."""
    if len(numbers) == 1:
        return {numbers.start: values}
    along = tiling.batch[-1]
    width, before = tiling.tile[along], (slice(None),) * tiling.axes(core).index(along)
    starts = ((number, (number - numbers.start) * width) for number in numbers)
    return {number: values[(*before, slice(start, start + width))] for number, start in starts}


def _write(task: TileTask, output: Output, parts: dict[int, Array], whole: Chunk | None) -> dict[int, int]:
    """Write an output of several tiles; return the checksums of its chunks, -1 for tiles that are empty."""
    array = open_output(task.run, task.target, output.name)
    if not array.size:
        return dict.fromkeys(parts, -1)
    ready = whole if output.name == "inverse" else None
    chunks = {number: ready or Chunk.of(array, part) for number, part in parts.items()}
    checksums = {number: chunk.seal() for number, chunk in chunks.items()}
    keys = {number: task.tiling.chunk_key(number, core=output.core) for number in parts}
    try:
        write_chunks(array, {keys[number]: chunk for number, chunk in chunks.items()}, synced=task.options.durable)
    except FileNotFoundError as error:
        raise LostArrayError(f"{output.name} of {task.target.name} was removed while the job ran") from error
    return checksums


@lru_cache(maxsize=8)
def open_source_once(run: str, source: Source, missing: Missing) -> zarr.Array[Any]:
    """Return the source, kept open for a run."""
    return source.open(missing)


@lru_cache(maxsize=24)
def open_output(run: str, target: Location, name: str, *, read_only: bool = False) -> zarr.Array[Any]:
    """Return an array of a target, kept open for a run."""
    return open_array(target / name, read_only=read_only)
