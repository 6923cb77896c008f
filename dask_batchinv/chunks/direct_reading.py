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
from dask_batchinv.chunks.bounded_store import BoundedStore, check_least
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
        spans, name = self._spans(region), self.array.metadata.encode_chunk_key
        keys = ((name(place), self._part_of(place, spans)) for place in self._places(spans))
        # What is kept may have made room before its turn comes: then it is fetched when it is wanted.
        return deque(
            None if kept and key == kept.key else pool.submit(self.store.fetch, key, part) for key, part in keys
        )

    def _part_of(self, place: tuple[int, ...], spans: Sequence[range]) -> range | None:
        """Return which bytes of a chunk a region needs, where that is not all of them and the rest need not be read."""
        if not self.plain.is_read_in_part:
            return None
        unit, start = self.plain.shape[0], place[0] * self.plain.shape[0]
        first, last = max(start, spans[0].start) - start, min(start + unit, spans[0].stop) - start
        row = self.plain.nbytes // unit
        return None if last - first == unit else range(first * row, last * row)

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
        key, part = self.array.metadata.encode_chunk_key(place), self._part_of(place, spans)
        fill = (
            partial(self._read_file, key, part)
            if fetched is None
            else partial(self._decode, key, part, fetched.popleft())
        )
        starts = [at * unit for at, unit in zip(place, self.plain.shape, strict=True)]
        both = [
            slice(max(start, span.start), min(start + unit, span.stop))
            for start, unit, span in zip(starts, self.plain.shape, spans, strict=True)
        ]
        there = out[_moved(both, [span.start for span in spans])]
        if part is not None:
            self._read_rows(there, both, starts, fill)
            return
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

    def _read_rows(
        self, there: npt.NDArray[Any], both: Region, starts: Sequence[int], fill: Callable[[Bytes], bool]
    ) -> None:
        """Read some rows of a chunk that need not be read whole, and put what is wanted of them there."""
        rows = (both[0].stop - both[0].start, *self.plain.shape[1:])
        if there.shape == rows and there.flags.c_contiguous:
            if not fill(there.reshape(-1).view(np.uint8)):
                there[...] = self._fill_value
            return
        content = np.empty(rows, self.plain.dtype)
        if not fill(content.reshape(-1).view(np.uint8)):
            there[...] = self._fill_value
        else:
            there[...] = content[_moved(both, [both[0].start, *starts[1:]])]

    @property
    def _fill_value(self) -> Any:
        return 0 if self.array.fill_value is None else self.array.fill_value  # so does Zarr

    def _decode(self, key: str, part: range | None, coming: Future[Any] | None, out: Bytes) -> bool:
        """Decode what comes from a store into `out`; return whether something does."""
        data = self.store.fetch(key, part) if coming is None else coming.result()
        if data is not None and part is not None:
            check_least(f"the chunk {key}", len(data), len(part))
            out[:] = data
        elif data is not None:
            self.plain.decode(data, out)
        return data is not None

    def _read_file(self, key: str, part: range | None, out: Bytes) -> bool:
        """Decode the file of a chunk into `out`, or copy a part of it there; return whether it is there."""
        with self.store.opened(key) as file:
            if file is None:
                return False
            handle, nbytes = file
            if self.plain.compressor is None:
                checksum = bytearray(CHECKSUM_NBYTES * self.plain.checksummed)
                self.plain.check_nbytes(nbytes - len(checksum))
                if part is not None:
                    _fill(handle, [out.data], len(part), part.start)
                    return True
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


def _fill(handle: int, buffers: list[memoryview], nbytes: int, start: int = 0) -> None:
    """Read `nbytes` bytes of a file into buffers, one after the other; EOFError if it has become shorter meanwhile."""
    done = 0
    while done < nbytes:
        count = os.preadv(handle, [buffers[0][:_READ_NBYTES]], start + done)
        if not count:
            raise EOFError("a chunk of the source became shorter while it was read")
        done += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][count:]
