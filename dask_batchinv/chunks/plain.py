"""Chunks that need no more than one decompressor: what is in them can be decoded to where it is wanted."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from dask_batchinv.chunks.decompression import COMPRESSORS, Bytes, Config, compressed_nbytes, decompress_into
from dask_batchinv.chunks.sealed import CHECKSUM_NBYTES
from dask_batchinv.storage import ChunkSizeError


@dataclass(frozen=True)
class PlainChunks:
    """How the chunks of an array are stored."""

    shape: tuple[int, ...]
    """Their shape."""
    dtype: np.dtype[Any]
    """Their dtype, of this machine's byte order."""
    compressor: tuple[str, Config] | None
    """Name and configuration of what they are compressed by."""
    checksummed: bool
    """Whether a CRC-32C is behind them."""

    @property
    def nbytes(self) -> int:
        """Bytes of a chunk, once decoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_read_in_part(self) -> bool:
        """Whether some rows of a chunk, along its first axis, can be read without the others."""
        return self.compressor is None and not self.checksummed and len(self.shape) > 0

    def longest_nbytes(self, *, in_store: bool) -> int:
        """Return the bytes of memory that a chunk takes at most before it is decoded."""
        if self.compressor is None:
            return self.nbytes if in_store else 0  # a file is read to where it is wanted
        return compressed_nbytes(self.nbytes)

    def decode(self, data: Bytes, out: npt.NDArray[np.uint8]) -> None:
        """Decode all of what is stored into a buffer of `nbytes`.

        Raises
        ------
        ChunkSizeError
            If it has more bytes or fewer.
        ValueError
            If it is damaged otherwise.
        """
        data = memoryview(data).cast("B")
        if self.checksummed:
            data = self._checked(data[:-CHECKSUM_NBYTES], data[-CHECKSUM_NBYTES:])
        if self.compressor is not None:
            decompress_into(*self.compressor, data, out)
            return
        self.check_nbytes(len(data))
        out[:] = data

    def check_nbytes(self, nbytes: int) -> None:
        """Raise ChunkSizeError if the numbers of a chunk that is not compressed have another size."""
        if nbytes != self.nbytes:
            raise ChunkSizeError(
                f"a chunk of the source has {nbytes} bytes where its metadata say {self.nbytes}: it was cut short, or "
                "is not what they describe. Restore it from where it came from"
            )

    @staticmethod
    def _checked(data: Any, checksum: Any) -> Any:
        found, expected = crc32c(data), int.from_bytes(checksum, "little")
        if len(checksum) != CHECKSUM_NBYTES or found != expected:
            raise ValueError(
                f"a chunk of the source is damaged: its CRC-32C should be {expected:08x}, but is {found:08x}"
            )
        return data

    def check(self, data: npt.NDArray[np.uint8], checksum: Any) -> None:
        """Raise ValueError unless `checksum` is that of data, where chunks have one."""
        if self.checksummed:
            self._checked(data.data, checksum)


def plain_chunks(meta: Config) -> PlainChunks | None:
    """Return how chunks are stored by metadata that were checked; None if they need more."""
    found = _of_v2(meta) if meta["zarr_format"] == 2 else _of_v3(meta)
    return found if found is not None and found.dtype.isnative and sys.byteorder == "little" else None


def _of_v2(meta: Config) -> PlainChunks | None:
    compressor = meta.get("compressor")
    if meta.get("filters") or meta.get("order", "C") != "C":
        return None
    if compressor is not None and compressor["id"] not in COMPRESSORS:
        return None
    packed = None if compressor is None else (compressor["id"], compressor)
    return PlainChunks(tuple(meta["chunks"]), np.dtype(meta["dtype"]), packed, checksummed=False)


def _of_v3(meta: Config) -> PlainChunks | None:
    chain: list[Config] = [{"name": codec} if isinstance(codec, str) else codec for codec in meta["codecs"]]
    names = [codec["name"] for codec in chain]
    if not names or names[0] != "bytes" or (chain[0].get("configuration") or {}).get("endian", "little") != "little":
        return None
    compressors = [codec for codec in chain[1:] if codec["name"].removeprefix("numcodecs.") in COMPRESSORS]
    checksummed = names[-1] == "crc32c"
    if len(chain) != 1 + len(compressors) + checksummed or len(compressors) > 1:
        return None
    packed = None
    if compressors:
        packed = (compressors[0]["name"].removeprefix("numcodecs."), compressors[0].get("configuration") or {})
    shape = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
    return PlainChunks(shape, np.dtype(meta["data_type"]), packed, checksummed=checksummed)
