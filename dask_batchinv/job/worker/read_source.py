"""Reads tiles of the source on a worker."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import zarr

from dask_batchinv.buffers import BUFFERS
from dask_batchinv.chunks.direct_reading import KeptChunk
from dask_batchinv.job.options import Missing
from dask_batchinv.job.results import Array, BadChunk
from dask_batchinv.job.source.parts import read_in_parts
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.outcome import Info


@dataclass(frozen=True)
class Reader:
    """Reads tiles of one source."""

    run: str
    """Unique to one run, so that arrays kept open by a worker are not those of an earlier one."""
    source: Source
    """Where to read."""
    missing: Missing
    """What a chunk that is not there means."""
    tiling: Tiling
    """Which region each tile has."""

    @property
    def array(self) -> zarr.Array[Any]:
        """The source, opened for reading."""
        return open_source_once(self.run, self.source, self.missing)

    def read(self, tiles: range, lent: ExitStack, coming: Any = None, kept: KeptChunk | None = None) -> Stored:
        """Read tiles as they are stored: plain ones to memory that is `lent`.

        From what is `coming`, if it was called for before, and from what was `kept` when their neighbours were read.
        """
        region = self.tiling.region(tiles, "matrix")
        out = None if self.source.plain is None else self._room(tiles, region, lent)
        return Stored(self.source.read_stored(self.array, region, out, coming, kept))

    def read_in_parts(self, tiles: range, lent: ExitStack) -> Stored:
        """Read tiles chunk by chunk, so that what cannot be read costs no more than its own matrices."""
        region = self.tiling.region(tiles, "matrix")
        parts = read_in_parts(self.source, self.array, region, self._room(tiles, region, lent))
        return Stored(parts.stored, np.where(parts.unreadable, np.int32(Info.UNREADABLE), 0), tuple(parts.bad))

    def _room(self, tiles: range, region: tuple[slice, ...], lent: ExitStack) -> Array:
        # As much for a tile that is cut off by the end of the stack, so that the same memory does for all.
        dtype, longest = self.source.dtype, len(tiles) * math.prod(self.tiling.tile)
        numbers = lent.enter_context(BUFFERS.borrow(longest * dtype.itemsize)).view(dtype)
        shape = [len(range(*span.indices(size))) for span, size in zip(region, self.tiling.shape, strict=True)]
        return numbers[: math.prod(shape)].reshape(shape)

    def count_filled(self, number: int) -> int:
        """Return how many chunks of a tile were not there."""
        if self.missing == "error":
            return 0
        return self.source.count_missing(self.array, self.tiling.region(number, "matrix"))


@dataclass(frozen=True)
class Stored:
    """What was read of tiles."""

    numbers: Array
    """As they are stored."""
    codes: Array | None = None
    """The ``info`` of those matrices that are not inverted, whatever is in them; 0 of all others."""
    bad: tuple[BadChunk, ...] = ()
    """The chunks that cannot be read."""


@lru_cache(maxsize=8)
def open_source_once(run: str, source: Source, missing: Missing) -> zarr.Array[Any]:
    """Return the source, kept open for a run."""
    return source.open(missing)
