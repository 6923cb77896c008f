"""An array in a store: its metadata are read and checked before Zarr may decode a single byte of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.chunks.direct_reading import DirectReader, Fetched, KeptChunk
from dask_batchinv.chunks.plain import PlainChunks, plain_chunks
from dask_batchinv.job.options import Missing
from dask_batchinv.job.seen import ChunkGrid, Seen, look_at_source
from dask_batchinv.job.source.bounded_decoding import open_bounded
from dask_batchinv.job.source.decoding import Packing, decode, decoded_dtype, read_packing
from dask_batchinv.job.source.held import itemsize_held
from dask_batchinv.job.source.metadata import (
    Node,
    allowed_codecs,
    check_codecs,
    check_layout,
    checked_dtype,
    chunk_grid_of,
    data_codecs,
    facts_of,
    is_checksummed,
    read_node,
    stored_names,
    wholly_decoded,
)
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location, raised_as
from dask_batchinv.outcome import SourceError
from dask_batchinv.storage import StrictStore, write_unit

Region = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """An array in a store, or a window on it, as its metadata describe it."""

    location: Location
    """Where it is."""
    zarr_format: Literal[2, 3]
    """Its Zarr format."""
    stored_shape: tuple[int, ...]
    """Shape, in the order stored."""
    start: tuple[int, ...]
    """Where in it the window begins."""
    shape: tuple[int, ...]
    """Shape of the window; of all of it, where there is none."""
    dtype: np.dtype[Any]
    """dtype as stored, byte order included."""
    read_unit: tuple[int, ...]
    """Shape of what must be decoded whole: a chunk (of a shard, where there are shards)."""
    itemsize_held: int
    """Bytes alive at once for an element of it while it is decoded."""
    sharded: bool
    """Whether chunks stand together in shards, which Zarr reads many chunks at a time."""
    packing: Packing = field(compare=False)
    """By which its numbers are decoded."""
    decoded_dtype: np.dtype[Any]
    """dtype of the numbers, once decoded."""
    plain: PlainChunks | None = field(hash=False)
    """How its chunks are stored, where that is so plain that they are read without Zarr."""
    chunk_grid: ChunkGrid
    """Where its stored chunks are."""
    checksummed: bool
    """Whether its chunks carry a checksum, so that damage is noticed."""
    facts: dict[str, str] = field(hash=False)
    """What its metadata say that decides on its numbers, but for the shape: see `facts_of`."""

    @classmethod
    def of(cls, node: Node, **more: Any) -> Self:
        """Return an array by its metadata, which are judged.

        Raises
        ------
        SourceError
            If its dtype or a codec is not on the list of those that are safe.
        """
        location, dtype = node.location, checked_dtype(node)
        check_codecs(node, allowed_codecs(node), f"{location.name} is not among those that are safe to run")
        check_layout(node, dtype.itemsize)
        stored_names(node)
        array = open_bounded(location.store(read_only=True), node.meta)
        packing = more["packing"] if "packing" in more else read_packing(node, array)
        known: dict[str, Any] = {
            "location": location,
            "zarr_format": node.zarr_format,
            "stored_shape": tuple(array.shape),
            "start": (0,) * array.ndim,
            "shape": tuple(array.shape),
            "dtype": dtype,
            "read_unit": write_unit(array) if wholly_decoded(node) else tuple(array.chunks),
            "itemsize_held": itemsize_held(dtype, data_codecs(node), sharded=array.shards is not None),
            "sharded": array.shards is not None,
            "packing": packing,
            "decoded_dtype": decoded_dtype(dtype, packing),
            "plain": plain_chunks(node.meta),
            "chunk_grid": chunk_grid_of(node),
            "checksummed": is_checksummed(node),
            "facts": facts_of(node),
        }
        return cls(**known | more)

    def part(self, window: Mapping[int, range]) -> Self:
        """Return a window on it, by axis."""
        spans = [window.get(axis, range(size)) for axis, size in enumerate(self.stored_shape)]
        return replace(self, start=tuple(span.start for span in spans), shape=tuple(map(len, spans)))

    def open(self, missing: Missing = "error") -> zarr.Array[Any]:
        """Open the array for reading.

        Parameters
        ----------
        missing : {"error", "fill"}
            What a chunk that is not in the store means: `MissingChunkError`, or the fill value.
        """
        node = self._checked_node()
        store = self.location.store(read_only=True)
        if missing == "error":
            store = StrictStore(store)
        # It may have grown meanwhile: that is for a later run.
        return open_bounded(store, node.meta | {"shape": list(self.stored_shape)})

    def look(self, tiling: Tiling) -> Seen:
        """Return what the store says of what each tile is read from; SourceError if it says nothing."""
        with raised_as(SourceError, f"the source {self.location.name} cannot be looked at"):
            return look_at_source(self.location, self.chunk_grid, tiling, tuple(range(len(self.shape))), self.start)

    def shape_now(self) -> tuple[int, ...]:
        """Return the shape that it has now.

        Raises
        ------
        SourceError
            If it has become another array, or smaller.
        """
        now = self._checked_node().shape
        return tuple(own + new - old for own, new, old in zip(self.shape, now, self.stored_shape, strict=True))

    def _checked_node(self) -> Node:
        """Read its metadata again; what is opened must be what was checked, also on a worker hours later."""
        node = read_node(self.location, self.zarr_format)
        if node is None or facts_of(node) != self.facts:
            raise SourceError(f"the metadata of {self.location.name} have changed since the job began: start it again")
        if any(now < then for now, then in zip(node.shape, self.stored_shape, strict=True)):
            raise SourceError(f"{self.location.name} has become smaller since the job began: start it again")
        return node

    def read_stored(
        self,
        array: zarr.Array[Any],
        region: tuple[slice, ...],
        out: npt.NDArray[Any] | None = None,
        coming: Future[Any] | Fetched | None = None,
        kept: KeptChunk | None = None,
    ) -> npt.NDArray[Any]:
        """Read a region of the array, which was opened for reading, as it is stored.

        Into `out` where Zarr does not read it; from what is `coming`, if `fetch` was called for it before; and from
        what was `kept` when its neighbour was read.
        """
        if isinstance(coming, Future):
            stored: npt.NDArray[Any] = coming.result()
            return stored
        return self.read_there(array, self.there(region), out, coming, kept)

    def read_there(
        self,
        array: zarr.Array[Any],
        region: Region,
        out: npt.NDArray[Any] | None = None,
        coming: Fetched | None = None,
        kept: KeptChunk | None = None,
    ) -> npt.NDArray[Any]:
        """Do what `read_stored` does for a region of the whole array, not of the window."""
        if (reader := self._reader(array)) is None:
            return np.asarray(array[region])
        return reader.read(region, out, coming, kept)

    def fetch(self, array: zarr.Array[Any], region: tuple[slice, ...], pool: Executor) -> Future[Any] | Fetched | None:
        """Begin to read a region ahead, with the threads of a pool; None where there is nothing to wait for."""
        reader = self._reader(array)
        if reader is None:
            return pool.submit(self.read_stored, array, region)
        return None if reader.store.is_local else reader.fetch(self.there(region), pool)

    def _reader(self, array: zarr.Array[Any]) -> DirectReader | None:
        store = array.store
        return DirectReader(array, self.plain, store) if self.plain and isinstance(store, BoundedStore) else None

    def there(self, region: Sequence[slice]) -> Region:
        """Return where a region of the window is in the array, along all axes."""
        spans = [*region, *(slice(None) for _ in self.shape[len(region) :])]
        found = (range(*span.indices(size)) for span, size in zip(spans, self.shape, strict=True))
        return tuple(slice(at + span.start, at + span.stop) for at, span in zip(self.start, found, strict=True))

    def read_block(self, array: zarr.Array[Any], region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read a region of the array, which was opened for reading, and decode its numbers."""
        return self.decode(self.read_stored(array, region))

    def decode(self, block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the numbers that a block stands for which was read of it."""
        return decode(block, self.packing)

    def count_missing(self, array: zarr.Array[Any], region: tuple[slice, ...]) -> int:
        """Return how many chunks of a region are not in the store, of an array that was opened with "fill".

        Shards are counted where there are some. Of chunks that were read just now it is known; others are looked for.

        Raises
        ------
        ChunkSizeError
            If one is damaged, not missing.
        """
        store = array.store
        assert isinstance(store, BoundedStore)
        spans = self.there(region)
        units = (
            range(span.start // unit, -(-span.stop // unit)) if span.stop > span.start else range(0)
            for span, unit in zip(spans, write_unit(array), strict=True)
        )
        return store.count_missing(map(array.metadata.encode_chunk_key, itertools.product(*units)))
