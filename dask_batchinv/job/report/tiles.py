"""Tiles that could not be done, or are not as they were written, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dask_batchinv.job.results import TileResult
from dask_batchinv.job.tiling import Tiling, describe_tile
from dask_batchinv.outcome import NAMED
from dask_batchinv.shown import Row


def spans_of(tiling: Tiling, number: int) -> tuple[tuple[int, int], ...]:
    """Return where a tile begins and ends along each batch axis."""
    return tuple((span.start, span.stop) for span in tiling.region(number))


@dataclass(frozen=True)
class FailedTile:
    """A tile that could not be done."""

    number: int
    """Its number in the plan."""
    region: tuple[tuple[int, int], ...]
    """Its (start, stop) along each batch dimension."""
    cause: str
    """Why."""

    @classmethod
    def of(cls, result: TileResult[Any], tiling: Tiling) -> FailedTile:
        """Return the failure that a result tells of."""
        return cls(result.number, spans_of(tiling, result.number), result.error or "")

    @property
    def place(self) -> str:
        """Its number and region, for people."""
        return describe_tile(self.number, self.region)

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}"


def named_tiles(tiles: tuple[FailedTile, ...]) -> list[Row]:
    """Return rows that name the first tiles and count the rest."""
    rows = [("", str(tile)) for tile in tiles[:NAMED]]
    return rows + ([("", f"and {len(tiles) - NAMED:,} more")] if len(tiles) > NAMED else [])
