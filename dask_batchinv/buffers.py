"""Buffers that are used again: new memory costs as much time as a copy, for the system clears every page of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
        self._lock = threading.Lock()
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
            self._give_back(buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of those that nobody uses."""
        with self._lock:
            return sum(buffer.nbytes for _, buffer in self._free)

    def _take(self, nbytes: int) -> Bytes:
        with self._lock:
            for place, (_, buffer) in reversed([*enumerate(self._free)]):
                if buffer.nbytes == nbytes:
                    del self._free[place]
                    return buffer
        return np.empty(nbytes, np.uint8)

    def _give_back(self, buffer: Bytes) -> None:
        with self._lock:
            self._free.append((time.monotonic(), buffer))
            starts, self._sweeps = not self._sweeps, True
        if starts:
            threading.Thread(target=self._sweep, name="dask_batchinv-buffers", daemon=True).start()

    def _sweep(self) -> None:
        """Let go of what was not used for a while, until nothing is left."""
        while True:
            time.sleep(_IDLE_SECONDS / 2)
            with self._lock:
                oldest = time.monotonic() - _IDLE_SECONDS
                self._free = [(since, buffer) for since, buffer in self._free if since > oldest]
                if not self._free:
                    self._sweeps = False
                    return


#: Those of this process.
BUFFERS = Buffers()
if hasattr(os, "register_at_fork"):  # a thread that does not exist there may hold the lock
    os.register_at_fork(after_in_child=BUFFERS.__init__)  # type: ignore[misc]
