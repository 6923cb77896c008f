"""The ledger: one row per tile, inside the target, written by the driver alone; and beside it a record of the runs.

A Zarr array of int64, with a checksum, whose chunks are replaced whole; each replacement is atomic where the store
is. A chunk that is damaged all the same is taken as "nothing recorded", and its tiles are done again. So is a row that
does not carry the number of this creation of the target: it was made for another one.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from crc32c import crc32c

from dask_batchinv.job.outputs import LEDGER
from dask_batchinv.job.results import COLUMNS, DEVICES, Rows, TileResult, TileRow, smallest_of
from dask_batchinv.job.target.chunks import CHECKSUM_NBYTES, Chunk, DamagedTargetError
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.location import Location
from dask_batchinv.outcome import FAILURE_KINDS
from dask_batchinv.storage import array_options

ROWS_PER_CHUNK = 4096
_CHUNK_SHAPE = (ROWS_PER_CHUNK, len(COLUMNS))
#: Of so many runs, the last ones, there is a record, in a file that Zarr does not know: its metadata are consolidated.
_RUNS, _RECORDS = 100, "runs.json"


def create(group: zarr.Group, n_tiles: int, attributes: dict[str, Any]) -> None:
    """Create the ledger of a new target."""
    # A group of its own, so that Xarray does not take it for a variable of the target.
    group.create_group(LEDGER, attributes={"columns": list(COLUMNS)} | attributes).create_array(
        "tiles", shape=(n_tiles, len(COLUMNS)), chunks=_CHUNK_SHAPE, dtype=np.int64,
        dimension_names=("tile", "column"), **array_options(np.int64),
    )  # fmt: skip


def _key(chunk: int) -> str:
    return f"{LEDGER}/tiles/c/{chunk}/0"


def read_chunk(target: Location, chunk: int) -> Rows:
    """Return rows of a ledger as they are in the store.

    Raises
    ------
    DamagedTargetError
        If they are damaged.
    OSError
        If they cannot be read, or are not there.
    """
    content = target.read(_key(chunk), 8 * ROWS_PER_CHUNK * len(COLUMNS) + CHECKSUM_NBYTES + 1)
    rows, checksum = content[:-CHECKSUM_NBYTES], content[-CHECKSUM_NBYTES:]
    if len(rows) != 8 * ROWS_PER_CHUNK * len(COLUMNS) or crc32c(rows) != int.from_bytes(checksum, "little"):
        raise DamagedTargetError(f"{_key(chunk)} of {target.name} is damaged")
    return np.frombuffer(rows, "<i8").reshape(_CHUNK_SHAPE)


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


class Ledger:
    """The rows of a target, in memory, and which of them are still to be written.

    Parameters
    ----------
    target, generation, n_tiles
        Where it is, which creation it is of, and how many rows it has.
    writer : Writer, optional
        Who writes it; without one it is only read.
    durable : bool
        Whether what was recorded is on the disk once it is written.
    """

    def __init__(
        self, target: Location, generation: str, n_tiles: int, *, writer: Writer | None = None, durable: bool = False
    ):
        self._tag, self._writer, self._durable = tag_of(generation), writer, durable
        self._rows: Rows = np.zeros((n_tiles, len(COLUMNS)), np.int64)
        self._dirty: set[int] = set()
        for chunk in range(-(-n_tiles // ROWS_PER_CHUNK)):
            part = self._rows[chunk * ROWS_PER_CHUNK : (chunk + 1) * ROWS_PER_CHUNK]
            if writer is not None:
                writer.watch(_key(chunk))
            with suppress(Exception):  # whatever a store may raise: then nothing is known of these tiles
                part[...] = read_chunk(target, chunk)[: len(part)]
        self._rows[self._rows[:, 0] != self._tag] = 0

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """Which tiles are done, by number."""
        done: npt.NDArray[np.bool_] = self.column("generation") == self._tag
        return done

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

    def record(self, result: TileResult[TileRow]) -> None:
        """Note that a tile is done; `flush` makes it last."""
        assert result.value is not None
        self._rows[result.number] = [self._tag, *result.value.encode(result.milliseconds, result.attempts)]
        self._dirty.add(result.number // ROWS_PER_CHUNK)

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
            chunk = Chunk(_CHUNK_SHAPE, np.int64)
            rows = self._rows[number * ROWS_PER_CHUNK : (number + 1) * ROWS_PER_CHUNK]
            chunk.values[: len(rows)], chunk.values[len(rows) :] = rows, 0
            chunk.seal()
            self._writer.replace(_key(number), chunk.stored.tobytes(), synced=self._durable)
            self._dirty.remove(number)
