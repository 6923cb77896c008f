"""Zarr arrays as places to read and write: write units, overlap, creation."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr
import zarr.abc.store
import zarr.storage
from crc32c import crc32c
from zarr.buffer.cpu import Buffer
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync

from dask_batchinv.place import Place

Chunks = tuple[tuple[int, ...], ...]
#: How long `remove_array` tries.
_REMOVAL_SECONDS = 5.0
#: Every chunk of ours ends with its CRC-32C.
CHECKSUM_NBYTES = 4
_METADATA_KEYS = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


class MissingChunkError(FileNotFoundError):
    """A chunk is not in its store."""


class StrictStore(zarr.storage.WrapperStore[zarr.abc.store.Store]):
    """A store that says so when a chunk is not there, where Zarr would quietly give the fill value.

    Zarr has ``array.read_missing_chunks`` for this, but not in the versions for Python 3.11.
    """

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the value of a key; MissingChunkError if it is a chunk and not there."""
        value = await self._store.get(key, prototype, byte_range)
        if value is None and key.rpartition("/")[2] not in _METADATA_KEYS:
            raise MissingChunkError(f"chunk {key} is not in the store")
        return value


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
    store = _innermost(array)
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


def write_unit(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Return the smallest region that may be written alone: a shard, or a chunk where there are no shards."""
    return tuple(array.shards or array.chunks)


def regular_chunks(chunks: Chunks) -> tuple[int, ...]:
    """Return the chunk shape nearest to Dask `chunks` that a Zarr array can have."""
    return tuple(max(1, *sizes) for sizes in chunks)


def safe_chunks(chunks: Chunks, unit: tuple[int, ...]) -> Chunks:
    """Return `chunks`, or others of about the same size whose inner bounds are all bounds of write units.

    No write unit is then touched by two tasks, which would lose data without an error.
    """
    return tuple(_safe_sizes(sizes, step) for sizes, step in zip(chunks, unit, strict=True))


def _safe_sizes(sizes: tuple[int, ...], step: int) -> tuple[int, ...]:
    bounds = np.cumsum(sizes)
    if not np.any(bounds[:-1] % step):
        return sizes
    size = step * max(1, round(max(sizes) / step))
    whole, rest = divmod(int(bounds[-1]), size)
    return (size,) * whole + ((rest,) if rest else ())


def create_array(
    location: str | os.PathLike[str], shape: tuple[int, ...], chunks: tuple[int, ...], dtype: npt.DTypeLike
) -> zarr.Array[Any]:
    """Create a Zarr array for inverses: checksummed, uncompressed, every chunk written.

    Raises
    ------
    zarr.errors.ContainsArrayError
        If there is one already.
    """
    return zarr.create_array(
        Place.parse(location).store(),
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        **array_options(dtype),
    )


def has_array(place: Place) -> bool:
    """Tell whether there is an array."""
    return place.read_json("zarr.json") is not None


def remove_array(place: Place) -> None:
    """Remove an array that tasks may still be writing to, if they look at `has_array` before each block.

    Raises
    ------
    OSError
        If it cannot be removed.
    """
    deadline, absent = time.monotonic() + _REMOVAL_SECONDS, 0
    while absent < 3:
        failure = None
        try:
            # First what makes it an array, so that no task begins another block.
            place.remove(first="zarr.json")
        except OSError as error:  # a block in hand was written meanwhile, or it is gone
            failure = error
        absent = 0 if place.exists() else absent + 1
        if not absent and time.monotonic() > deadline:
            raise failure or OSError(f"something keeps writing to {place.name}")
        time.sleep(0.05)


def array_options(dtype: npt.DTypeLike) -> dict[str, Any]:
    """Return how we store results: inverses of real data hardly compress, but a flipped bit must not pass."""
    return {
        "compressors": [Crc32cCodec()],
        "fill_value": np.nan if np.dtype(dtype).kind in "fc" else 0,
        "config": {"write_empty_chunks": True},
    }


def shares_memory(a: Any, b: npt.NDArray[Any]) -> bool:
    """Tell whether two arrays share memory; True where that is too hard to say."""
    if not isinstance(a, np.ndarray):  # both are CuPy's
        import cupy

        return bool(cupy.shares_memory(a, b))
    effort: Any = 10_000  # NumPy's types know only -1 and 0 in some versions
    try:
        return np.shares_memory(a, b, max_work=effort)
    except np.exceptions.TooHardError:
        return True


def refuse_overlap(out: Any, result: da.Array) -> None:
    """Raise ValueError if computing `result` reads the memory or the Zarr array that `out` writes.

    Sees the arrays in the graph, also inside Xarray's wrappers; not those that a task opens by itself.
    """
    for source in _arrays_in(result):
        if isinstance(out, np.ndarray):
            if isinstance(source, np.ndarray) and shares_memory(source, out):
                raise ValueError("out overlaps the input: pass an array of its own memory")
        elif isinstance(source, zarr.Array) and _location(source) == _location(out):
            raise ValueError(f"out is the array at {out.store_path} that the input is read from: write elsewhere")


def is_in_memory(array: zarr.Array[Any]) -> bool:
    """Tell whether an array lives in this process alone, so that no other can write to it."""
    store = _innermost(array)
    return isinstance(store, zarr.storage.MemoryStore) or (
        isinstance(store, zarr.storage.FsspecStore) and _protocol(store) == "memory"
    )


def _innermost(array: zarr.Array[Any]) -> Any:
    store: Any = array.store
    while isinstance(store, zarr.storage.WrapperStore):
        store = store._store
    return store


def _protocol(store: zarr.storage.FsspecStore) -> str:
    protocol = store.fs.protocol
    return protocol if isinstance(protocol, str) else protocol[0]


def _location(array: zarr.Array[Any]) -> object:
    """Return what two arrays have in common if and only if they are one."""
    store = _innermost(array)
    if isinstance(store, zarr.storage.LocalStore):
        return os.path.realpath(os.path.join(store.root, array.path))
    if isinstance(store, zarr.storage.FsspecStore):
        protocol, path = _protocol(store), f"{store.path}/{array.path}".rstrip("/")
        return os.path.realpath(path) if protocol in ("file", "local") else f"{protocol}://{path}"
    return store, array.path


def _arrays_in(collection: da.Array) -> Iterator[Any]:
    """Yield the NumPy and Zarr arrays that the tasks of a collection hold."""
    seen: set[int] = set()
    todo = list(dict(collection.__dask_graph__()).values())
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (np.ndarray, zarr.Array)):
            yield thing
        elif isinstance(thing, (tuple, list)):
            todo += thing
        else:
            # Tasks of Dask, and the lazy arrays of Xarray, which wrap each other.
            todo += [getattr(thing, name) for name in ("value", "args", "array", "_array") if hasattr(thing, name)]


def open_array(place: Place, *, read_only: bool = False) -> zarr.Array[Any]:
    """Open an array of ours.

    Chunks that equal the fill value are written like all others, so that one which is not there was lost: reading
    raises `MissingChunkError`.
    """
    array = zarr.open_array(OwnStore(place.store(read_only=read_only)), mode="r" if read_only else "r+", zarr_format=3)
    # Zarr up to 3.1 takes no notice of a configuration that is given when an array is opened.
    return array.with_config({"write_empty_chunks": True})
