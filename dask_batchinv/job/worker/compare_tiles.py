"""Compares tiles on a worker with what they were made from: what the source has now is read, and nothing computed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from dask_batchinv.job.options import Missing
from dask_batchinv.job.results import TileResult, TileRow, all_final, as_results, naming
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.target.ledger import ROWS_PER_CHUNK
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.job.worker.read_back import rows_of_chunk
from dask_batchinv.job.worker.read_source import Reader
from dask_batchinv.location import Location
from dask_batchinv.outcome import Info


@dataclass(frozen=True)
class CompareTask:
    """All that a worker needs to know to compare tiles with their source."""

    run: str
    """Unique to one run."""
    source: Source
    """Where to read."""
    target: Location
    """Where they are."""
    ledger: str
    """The name of the array with their rows."""
    tiling: Tiling
    """Which they are."""
    missing: Missing
    """What a chunk that is not there means."""


def compare_tiles(task: CompareTask, numbers: range) -> list[TileResult[bool]]:
    """Return of each tile whether it was made from what the source has now."""
    return [result for number in numbers for result in as_results(number, partial(_compare, task, number))]


def _compare(task: CompareTask, number: int) -> list[TileResult[bool]]:
    rows = rows_of_chunk(task.run, task.target, task.ledger, number // ROWS_PER_CHUNK, task.tiling.n_tiles)
    row = TileRow.decode(rows[number % ROWS_PER_CHUNK])
    if row.failed["unreadable"]:  # it may have been repaired: that is seen when it is done again
        return [TileResult(number, False)]
    reader = Reader(task.run, task.source, task.missing, task.tiling)
    with ExitStack() as lent:
        tile = range(number, number + 1)
        try:
            stored = reader.read(tile, lent)
        except Exception:
            if task.source.is_lazy:
                raise
            stored = reader.read_in_parts(tile, lent)
            if not stored.bad:
                raise
            assert stored.codes is not None
            if (stored.codes == int(Info.UNREADABLE)).any():
                text = naming(stored.bad)
                return [TileResult(number, None, text, is_final=all_final(stored.bad), bad_chunks=stored.bad)]
        found = reader.checksums(stored, tile)[number]
        same = found == row.source_checksum and reader.count_filled(number) == row.filled
    return [TileResult(number, same)]
