"""Chunks decompressed to no more bytes than they may have, into memory that is taken once."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from dask_batchinv.storage import ChunkSizeError

#: Codecs whose output can be larger than their input.
COMPRESSORS = frozenset(["blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"])
#: Codecs that add four bytes.
CHECKSUMS = frozenset(["adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3"])
#: How much goes into a decompressor, and comes out of it, at a time.
_PIECE_NBYTES, _STEP_NBYTES = 2**16, 2**18
_ZSTD_MAGIC = 0xFD2FB528

Bytes = Any
Config = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How many bytes come out of a compressor."""

    limit: int
    """At most."""
    exact: bool = True
    """Whether it must be so many."""
    because: str = "its metadata say"
    """What sets the limit."""

    def check(self, nbytes: int) -> None:
        """Raise ChunkSizeError if `nbytes` are too many."""
        if nbytes > self.limit:
            raise ChunkSizeError(
                f"a chunk of the source decompresses to {nbytes} bytes or more where {self.because} {self.limit}: "
                "it is corrupt, or a decompression bomb. Rewrite the source"
            )


def compressed_nbytes(nbytes: int) -> int:
    """Return more than any compressor makes of `nbytes` that cannot be compressed, with checksums."""
    return nbytes + nbytes // 8 + 4096


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
    # Of itself a decompressor would put pieces together at the end: then there are two copies.
    out = np.empty(size.limit, np.uint8)
    return out[: _decompress_steps(kind, configuration, data, size, out)]


def decompress_into(kind: str, configuration: Config, data: Bytes, out: npt.NDArray[np.uint8]) -> None:
    """Fill `out` with what a compressor makes of `data`.

    Raises
    ------
    ChunkSizeError
        If that were more bytes than `out` has, or fewer.
    """
    data, size = memoryview(data).cast("B"), Size(out.nbytes)
    # Each of these says first how many bytes will come, and none writes more than that.
    if kind == "blosc" and _blosc_nbytes(data, size) == out.nbytes:
        numcodecs.Blosc().decode(data, out)
    elif kind == "lz4" and _lz4_nbytes(data, size) == out.nbytes:
        numcodecs.LZ4().decode(data, out)
    elif kind == "zstd" and [*zstd_frames(data)] == [out.nbytes]:
        numcodecs.Zstd().decode(data, out)
    elif kind in _STREAMS:
        _check_all(_decompress_steps(kind, configuration, data, size, out), out.nbytes)
    else:
        made = np.frombuffer(decompress(kind, configuration, data, size), np.uint8)
        _check_all(made.nbytes, out.nbytes)
        out[:] = made


def _check_all(nbytes: int, expected: int) -> None:
    if nbytes != expected:
        raise ChunkSizeError(
            f"a chunk of the source decompresses to {nbytes} bytes where its metadata say {expected}: it is corrupt. "
            "Restore it from where it came from"
        )


def _decompress_steps(
    kind: str, configuration: Config, data: memoryview, size: Size, out: npt.NDArray[np.uint8]
) -> int:
    """Decompress to the front of `out`, and return how many bytes that were."""
    filled = 0
    for step in _steps(kind, configuration, data):
        size.check(filled + len(step))
        out[filled : filled + len(step)] = np.frombuffer(step, np.uint8)
        filled += len(step)
    return filled


def _steps(kind: str, configuration: Config, data: memoryview) -> Iterator[bytes]:
    """Yield the content of a chunk of one stream, or of several, one after the other, but for zlib's."""
    at, first = 0, True
    while first or (at < len(data) and kind != "zlib"):
        if kind == "gzip" and not first and not data[at]:  # zeros fill up what is written in blocks
            at += 1
            continue
        stream = _STREAMS[kind](configuration)
        begun = first
        while not stream.eof:
            piece = getattr(stream, "unconsumed_tail", b"")
            if not piece and getattr(stream, "needs_input", True):
                piece = data[at : at + _PIECE_NBYTES]
                at += len(piece)
            try:
                step = stream.decompress(piece, _STEP_NBYTES)
            except (OSError, lzma.LZMAError):
                if begun:
                    raise
                return  # what follows the last stream is none: BZ2File and LZMAFile let it pass, too
            if not step and not piece and not stream.eof:
                raise EOFError("a chunk of the source ends before its last byte")
            yield step
            begun = True
        at -= len(stream.unused_data)
        first = False


def _lzma(configuration: Config) -> Any:
    container, filters = configuration.get("format", lzma.FORMAT_XZ), configuration.get("filters")
    return lzma.LZMADecompressor(format=container, filters=filters)


_STREAMS: dict[str, Callable[[Config], Any]] = {
    "bz2": lambda _: bz2.BZ2Decompressor(),
    "gzip": lambda _: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "lzma": _lzma,
    "zlib": lambda _: zlib.decompressobj(),
}


def _blosc(data: Bytes, size: Size) -> Bytes:
    _blosc_nbytes(data, size)
    return numcodecs.Blosc().decode(data)


def _blosc_nbytes(data: Bytes, size: Size) -> int:
    """Return how many bytes come out, and see that all is there that they are made of."""
    nbytes = int.from_bytes(data[4:8], "little")
    size.check(nbytes)
    if not 16 <= int.from_bytes(data[12:16], "little") <= len(data):  # Blosc itself would read on
        raise EOFError("a chunk of the source ends before its last byte")
    return nbytes


def _lz4(data: Bytes, size: Size) -> Bytes:
    _lz4_nbytes(data, size)
    return numcodecs.LZ4().decode(data)


def _lz4_nbytes(data: Bytes, size: Size) -> int:
    nbytes = int.from_bytes(data[:4], "little")
    size.check(nbytes)
    return nbytes


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
    """Return the size of the content of all frames of Zstandard; None if one of them does not say."""
    total = 0
    for nbytes in zstd_frames(data):
        if nbytes is None:
            return None
        total += nbytes
    return total


def zstd_frames(data: Bytes) -> Iterator[int | None]:
    """Yield the size of the content of each frame, 0 for one to skip; None if it does not say (RFC 8878)."""
    at = 0
    while at < len(data):
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic >> 4 == 0x184D2A5:  # a frame to skip
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            yield 0
            continue
        if magic != _ZSTD_MAGIC or at + 5 > len(data):
            raise ValueError("a chunk of the source is damaged: it is not compressed by Zstandard")
        nbytes, at = _zstd_frame(data, at + 4)
        yield nbytes


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
