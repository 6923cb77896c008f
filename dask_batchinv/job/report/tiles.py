"""Tiles that could not be done, or are not as they were written, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dask_batchinv.job.results import TileResult
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.outcome import NAMED


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
        spans = tuple((span.start, span.stop) for span in tiling.region(result.number))
        return cls(result.number, spans, result.error or "")

    @property
    def place(self) -> str:
        """Its number and region, for people."""
        spans = ", ".join(f"{start}:{stop}" for start, stop in self.region)
        return f"tile {self.number} [{spans}]"

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}"


def named_tiles(tiles: tuple[FailedTile, ...]) -> list[str]:
    """Return lines that name the first tiles and count the rest."""
    lines = [f"  {tile}" for tile in tiles[:NAMED]]
    return lines + ([f"  and {len(tiles) - NAMED} more tiles"] if len(tiles) > NAMED else [])
