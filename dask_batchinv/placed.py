"""Functions of the blocks of a Dask array that are told where their block stands.

Where all chunks of an axis but the last are equally long, that follows from the number of the block. `block_info` would
tell it as well, but costs as much as a block of small matrices does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask.array as da

Span = tuple[float, float]


@dataclass(frozen=True)
class Standing:
    """Where a block stands in its array."""

    number: tuple[int, ...]
    """Its number along each axis."""
    spans: tuple[Span, ...]
    """Where it begins and ends there, NaN where that is unknown."""


@dataclass(frozen=True)
class _Grid:
    """Chunks of which all but the last of each axis are equally long."""

    sizes: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, chunks: tuple[tuple[float, ...], ...]) -> _Grid | None:
        """Return the grid of an array's chunks, or None if they are not so."""
        for own in chunks:
            if any(size != own[0] for size in own[:-1]) or not own[-1] <= own[0]:  # unknown ones are neither
                return None
        return cls(tuple(int(own[0]) for own in chunks), tuple(int(sum(own)) for own in chunks))

    def standing(self, number: tuple[int, ...]) -> Standing:
        """Return where a block stands, along as many axes as its number has."""
        spans = (
            (i * size, min((i + 1) * size, length))
            for i, size, length in zip(number, self.sizes, self.lengths, strict=False)
        )
        return Standing(number, tuple(spans))


def map_placed(function: Callable[[Any, Standing | None], Any], a: da.Array, **options: Any) -> da.Array:
    """Return `a.map_blocks` of a function that is called with each block and where it stands.

    That is None when Dask tries the function. `options` are those of `map_blocks`; of axes, it may drop the last.
    """
    grid = _Grid.of(a.chunks)
    if grid is None:
        return a.map_blocks(_by_info, function=function, **options)
    return a.map_blocks(_by_number, function=function, grid=grid, **options)


def _by_number(block: Any, function: Callable[..., Any], grid: _Grid, block_id: tuple[int, ...] | None = None) -> Any:
    return function(block, None if block_id is None else grid.standing(block_id))


def _by_info(block: Any, function: Callable[..., Any], block_info: Any = None) -> Any:
    if not block_info:
        return function(block, None)
    spans = tuple((math.nan, math.nan) if None in span else tuple(span) for span in block_info[0]["array-location"])
    return function(block, Standing(tuple(block_info[0]["chunk-location"]), spans))
