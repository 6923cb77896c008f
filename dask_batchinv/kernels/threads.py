"""How many threads a call shares its stack out over, and these threads.

As NumPy, torch and JAX do, a call takes all processors that the process may use; but within a Dask task one, since Dask
has shared them out already. Which thread has a matrix changes no bit.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import dask.config
from dask.system import CPU_COUNT

from dask_batchinv.kernels.emit.environment import standard_environment

_lock = threading.Lock()
#: What waits for a thread, and how many threads there are for it.
_handed_out: SimpleQueue[Callable[[], None]] = SimpleQueue()
_servers = 0
#: Processors that calls have claimed.
_busy = 0


def _in_child() -> None:
    """Forget what a forked child does not have."""
    global _lock, _handed_out, _servers, _busy
    _lock, _handed_out, _servers, _busy = threading.Lock(), SimpleQueue(), 0, 0


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


def run_all(
    work: Callable[[Any], None], pieces: Sequence[Any], threads: int, *, end: Callable[[], None] = lambda: None
) -> None:
    """Call `work` for every piece, by up to so many threads, of which this is one.

    However it ends, the others have ended before, as they work on the caller's memory: also if Ctrl-C comes meanwhile.
    `end` is called when this thread does nothing more: what others wait for will not come any more.
    """
    with _claimed(min(threads, len(pieces))) as claimed:
        left, lock = iter(pieces), threading.Lock()
        begun, ended, errors = list[int](), list[int](), list[BaseException]()
        changed = threading.Lock()
        changed.acquire()

        def run() -> None:
            with standard_environment():
                while True:
                    with lock:
                        piece = next(left, None)
                    if piece is None:
                        return
                    work(piece)

        def help_out(number: int) -> None:
            begun.append(number)
            try:
                run()
            except BaseException as error:
                errors.append(error)
            finally:
                ended.append(number)
                with suppress(RuntimeError):  # when it is released already
                    changed.release()

        def wait() -> None:
            with lock:
                for _ in left:  # after an error, nothing else is begun
                    pass
            end()
            _wait_until(lambda: len(ended) == len(begun), changed)

        try:
            for number in range(claimed - 1):
                _hand_out(partial(help_out, number))
            run()
        finally:
            # Ctrl-C may come once more at the very moment when what is to wait begins.
            try:
                wait()
            finally:
                try:
                    wait()
                finally:
                    wait()
        if errors:
            raise errors[0]


def _wait_until(done: Callable[[], bool], changed: threading.Lock) -> None:
    """Wait, and only then say that Ctrl-C has come; `changed` is released whenever it may be done."""
    interrupted: BaseException | None = None
    while not done():
        try:
            changed.acquire(timeout=1)
        except BaseException as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


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


def _hand_out(work: Callable[[], None]) -> None:
    """Have a thread call something that raises nothing."""
    global _servers
    with _lock:
        if _servers < _busy:
            # Not of an executor, nor a Thread: both have conditions, which Ctrl-C could leave locked for ever.
            _thread.start_new_thread(_serve, (_handed_out,))
            _servers += 1
    _handed_out.put(work)


def _serve(handed_out: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        handed_out.get()()
