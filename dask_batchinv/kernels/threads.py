"""How many threads a call shares its stack out over, and these threads.

As NumPy, torch and JAX do, a call takes all processors that the process may use; but within a Dask task one, since Dask
has shared them out already. Which thread has a matrix changes no bit.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import dask.config
from dask.system import CPU_COUNT

from dask_batchinv.kernels.emit.environment import standard_environment

_lock = threading.Lock()
_pool: Executor | None = None
_busy = 0


def _in_child() -> None:
    """Forget what a forked child does not have."""
    global _lock, _pool, _busy
    _lock, _pool, _busy = threading.Lock(), None, 0


os.register_at_fork(after_in_child=_in_child)


def threads_for_call() -> int:
    """Return how many threads a call from this thread may take.

    The Dask configuration ``batchinv.threads`` decides; for "auto" it is 1 in a Dask task, else what the environment
    variable OMP_NUM_THREADS says, as Dask's own workers set it, else the processors that the process may use.

    Raises
    ------
    ValueError
        If the configuration is neither "auto" nor a positive integer.
    """
    configured = dask.config.get("batchinv.threads", "auto")
    if configured != "auto":
        if isinstance(configured, bool) or not isinstance(configured, int) or configured < 1:
            raise ValueError(f'dask.config batchinv.threads must be "auto" or a positive integer, got {configured!r}')
        return configured
    if _in_task():
        return 1
    said = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(said)) if said.isdecimal() else CPU_COUNT


def _in_task() -> bool:
    """Tell whether this thread is at a task of a worker, or one of the threads of Dask's own scheduler."""
    worker, threaded = (sys.modules.get(name) for name in ("distributed.worker", "dask.threaded"))
    if hasattr(getattr(worker, "thread_state", None), "execution_state"):
        return True
    pools = [getattr(threaded, "default_pool", None)]
    for own in list(getattr(threaded, "pools", {}).values()):
        pools += own.values()
    # A thread is at work before its pool has noted it, but has its name from the first.
    name = threading.current_thread().name.rpartition("_")[0]
    return any(name == getattr(pool, "_thread_name_prefix", None) for pool in pools)


def run_all(work: Callable[[Any], None], pieces: Sequence[Any], threads: int) -> None:
    """Call `work` for every piece, by up to so many threads, of which this is one."""
    with _claimed(min(threads, len(pieces))) as claimed:
        left, lock = iter(pieces), threading.Lock()

        def run() -> None:
            with standard_environment():
                while True:
                    with lock:
                        piece = next(left, None)
                    if piece is None:
                        return
                    work(piece)

        others = [_executor().submit(run) for _ in range(claimed - 1)]
        try:
            run()
        finally:
            with lock:
                for _ in left:  # after an error, nothing else is begun
                    pass
            wait(others)
        for other in others:
            other.result()


@contextmanager
def _claimed(threads: int) -> Iterator[int]:
    """Claim processors that no other call has, one at least."""
    global _busy
    with _lock:
        claimed = max(1, min(threads, max(threads, CPU_COUNT) - _busy))
        _busy += claimed
    try:
        yield claimed
    finally:
        with _lock:
            _busy -= claimed


def _executor() -> Executor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(CPU_COUNT, 64), thread_name_prefix="dask_batchinv")
        return _pool
