"""What a chunk takes of the memory while it is decoded: pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dask_batchinv.chunks.decompression import COMPRESSORS

#: Filters that give back what they are given, or a view of it.
_IN_PLACE = frozenset(["bitround", "bytes", "quantize", "sharding_indexed", "transpose"])
#: LZMA keeps what it has made in its dictionary, up to all of it.
_KEEPS_ALL = "lzma"


def itemsize_held(dtype: np.dtype[Any], codecs: Iterable[tuple[str, dict[str, Any]]], *, sharded: bool) -> int:
    """Return how many bytes are alive at once for each element of a chunk that is decoded.

    What was read of the store stays until the chunk is done; beside it stand what one codec is given and what it makes.

    Parameters
    ----------
    dtype
        That of the array.
    codecs
        (name, configuration) of those of the data, in the order in which they encode.
    sharded
        Whether chunks are put together in an array of their shard.

    Examples
    --------
    >>> itemsize_held(np.dtype("f8"), [("gzip", {})], sharded=False)
    16
    >>> itemsize_held(np.dtype("f8"), [("delta", {"astype": "<f4"}), ("gzip", {})], sharded=False)
    16
    >>> itemsize_held(np.dtype("f8"), [("delta", {}), ("gzip", {})], sharded=False)
    24
    """
    width, moments = dtype.itemsize, [dtype.itemsize]
    for name, configuration in codecs:
        kind, before = name.removeprefix("numcodecs."), width
        made = configuration.get("astype") or configuration.get("encode_dtype")
        width = before if made is None else np.dtype(made).itemsize
        if kind in COMPRESSORS:
            moments.append(width * (2 if kind == _KEEPS_ALL else 1))
        elif kind == "fixedscaleoffset":  # two more, of floating numbers, while it computes
            moments.append(before + width + 2 * max(8, before))
        elif kind not in _IN_PLACE:
            moments.append(before + width)
    return width + max(moments) + sharded * dtype.itemsize
