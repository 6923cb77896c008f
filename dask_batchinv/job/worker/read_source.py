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
from dask_batchinv.job.results import Array, BadChunk, content_checksum
from dask_batchinv.job.source.mask import Mask
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.tiling import Extent, Tiling
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
        return self.source.open_once(self.run, self.missing)

    def read(self, tiles: range, lent: ExitStack, coming: Any = None, kept: KeptChunk | None = None) -> Stored:
        """Read tiles as they are stored: plain ones to memory that is `lent`.

        From what is `coming`, if it was called for before, and from what was `kept` when their neighbours were read.
        """
        region = self.tiling.region(tiles, "matrix")
        out = None if self.source.plain is None else self._room(tiles, region, lent)
        codes = self._mask(region)
        if coming is None and codes is not None and codes.all():  # then it does not matter what is there
            return Stored(np.broadcast_to(self.source.dtype.type(0), self._shape(region)), codes)
        return Stored(self.source.read_stored(self.array, region, out, coming, kept), codes)

    def read_in_parts(self, tiles: range, lent: ExitStack) -> Stored:
        """Read tiles chunk by chunk, so that what cannot be read costs no more than its own matrices."""
        region = self.tiling.region(tiles, "matrix")
        parts = self.source.read_in_parts(self.array, region, self._room(tiles, region, lent))
        codes, masked = np.where(parts.unreadable, np.int32(Info.UNREADABLE), 0), self._mask(region)
        if masked is not None:
            codes = np.where(masked != 0, masked, codes)
        return Stored(parts.stored, codes, tuple(parts.bad))

    def checksums(self, stored: Stored, tiles: range) -> dict[int, int]:
        """Return numbers for what tiles are made from: what is stored, and which of it is left out."""
        numbers = split(self.tiling, stored.numbers, tiles, "matrix")
        if self.source.mask is None:
            return {number: content_checksum(part) for number, part in numbers.items()}
        assert stored.codes is not None
        codes = split(self.tiling, stored.codes, tiles, "number")
        # Where all is left out, nothing is read.
        return {
            number: content_checksum(codes[number]) ^ (0 if codes[number].all() else content_checksum(part))
            for number, part in numbers.items()
        }

    def _mask(self, region: tuple[slice, ...]) -> Array | None:
        """Return the ``info`` of matrices that a mask leaves out; None if there is no mask."""
        if (mask := self.source.mask) is None:
            return None
        masked = mask.read(open_mask_once(self.run, mask), self.source, region)
        shape = self._shape(region)
        batch = [shape[axis] for axis in self.tiling.batch]
        masked = np.broadcast_to(masked.squeeze(self.tiling.core), batch)
        return np.where(masked, np.int32(Info.MASKED), np.int32(0))

    def _shape(self, region: tuple[slice, ...]) -> list[int]:
        return [len(range(*span.indices(size))) for span, size in zip(region, self.tiling.shape, strict=True)]

    def _room(self, tiles: range, region: tuple[slice, ...], lent: ExitStack) -> Array:
        # As much for a tile that is cut off by the end of the stack, so that the same memory does for all.
        dtype, longest = self.source.dtype, len(tiles) * math.prod(self.tiling.tile)
        numbers = lent.enter_context(BUFFERS.borrow(longest * dtype.itemsize)).view(dtype)
        shape = self._shape(region)
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


def split(tiling: Tiling, values: Array, numbers: range, extent: Extent) -> dict[int, Array]:
    """Return what each of several tiles has of an array."""
    if len(numbers) == 1:
        return {numbers.start: values}
    along = tiling.batch[-1]
    width, before = tiling.tile[along], (slice(None),) * tiling.axes(extent).index(along)
    starts = ((number, (number - numbers.start) * width) for number in numbers)
    return {number: values[(*before, slice(start, start + width))] for number, start in starts}


@lru_cache(maxsize=8)
def open_mask_once(run: str, mask: Mask) -> zarr.Array[Any]:
    """Return a mask, kept open for a run."""
    # Who writes masks hardly ever stores chunks that are all 0, so that those which are not there mean nothing.
    return mask.open("fill")
