"""One BLAS thread while a kernel runs, however many of our threads run kernels.

Dask already uses every core; BLAS threads on top of that cost a factor of ten or more, and they change the last
bits of large matrices. Most limits are global to the process, and with threadpoolctl 3.8 the thread that sets one is
the only one that can take it off, so a thread of its own does both: when the first kernel enters, and when the last
has left. Where somebody else has set a limit before, theirs holds; who sets one meanwhile takes ours for what was
there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from threadpoolctl import ThreadpoolController

_lock = threading.RLock()
_inside = 0
_limit: Any = None
_keeper: Executor | None = None


def _in_child() -> None:
    """Forget the threads that are not in a forked child; their limit is taken off after its first kernel."""
    global _inside, _keeper
    _inside, _keeper = 0, None
    _lock.release()


# A child forked while another thread holds the lock would wait for it for ever: as `kernels.emit.compiler` has it.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child)


@cache
def _controller() -> Any:
    return ThreadpoolController()


def _by_keeper(work: Callable[[], Any]) -> Any:
    """Call something in the thread that keeps the limit."""
    global _keeper
    if _keeper is None:
        _keeper = ThreadPoolExecutor(1, thread_name_prefix="dask_batchinv_blas")
    return _keeper.submit(work).result()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread; may be entered by many threads at once, and left in any order."""
    global _inside, _limit
    with _lock:
        if _limit is None:
            _limit = _by_keeper(lambda: _controller().limit(limits=1, user_api="blas").__enter__())
        _inside += 1
    try:
        # With OpenMP each thread has a limit of its own.
        with _controller().select(threading_layer="openmp").limit(limits=1):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _by_keeper(partial(_limit.__exit__, None, None, None))
                _limit = None
