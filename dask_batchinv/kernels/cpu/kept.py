"""Memory that is kept for the next call: to get new memory from the system can take as long as to work on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_batchinv.kernels.cpu.aligned import aligned

#: Bytes that are kept in all for whoever comes next.
LARGEST_NBYTES = 2**25

_lock = threading.Lock()
#: What is kept, the oldest first, with its kind and its size in bytes.
_kept: list[tuple[Hashable, Any, int]] = []


def _in_child() -> None:
    """Forget what another thread may have been at when this process was forked."""
    global _lock
    _lock = threading.Lock()
    _kept.clear()


os.register_at_fork(after_in_child=_in_child)


def take(kind: Hashable) -> Any:
    """Return what somebody has given back of a kind, or None; until it is given back nobody else has it."""
    with _lock:
        for i in reversed(range(len(_kept))):
            if _kept[i][0] == kind:
                return _kept.pop(i)[1]
    return None


def give_back(kind: Hashable, thing: Any, nbytes: int) -> None:
    """Keep something for the next, if there is room; the oldest has to go first."""
    if nbytes > LARGEST_NBYTES:
        return
    with _lock:
        _kept.append((kind, thing, nbytes))
        while sum(kept[2] for kept in _kept) > LARGEST_NBYTES:
            del _kept[0]


@contextmanager
def scratch(nbytes: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Lend memory whose content is not set."""
    memory = take(nbytes)
    if memory is None:
        memory = aligned((nbytes,), np.dtype(np.uint8))
    yield memory
    # Not after an error: somebody may hold on to it.
    give_back(nbytes, memory, nbytes)
