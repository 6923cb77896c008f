"""The ledger: one row per tile, inside the target, written by the driver alone; and beside it a record of the runs.

A Zarr array of int64, with a checksum, whose chunks are replaced whole; each replacement is atomic where the store
is. A chunk that is damaged all the same is taken as "nothing recorded", and its tiles are done again. So is a row that
does not carry the number of this creation of the target: it was made for another one.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from crc32c import crc32c

from dask_batchinv.chunks.sealed import CHECKSUM_NBYTES, Chunk
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.outputs import LEDGER
from dask_batchinv.job.results import COLUMNS, DEVICES, Rows, TileResult, TileRow, smallest_of, smallest_rconds
from dask_batchinv.job.seen import UNKNOWN
from dask_batchinv.job.target.chunks import DamagedTargetError
from dask_batchinv.job.target.state import Target
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.job.tiling import cuts
from dask_batchinv.location import Location
from dask_batchinv.outcome import FAILURE_KINDS
from dask_batchinv.storage import array_options

#: At 10⁶ tiles it is read with 62 requests, and what is written of it while tiles are done has 3 MiB.
ROWS_PER_CHUNK = 2**14
#: Where there are few tiles it has fewer, by powers of two, so that it rarely changes when a target grows.
_FEWEST_ROWS = 2**8
#: Of so many runs, the last ones, there is a record, in a file that Zarr does not know: its metadata are consolidated.
_RUNS, _RECORDS = 100, "runs.json"
#: And of that at work, how far the target was when it began.
_AT_WORK = "run.json"
#: Who has committed nothing for so long, which is some batches, is taken for dead.
_SILENT_SECONDS = 300.0


def create(group: zarr.Group, name: str, n_tiles: int, attributes: dict[str, Any]) -> None:
    """Create the ledger of a target, its rows in an array of a name."""
    # A group of its own, so that Xarray does not take it for a variable of the target.
    group.create_group(LEDGER, attributes={"columns": list(COLUMNS)} | attributes).create_array(
        name, shape=(n_tiles, len(COLUMNS)), chunks=chunk_shape(n_tiles), dtype=np.int64,
        dimension_names=("tile", "column"), **array_options(np.int64),
    )  # fmt: skip


def chunk_shape(n_tiles: int) -> tuple[int, int]:
    """Return the shape of the chunks of a ledger of so many rows.

    Examples
    --------
    >>> [chunk_shape(n)[0] for n in (0, 256, 257, 10**6)]
    [256, 256, 512, 16384]
    """
    return min(ROWS_PER_CHUNK, max(_FEWEST_ROWS, 1 << (n_tiles - 1).bit_length())), len(COLUMNS)


def _key(name: str, chunk: int) -> str:
    return f"{LEDGER}/{name}/c/{chunk}/0"


def read_chunk(target: Location, name: str, chunk: int, n_tiles: int) -> Rows:
    """Return rows of a ledger of so many as they are in the store, in the array of a name.

    Raises
    ------
    DamagedTargetError
        If they are damaged.
    OSError
        If they cannot be read, or are not there.
    """
    key, shape = _key(name, chunk), chunk_shape(n_tiles)
    nbytes = 8 * math.prod(shape)
    content = target.read(key, nbytes + CHECKSUM_NBYTES + 1)
    rows, checksum = content[:-CHECKSUM_NBYTES], content[-CHECKSUM_NBYTES:]
    if len(rows) != nbytes or crc32c(rows) != int.from_bytes(checksum, "little"):
        raise DamagedTargetError(f"{key} of {target.name} is damaged")
    return np.frombuffer(rows, "<i8").reshape(shape)


def tag_of(generation: str) -> int:
    """Return the number by which the rows of a creation of a target are known: never 0.

    Examples
    --------
    >>> tag_of("00000000000000ffe0000000000000a7")
    63
    """
    return int(generation[:16], 16) >> 2 | 1


def runs_of(target: Location) -> list[dict[str, Any]]:
    """Return the records of the last runs that wrote to a target, the first of them first."""
    try:
        return _records((target / LEDGER).read_json(_RECORDS))
    except ValueError:  # half written
        return []


def _records(found: Any) -> list[dict[str, Any]]:
    runs = found.get("runs") if isinstance(found, dict) else None
    return runs if isinstance(runs, list) else []


def record_run(writer: Writer, record: dict[str, Any]) -> None:
    """Append the record of a run."""

    def appended(old: bytes | None) -> bytes:
        try:
            runs = _records(json.loads(old or b"{}"))
        except ValueError:
            runs = []
        return json.dumps({"runs": [*runs, record][-_RUNS:]}).encode()

    writer.change(f"{LEDGER}/{_RECORDS}", appended)


def record_begin(writer: Writer, begin: dict[str, Any]) -> None:
    """Note how far a target is when a run begins to invert."""
    writer.create(f"{LEDGER}/{_AT_WORK}", json.dumps(begin).encode())


def forget_begin(writer: Writer) -> None:
    """Remove what `record_begin` has noted: the run has ended."""
    writer.delete_all([f"{LEDGER}/{_AT_WORK}"])


def begin_of(target: Location, run: str) -> dict[str, Any] | None:
    """Return how far a target was when a run began to invert; None if that is not known."""
    with suppress(ValueError):
        found = (target / LEDGER).read_json(_AT_WORK)
        return found if found and found.get("run") == run else None
    return None


def sign_of(target: Location) -> dict[str, Any] | None:
    """Return what a run has committed of itself that may be at work still, in a store that knows commits."""
    if target.transaction is None:
        return None
    with suppress(ValueError, KeyError, TypeError):
        found = (target / LEDGER).read_json(_AT_WORK)
        if found and (datetime.now(UTC) - datetime.fromisoformat(found["at"])).total_seconds() < _SILENT_SECONDS:
            return found
    return None


class Ledger:
    """The rows of a target, in memory, and which of them are still to be written.

    Parameters
    ----------
    location, target
        Where it is, and of what.
    writer : Writer, optional
        Who writes it; without one it is only read.
    durable : bool
        Whether what was recorded is on the disk once it is written.
    """

    def __init__(self, location: Location, target: Target, *, writer: Writer | None = None, durable: bool = False):
        self._tag, self._writer, self._durable = tag_of(target.generation), writer, durable
        self._tiling, self._name = target.tiling, target.ledger
        self._rows: Rows = np.zeros((self._tiling.n_tiles, len(COLUMNS)), np.int64)
        self._dirty: set[int] = set()
        for chunk in range(cuts(len(self._rows), ROWS_PER_CHUNK)):
            part = self._rows[chunk * ROWS_PER_CHUNK : (chunk + 1) * ROWS_PER_CHUNK]
            if writer is not None:
                writer.watch(_key(self._name, chunk))
            with suppress(Exception):  # whatever a store may raise: then nothing is known of these tiles
                part[...] = read_chunk(location, self._name, chunk, len(self._rows))[: len(part)]
        # Neither of another creation, nor of a tile that was smaller before its source has grown.
        valid = (self._rows[:, 0] == self._tag) & (self.column("matrices") == self._tiling.matrices())
        self._rows[~valid] = 0

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """Which tiles are done, by number."""
        done: npt.NDArray[np.bool_] = self.column("generation") == self._tag
        return done

    def unwanted(self, options: JobOptions) -> npt.NDArray[np.bool_]:
        """Return of which tiles chunks were filled, or left out, where that is an error now."""
        unwanted = np.zeros(len(self._rows), bool)
        if options.missing == "error":
            unwanted |= self.column("filled") > 0
        if options.bad_chunks == "error":
            unwanted |= self.column("unreadable") > 0
        return unwanted

    def column(self, name: str) -> Rows:
        """Return one column, by tile number."""
        rows: Rows = self._rows[:, COLUMNS.index(name)]
        return rows

    def row(self, number: int) -> TileRow:
        """Return what is recorded of a tile."""
        return TileRow.decode(self._rows[number])

    def total(self, name: str) -> int:
        """Return the sum of a column over the tiles that are done."""
        return int(self.column(name)[self.done].sum())

    @property
    def failed(self) -> dict[str, int]:
        """Matrices without an inverse, by kind."""
        return {kind: self.total(kind) for kind in FAILURE_KINDS}

    @property
    def devices(self) -> dict[str, int]:
        """Tiles by the device that inverted them."""
        counts = np.bincount(self.column("device")[self.done], minlength=len(DEVICES))
        return dict(zip(DEVICES, map(int, counts), strict=True))

    @property
    def smallest_rcond(self) -> float | None:
        """The smallest rcond of a good matrix, or None if there is none."""
        return smallest_of(self._rows[self.done])

    def smallest_rconds(self) -> npt.NDArray[np.float64]:
        """Return the smallest rcond of a good matrix, by tile number; NaN where there is none, or nothing done."""
        return np.where(self.done, smallest_rconds(self._rows), np.nan)

    def record(self, result: TileResult[TileRow], seen: int = UNKNOWN) -> None:
        """Note that a tile is done, and what was seen of its source before; `flush` makes it last."""
        assert result.value is not None
        row = result.value.encode(result.milliseconds, result.attempts)
        self._rows[result.number] = [self._tag, *row, seen, UNKNOWN]
        self._dirty.add(result.number // ROWS_PER_CHUNK)

    def note(self, column: str, numbers: Rows, seen: Rows) -> None:
        """Note what was seen of the sources or the targets of tiles that are done: a number for each."""
        news = numbers[self.column(column)[numbers] != seen]
        self.column(column)[numbers] = seen
        self._dirty |= set(np.unique(news // ROWS_PER_CHUNK).tolist())

    def moved_to(self, location: Location, target: Target, writer: Writer) -> Ledger:
        """Return a ledger with the same rows for the same tiles of a target that has grown; none are written yet."""
        moved = Ledger(location, target, writer=writer, durable=True)
        new = target.tiling
        moved._rows[:] = 0
        moved._rows[self._tiling.numbers_in(new)] = self._rows
        moved._rows[moved.column("matrices") != new.matrices()] = 0
        moved._dirty = set(range(cuts(new.n_tiles, ROWS_PER_CHUNK)))
        return moved

    def forget(self, number: int) -> None:
        """Note that a tile is not done after all."""
        self._rows[number] = 0
        self._dirty.add(number // ROWS_PER_CHUNK)

    @property
    def has_changes(self) -> bool:
        """Whether there is something to write."""
        return bool(self._dirty)

    def flush(self) -> None:
        """Write what was recorded since the last time. After an error it can be called again.

        Raises
        ------
        TakenOverError
            If this run holds the target no more, or somebody else has written to its ledger.
        """
        assert self._writer is not None
        for number in sorted(self._dirty):
            chunk = Chunk(chunk_shape(len(self._rows)), np.int64)
            rows = self._rows[number * ROWS_PER_CHUNK : (number + 1) * ROWS_PER_CHUNK]
            chunk.values[: len(rows)], chunk.values[len(rows) :] = rows, 0
            chunk.seal()
            self._writer.replace(_key(self._name, number), chunk.stored.tobytes(), synced=self._durable)
            self._dirty.remove(number)

    def commit(self) -> None:
        """Make what was written to the target last, where a store knows commits."""
        assert self._writer is not None
        self._writer.commit(f"{self.done.sum():,} of {len(self._rows):,} tiles")
