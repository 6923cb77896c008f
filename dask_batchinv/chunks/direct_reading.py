"""Reads regions of a plain array: each chunk is decoded to where it is wanted, without Zarr's copies on the way."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.buffers import BUFFERS
from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.chunks.plain import PlainChunks
from dask_batchinv.chunks.sealed import CHECKSUM_NBYTES

Region = Sequence[slice]
Bytes = npt.NDArray[np.uint8]
#: Some systems read no more at a time.
_READ_NBYTES = 2**30
#: What is on its way from a store: the bytes of chunks, None for one that is not there.
Fetched = deque[Future[Any] | None]


class KeptChunk:
    """The chunk of which a part was read last, for whoever reads the other parts next. Its memory is `lent`."""

    def __init__(self, lent: ExitStack):
        self._lent = lent
        self._buffer: Bytes | None = None
        self.key = ""
        """Its key; empty if there is none."""

    def get(self, key: str, nbytes: int, fill: Callable[[Bytes], bool]) -> Bytes | None:
        """Return what is in a chunk, which `fill` decodes if it is not kept already; None if it is not there."""
        if self._buffer is None:
            self._buffer = self._lent.enter_context(BUFFERS.borrow(nbytes))
        if key != self.key:
            self.key = ""
            if not fill(self._buffer):
                return None
            self.key = key
        return self._buffer


@dataclass(frozen=True)
class DirectReader:
    """An array of plain chunks."""

    array: zarr.Array[Any]
    """As Zarr has it."""
    plain: PlainChunks
    """How its chunks are stored."""
    store: BoundedStore
    """Where they are."""

    def read(
        self,
        region: Region,
        out: npt.NDArray[Any] | None = None,
        fetched: Fetched | None = None,
        kept: KeptChunk | None = None,
    ) -> npt.NDArray[Any]:
        """Read a region.

        Parameters
        ----------
        region
            Slices without steps.
        out
            Where to, of its shape and dtype; new memory by default.
        fetched
            What `fetch` gave for it, of a store that is not on this machine.
        kept
            What is left of a region that was read before.

        Raises
        ------
        DamagedChunkError
            If a chunk is not what the metadata say, or not there where that is an error.
        """
        spans = self._spans(region)
        if out is None:
            out = BUFFERS.array([len(span) for span in spans], self.plain.dtype)
        if fetched is None and not self.store.is_local:
            pool = ThreadPoolExecutor(int(zarr.config.get("async.concurrency")))
            try:
                return self.read(region, out, self.fetch(region, pool, kept), kept)
            finally:
                pool.shutdown(cancel_futures=True)
        for place in self._places(spans):
            self._read_part(place, spans, out, fetched, kept)
        return out

    def fetch(self, region: Region, pool: Executor, kept: KeptChunk | None = None) -> Fetched:
        """Begin to fetch the chunks of a region from a store, and return what will come, in the order of reading."""
        keys = map(self.array.metadata.encode_chunk_key, self._places(self._spans(region)))
        # What is kept may have made room before its turn comes: then it is fetched when it is wanted.
        return deque(None if kept and key == kept.key else pool.submit(self.store.fetch, key) for key in keys)

    def _spans(self, region: Region) -> list[range]:
        return [range(*span.indices(size)) for span, size in zip(region, self.array.shape, strict=True)]

    def _places(self, spans: Sequence[range]) -> Iterator[tuple[int, ...]]:
        """Yield the places in the grid of all chunks that have a part of a region."""
        units = (
            range(span.start // unit, -(-span.stop // unit)) if span else range(0)
            for span, unit in zip(spans, self.plain.shape, strict=True)
        )
        return itertools.product(*units)

    def _read_part(
        self,
        place: tuple[int, ...],
        spans: Sequence[range],
        out: npt.NDArray[Any],
        fetched: Fetched | None,
        kept: KeptChunk | None,
    ) -> None:
        """Read what the chunk at a place in the grid has of a region."""
        key = self.array.metadata.encode_chunk_key(place)
        fill = partial(self._read_file, key) if fetched is None else partial(self._decode, key, fetched.popleft())
        starts = [at * unit for at, unit in zip(place, self.plain.shape, strict=True)]
        both = [
            slice(max(start, span.start), min(start + unit, span.stop))
            for start, unit, span in zip(starts, self.plain.shape, spans, strict=True)
        ]
        there = out[_moved(both, [span.start for span in spans])]
        if there.shape == self.plain.shape and there.flags.c_contiguous:
            if not fill(there.reshape(-1).view(np.uint8)):
                there[...] = self._fill_value
            return
        with ExitStack() as lent:
            content = (kept or KeptChunk(lent)).get(key, self.plain.nbytes, fill)
            if content is None:
                there[...] = self._fill_value
            else:
                there[...] = content.view(self.plain.dtype).reshape(self.plain.shape)[_moved(both, starts)]

    @property
    def _fill_value(self) -> Any:
        return 0 if self.array.fill_value is None else self.array.fill_value  # so does Zarr

    def _decode(self, key: str, coming: Future[Any] | None, out: Bytes) -> bool:
        """Decode what comes from a store into `out`; return whether something does."""
        if (data := self.store.fetch(key) if coming is None else coming.result()) is not None:
            self.plain.decode(data, out)
        return data is not None

    def _read_file(self, key: str, out: Bytes) -> bool:
        """Decode the file of a chunk into `out`; return whether it is there."""
        with self.store.opened(key) as file:
            if file is None:
                return False
            handle, nbytes = file
            if self.plain.compressor is None:
                checksum = bytearray(CHECKSUM_NBYTES * self.plain.checksummed)
                self.plain.check_nbytes(nbytes - len(checksum))
                _fill(handle, [out.data, memoryview(checksum)], nbytes)
                self.plain.check(out, checksum)
                return True
            with BUFFERS.borrow(self.plain.longest_nbytes(in_store=False)) as buffer:
                _fill(handle, [buffer.data[:nbytes]], nbytes)
                self.plain.decode(buffer.data[:nbytes], out)
        return True


def _moved(region: Region, origin: Sequence[int]) -> tuple[Any, ...]:
    # Of an array without dimensions, too, this makes a view.
    return *(slice(span.start - at, span.stop - at) for span, at in zip(region, origin, strict=True)), ...


def _fill(handle: int, buffers: list[memoryview], nbytes: int) -> None:
    """Read `nbytes` bytes of a file into buffers, one after the other; EOFError if it has become shorter meanwhile."""
    done = 0
    while done < nbytes:
        count = os.preadv(handle, [buffers[0][:_READ_NBYTES]], done)
        if not count:
            raise EOFError("a chunk of the source became shorter while it was read")
        done += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][count:]
