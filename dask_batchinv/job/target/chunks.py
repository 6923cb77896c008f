"""The chunks of a target: written whole, with a checksum where they lie, and read back with it."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import Any

import zarr
import zarr.abc.store
import zarr.storage

from dask_batchinv.chunks.sealed import CHECKSUM_NBYTES
from dask_batchinv.job.source.bounded_decoding import open_bounded
from dask_batchinv.job.source.metadata import Node, check_codecs, check_layout
from dask_batchinv.location import Location
from dask_batchinv.storage import StrictStore, innermost
from dask_batchinv.text import harmless

#: The codecs of arrays that are compressed or in shards.
ENCODERS = frozenset(["blosc", "bytes", "crc32c", "sharding_indexed", "zstd"])
#: The dtypes of arrays of ours.
_ITEMSIZES = {"float32": 4, "float64": 8, "complex64": 8, "complex128": 16, "int32": 4, "int64": 8}


class DamagedTargetError(ValueError):
    """What a target holds is not what was written there, and cannot be read."""


class OwnStore(StrictStore):
    """A store of ours: gives chunks of the one length that they can have, and remembers the checksums that end them."""

    def __init__(self, store: zarr.abc.store.Store, nbytes: int):
        super().__init__(store)
        self._nbytes = nbytes
        self._checksums: dict[str, int] = {}
        inner = innermost(store)
        self._root = str(inner.root) if isinstance(inner, zarr.storage.LocalStore) else None

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the value of a key, as StrictStore does; DamagedTargetError if it is longer or shorter."""
        if self._root is not None:
            path = os.path.join(self._root, key)
            self._check(key, os.path.getsize(path) if os.path.isfile(path) else -os.path.lexists(path))
        value = await super().get(key, prototype, byte_range)
        if value is not None and byte_range is None:
            self._check(key, len(value))
            self._checksums[key] = int.from_bytes(value[-CHECKSUM_NBYTES:].to_bytes(), "little")
        return value

    def _check(self, key: str, nbytes: int) -> None:
        if nbytes not in (0, self._nbytes):  # 0 where there is none, which StrictStore knows
            raise DamagedTargetError(f"chunk {key} is not the file of {self._nbytes} bytes that was written")

    def checksum(self, key: str) -> int:
        """Return the checksum of the chunk that passed last under a key and forget it; -1 if none did."""
        return self._checksums.pop(key, -1)


def open_array(location: Location, *, read_only: bool = False) -> zarr.Array[Any]:
    """Open an array of ours.

    Chunks that equal the fill value are written like all others, so that one which is not there was lost: reading
    raises `MissingChunkError`.

    Raises
    ------
    DamagedTargetError
        If its metadata are not such as we write.
    """
    meta = None
    with suppress(ValueError):  # not JSON, or not even a file
        meta = location.read_json("zarr.json")
    damaged = DamagedTargetError(
        f"the metadata of {location.name} are lost or damaged: run the job again that made the target"
    )
    if meta is None:
        raise damaged
    store = location.store(read_only=read_only)
    try:
        if (nbytes := _chunk_nbytes(meta)) is None:
            return _open_encoded(location, meta, store)
        return zarr.Array.from_dict(zarr.storage.StorePath(OwnStore(store, nbytes + CHECKSUM_NBYTES)), meta)
    except Exception as error:  # whatever Zarr makes of members that it does not expect
        raise damaged from harmless(error)


def _open_encoded(location: Location, meta: dict[str, Any], store: zarr.abc.store.Store) -> zarr.Array[Any]:
    """Open an array of ours that is compressed or in shards, as strictly as any source; SourceError if damaged."""
    node = Node(location, 3, meta.get("node_type") == "array", meta, {})
    node.expect(node.is_array and meta.get("data_type") in _ITEMSIZES, "an array of ours", meta.get("data_type"))
    check_codecs(node, ENCODERS, "is none of those that we write")
    check_layout(node, _ITEMSIZES[meta["data_type"]])
    return open_bounded(StrictStore(store), meta)


def _chunk_nbytes(meta: dict[str, Any]) -> int | None:
    """Return the bytes of a chunk by metadata such as ours; None if they are none, so that Zarr need not judge them."""
    try:
        codecs = [codec["name"] for codec in meta["codecs"]]
        shape, chunk = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        sizes_are_right = all(type(size) is int and 0 <= size < 2**63 for size in [*shape, *chunk]) and all(chunk)
        itemsize = _ITEMSIZES[meta["data_type"]]
    except (KeyError, TypeError):
        return None
    ok = (
        codecs == ["bytes", "crc32c"] and meta["chunk_grid"].get("name") == "regular" and len(shape) == len(chunk)
        and sizes_are_right and meta.get("node_type") == "array" and not meta.get("storage_transformers")
    )  # fmt: skip
    return itemsize * math.prod(chunk) if ok else None


def checksum(array: zarr.Array[Any], key: str) -> int:
    """Return the checksum of the chunk of `open_array` that was read last under a key; -1 if none was."""
    store = array.store
    assert isinstance(store, OwnStore)
    return store.checksum(key)
