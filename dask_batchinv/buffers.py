"""Buffers that are used again: new memory costs as much time as a copy, for the system clears every page of it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

#: Smaller ones come from the allocator's own store.
LEAST_NBYTES = 2**18
#: What nobody has used for so long is given back: the process may be somebody else's.
_IDLE_SECONDS = 2.0


class Buffers:
    """Buffers that nobody uses at the moment."""

    def __init__(self) -> None:
        self._free: list[tuple[float, Bytes]] = []
        self._lent = 0
        # What is given back when the garbage is collected may interrupt anything, also what holds this.
        self._lock = threading.RLock()
        self._sweeps = False

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[Bytes]:
        """Lend `nbytes` bytes, whatever is in them, until the block is left."""
        if nbytes < LEAST_NBYTES:
            yield np.empty(nbytes, np.uint8)
            return
        buffer = self._take(nbytes)
        try:
            yield buffer
        finally:
            self.give_back(buffer)

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array, whatever is in it, whose memory comes back when it and all its views are gone."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < LEAST_NBYTES:
            return np.empty(shape, dtype)
        return np.asarray(_Lent(self, self._take(nbytes))).view(dtype).reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of those that nobody uses."""
        with self._lock:
            return sum(buffer.nbytes for _, buffer in self._free)

    def give_back(self, buffer: Bytes) -> None:
        """Take back what was lent."""
        with self._lock:
            self._lent -= 1
            if self._sweeps:  # else nobody would let go of it
                self._free.append((time.monotonic(), buffer))

    def _take(self, nbytes: int) -> Bytes:
        with self._lock:
            self._lent += 1
            starts, self._sweeps = not self._sweeps, True
            # The last one first: some of it is still in the processor's cache.
            places = reversed(range(len(self._free)))
            found = next((place for place in places if self._free[place][1].nbytes == nbytes), None)
            buffer = None if found is None else self._free.pop(found)[1]
        if starts:
            try:
                threading.Thread(target=self._sweep, name="dask_batchinv-buffers", daemon=True).start()
            except RuntimeError:  # no thread can be started any more
                self._sweeps = False
        return np.empty(nbytes, np.uint8) if buffer is None else buffer

    def _sweep(self) -> None:
        """Let go of what was not used for a while, until nothing is lent, or left."""
        while True:
            time.sleep(_IDLE_SECONDS / 2)
            with self._lock:
                oldest = time.monotonic() - _IDLE_SECONDS
                for place in reversed(range(len(self._free))):
                    if self._free[place][0] < oldest:
                        del self._free[place]
                if not self._free and not self._lent:
                    self._sweeps = False
                    return


class _Lent:
    """What an array and its views hold on to: gives their memory back when they are gone."""

    def __init__(self, lender: Buffers, buffer: Bytes):
        self._lender, self._buffer = lender, buffer
        self.__array_interface__ = buffer.__array_interface__

    def __del__(self) -> None:
        self._lender.give_back(self._buffer)


#: Those of this process.
BUFFERS = Buffers()
if hasattr(os, "register_at_fork"):  # a thread that does not exist there may hold the lock
    os.register_at_fork(after_in_child=BUFFERS.__init__)  # type: ignore[misc]
