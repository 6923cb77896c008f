"""The source of a job opened so that no chunk can decompress to more than its metadata say.

A few KiB can decompress to any number of GiB. Zarr's codecs would find out when it is too late; those here know
beforehand how many bytes must come out, and stop there. They stand in one array only, not in anybody's registry.
Nor is a chunk read that is longer in its store than it could be: a file with a hole takes no space.
"""

from __future__ import annotations

import asyncio
import bz2
import gzip
import io
import lzma
import math
import os
import stat
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import numcodecs.abc  # type: ignore[import-untyped]
import numpy as np
import zarr
import zarr.abc.store
import zarr.storage
from zarr.abc.codec import BytesBytesCodec
from zarr.abc.store import RangeByteRequest
from zarr.codecs import ShardingCodec
from zarr.registry import get_codec_class

from dask_batchinv.storage import innermost

#: Codecs whose output can be larger than their input.
COMPRESSORS = frozenset(["blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"])
#: Codecs that add four bytes.
CHECKSUMS = frozenset(["adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3"])
_ZSTD_MAGIC = 0xFD2FB528

Bytes = Any
Config = dict[str, Any]


class ChunkSizeError(ValueError):
    """A chunk would decompress to another size than its metadata say."""


@dataclass(frozen=True)
class Size:
    """How many bytes come out of a compressor."""

    limit: int
    """At most."""
    exact: bool = True
    """Whether it must be so many."""

    def check(self, nbytes: int) -> None:
        """Raise ChunkSizeError if `nbytes` are too many."""
        if nbytes > self.limit:
            raise ChunkSizeError(
                f"a chunk of the source decompresses to {nbytes} bytes or more where its metadata say {self.limit}: "
                "it is corrupt, or a decompression bomb. Rewrite the source"
            )


def open_bounded(store: zarr.abc.store.Store, meta: Config) -> zarr.Array[Any]:
    """Open an array for reading whose metadata were read and checked already."""
    bounded = _bound_v2(meta) if meta["zarr_format"] == 2 else meta | {"codecs": _bound_v3(meta["codecs"])}
    whole, part = _stored_v2(bounded) if meta["zarr_format"] == 2 else _stored_v3(meta)
    return zarr.Array.from_dict(zarr.storage.StorePath(BoundedStore(store, whole, part)), bounded)


# --- what is stored -------------------------------------------------------------------------------------------


class BoundedStore(zarr.storage.WrapperStore[zarr.abc.store.Store]):
    """A store of chunks that gives none which is longer than it could be, and on a disk nothing but files."""

    def __init__(self, store: zarr.abc.store.Store, whole: int, part: int):
        super().__init__(store)
        self._whole, self._part = whole, part
        inner = innermost(store)
        self._root = str(inner.root) if isinstance(inner, zarr.storage.LocalStore) else None

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the value of a key; ChunkSizeError if it is too long."""
        if self._root is not None:
            self._check_file(os.path.join(self._root, key))
        if isinstance(byte_range, RangeByteRequest):
            _check_stored(key, byte_range.end - byte_range.start, self._part)
        value = await self._store.get(key, prototype, byte_range)
        if value is not None:
            _check_stored(key, len(value), self._whole)
        return value

    def _check_file(self, path: str) -> None:
        try:
            found = os.stat(path)
        except OSError:  # reading will say what it is
            return
        if not stat.S_ISREG(found.st_mode):
            raise ChunkSizeError(f"{path} is not a file: a chunk of the source was expected")
        _check_stored(path, found.st_size, self._whole)


def _check_stored(key: str, nbytes: int, limit: int) -> None:
    if nbytes > limit:
        raise ChunkSizeError(
            f"the chunk {key} of the source has {nbytes} bytes where by its metadata it cannot have more than {limit}: "
            "it is corrupt, or a decompression bomb. Rewrite the source"
        )


def _stored_v2(meta: Config) -> tuple[int, int]:
    """Return how long a chunk can be in the store, whole and each part that is read by itself."""
    chain = [*(meta["filters"] or ()), *([] if meta["compressor"] is None else [meta["compressor"]])]
    if chain and isinstance(chain[-1], BoundedCompressor):
        limit = _compressed(chain[-1].size.limit)
    else:  # exactly that: filters multiply what is too long
        limit = _size_after([numcodecs.get_codec(c) if isinstance(c, dict) else c for c in chain], meta).limit
    return limit, limit


def _stored_v3(meta: Config) -> tuple[int, int]:
    widths = [meta["data_type"]]
    widths += [codec["configuration"]["astype"] for codec in meta["codecs"] if _has(codec, "astype")]
    widths += [codec["configuration"]["encode_dtype"] for codec in meta["codecs"] if _has(codec, "encode_dtype")]
    itemsize = max(np.dtype(width).itemsize for width in widths)
    whole = math.prod(meta["chunk_grid"]["configuration"]["chunk_shape"]) * itemsize
    shards = [codec["configuration"] for codec in meta["codecs"] if _has(codec, "chunk_shape")]
    if not shards:
        return _compressed(whole), _compressed(whole)
    # There may be gaps in a shard, and in the shards in it; each chunk has a header and a place in the index.
    part = math.prod(shards[0]["chunk_shape"]) * itemsize
    return 2 * _compressed(whole) + whole // part * 1024, 2 * _compressed(part)


def _has(codec: Any, key: str) -> bool:
    return isinstance(codec, dict) and (codec.get("configuration") or {}).get(key) is not None


def _compressed(nbytes: int) -> int:
    """Return more than any compressor makes of `nbytes` that cannot be compressed, with checksums."""
    return nbytes + nbytes // 8 + 4096


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

    is_fixed_size = False

    def to_dict(self) -> Config:
        """Return what the metadata say."""
        return dict(self.inner.to_dict())

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Not used: sources are only read."""
        raise NotImplementedError

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        itemsize = chunk_spec.dtype.to_native_dtype().itemsize
        size = Size(math.prod(chunk_spec.shape) * itemsize + self.extra)
        data = decompress(self.kind, self.configuration, chunk_bytes.as_numpy_array(), size)
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    def _encode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        raise NotImplementedError("a source is only read")

    async def _encode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        raise NotImplementedError("a source is only read")


def _bound_v3(codecs: Sequence[Any]) -> list[Any]:
    bounded: list[Any] = []
    extra = 0
    for codec in codecs:
        document: Config = {"name": codec} if isinstance(codec, str) else codec
        name: str = document["name"]
        configuration: Config = document.get("configuration") or {}
        kind = name.removeprefix("numcodecs.")
        if kind in COMPRESSORS:
            inner = get_codec_class(name).from_dict(document)
            bounded.append(BoundedCodec(inner, kind, configuration, extra))
        elif name == "sharding_indexed":
            bounded.append(ShardingCodec(**configuration | {"codecs": _bound_v3(configuration["codecs"])}))
        else:
            bounded.append(codec)
        extra += 4 * (kind in CHECKSUMS)
    return bounded


# --- Zarr format 2 --------------------------------------------------------------------------------------------


class BoundedCompressor(numcodecs.abc.Codec):  # type: ignore[misc]  # numcodecs has no types
    """A compressor of Zarr format 2 that only decodes, and only to the size of a chunk."""

    codec_id = "bounded"

    def __init__(self, configuration: Config, size: Size):
        self.codec_id = str(configuration["id"])
        self.size = size
        self._inner = numcodecs.get_codec(configuration)
        self._configuration = configuration

    def decode(self, buf: Bytes, out: Any = None) -> Bytes:
        """Return the bytes of a chunk; ChunkSizeError if they were more than a chunk has."""
        return decompress(self.codec_id, self._configuration, buf, self.size)

    def encode(self, buf: Bytes) -> Bytes:
        """Never called."""
        raise NotImplementedError("a source is only read")

    def get_config(self) -> Config:
        """Return what the metadata say."""
        return dict(self._inner.get_config())


def _bound_v2(meta: Config) -> Config:
    """Replace the compressor, which may also stand among the filters."""
    filters = [numcodecs.get_codec(codec) for codec in meta.get("filters") or ()]
    compressor = meta.get("compressor")
    for index, codec in enumerate(filters):
        if codec.codec_id in COMPRESSORS:
            filters[index] = BoundedCompressor(meta["filters"][index], _size_after(filters[:index], meta))
    if compressor is not None and compressor["id"] in COMPRESSORS:
        compressor = BoundedCompressor(compressor, _size_after(filters, meta))
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


# --- decompression --------------------------------------------------------------------------------------------


def decompress(kind: str, configuration: Config, data: Bytes, size: Size) -> Bytes:
    """Return what a compressor makes of `data`.

    Raises
    ------
    ChunkSizeError
        If that were more than `size` allows; no more memory than that was taken.
    """
    data = memoryview(data).cast("B")
    if kind in _HEADERS:
        return _HEADERS[kind](data, size)
    if kind == "zlib":
        stream = zlib.decompressobj()
        out = stream.decompress(data, size.limit + 1)
        size.check(len(out))
        if not stream.eof:
            raise EOFError("a chunk of the source ends before its last byte")
        return out
    # As files, for several streams, one after the other, are one chunk.
    with _FILES[kind](io.BytesIO(data), configuration) as file:
        out = file.read(size.limit + 1)
    size.check(len(out))
    return out


def _lzma(file: io.BytesIO, configuration: Config) -> Any:
    container, filters = configuration.get("format", lzma.FORMAT_XZ), configuration.get("filters")
    return lzma.LZMAFile(file, format=container, filters=filters)


_FILES: dict[str, Callable[[io.BytesIO, Config], Any]] = {
    "bz2": lambda file, _: bz2.BZ2File(file),
    "gzip": lambda file, _: gzip.GzipFile(fileobj=file, mode="rb"),
    "lzma": _lzma,
}


def _blosc(data: Bytes, size: Size) -> Bytes:
    size.check(int.from_bytes(data[4:8], "little"))
    if not 16 <= int.from_bytes(data[12:16], "little") <= len(data):  # Blosc itself would read on
        raise EOFError("a chunk of the source ends before its last byte")
    return numcodecs.Blosc().decode(data)


def _lz4(data: Bytes, size: Size) -> Bytes:
    size.check(int.from_bytes(data[:4], "little"))
    return numcodecs.LZ4().decode(data)


def _zstd(data: Bytes, size: Size) -> Bytes:
    # Not always by decoding into a buffer of the right size: of a chunk that is too short, numcodecs fills the front
    # and says nothing; and up to 0.16 it stops after the first of several frames.
    nbytes = zstd_nbytes(data)
    if nbytes is not None:
        size.check(nbytes)
        return numcodecs.Zstd().decode(data)
    if not size.exact:
        raise ChunkSizeError("a chunk of the source does not say how large it is: rewrite the source")
    out = np.empty(size.limit, np.uint8)
    try:
        return numcodecs.Zstd().decode(data, out)
    except RuntimeError as error:
        raise ChunkSizeError(
            f"a chunk of the source does not decompress to the {size.limit} bytes that its metadata say ({error}): it "
            "is corrupt, or a decompression bomb. Rewrite the source"
        ) from error


_HEADERS: dict[str, Callable[[Bytes, Size], Bytes]] = {"blosc": _blosc, "lz4": _lz4, "zstd": _zstd}


def zstd_nbytes(data: Bytes) -> int | None:
    """Return the size of the content of all frames of Zstandard; None if one of them does not say (RFC 8878)."""
    total, at = 0, 0
    while at < len(data):
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic >> 4 == 0x184D2A5:  # a frame to skip
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != _ZSTD_MAGIC or at + 5 > len(data):
            raise ValueError("a chunk of the source is damaged: it is not compressed by Zstandard")
        nbytes, at = _zstd_frame(data, at + 4)
        if nbytes is None:
            return None
        total += nbytes
    return total


def _zstd_frame(data: Bytes, at: int) -> tuple[int | None, int]:
    """Return the size of the content of a frame and where it ends, from its header on."""
    flags = data[at]
    single = flags >> 5 & 1
    at += 1 + (not single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    nbytes = int.from_bytes(data[at : at + width], "little") + 256 * (width == 2) if width else None
    at += width
    last = 0
    while not last and at < len(data):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind = header & 1, header >> 1 & 3
        at += 3 + (1 if kind == 1 else header >> 3)  # one byte, repeated
    return nbytes, at + 4 * (flags >> 2 & 1)
