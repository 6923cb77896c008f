"""Reads tiles back on a worker: every chunk is compared, byte for byte, with its recorded checksum."""

from __future__ import annotations

import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dask_batchinv.job.outputs import Outputs, checksum_column
from dask_batchinv.job.results import COLUMNS, Rows, TileResult
from dask_batchinv.job.target.encoding import Encoding
from dask_batchinv.job.target.ledger import ROWS_PER_CHUNK, read_chunk
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location
from dask_batchinv.text import clean

#: How many read at a time for each thread of a worker: a disk or a store that is asked for one chunk after the other
#: keeps us waiting. And how many tiles each of them takes at a time: so few large ones are read back at a time, see
#: `spans_to_read_back`, that they have one reader, and no more memory.
_READERS = 8
_PER_READER = 16
#: A store that answers with an error may do better a moment later; after that the tile is done again, at no harm.
_ATTEMPTS = 3


@dataclass(frozen=True)
class ReadBackTask:
    """All that a worker needs to know to read tiles back."""

    run: str
    """Unique to one run."""
    target: Location
    """Where they are."""
    tiling: Tiling
    """Which they are."""
    ledger: str
    """The name of the array with their rows."""
    outputs: Outputs
    """The arrays of the target."""
    encoding: Encoding
    """How their chunks are stored."""
    dtype: np.dtype[Any]
    """As what the inverses are stored."""


def read_back_tiles(task: ReadBackTask, numbers: range) -> list[TileResult[int]]:
    """Read tiles back, and return one result for each that is not as recorded, and one that counts the others."""
    chunk = numbers.start // ROWS_PER_CHUNK
    rows = rows_of_chunk(task.run, task.target, task.ledger, chunk, task.tiling.n_tiles)

    def problems(some: range) -> list[TileResult[int]]:
        found = ((number, _problem(task, number, rows[number % ROWS_PER_CHUNK])) for number in some)
        return [TileResult(number, None, problem) for number, problem in found if problem]

    with ThreadPoolExecutor(_READERS) as readers:
        parts = [numbers[start : start + _PER_READER] for start in range(0, len(numbers), _PER_READER)]
        bad = [result for part in readers.map(problems, parts) for result in part]
    return [TileResult(numbers.start, len(numbers) - len(bad)), *bad]


@lru_cache(maxsize=4)
def rows_of_chunk(run: str, target: Location, ledger: str, chunk: int, n_tiles: int) -> Rows:
    """Return rows of the ledger of a target, kept for a run."""
    return read_chunk(target, ledger, chunk, n_tiles)


def _problem(task: ReadBackTask, number: int, row: Rows) -> str | None:
    for output in task.outputs:
        nbytes, _ = task.encoding.bound(task.tiling, output, task.dtype)
        key = f"{output.name}/{task.encoding.key(task.tiling, number, output.extent)}"
        recorded = int(row[COLUMNS.index(checksum_column(output.role))])
        if recorded < 0:  # it is empty
            continue
        try:
            content = _read(task.target, key, nbytes + 1)
        except Exception as error:  # whatever a file system may raise
            return clean(f"{key} cannot be read: {type(error).__name__}: {error}")
        if task.encoding.checksum(content) != recorded:
            return f"{key} is not what was written"
    return None


def _read(target: Location, key: str, limit: int) -> bytes:
    if target.is_local:
        return _read_file(f"{target.url}/{key}", limit)
    for attempt in range(_ATTEMPTS):
        try:
            return target.read(key, limit)
        except FileNotFoundError:
            raise
        except Exception:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _read_file(path: str, limit: int) -> bytes:
    """Read a file with as few calls as there can be: where tiles are small, they are all that costs."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # what is not a file might never open
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a file")
        left, parts = min(found.st_size, limit), []
        while left and (part := os.read(handle, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    finally:
        os.close(handle)
