"""A Zarr array that Dask reads block by block, directly where its chunks are plain."""

from __future__ import annotations

import os
from typing import Any

import dask.array as da
import zarr
import zarr.storage
from dask.base import normalize_token
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from fsspec.implementations.local import LocalFileSystem

from dask_batchinv.chunks.bounded_store import BoundedStore, Stored
from dask_batchinv.chunks.direct_reading import DirectReader
from dask_batchinv.chunks.plain import plain_chunks


class PlainArray:
    """A Zarr array of plain chunks in files, of which slices are read directly, and all else is as Zarr has it."""

    def __init__(self, array: zarr.Array[Any], reader: DirectReader):
        self.array, self._reader = array, reader

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple) and len(key) == self.array.ndim and all(map(_is_plain_slice, key)):
            return self._reader.read(key)
        return self.array[key]

    def __getattr__(self, name: str) -> Any:
        if name in ("array", "_reader"):  # not there while it is unpickled
            raise AttributeError(name)
        return getattr(self.array, name)

    def __dask_tokenize__(self) -> Any:
        return normalize_token(self.array)


def plain_array(array: zarr.Array[Any]) -> Any:
    """Return an array as `PlainArray` where that is possible, else as it is."""
    if not array.ndim or not _gives_fill_values(array) or (folder := _folder(array)) is None:
        return array
    meta: dict[str, Any] = array.metadata.to_dict()
    try:
        plain = plain_chunks(meta)
    except (KeyError, TypeError, ValueError, AttributeError):  # metadata of an extension
        plain = None
    if plain is None or plain.dtype != array.dtype or plain.shape != array.chunks:
        return array
    store = BoundedStore(zarr.storage.LocalStore(folder, read_only=True), Stored.of(plain.nbytes))
    return PlainArray(array, DirectReader(array, plain, store))


def read_directly(a: da.Array) -> da.Array:
    """Return a Dask array of which the Zarr arrays that it is read from are read directly, where that is possible."""
    graph = a.__dask_graph__()
    if not isinstance(graph, HighLevelGraph):
        return a
    replaced = {}
    for name, layer in graph.layers.items():
        # So `da.from_array` calls what it takes blocks from, and nothing else.
        if isinstance(layer, MaterializedLayer) and name.startswith("original-") and list(layer) == [name]:
            array = getattr(layer[name], "value", layer[name])
            if isinstance(array, zarr.Array) and isinstance(found := plain_array(array), PlainArray):
                replaced[name] = MaterializedLayer({name: found})
    if not replaced:
        return a
    return da.Array(HighLevelGraph({**graph.layers, **replaced}, graph.dependencies), a.name, a.chunks, meta=a._meta)


def _is_plain_slice(key: Any) -> bool:
    return isinstance(key, slice) and key.step in (None, 1)


def _gives_fill_values(array: zarr.Array[Any]) -> bool:
    """Tell whether Zarr gives those where chunks are not there: newer versions raise an error if they are asked to."""
    configuration = getattr(array.async_array, "config", None)
    wanted = getattr(configuration, "read_missing_chunks", None)
    return bool(zarr.config.get("array.read_missing_chunks", True) if wanted is None else wanted)


def _folder(array: zarr.Array[Any]) -> str | None:
    """Return the folder of this machine that an array is in, if no other store is between, which may change bytes."""
    store = array.store
    if type(store) is zarr.storage.LocalStore:
        return os.path.join(store.root, array.path)
    # `da.from_zarr` opens a path so.
    if type(store) is zarr.storage.FsspecStore and type(getattr(store.fs, "sync_fs", None)) is LocalFileSystem:
        return os.path.join(store.path, array.path)
    return None
