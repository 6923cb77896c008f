"""Chunks as we write them: the values, and their checksum where they lie."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zarr
import zarr.storage
from crc32c import crc32c
from zarr.buffer.cpu import Buffer
from zarr.core.sync import sync

from dask_batchinv.buffers import BUFFERS, LEAST_NBYTES
from dask_batchinv.disk import write_file
from dask_batchinv.requests import COUNT
from dask_batchinv.storage import innermost

#: A CRC-32C has so many: every chunk of ours ends with its own.
CHECKSUM_NBYTES = 4


class Chunk:
    """A chunk of an array of ours as it is stored: the values, and after them their checksum.

    Zarr's codecs give the same bytes, but copy all of them twice for the sake of the last four. With `lent`, its
    memory is its own until that is closed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, lent: ExitStack | None = None):
        dtype = np.dtype(dtype).newbyteorder("<")
        nbytes = math.prod(shape) * dtype.itemsize + CHECKSUM_NBYTES
        if lent is None or nbytes < LEAST_NBYTES:
            self._stored = np.empty(nbytes, np.uint8)
        else:
            self._stored = lent.enter_context(BUFFERS.borrow(nbytes))
        self.values: npt.NDArray[Any] = self._stored[:-CHECKSUM_NBYTES].view(dtype).reshape(shape)
        """To be filled before `seal`."""
        self.checksum = -1
        """Of the values, once sealed."""

    @classmethod
    def of_each(
        cls, array: zarr.Array[Any], parts: Iterable[npt.NDArray[Any]], lent: ExitStack | None = None
    ) -> list[Chunk]:
        """Return chunks of an array with copies of values, which may be fewer where the array ends."""
        shape, dtype, chunks = array.chunks, array.dtype, []
        for values in parts:
            chunk = cls(shape, dtype, lent)
            if values.shape != shape:
                chunk.values[...] = array.fill_value
            chunk.values[tuple(map(slice, values.shape))] = values
            chunks.append(chunk)
        return chunks

    def seal(self) -> None:
        """Set the checksum."""
        self.checksum = crc32c(self._stored[:-CHECKSUM_NBYTES].data)
        self._stored[-CHECKSUM_NBYTES:] = np.frombuffer(self.checksum.to_bytes(CHECKSUM_NBYTES, "little"), np.uint8)

    @property
    def stored(self) -> npt.NDArray[np.uint8]:
        """What is stored, once sealed."""
        return self._stored


class Sealed(Protocol):
    """What can be written."""

    @property
    def stored(self) -> npt.NDArray[np.uint8]:
        """What is stored."""


def write_chunks(chunks: Iterable[tuple[zarr.Array[Any], str, Sealed]], *, synced: bool = False) -> None:
    """Write sealed chunks of arrays under their keys, where there is a store several at a time.

    On a disk no folder is made for them: one that is not there any more was removed with the target. With `synced`
    they and their names are on the disk when it returns.
    """
    elsewhere = []
    for array, key, chunk in chunks:
        COUNT.add()
        inner = innermost(array.store)
        if isinstance(inner, zarr.storage.LocalStore):
            write_file(os.path.join(inner.root, key), [chunk.stored.data], synced=synced)
        else:
            elsewhere.append((array.store_path / key, chunk))

    async def write() -> None:
        room = asyncio.Semaphore(int(zarr.config.get("async.concurrency")))

        async def one(path: zarr.storage.StorePath, chunk: Sealed) -> None:
            async with room:
                await path.set(Buffer(chunk.stored))

        # All have ended, well or not, when this does: the memory of the chunks is used for others then.
        ends = await asyncio.gather(*(one(path, chunk) for path, chunk in elsewhere), return_exceptions=True)
        for failure in filter(None, ends):
            raise failure

    if elsewhere:
        sync(write())


def write_values(path: str, values: npt.NDArray[Any]) -> None:
    """Write the file of a chunk from values in C order, without a copy of them."""
    content = values.reshape(-1).view(np.uint8).data
    write_file(path, [content, crc32c(content).to_bytes(CHECKSUM_NBYTES, "little")], synced=False)
