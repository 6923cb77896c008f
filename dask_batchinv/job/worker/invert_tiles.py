"""Inverts tiles on a worker: read, invert, let go of the input, write, and return an account of each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import zarr

from dask_batchinv.chunks.direct_reading import KeptChunk
from dask_batchinv.chunks.sealed import Chunk, write_chunks
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.outputs import Output, Outputs
from dask_batchinv.job.results import (
    Array,
    BadChunk,
    LostArrayError,
    LostTargetError,
    TileResult,
    TileRow,
    all_final,
    as_results,
    naming,
)
from dask_batchinv.job.seen import mark_of_files
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.target.chunks import open_array
from dask_batchinv.job.target.encoding import EncodedChunk, Encoding, encode
from dask_batchinv.job.target.holder import holder_of
from dask_batchinv.job.tiling import Extent, Tiling
from dask_batchinv.job.worker import metrics
from dask_batchinv.job.worker.products import Products, products
from dask_batchinv.job.worker.read_source import Reader, Stored, split
from dask_batchinv.kernels import InverseEx, invert_block
from dask_batchinv.kernels.device import device_for
from dask_batchinv.location import Location
from dask_batchinv.outcome import Info
from dask_batchinv.requests import COUNT
from dask_batchinv.stack import Device, computed_dtype

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
    """Which run holds the target: another one may have taken its place since. Empty where nobody can."""
    tiling: Tiling
    """Which region each tile has."""
    options: JobOptions
    """How to invert."""
    dtype: np.dtype[Any]
    """As what the inverses are stored."""
    encoding: Encoding
    """How chunks of the target are stored."""
    together: int = 1
    """Tiles that are done at a time."""
    ahead: int = 0
    """How many times as many are read ahead, and written behind; none where all is on disks."""

    def for_span(self, span: range) -> TileTask:
        """Return it with what some tiles need, where they are computed."""
        return replace(self, source=self.source.part_for(self.tiling, span), target=self.target.forked())

    @property
    def outputs(self) -> Outputs:
        """The arrays of the target."""
        return self.options.outputs

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [output.name for output in self.outputs]

    @property
    def reader(self) -> Reader:
        """What reads its source."""
        return Reader(self.run, self.source, self.options.missing, self.tiling)


def invert_tiles(task: TileTask, numbers: range) -> list[TileResult[TileRow]]:
    """Do tiles. May be done again, by anyone: it writes the same bytes to the same keys."""
    results = _do(task, numbers)
    results[0] = replace(results[0], requests=COUNT.take())
    metrics.count(results)
    if (changes := task.target.changes) is None:
        return results
    return [result if result.value is None else replace(result, changes=changes) for result in results]


def _do(task: TileTask, numbers: range) -> list[TileResult[TileRow]]:
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
    return [result for k in span for result in as_results(k, partial(_do_alone, task, k, kept))]


def _do_alone(task: TileTask, number: int, kept: KeptChunk | None) -> list[TileResult[TileRow]]:
    """Do a tile; where chunks of the source are damaged, all of it that is not in them."""
    span = range(number, number + 1)
    try:
        return do_span(task, span, kept)
    except Exception:
        if task.source.is_lazy:
            raise
        start = time.perf_counter()
        with ExitStack() as lent:
            made = _make(task, span, lent, partial(task.reader.read_in_parts, span))
            if not made.bad:  # it was something else, or has passed: to be tried again
                raise
            if not (made.info[number] == int(Info.UNREADABLE)).any():  # a mask leaves out all that is in them
                made.write(task)
                return made.results(task, time.perf_counter() - start)
            bad: Any = {"error": naming(made.bad), "is_final": all_final(made.bad), "bad_chunks": made.bad}
            # Of nothing at all nothing is written: it may be the wrong array.
            if task.options.bad_chunks == "error" and (made.info[number] == int(Info.UNREADABLE)).all():
                return [TileResult(number, None, **bad)]
            made.write(task)
            return [replace(result, **bad) for result in made.results(task, time.perf_counter() - start)]


def do_span(task: TileTask, span: range, kept: KeptChunk | None = None) -> list[TileResult[TileRow]]:
    """Do tiles that lie side by side at a time."""
    start = time.perf_counter()
    with ExitStack() as lent:
        made = _make(task, span, lent, partial(task.reader.read, span, kept=kept))
        made.write(task)
        return made.results(task, time.perf_counter() - start)


def _do_overlapping(task: TileTask, spans: list[range]) -> list[TileResult[TileRow]]:
    """Do spans of tiles, each while some after it are read and some before it are written: stores make us wait."""
    results: list[TileResult[TileRow]] = []
    failed: list[range] = []
    array = task.reader.array
    pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="dask_batchinv-requests")
    behind: deque[tuple[_Made, Future[None], ExitStack]] = deque()

    def fetch(span: range) -> Any:
        return task.source.fetch(array, task.tiling.region(span, "matrix"), pool)

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
                    made = _make(task, span, lent, partial(task.reader.read, span, coming=coming.popleft()))
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
    chunks: dict[int, dict[Output, tuple[str, Chunk | EncodedChunk]]]
    """What is to be written, and its key, by tile and output; nothing for tiles that are empty."""
    bad: tuple[BadChunk, ...]
    """The chunks that they have a part of and that cannot be read."""
    cpu_seconds: float = 0.0
    """For how long this thread has computed."""
    seconds: float = 0.0
    """How long it took."""

    def write(self, task: TileTask) -> None:
        """Write all chunks, if the target is still that of the task."""
        _check_holder(task)
        try:
            write_chunks(
                (
                    (open_output(task.run, task.target, output.name), key, chunk)
                    for chunks in self.chunks.values()
                    for output, (key, chunk) in chunks.items()
                ),
                synced=task.options.durable,
            )
        except FileNotFoundError as error:
            lost = next((name for name in task.names if not (task.target / name).exists()), "an array")
            raise LostArrayError(f"{lost} of {task.target.name} was removed while the job ran") from error

    def results(self, task: TileTask, seconds: float) -> list[TileResult[TileRow]]:
        """Return the account of each tile, once written."""
        wall, cpu = (round(1000 * each / len(self.span)) for each in (seconds, self.cpu_seconds))
        return [
            TileResult(number, self._row(task, number), milliseconds=wall, cpu_milliseconds=cpu) for number in self.span
        ]

    def _row(self, task: TileTask, number: int) -> TileRow:
        chunks = self.chunks[number]
        return TileRow.of(
            self.info[number],
            self.rcond[number],
            {output.role: chunk.checksum for output, (_, chunk) in chunks.items()},
            self.device,
            task.reader.count_filled(number),
            self.sources[number],
            mark_of_files(task.target, {output.name: key for output, (key, _) in chunks.items()}),
        )


def _make(task: TileTask, span: range, lent: ExitStack, read: Callable[[ExitStack], Stored]) -> _Made:
    """Read and invert tiles, in memory that is `lent`, and seal the chunks of the results."""
    device, begun = device_for(None, task.options.device), time.thread_time()
    whole, results, sources, bad = _read_and_invert(task, span, device, lent, read)
    parts = {output.role: split(task.tiling, results[output.role], span, output.extent) for output in task.outputs}
    made = _Made(span, device, sources, parts["info"], parts["rcond"], {number: {} for number in span}, bad)
    for output in task.outputs:
        array = open_output(task.run, task.target, output.name)
        if not array.size:
            continue
        values = parts[output.role].values()
        for number, chunk in zip(span, _chunks_of(task, output, array, values, whole, lent), strict=True):
            made.chunks[number][output] = task.encoding.key(task.tiling, number, output.extent), chunk
    made.cpu_seconds = time.thread_time() - begun
    return made


def _chunks_of(
    task: TileTask,
    output: Output,
    array: zarr.Array[Any],
    values: Iterable[Array],
    whole: Chunk | None,
    lent: ExitStack,
) -> Sequence[Chunk | EncodedChunk]:
    """Return what is stored of an output for each tile."""
    if not task.encoding.is_plain:
        return [encode(part, task.encoding, task.tiling, output, task.dtype) for part in values]
    chunks = [whole] if whole and output.extent == "matrix" else Chunk.of_each(array, values, lent)
    for chunk in chunks:
        chunk.seal()
    return chunks


def _read_and_invert(
    task: TileTask, span: range, device: Device, lent: ExitStack, read: Callable[[ExitStack], Stored]
) -> tuple[Chunk | None, dict[str, Array], dict[int, int], tuple[BadChunk, ...]]:
    """Return the results of tiles in the order stored, the checksums of what they were made from, and what was damaged.

    The inverses as a chunk too, where they are one as they come.
    """
    # A function of its own so that the input is gone before the output is encoded.
    with ExitStack() as until_inverted:
        stored = read(until_inverted)
        codes, bad, numbers = stored.codes, stored.bad, stored.numbers
        sources = task.reader.checksums(stored, span)
        stack = np.moveaxis(task.source.decode(numbers), task.tiling.core, (-2, -1))
        del stored, numbers
        dtype = computed_dtype(stack.dtype, task.dtype, task.options.precision)
        is_last = task.tiling.core == (stack.ndim - 2, stack.ndim - 1)
        as_made = task.options.keep == "inverse" and not task.options.like_source
        is_kept = as_made and dtype == task.dtype and task.encoding.is_plain
        is_chunk = is_kept and is_last and stack.shape == task.tiling.tile
        whole = Chunk(stack.shape, dtype, lent) if is_chunk else None
        out = whole.values if whole else None
        if codes is not None and codes.size and codes.all():  # nothing is left to invert
            results = _without_inverses(stack.shape, dtype, out)
        else:
            results = invert_block(
                stack, dtype=dtype, assume_a=task.options.assume_a, lower=task.options.lower, device=device,
                min_rcond=task.options.min_rcond, out=out,
            )  # fmt: skip
        made = products(results, stack, task.options, task.dtype)
    if codes is not None:
        made["info"][codes != 0] = codes[codes != 0]
        for role in made.keys() - {"info"}:
            made[role][codes != 0] = np.nan
    return whole, _as_stored(task, made), sources, bad


def _without_inverses(shape: tuple[int, ...], dtype: np.dtype[Any], out: Array | None) -> InverseEx:
    inverse = np.empty(shape, dtype) if out is None else out
    inverse[...] = np.nan
    rcond = np.full(shape[:-2], np.nan, np.finfo(dtype).dtype)
    return InverseEx(inverse, np.full(shape[:-2], int(Info.NOT_FINITE), np.int32), rcond)


def _as_stored(task: TileTask, made: Products) -> Products:
    """Return what was made of a stack with its axes in the order stored."""
    row, col = task.tiling.core
    # Triangles and parts stand last, and those of formed sources have their core dimensions last.
    axes: dict[Extent, Any] = {"matrix": ((-2, -1), (row, col)), "row": (-1, row - (col < row))}
    return {output.role: np.moveaxis(made[output.role], *axes.get(output.extent, ((), ()))) for output in task.outputs}


def _check_holder(task: TileTask) -> None:
    """Hold back a worker that was cut off for so long that its target was taken over meanwhile, or sees another one."""
    if task.holder and holder_of(task.target) != task.holder:
        raise LostTargetError(f"{task.target.name} was removed, replaced, or is another place on this worker")


@lru_cache(maxsize=24)
def open_output(run: str, target: Location, name: str, *, read_only: bool = False) -> zarr.Array[Any]:
    """Return an array of a target, kept open for a run."""
    return open_array(target / name, read_only=read_only)
