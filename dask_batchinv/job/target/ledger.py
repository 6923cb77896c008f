"""The ledger: one row per tile, inside the target, written by the driver alone; and beside it a record of the runs.

A Zarr array of int64, with a checksum, whose chunks are replaced whole; each replacement is atomic where the store
is. A chunk that is damaged all the same is taken as "nothing recorded", and its tiles are done again.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.job.outputs import LEDGER
from dask_batchinv.job.results import COLUMNS, DEVICES, Rows, TileResult, TileRow, smallest_of
from dask_batchinv.job.target.chunks import open_array, sync_chunk
from dask_batchinv.location import Location
from dask_batchinv.outcome import FAILURE_KINDS
from dask_batchinv.storage import array_options

ROWS_PER_CHUNK = 4096
#: Of so many runs, the last ones, there is a record, in a file that Zarr does not know: its metadata are consolidated.
_RUNS, _RECORDS = 100, "runs.json"


def create(group: zarr.Group, n_tiles: int) -> None:
    """Create the ledger of a new target."""
    # A group of its own, so that Xarray does not take it for a variable of the target.
    group.create_group(LEDGER, attributes={"columns": list(COLUMNS)}).create_array(
        "tiles", shape=(n_tiles, len(COLUMNS)), chunks=(ROWS_PER_CHUNK, len(COLUMNS)), dtype=np.int64,
        dimension_names=("tile", "column"), **array_options(np.int64),
    )  # fmt: skip


def read_rows(target: Location, part: slice) -> Rows:
    """Return rows of a ledger as they are in the store, with an error if they are damaged."""
    rows: Rows = np.asarray(_open(target, read_only=True)[part])
    return rows


def _open(target: Location, *, read_only: bool) -> zarr.Array[Any]:
    return open_array(target / LEDGER / "tiles", read_only=read_only)


def runs_of(target: Location) -> list[dict[str, Any]]:
    """Return the records of the last runs that wrote to a target, the first of them first."""
    try:
        found: list[dict[str, Any]] = ((target / LEDGER).read_json(_RECORDS) or {}).get("runs", [])
    except ValueError:  # half written
        found = []
    return found


def record_run(target: Location, record: dict[str, Any]) -> None:
    """Append the record of a run."""
    (target / LEDGER).write(_RECORDS, json.dumps({"runs": [*runs_of(target), record][-_RUNS:]}).encode())


class Ledger:
    """The rows of a target, in memory, and which of them are still to be written."""

    def __init__(self, target: Location, *, read_only: bool = False, durable: bool = False):
        self._durable = durable
        self._array = _open(target, read_only=read_only)
        self._rows: Rows = np.zeros(self._array.shape, np.int64)
        self._dirty: set[int] = set()
        for start in range(0, len(self._rows), ROWS_PER_CHUNK):
            part = slice(start, start + ROWS_PER_CHUNK)
            try:
                self._rows[part] = np.asarray(self._array[part])
            except Exception:  # whatever a codec raises for a damaged chunk
                self._rows[part] = 0
                self._dirty.add(start // ROWS_PER_CHUNK)

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """Which tiles are done, by number."""
        done: npt.NDArray[np.bool_] = self.column("done") == 1
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
        self._rows[result.number] = result.value.encode(result.milliseconds, result.attempts)
        self._dirty.add(result.number // ROWS_PER_CHUNK)

    def forget(self, number: int) -> None:
        """Note that a tile is not done after all."""
        self._rows[number] = 0
        self._dirty.add(number // ROWS_PER_CHUNK)

    def flush(self) -> None:
        """Write what was recorded since the last time. After an error it can be called again."""
        for chunk in sorted(self._dirty):
            part = slice(chunk * ROWS_PER_CHUNK, (chunk + 1) * ROWS_PER_CHUNK)
            self._array[part] = self._rows[part]
            if self._durable:
                sync_chunk(self._array, f"c/{chunk}/0")
            self._dirty.remove(chunk)
