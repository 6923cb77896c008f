"""One BLAS thread while a kernel runs, however many of our threads run kernels.

Dask already uses every core; BLAS threads on top of that cost a factor of ten or more, and they change the last
bits of large matrices. Limits of threadpoolctl are global to the process and do not nest across threads, so the
first kernel to enter sets the limit and the last to leave takes it off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

_lock = threading.RLock()
_inside = 0
_limit: Any = None


def _in_child() -> None:
    """Forget the threads that are not in a forked child; their limit is taken off after its first kernel."""
    global _inside
    _inside = 0
    _lock.release()


# A child forked while another thread holds the lock would wait for it for ever: as `kernels.emit.compiler` has it.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child)


@cache
def _controller() -> Any:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread; may be entered by many threads at once."""
    global _inside, _limit
    with _lock:
        if _limit is None:
            _limit = _controller().limit(limits=1, user_api="blas")
            _limit.__enter__()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _limit.__exit__(None, None, None)
                _limit = None
