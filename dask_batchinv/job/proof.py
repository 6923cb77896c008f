"""Proof that what the ledger says was written is still there: every chunk, byte for byte, by its checksum."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from crc32c import crc32c

from dask_batchinv.job.ledger import CHECKSUMS, COLUMNS, ROWS_PER_CHUNK, Rows, read_rows
from dask_batchinv.job.plan import Tiling
from dask_batchinv.job.tile import TileResult
from dask_batchinv.place import Place, redact
from dask_batchinv.storage import CHECKSUM_NBYTES

#: Tiles of at most so many bytes are proven at a time.
SPAN_NBYTES = 2**26
#: How many read at a time for each thread of a worker: a disk or a store that is asked for one chunk after the other
#: keeps us waiting. And how many tiles each of them takes at a time: so few large ones are proven at a time, see above,
#: that they have one reader, and no more memory.
_READERS = 8
_PER_READER = 16
#: A store that answers with an error may do better a moment later; after that the tile is done again, at no harm.
_ATTEMPTS = 3


@dataclass(frozen=True)
class ProofTask:
    """All that a worker needs to know to prove tiles."""

    run: str
    """Unique to one run."""
    target: Place
    """Where they are."""
    tiling: Tiling
    """Which they are."""


def spans_to_prove(numbers: np.ndarray[tuple[int], np.dtype[np.int64]], tile_nbytes: int) -> Iterator[range]:
    """Yield ascending tile numbers, many at a time, none of them from two chunks of the ledger."""
    longest = max(1, min(ROWS_PER_CHUNK, SPAN_NBYTES // max(1, tile_nbytes)))
    cuts = np.flatnonzero((np.diff(numbers) > 1) | (np.diff(numbers // ROWS_PER_CHUNK) > 0)) + 1
    for part in np.split(numbers, cuts):
        for start in range(0, len(part), longest):
            some = part[start : start + longest]
            yield range(int(some[0]), int(some[-1]) + 1)


def prove_tiles(task: ProofTask, numbers: range) -> list[TileResult]:
    """Read tiles back, and return one result for each that is not as recorded, and one that counts the others."""
    chunk = numbers.start // ROWS_PER_CHUNK
    rows = _rows_of_chunk(task.run, task.target, chunk)

    def problems(some: range) -> list[TileResult]:
        found = ((number, _problem(task, number, rows[number % ROWS_PER_CHUNK])) for number in some)
        return [TileResult(number, None, problem) for number, problem in found if problem]

    with ThreadPoolExecutor(_READERS) as readers:
        parts = [numbers[start : start + _PER_READER] for start in range(0, len(numbers), _PER_READER)]
        bad = [result for part in readers.map(problems, parts) for result in part]
    return [TileResult(numbers.start, {"proven": len(numbers) - len(bad)}), *bad]


@lru_cache(maxsize=4)
def _rows_of_chunk(run: str, target: Place, chunk: int) -> Rows:
    return read_rows(target, slice(chunk * ROWS_PER_CHUNK, (chunk + 1) * ROWS_PER_CHUNK))


def _problem(task: ProofTask, number: int, row: Rows) -> str | None:
    for name, key in task.tiling.chunk_keys(number).items():
        recorded = int(row[COLUMNS.index(CHECKSUMS[name])])
        if recorded < 0:  # it is empty
            continue
        try:
            content = _read(task.target, f"{name}/{key}")
        except Exception as error:  # whatever a file system may raise
            return redact(f"{name}/{key} cannot be read: {type(error).__name__}: {error}")
        if _checksum(content) != recorded:
            return f"{name}/{key} is not what was written"
    return None


def _read(target: Place, key: str) -> bytes:
    if target.is_local:
        return _read_file(f"{target.url}/{key}")
    fs, path = target.filesystem()
    for attempt in range(_ATTEMPTS):
        try:
            content: bytes = fs.cat_file(f"{path}/{key}")
            return content
        except FileNotFoundError:
            raise
        except Exception:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _read_file(path: str) -> bytes:
    """Read a file with as few calls as there can be: where tiles are small, they are all that costs."""
    handle = os.open(path, os.O_RDONLY)
    try:
        left, parts = os.fstat(handle).st_size, []
        while left and (part := os.read(handle, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    finally:
        os.close(handle)


def _checksum(content: bytes) -> int:
    """Return the checksum of a chunk if that is also what the chunk itself says, else -1."""
    data = np.frombuffer(content, np.uint8)
    computed = crc32c(data[:-CHECKSUM_NBYTES].data)
    return computed if computed == int.from_bytes(content[-CHECKSUM_NBYTES:], "little") else -1
