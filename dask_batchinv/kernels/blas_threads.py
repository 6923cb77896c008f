"""One BLAS thread while a kernel runs, however many of our threads run kernels.

Dask already uses every core; BLAS threads on top of that cost a factor of ten or more, and they change the last
bits of large matrices. Limits of threadpoolctl are global to the process and do not nest across threads, so the
first kernel to enter sets the limit and the last to leave takes it off.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_inside = 0
_limit: Any = None


@cache
def _controller() -> Any:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread; may be entered by many threads at once."""
    global _inside, _limit
    with _lock:
        if _inside == 0:
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
