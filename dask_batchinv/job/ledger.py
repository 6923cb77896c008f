"""The ledger: one row per tile, inside the target, written by the driver alone.

A Zarr array of int64, with a checksum, whose chunks are replaced whole; each replacement is atomic where the store
is. A chunk that is damaged all the same is taken as "nothing recorded", and its tiles are done again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv import storage
from dask_batchinv.place import Place

#: The checksum that each chunk of a tile was written with; -1 if it has none, being empty.
CHECKSUMS = {"inverse": "inverse_crc32c", "rcond": "rcond_crc32c", "info": "info_crc32c"}
#: What a row says of its tile, 112 bytes in all. ``smallest_rcond_bits``: of the good matrices, a float64 as int64;
#: ``device``: an index of DEVICES.
COLUMNS = (
    "done", "matrices", "singular", "not_finite", "overflow", "below_min_rcond", "ill_conditioned",
    "smallest_rcond_bits", "milliseconds", "attempts", "device", *CHECKSUMS.values(),
)  # fmt: skip
DEVICES = ("cpu", "gpu")
FAILED = ("singular", "not_finite", "overflow", "below_min_rcond")
ROWS_PER_CHUNK = 4096

Rows = npt.NDArray[np.int64]


def create(group: zarr.Group, n_tiles: int) -> None:
    """Create the ledger of a new target."""
    # A group of its own, so that Xarray does not take it for a variable of the target.
    group.create_group("ledger", attributes={"columns": list(COLUMNS)}).create_array(
        "tiles", shape=(n_tiles, len(COLUMNS)), chunks=(ROWS_PER_CHUNK, len(COLUMNS)), dtype=np.int64,
        dimension_names=("tile", "column"), **storage.array_options(np.int64),
    )  # fmt: skip


def read_rows(target: Place, part: slice) -> Rows:
    """Return rows of a ledger as they are in the store, with an error if they are damaged."""
    rows: Rows = np.asarray(storage.open_array(target / "ledger" / "tiles", read_only=True)[part])
    return rows


class Ledger:
    """The rows of a target, in memory, and which of them are still to be written."""

    def __init__(self, target: Place, *, read_only: bool = False, durable: bool = False):
        self._durable = durable
        self._array = storage.open_array(target / "ledger" / "tiles", read_only=read_only)
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

    def total(self, name: str) -> int:
        """Return the sum of a column over the tiles that are done."""
        return int(self.column(name)[self.done].sum())

    @property
    def failed(self) -> dict[str, int]:
        """Matrices without an inverse, by kind."""
        return {name: self.total(name) for name in FAILED}

    @property
    def devices(self) -> dict[str, int]:
        """Tiles by the device that inverted them."""
        counts = np.bincount(self.column("device")[self.done], minlength=len(DEVICES))
        return dict(zip(DEVICES, map(int, counts), strict=True))

    @property
    def smallest_rcond(self) -> float | None:
        """The smallest rcond of a good matrix, or None if there is none."""
        values = self.column("smallest_rcond_bits")[self.done].view(np.float64)
        values = values[np.isfinite(values)]
        return float(values.min()) if len(values) else None

    def record(self, number: int, row: dict[str, Any]) -> None:
        """Note that a tile is done; `flush` makes it last."""
        self._rows[number] = [row[name] for name in COLUMNS]
        self._dirty.add(number // ROWS_PER_CHUNK)

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
                storage.sync_chunk(self._array, f"c/{chunk}/0")
            self._dirty.remove(chunk)
