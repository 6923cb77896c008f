"""Documents of Zarr format 2 beside those of a target, for programs that read nothing else: they describe one data.

Each array has documents of both formats, and its chunks are written once, in a way that both can say: under the keys of
format 2, and without the checksum behind them, which not all of its readers know. Coordinates, being small, are there
twice.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import zarr
import zarr.storage

from dask_batchinv.job.target.contents import OF_FORMAT_2, Contents
from dask_batchinv.location import json_object
from dask_batchinv.storage import unspecified

#: The documents of the group that have its attributes.
_, ATTRIBUTES, CONSOLIDATED = OF_FORMAT_2
#: By which Xarray knows the dimensions of an array, which users may not change.
_DIMENSIONS = "_ARRAY_DIMENSIONS"
_COMPRESSORS = {
    "zstd": lambda level: numcodecs.Zstd(level=level),
    "blosc": lambda level: numcodecs.Blosc(cname="zstd", clevel=level, shuffle=numcodecs.Blosc.SHUFFLE),
}


def documents_of(contents: Contents) -> dict[str, bytes]:
    """Return the documents of a target, and the chunks of its coordinates, by key."""
    kept: dict[str, Any] = {}
    store = zarr.storage.MemoryStore(kept)
    group = zarr.create_group(store, zarr_format=2, attributes=contents.group_attributes | {"complete": 0})
    tiling, encoding = contents.tiling, contents.encoding
    name, _, level = (encoding.compress or "").partition(":")
    for output in contents.outputs:
        dims = contents.dims_of(output)
        group.create_array(
            output.name, shape=tiling.shape_of(output.extent), chunks=tiling.chunk_of(output.extent),
            dtype=output.dtype(contents.dtype), fill_value=output.fill, filters=None,
            compressors=_COMPRESSORS[name](int(level)) if name else None,
            attributes=contents.attributes_of(output) | {_DIMENSIONS: dims},
        )  # fmt: skip
    if contents.coordinates is not None:
        with unspecified():
            attributes = dict(group.attrs)
            contents.coordinates.assign_attrs(attributes).to_zarr(store, mode="a", zarr_format=2, consolidated=False)
    with unspecified():
        zarr.consolidate_metadata(store, zarr_format=2)
    return {key: value.to_bytes() for key, value in kept.items()}


def with_complete(key: str, document: bytes | None, complete: bool) -> bytes:
    """Return a document of the group that says whether the target is complete."""
    meta: dict[str, Any] = {}
    with suppress(ValueError):
        meta = json_object(document or b"{}", key)
    attributes = meta if key == ATTRIBUTES else meta.setdefault("metadata", {}).setdefault(ATTRIBUTES, {})
    attributes["complete"] = int(complete)
    return json.dumps(meta, indent=2).encode()


def says_the_same(key: str, found: bytes, expected: bytes) -> bool:
    """Tell whether a document says of arrays what it should; attributes are left to users."""
    mine, theirs = (json_object(text, key) for text in (expected, found))
    if key.rpartition("/")[2] == ATTRIBUTES:
        return bool(mine.get(_DIMENSIONS) == theirs.get(_DIMENSIONS))
    return bool(_without_attributes(mine) == _without_attributes(theirs))


def _without_attributes(meta: dict[str, Any]) -> Any:
    inner = meta.get("metadata")
    if not isinstance(inner, dict):
        return meta
    return {name: own.get(_DIMENSIONS) if name.rpartition("/")[2] == ATTRIBUTES else own for name, own in inner.items()}
