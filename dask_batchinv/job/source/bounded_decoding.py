"""The source of a job opened so that no chunk can decompress to more than its metadata say.

A few KiB can decompress to any number of GiB. Zarr's codecs would find out when it is too late; those here know
beforehand how many bytes must come out, and stop there. They stand in one array only, not in anybody's registry.
Nor is a chunk read that is longer in its store than it could be: a file with a hole takes no space.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import numcodecs.abc  # type: ignore[import-untyped]
import numpy as np
import zarr
import zarr.abc.store
import zarr.codecs
import zarr.storage
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec
from zarr.registry import get_codec_class

from dask_batchinv.chunks.bounded_store import BoundedStore, Stored, check_least, least_nbytes
from dask_batchinv.chunks.decompression import (
    CHECKSUMS,
    COMPRESSORS,
    Bytes,
    Config,
    Size,
    compressed_nbytes,
    decompress,
)
from dask_batchinv.storage import ChunkSizeError

#: What the metadata call text of any length.
TEXTS = ("|O", "string", "variable_length_utf8")
#: Texts of any length may have so many bytes together, in UTF-8.
TEXT_NBYTES = 2**27


class TextAllowance:
    """How many bytes of text may still be read: where a text has any length, nothing else tells."""

    def __init__(self, nbytes: int = TEXT_NBYTES):
        self.left = nbytes

    def size(self, extra: int = 0) -> Size:
        """Return how many bytes may come of a chunk, and `extra` that are no text."""
        return Size(max(0, self.left) + extra, exact=False, because="of all the text there may only be")

    def take(self, data: Bytes, count: int) -> None:
        """Count the text of a chunk that must have `count` items; ChunkSizeError if it is too much, or has others."""
        data = memoryview(data).cast("B")
        found = int.from_bytes(data[:4], "little")
        if len(data) < 4 or found != count:
            raise ChunkSizeError(
                f"a chunk of the source has {found} texts where its metadata say {count}: it is corrupt"
            )
        self.left -= len(data)
        if self.left < 0:
            raise ChunkSizeError(f"there are more than {TEXT_NBYTES >> 20} MiB of text")


def open_bounded(store: zarr.abc.store.Store, meta: Config, allowance: TextAllowance | None = None) -> zarr.Array[Any]:
    """Open an array for reading whose metadata were read and checked already.

    Parameters
    ----------
    store
        What it is in.
    meta
        Its metadata.
    allowance
        What it may have of text of any length; its own by default.
    """
    text = (allowance or TextAllowance()) if is_text(meta) else None
    if meta["zarr_format"] == 2:
        bounded, stored = _bound_v2(meta, text), _stored_v2(meta)
    else:
        bounded, stored = meta | {"codecs": _bound_v3(meta["codecs"], text)}, _stored_v3(meta)
    path = zarr.storage.StorePath(BoundedStore(store, stored))
    array = zarr.Array.from_dict(path, bounded)
    if meta["zarr_format"] == 2 and text is not None:  # Zarr looks for this codec among what is not opened yet
        metadata: Any = array.metadata
        filters = (BoundedText(text, math.prod(meta["chunks"])), *metadata.filters[1:])
        array = zarr.Array(zarr.AsyncArray(replace(metadata, filters=filters), path))
    return array


def is_text(meta: Config) -> bool:
    """Tell whether an array is of texts of any length."""
    declared = meta["dtype"] if meta["zarr_format"] == 2 else meta["data_type"]
    return bool((declared["name"] if isinstance(declared, dict) else declared) in TEXTS)


def element_nbytes(declared: Any) -> int:
    """Return the bytes of an element of a dtype that was checked, and is not text of any length."""
    if not isinstance(declared, dict):
        return int(np.dtype(declared).itemsize)
    return int((declared.get("configuration") or {}).get("length_bytes", 8))  # else it is a time


def _chunk_shape(meta: Config) -> tuple[int, ...]:
    return tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])


# --- what is stored -------------------------------------------------------------------------------------------


def _stored_v2(meta: Config) -> Stored:
    if is_text(meta):
        return Stored.of(TEXT_NBYTES)
    chain = [*(meta["filters"] or ()), *([] if meta["compressor"] is None else [meta["compressor"]])]
    while chain and chain[-1]["id"] in CHECKSUMS and any(map(_compresses, chain)):
        chain.pop()
    compressed = bool(chain) and _compresses(chain[-1])
    before = chain[:-1] if compressed else chain
    if any(map(_compresses, before)):
        raise ValueError(f"{chain[-1]['id']} behind a compressor: the size of chunks cannot be bounded")
    limit = _size_after([numcodecs.get_codec(codec) for codec in before], meta).limit
    # Where nothing compresses exactly that: filters multiply what is too long.
    return Stored.of(limit) if compressed else Stored(limit, limit)


def _stored_v3(meta: Config) -> Stored:
    shards = [codec["configuration"] for codec in meta["codecs"] if _has(codec, "chunk_shape")]
    shape = _chunk_shape(meta)
    least = _index_nbytes(shards[0], shape) if shards else 1
    if is_text(meta):
        return Stored(compressed_nbytes(TEXT_NBYTES), compressed_nbytes(TEXT_NBYTES), least)
    widths = [meta["data_type"]]
    widths += [codec["configuration"]["astype"] for codec in meta["codecs"] if _has(codec, "astype")]
    widths += [codec["configuration"]["encode_dtype"] for codec in meta["codecs"] if _has(codec, "encode_dtype")]
    itemsize = max(map(element_nbytes, widths))
    whole = math.prod(shape) * itemsize
    if not shards:
        return Stored.of(whole)
    # There may be gaps in a shard, and in the shards in it; each chunk has a header and a place in the index.
    part = math.prod(shards[0]["chunk_shape"]) * itemsize
    return Stored(2 * compressed_nbytes(whole) + whole // part * 1024, 2 * compressed_nbytes(part), least)


def _index_nbytes(shard: Config, shape: Sequence[int]) -> int:
    """Return the bytes of the index of a shard: two numbers for each chunk, and its checksums."""
    codecs = shard.get("index_codecs", ["bytes", "crc32c"])
    names = [codec if isinstance(codec, str) else codec["name"] for codec in codecs]
    return 16 * (math.prod(shape) // math.prod(shard["chunk_shape"])) + 4 * names.count("crc32c")


def _has(codec: Any, key: str) -> bool:
    return isinstance(codec, dict) and (codec.get("configuration") or {}).get(key) is not None


# --- Zarr format 3 --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoundedCodec(BytesBytesCodec):
    """A compressor of Zarr format 3 that only decodes, and only to the size of the chunk."""

    inner: Any
    """The codec whose place it takes."""
    kind: str
    """Its name, without prefix."""
    configuration: Config
    """What the metadata say of it."""
    extra: int
    """Bytes that other codecs add before it."""
    text: TextAllowance | None = None
    """What there may be of text."""

    is_fixed_size = False

    def to_dict(self) -> Config:
        """Return what the metadata say."""
        return dict(self.inner.to_dict())

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Not used: sources are only read."""
        raise NotImplementedError

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        if self.text is not None:
            size = self.text.size(self.extra)
        else:
            size = Size(math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize + self.extra)
        data = decompress(self.kind, self.configuration, chunk_bytes.as_numpy_array(), size)
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    def _encode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        raise NotImplementedError("a source is only read")

    async def _encode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        raise NotImplementedError("a source is only read")


@dataclass(frozen=True)
class VLenUTF8Codec(zarr.codecs.VLenUTF8Codec):
    """The codec of text of Zarr format 3, which looks how many there are before it takes memory for them.

    Zarr knows it by its name.
    """

    text: TextAllowance
    """What there may be of it."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        self.text.take(chunk_bytes.as_numpy_array(), math.prod(chunk_spec.shape))
        return super()._decode_sync(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return self._decode_sync(chunk_bytes, chunk_spec)


class _WholeParts:
    """Reads a shard that stands in a shard, and sees that nothing of it is left out."""

    def __init__(self, inner: Any, least: int):
        self._inner, self._least = inner, least

    async def get(self, prototype: Any, byte_range: Any = None) -> Any:
        value = await self._inner.get(prototype, byte_range)
        if value is not None:
            check_least("a shard within a shard", len(value), least_nbytes(byte_range, self._least))
        return value


class BoundedSharding(ShardingCodec):
    """The codec of shards, in which none that stands in another may be empty or cut short."""

    async def _decode_partial_single(self, byte_getter: Any, selection: Any, shard_spec: Any) -> Any:
        if not isinstance(byte_getter, zarr.storage.StorePath):  # else `BoundedStore` sees to it
            index = {"index_codecs": [codec.to_dict() for codec in self.index_codecs], "chunk_shape": self.chunk_shape}
            byte_getter = _WholeParts(byte_getter, _index_nbytes(index, shard_spec.shape))
        return await super()._decode_partial_single(byte_getter, selection, shard_spec)


def _bound_v3(codecs: Sequence[Any], text: TextAllowance | None) -> list[Any]:
    bounded: list[Any] = []
    extra = 0
    for codec in codecs:
        document: Config = {"name": codec} if isinstance(codec, str) else codec
        name: str = document["name"]
        configuration: Config = document.get("configuration") or {}
        kind = name.removeprefix("numcodecs.")
        if kind in COMPRESSORS:
            inner = get_codec_class(name).from_dict(document)
            bounded.append(BoundedCodec(inner, kind, configuration, extra, text))
        elif name == "vlen-utf8":
            bounded.append(VLenUTF8Codec(text or TextAllowance()))
        elif name == "sharding_indexed":
            bounded.append(BoundedSharding(**configuration | {"codecs": _bound_v3(configuration["codecs"], text)}))
        else:
            bounded.append(codec)
        extra += 4 * (kind in CHECKSUMS)
    return bounded


# --- Zarr format 2 --------------------------------------------------------------------------------------------


class BoundedCompressor(numcodecs.abc.Codec):  # type: ignore[misc]  # numcodecs has no types
    """A compressor of Zarr format 2 that only decodes, and only to the size of a chunk."""

    codec_id = "bounded"

    def __init__(self, configuration: Config, size: Size | TextAllowance):
        self.codec_id = str(configuration["id"])
        self._size = size
        self._inner = numcodecs.get_codec(configuration)
        self._configuration = configuration

    def decode(self, buf: Bytes, out: Any = None) -> Bytes:
        """Return the bytes of a chunk; ChunkSizeError if they were more than a chunk has."""
        size = self._size if isinstance(self._size, Size) else self._size.size()
        return decompress(self.codec_id, self._configuration, buf, size)

    def encode(self, buf: Bytes) -> Bytes:
        """Never called."""
        raise NotImplementedError("a source is only read")

    def get_config(self) -> Config:
        """Return what the metadata say."""
        return dict(self._inner.get_config())


class BoundedText(numcodecs.VLenUTF8):  # type: ignore[misc]  # numcodecs has no types
    """The codec of text of Zarr format 2, which looks how many there are before it takes memory for them."""

    def __init__(self, text: TextAllowance, count: int):
        super().__init__()
        self._text, self._count = text, count

    def decode(self, buf: Bytes, out: Any = None) -> Any:
        """Return the texts of a chunk; ChunkSizeError if it has others than its metadata say."""
        self._text.take(buf, self._count)
        return super().decode(buf, out)


def _compresses(codec: Config) -> bool:
    return codec["id"] in COMPRESSORS


def _bound_v2(meta: Config, text: TextAllowance | None) -> Config:
    """Replace the compressor, which may also stand among the filters."""
    filters: list[Any] = list(meta.get("filters") or ())
    known = [] if text is not None else [numcodecs.get_codec(codec) for codec in filters]
    for index, codec in enumerate(filters):
        if _compresses(codec):
            filters[index] = BoundedCompressor(codec, text or _size_after(known[:index], meta))
    compressor = meta.get("compressor")
    if compressor is not None and _compresses(compressor):
        compressor = BoundedCompressor(compressor, text or _size_after(known, meta))
    return meta | {"filters": filters or None, "compressor": compressor}


def _size_after(filters: Sequence[Any], meta: Config) -> Size:
    """Return the size that a chunk has after filters, each of which adds or multiplies."""
    count = math.prod(meta["chunks"])
    if not filters:
        return Size(count * np.dtype(meta["dtype"]).itemsize)
    few, more = (_size_of(filters, np.zeros(n, meta["dtype"])) for n in (64, 128))
    # One more for the bits that are left where eight make a byte.
    packs = any(codec.codec_id == "packbits" for codec in filters)
    return Size(few + (more - few) * (count - 64) // 64 + packs, exact=not packs)


def _size_of(filters: Sequence[Any], sample: Any) -> int:
    with np.errstate(all="ignore"):
        for codec in filters:
            sample = codec.encode(sample)
    return memoryview(sample).nbytes
