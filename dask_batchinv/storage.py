"""What all that reads or writes Zarr here shares."""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.abc.store
import zarr.storage
from zarr.codecs import Crc32cCodec

from dask_batchinv.disk import is_file_or_absent
from dask_batchinv.text import CleanError

#: The attribute by which an array or a group is known to be ours. It holds a text, as every format of files can.
MARK = "dask_batchinv"
#: What Zarr keeps beside chunks.
METADATA_KEYS = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


class DamagedChunkError(CleanError):
    """A chunk is not what its metadata say, as far as its store can tell: to try again would change nothing.

    A checksum that does not match is not one of these: what was read may have been damaged on its way.
    """


class MissingChunkError(DamagedChunkError, FileNotFoundError):
    """A chunk is not in its store."""


class ChunkSizeError(DamagedChunkError, ValueError):
    """A chunk has, or would decompress to, another size than its metadata say, or is no file."""


class GuardedStore(zarr.storage.WrapperStore[zarr.abc.store.Store]):
    """A store in which all that is read passes `get`, also what newer versions of Zarr would read around it."""

    #: Zarr asks for this from version 3.3 on.
    _supports_sync_io = False

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
        """Return the values of several keys, or of parts of them."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def get_ranges(
        self, key: str, byte_ranges: Any, *, prototype: Any, **_: Any
    ) -> AsyncIterator[list[tuple[int, Any]]]:
        """Yield parts of the value of a key, not joined: each is as long as it may be."""
        for index, byte_range in enumerate(byte_ranges):
            yield [(index, await self.get(key, prototype, byte_range))]

    async def _get_many(self, requests: Any) -> AsyncGenerator[tuple[str, Any], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)


class FilesStore(GuardedStore):
    """A store that on a disk reads nothing but files: a pipe might never end."""

    def __init__(self, store: zarr.abc.store.Store):
        super().__init__(store)
        inner = innermost(store)
        self._root = str(inner.root) if isinstance(inner, zarr.storage.LocalStore) else None

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the value of a key; ChunkSizeError if it is not a file."""
        if self._root is not None and not is_file_or_absent(os.path.join(self._root, key)):
            raise ChunkSizeError(f"{key} is not a file")
        return await self._store.get(key, prototype, byte_range)


class StrictStore(GuardedStore):
    """A store that says so when a chunk is not there, where Zarr would quietly give the fill value.

    Zarr has ``array.read_missing_chunks`` for this, but not in the versions for Python 3.11.
    """

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the value of a key; MissingChunkError if it is a chunk and not there."""
        value = await self._store.get(key, prototype, byte_range)
        if value is None and key.rpartition("/")[2] not in METADATA_KEYS:
            raise MissingChunkError(f"chunk {key} is not in the store")
        return value


def array_options(dtype: npt.DTypeLike) -> dict[str, Any]:
    """Return how we store results: inverses of real data hardly compress, but a flipped bit must not pass."""
    return {
        "compressors": [Crc32cCodec()],
        "fill_value": np.nan if np.dtype(dtype).kind in "fc" else 0,
        "config": {"write_empty_chunks": True},
    }


def fill_means_missing(array: zarr.Array[Any], attributes: Mapping[str, Any]) -> bool:
    """Tell whether Xarray takes the fill value of an array for "no number": in format 2, with dimension names."""
    return array.metadata.zarr_format == 2 and "_ARRAY_DIMENSIONS" in attributes and array.fill_value is not None


def write_unit(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Return the smallest region that may be written alone: a shard, or a chunk where there are no shards."""
    return tuple(array.shards or array.chunks)


def innermost(store: Any) -> Any:
    """Return a store without what is wrapped around it."""
    while isinstance(store, zarr.storage.WrapperStore):
        store = store._store
    return store


@contextmanager
def unspecified() -> Iterator[None]:
    """Silence Zarr where it warns that consolidated metadata and text labels are not in its specification yet.

    Xarray wants the former, and users have the latter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
