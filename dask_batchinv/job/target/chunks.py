"""The chunks of a target: written whole, with a checksum where they lie, and read back with it."""

from __future__ import annotations

import asyncio
import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.abc.store
import zarr.storage
from crc32c import crc32c
from zarr.buffer.cpu import Buffer
from zarr.core.sync import sync

from dask_batchinv.location import Location
from dask_batchinv.storage import StrictStore, innermost

#: Every chunk of ours ends with its CRC-32C.
CHECKSUM_NBYTES = 4


class OwnStore(StrictStore):
    """A store of ours. Remembers the checksum that ends each chunk which is read, so that it can be compared."""

    def __init__(self, store: zarr.abc.store.Store):
        super().__init__(store)
        self._checksums: dict[str, int] = {}

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the value of a key, as StrictStore does."""
        value = await super().get(key, prototype, byte_range)
        if value is not None and byte_range is None and key.startswith("c"):
            self._checksums[key] = int.from_bytes(value[-CHECKSUM_NBYTES:].to_bytes(), "little")
        return value

    def checksum(self, key: str) -> int:
        """Return the checksum of the chunk that passed last under a key and forget it; -1 if none did."""
        return self._checksums.pop(key, -1)


def open_array(location: Location, *, read_only: bool = False) -> zarr.Array[Any]:
    """Open an array of ours.

    Chunks that equal the fill value are written like all others, so that one which is not there was lost: reading
    raises `MissingChunkError`.
    """
    array = zarr.open_array(
        OwnStore(location.store(read_only=read_only)), mode="r" if read_only else "r+", zarr_format=3
    )
    # Zarr up to 3.1 takes no notice of a configuration that is given when an array is opened.
    return array.with_config({"write_empty_chunks": True})


def checksum(array: zarr.Array[Any], key: str) -> int:
    """Return the checksum of the chunk of `open_array` that was read last under a key; -1 if none was."""
    store = array.store
    assert isinstance(store, OwnStore)
    return store.checksum(key)


class Chunk:
    """A chunk of an array of ours as it is stored: the values, and after them their checksum.

    Zarr's codecs give the same bytes, but copy all of them twice for the sake of the last four.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike):
        dtype = np.dtype(dtype).newbyteorder("<")
        self._stored = np.empty(math.prod(shape) * dtype.itemsize + CHECKSUM_NBYTES, np.uint8)
        self.values: npt.NDArray[Any] = self._stored[:-CHECKSUM_NBYTES].view(dtype).reshape(shape)
        """To be filled before `seal`."""

    @classmethod
    def of(cls, array: zarr.Array[Any], values: npt.NDArray[Any]) -> Chunk:
        """Return a chunk of an array with copies of `values`, which may be fewer where the array ends."""
        chunk = cls(array.chunks, array.dtype)
        if values.shape != array.chunks:
            chunk.values[...] = array.fill_value
        chunk.values[tuple(map(slice, values.shape))] = values
        return chunk

    def seal(self) -> int:
        """Set the checksum, and return it."""
        checksum = crc32c(self._stored[:-CHECKSUM_NBYTES].data)
        self._stored[-CHECKSUM_NBYTES:] = np.frombuffer(checksum.to_bytes(CHECKSUM_NBYTES, "little"), np.uint8)
        return checksum

    def as_buffer(self) -> Buffer:
        """Return what is stored."""
        return Buffer(self._stored)


def write_chunks(array: zarr.Array[Any], chunks: dict[str, Chunk]) -> None:
    """Write sealed chunks under their keys, several at a time."""

    async def write() -> None:
        room = asyncio.Semaphore(int(zarr.config.get("async.concurrency")))

        async def one(key: str, chunk: Chunk) -> None:
            async with room:
                await (array.store_path / key).set(chunk.as_buffer())

        await asyncio.gather(*(one(key, chunk) for key, chunk in chunks.items()))

    sync(write())


def sync_chunk(array: zarr.Array[Any], key: str) -> None:
    """Have the operating system put a chunk, and the names that lead to it, on the disk; if it is on one."""
    store = innermost(array.store)
    if not isinstance(store, zarr.storage.LocalStore):
        return
    path = os.path.join(store.root, key)
    if not os.path.exists(path):  # of an empty tile
        return
    while len(path) >= len(str(store.root)):
        sync_path(path)
        path = os.path.dirname(path)


def sync_path(path: str) -> None:
    """Have the operating system put a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
