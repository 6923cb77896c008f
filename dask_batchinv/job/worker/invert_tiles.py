"""Inverts tiles on a worker: read, invert, let go of the input, write, and return an account of each."""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import zarr

from dask_batchinv.buffers import BUFFERS
from dask_batchinv.chunks.direct_reading import KeptChunk
from dask_batchinv.chunks.sealed import Chunk, write_chunks
from dask_batchinv.job.options import JobOptions, Missing
from dask_batchinv.job.outputs import OUTPUTS
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
from dask_batchinv.job.target.chunks import open_array
from dask_batchinv.job.target.holder import holder_of
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.kernels import invert_block
from dask_batchinv.kernels.device import device_for
from dask_batchinv.location import Location
from dask_batchinv.stack import Device, result_dtype

#: Requests to stores at a time, for each thread of a worker.
REQUESTS = 16


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
    together: int = 1
    """Tiles that are done at a time."""
    ahead: int = 0
    """How many times as many are read ahead, and written behind; none where all is on disks."""


def invert_tiles(task: TileTask, numbers: range) -> list[TileResult[TileRow]]:
    """Do tiles. May be done again, by anyone: it writes the same bytes to the same keys."""
    spans = [*task.tiling.spans(numbers, task.together)]
    if task.ahead and len(spans) > 1:
        return _do_overlapping(task, spans)
    with ExitStack() as lent:
        kept = KeptChunk(lent)
        return [result for span in spans for result in _do_together(task, span, kept)]


def _do_together(task: TileTask, span: range, kept: KeptChunk | None = None) -> list[TileResult[TileRow]]:
    """Do tiles that lie side by side at a time, or one by one where that fails: then each has an error of its own."""
    if len(span) > 1:
        with suppress(Exception):
            return do_span(task, span, kept)
    return [result for k in span for result in as_results(k, partial(do_span, task, range(k, k + 1), kept))]


def do_span(task: TileTask, span: range, kept: KeptChunk | None = None) -> list[TileResult[TileRow]]:
    """Do tiles that lie side by side at a time."""
    start = time.perf_counter()
    with ExitStack() as lent:
        made = _make(task, span, lent, kept=kept)
        made.write(task)
        return made.results(task, time.perf_counter() - start)


def _do_overlapping(task: TileTask, spans: list[range]) -> list[TileResult[TileRow]]:
    """Do spans of tiles, each while some after it are read and some before it are written: stores make us wait."""
    results: list[TileResult[TileRow]] = []
    failed: list[range] = []
    array = open_source_once(task.run, task.source, task.options.missing)
    pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="dask_batchinv-requests")
    behind: deque[tuple[_Made, Future[None], ExitStack]] = deque()

    def fetch(span: range) -> Any:
        return task.source.fetch(array, task.tiling.region(span, core=True), pool)

    def end_oldest() -> None:
        made, written, lent = behind.popleft()
        with lent:
            try:
                written.result()
                results.extend(made.results(task, made.seconds))
            except Exception:
                failed.append(made.span)

    try:
        coming = deque(map(fetch, spans[: task.ahead]))
        for place, span in enumerate(spans):
            with ExitStack() as lent:
                start = time.perf_counter()
                try:
                    made = _make(task, span, lent, coming.popleft())
                except Exception:
                    failed.append(span)
                else:
                    made.seconds = time.perf_counter() - start
                    behind.append((made, pool.submit(made.write, task), lent.pop_all()))
            coming.extend(map(fetch, spans[place + task.ahead : place + task.ahead + 1]))
            while len(behind) > task.ahead:
                end_oldest()
        while behind:
            end_oldest()
    finally:
        pool.shutdown(cancel_futures=True)  # nothing is written any more once the driver hears of it
    return results + [result for span in failed for result in _do_together(task, span)]


def count_filled(run: str, source: Source, missing: Missing, tiling: Tiling, number: int) -> int:
    """Return how many chunks of the source were not there."""
    if missing == "error":
        return 0
    return source.count_missing(open_source_once(run, source, "fill"), tiling.region(number, core=True))


@dataclass
class _Made:
    """The results of a span of tiles, ready to be written."""

    span: range
    """Which tiles."""
    device: str
    """Where they were inverted."""
    sources: dict[int, int]
    """Checksums of what they were made from."""
    info: dict[int, Array]
    """The codes of each tile."""
    rcond: dict[int, Array]
    """Its condition numbers."""
    chunks: dict[int, dict[str, tuple[str, Chunk]]]
    """What is to be written, and its key, by tile and output; nothing for tiles that are empty."""
    seconds: float = 0.0
    """How long it took."""

    def write(self, task: TileTask) -> None:
        """Write all chunks, if the target is still that of the task."""
        _check_holder(task)
        try:
            write_chunks(
                (
                    (open_output(task.run, task.target, name), key, chunk)
                    for chunks in self.chunks.values()
                    for name, (key, chunk) in chunks.items()
                ),
                synced=task.options.durable,
            )
        except FileNotFoundError as error:
            lost = next((output.name for output in OUTPUTS if not (task.target / output.name).exists()), "an array")
            raise LostArrayError(f"{lost} of {task.target.name} was removed while the job ran") from error

    def results(self, task: TileTask, seconds: float) -> list[TileResult[TileRow]]:
        """Return the account of each tile, once written."""
        milliseconds = round(1000 * seconds / len(self.span))
        return [TileResult(number, self._row(task, number), milliseconds=milliseconds) for number in self.span]

    def _row(self, task: TileTask, number: int) -> TileRow:
        chunks = self.chunks[number]
        return TileRow.of(
            self.info[number],
            self.rcond[number],
            {output.name: chunks[output.name][1].checksum if output.name in chunks else -1 for output in OUTPUTS},
            self.device,
            count_filled(task.run, task.source, task.options.missing, task.tiling, number),
            self.sources[number],
            mark_of_files(task.target, {name: key for name, (key, _) in chunks.items()}),
        )


def _make(task: TileTask, span: range, lent: ExitStack, coming: Any = None, kept: KeptChunk | None = None) -> _Made:
    """Read and invert tiles, in memory that is `lent`, and seal the chunks of the results."""
    device = device_for(None, task.options.device)
    whole, results, sources = _read_and_invert(task, span, device, lent, coming, kept)
    parts = {output.name: _split(task.tiling, results[output.name], span, core=output.core) for output in OUTPUTS}
    made = _Made(span, device, sources, parts["info"], parts["rcond"], {number: {} for number in span})
    for output in OUTPUTS:
        array = open_output(task.run, task.target, output.name)
        if not array.size:
            continue
        chunks = (
            [whole] if whole and output.name == "inverse" else Chunk.of_each(array, parts[output.name].values(), lent)
        )
        for number, chunk in zip(span, chunks, strict=True):
            chunk.seal()
            made.chunks[number][output.name] = task.tiling.chunk_key(number, core=output.core), chunk
    return made


def _read_and_invert(
    task: TileTask, span: range, device: Device, lent: ExitStack, coming: Any, kept: KeptChunk | None
) -> tuple[Chunk | None, dict[str, Array], dict[int, int]]:
    """Return the results of tiles in the order stored, and the checksums of what they were made from.

    The inverses as a chunk too, where they are one as they come.
    """
    # A function of its own so that the input is gone before the output is encoded.
    with ExitStack() as read:
        stored = _read(task, span, read, coming, kept)
        sources = {n: content_checksum(part) for n, part in _split(task.tiling, stored, span, core=True).items()}
        stack = np.moveaxis(task.source.decode(stored), task.tiling.core, (-2, -1))
        del stored
        dtype = result_dtype(stack.dtype)
        is_chunk = task.tiling.core == (stack.ndim - 2, stack.ndim - 1) and stack.shape == task.tiling.tile
        whole = Chunk(stack.shape, dtype, lent) if is_chunk else None
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


def _read(task: TileTask, span: range, lent: ExitStack, coming: Any, kept: KeptChunk | None) -> Array:
    """Read tiles as they are stored: plain ones to memory that is `lent`."""
    array, region = open_source_once(task.run, task.source, task.options.missing), task.tiling.region(span, core=True)
    if task.source.plain is None:
        return task.source.read_stored(array, region, None, coming)
    # As much for a tile that is cut off by the end of the stack, so that the same memory does for all.
    dtype, longest = task.source.plain.dtype, len(span) * math.prod(task.tiling.tile)
    numbers = lent.enter_context(BUFFERS.borrow(longest * dtype.itemsize)).view(dtype)
    shape = [len(range(*span.indices(size))) for span, size in zip(region, task.tiling.shape, strict=True)]
    return task.source.read_stored(array, region, numbers[: math.prod(shape)].reshape(shape), coming, kept)


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


@lru_cache(maxsize=8)
def open_source_once(run: str, source: Source, missing: Missing) -> zarr.Array[Any]:
    """Return the source, kept open for a run."""
    return source.open(missing)


@lru_cache(maxsize=24)
def open_output(run: str, target: Location, name: str, *, read_only: bool = False) -> zarr.Array[Any]:
    """Return an array of a target, kept open for a run."""
    return open_array(target / name, read_only=read_only)
