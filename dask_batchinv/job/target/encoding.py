"""How the chunks of a target are stored: as they are, compressed, in shards, and for which formats of Zarr.

A target is of format 3. For those that read format 2 alone, documents of that format are put beside, which describe the
same chunks: see `dask_batchinv.job.target.format_2`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
import zarr.storage
from crc32c import crc32c
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from dask_batchinv.chunks.decompression import compressed_nbytes
from dask_batchinv.chunks.sealed import CHECKSUM_NBYTES
from dask_batchinv.job.outputs import Output
from dask_batchinv.job.results import Array
from dask_batchinv.job.tiling import Extent, Tiling
from dask_batchinv.outcome import RefusedError

#: What compressors are made of: by name, from a level, and the level that is meant where none is given. Not gzip, which
#: writes the time into what it makes: a tile must have the same bytes whoever does it again.
_COMPRESSORS: dict[str, tuple[Any, int, range]] = {
    "zstd": (lambda level: ZstdCodec(level=level), 3, range(1, 23)),
    "blosc": (lambda level: BloscCodec(cname="zstd", clevel=level, shuffle="shuffle"), 5, range(1, 10)),
}
#: What an entry of the index of a shard takes.
_INDEX_NBYTES = 16
#: How many bytes at most, and whether always as many.
Bound = tuple[int, bool]


@dataclass(frozen=True)
class Encoding:
    """How the chunks of a target are stored."""

    compress: str | None = None
    """The compressor and its level, ``"zstd:3"``."""
    inner: tuple[int, ...] | None = None
    """The shape of the chunks in a shard, which then is what a tile gives; None if there are no shards."""
    zarr_format: Literal[2, 3] = 3
    """The lowest format of Zarr that can read it."""
    separator: Literal[".", "/"] = "."
    """What stands between the numbers of a key: not the usual one, but where a store knows no other."""

    @property
    def is_plain(self) -> bool:
        """Whether a chunk is its numbers, and behind them their checksum."""
        return self.compress is None and self.inner is None and self.zarr_format == 3

    @property
    def is_sealed(self) -> bool:
        """Whether what is stored ends with a checksum of all before it."""
        return self.inner is None and self.zarr_format == 3

    def checksum(self, content: bytes) -> int:
        """Return the checksum by which what is stored is known; -1 if it says itself that it is damaged."""
        data = np.frombuffer(content, np.uint8)
        if not self.is_sealed:
            return crc32c(data.data)
        computed = crc32c(data[:-CHECKSUM_NBYTES].data)
        return computed if computed == int.from_bytes(content[-CHECKSUM_NBYTES:], "little") else -1

    def key(self, tiling: Tiling, number: int, extent: Extent) -> str:
        """Return the key of what a tile gives to an array.

        Examples
        --------
        >>> tiling = Tiling(shape=(10, 3, 3), core=(1, 2), tile=(4, 3, 3))
        >>> Encoding().key(tiling, 2, "matrix"), Encoding(zarr_format=2).key(tiling, 2, "number")
        ('c.2.0.0', '2')
        """
        numbers = self.separator.join(map(str, tiling.place(number, extent)))
        if self.zarr_format == 2:
            return numbers or "0"
        return f"c{self.separator}{numbers}" if numbers else "c"

    def prefix(self, extent: Extent, tiling: Tiling) -> str:
        """Return what the keys of an array begin with, or the only one of an array without dimensions."""
        if self.zarr_format == 2:
            return "" if tiling.axes(extent) else "0"
        return f"c{self.separator}" if tiling.axes(extent) else "c"

    def bound(self, tiling: Tiling, output: Output, dtype: np.dtype[Any]) -> Bound:
        """Return how many bytes a tile gives to an output at most, and whether it is always as many."""
        chunk = tiling.chunk_of(output.extent)
        nbytes = math.prod(chunk) * output.dtype(dtype).itemsize
        if self.is_plain:
            return nbytes + CHECKSUM_NBYTES, True
        if self.compress is None and self.inner is None:
            return nbytes, True
        count = 1 if self.inner is None else math.prod(chunk) // math.prod(self.inner_of(tiling, output.extent) or (1,))
        return compressed_nbytes(nbytes) + count * (compressed_nbytes(0) + _INDEX_NBYTES), False

    def inner_of(self, tiling: Tiling, extent: Extent) -> tuple[int, ...] | None:
        """Return the shape of the chunks of an array in its shards."""
        if self.inner is None:
            return None
        pairs = zip(tiling.axes(extent), tiling.chunk_of(extent), strict=True)
        return tuple(self.inner[axis] if axis >= 0 else whole for axis, whole in pairs)

    def options(self, tiling: Tiling, output: Output, dtype: np.dtype[Any]) -> dict[str, Any]:
        """Return what Zarr is told to create an array of an output with, but for its shape and attributes."""
        chunk, inner = tiling.chunk_of(output.extent), self.inner_of(tiling, output.extent)
        codecs: list[Any] = [] if self.compress is None else [_compressor(self.compress)]
        if self.zarr_format == 3:
            codecs.append(Crc32cCodec())
        # The chunks of an array lie in one folder. With the usual "/" each chunk of the inverse would have two folders
        # to itself: very small ones then took 1.8 times as long to write, and 3.5 times as long to read from a disk.
        key = {"name": "v2" if self.zarr_format == 2 else "default", "separator": self.separator}
        return {
            "dtype": output.dtype(dtype),
            "chunks": inner or chunk,
            "shards": None if inner is None else chunk,
            "compressors": codecs,
            "fill_value": output.fill,
            "chunk_key_encoding": key,
            "config": {"write_empty_chunks": True},
        }


def parse_compress(text: str | None) -> str | None:
    """Return a compressor and its level.

    Raises
    ------
    RefusedError
        If it is none that we know.

    Examples
    --------
    >>> parse_compress("zstd"), parse_compress("blosc:9"), parse_compress(None)
    ('zstd:3', 'blosc:9', None)
    """
    if text is None:
        return None
    name, mark, level = str(text).partition(":")
    _, default, levels = _COMPRESSORS.get(name, (None, 0, range(0)))
    number = int(level) if mark and level.isdecimal() else default if not mark else -1
    if number not in levels:
        known = ", ".join(f"{known} (levels {own[0]} to {own[-1]})" for known, (_, _, own) in _COMPRESSORS.items())
        raise RefusedError(f"{text!r} is no compressor: take {known}, such as zstd or zstd:9")
    return f"{name}:{number}"


def _compressor(text: str) -> Any:
    name, _, level = text.partition(":")
    return _COMPRESSORS[name][0](int(level))


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk, or a shard, as it is stored."""

    stored: npt.NDArray[np.uint8]
    """What is stored."""
    checksum: int
    """By which it is known."""


def encode(values: Array, encoding: Encoding, tiling: Tiling, output: Output, dtype: np.dtype[Any]) -> EncodedChunk:
    """Return what is stored of the values of a tile, which may be fewer where the array ends, by Zarr's own codecs."""
    kept: dict[str, Any] = {}
    shape = tiling.chunk_of(output.extent)
    array = zarr.create_array(zarr.storage.MemoryStore(kept), shape=shape, **encoding.options(tiling, output, dtype))
    if values.shape == shape:
        array[...] = values
    else:
        whole = np.full(shape, output.fill, output.dtype(dtype))
        whole[tuple(map(slice, values.shape))] = values
        array[...] = whole
    (key,) = kept.keys() - {"zarr.json"}
    content = kept[key].to_bytes()
    return EncodedChunk(np.frombuffer(content, np.uint8), encoding.checksum(content))
