"""Zarr arrays as places to read and write: write units, overlap, creation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr
import zarr.abc.store
import zarr.storage
from zarr.codecs import Crc32cCodec

from dask_batchinv.place import Place

Chunks = tuple[tuple[int, ...], ...]


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


def array_options(dtype: npt.DTypeLike) -> dict[str, Any]:
    """Return how we store results: inverses of real data hardly compress, but a flipped bit must not pass."""
    return {
        "compressors": [Crc32cCodec()],
        "fill_value": np.nan if np.dtype(dtype).kind in "fc" else 0,
        "config": {"write_empty_chunks": True},
    }


def shares_memory(a: Any, b: npt.NDArray[Any]) -> bool:
    """Tell whether two arrays share memory; True where that is too hard to say."""
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # any number is right
    except np.exceptions.TooHardError:
        return True


def refuse_overlap(out: zarr.Array[Any], result: da.Array) -> None:
    """Raise ValueError if computing `result` reads the array that `out` writes.

    Sees the Zarr arrays that stand in the graph as such, not those that other wrappers hide.
    """
    for source in _zarr_arrays(result):
        if _location(source) == _location(out):
            raise ValueError(f"out is the array at {out.store_path} that the input is read from: write elsewhere")


def _location(array: zarr.Array[Any]) -> object:
    """Return what two arrays have in common if and only if they are one."""
    store: Any = array.store
    while isinstance(store, zarr.storage.WrapperStore):
        store = store._store
    if isinstance(store, zarr.storage.LocalStore):
        return os.path.realpath(os.path.join(store.root, array.path))
    if isinstance(store, zarr.storage.FsspecStore):
        protocol = store.fs.protocol if isinstance(store.fs.protocol, str) else store.fs.protocol[0]
        path = f"{store.path}/{array.path}".rstrip("/")
        return os.path.realpath(path) if protocol in ("file", "local") else f"{protocol}://{path}"
    return store, array.path


def _zarr_arrays(collection: da.Array) -> Iterator[zarr.Array[Any]]:
    for node in dict(collection.__dask_graph__()).values():
        for held in (node, *getattr(node, "args", ())):
            thing = getattr(held, "value", held)
            if isinstance(thing, zarr.Array):
                yield thing


def open_array(place: Place, *, read_only: bool = False) -> zarr.Array[Any]:
    """Open an array of ours.

    Chunks that equal the fill value are written like all others, so that one which is not there was lost: reading
    raises `MissingChunkError`.
    """
    return zarr.open_array(
        StrictStore(place.store(read_only=read_only)),
        mode="r" if read_only else "r+",
        zarr_format=3,
        config={"write_empty_chunks": True},
    )
