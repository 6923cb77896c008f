"""One run at a time: the lock of a target, which dies with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from dask_batchinv.location import Location, raised_as
from dask_batchinv.outcome import TargetError

#: Its name in the target, only while a run is at work there, or one was killed.
LOCK = ".dask_batchinv.lock"
#: A lease is renewed this often, and given up for dead after so many renewals that did not come.
RENEWAL_SECONDS = 5.0
RENEWALS = 3
#: Of two runs that take a lease over at the same moment, the one that writes last keeps it.
_SETTLING_SECONDS = 1.0
_ATTEMPTS = 10


class LockLostError(ConnectionError):
    """Another run has taken the target over, because this one was not heard of for too long."""


class Lock:
    """What a run holds while it may write to a target."""

    def check(self) -> None:
        """Raise LockLostError if another run has taken over."""


@contextmanager
def locked(target: Location) -> Iterator[Lock]:
    """Hold the lock of a target.

    On a disk it is a lock of the operating system, which ends with the process. Where there is none, as in an object
    store, it is a lease that is renewed: a run that finds one watches it for a while, by its own clock, and takes it
    over if nobody renews it.

    Raises
    ------
    TargetError
        If another run is at work on the target.
    """
    handle = _lock_file(target) if target.is_local else None
    if handle is None:
        with _Lease(target) as lease:
            yield lease
        return
    try:
        yield Lock()
    finally:
        # Removed while it is still locked: who waits for it sees that the file has gone, and makes another.
        with suppress(OSError):
            os.unlink(os.path.join(target.url, LOCK))
            os.rmdir(target.url)  # if the run has created nothing
        os.close(handle)


def remove_stale_lock(target: Location) -> None:
    """Remove the lock of a run that was killed, if it left one."""
    if LOCK in target.children():
        with suppress(TargetError), locked(target):  # unless a run is at work
            pass


def _lock_file(target: Location) -> int | None:
    """Return the handle of the locked file, or None where the file system has no locks."""
    path = os.path.join(target.url, LOCK)
    for attempt in count():
        try:
            os.makedirs(target.url, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS:
                continue  # another run has just removed the folder, having done nothing
            raise TargetError(f"the target {target.name} cannot be written: {error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.truncate(handle, 0)
                os.write(handle, _holder().encode())
                return handle
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace")
            os.close(handle)
            raise _busy(target, holder) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return None
        os.close(handle)
    raise AssertionError("counting has no end")


def _is_at(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _busy(target: Location, holder: str) -> TargetError:
    return TargetError(f"another run is writing to {target.name} ({holder or 'unknown'}): wait for it or stop it")


class _Lease(Lock):
    """A lease: a key in the target, renewed with a counter."""

    def __init__(self, target: Location):
        self._target = target
        self._me = uuid.uuid4().hex
        self._lost = False
        self._released = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        """Raise LockLostError if another run has taken over."""
        if self._lost:
            raise LockLostError(f"another run has taken over {self._target.name}")

    def __enter__(self) -> _Lease:
        with raised_as(TargetError, f"the target {self._target.name} cannot be written"):
            self._acquire()
        self._renewing.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._released.set()
        self._renewing.join()
        if not self._lost:
            with suppress(Exception):
                self._target.delete(LOCK)

    def _acquire(self) -> None:
        if seen := self._read():
            self._watch(seen)
        self._write(0)
        time.sleep(_SETTLING_SECONDS)
        if (now := self._read()).get("run") != self._me:
            raise _busy(self._target, str(now.get("holder", "")))

    def _watch(self, seen: dict[str, Any]) -> None:
        deadline = time.monotonic() + RENEWALS * RENEWAL_SECONDS
        while time.monotonic() < deadline:
            time.sleep(RENEWAL_SECONDS / 5)
            now = self._read()
            if not now:
                return
            if now != seen:
                raise _busy(self._target, str(now.get("holder", "")))

    def _renew(self) -> None:
        number = 0
        while not self._released.wait(RENEWAL_SECONDS):
            # What fails now may succeed the next time; if it never does, another run may take over, and we see that.
            with suppress(Exception):
                if (now := self._read()) and now.get("run") != self._me:
                    self._lost = True
                    return
                self._write(number := number + 1)

    def _read(self) -> dict[str, Any]:
        try:
            return self._target.read_json(LOCK) or {}
        except ValueError:  # half written
            return {"run": "unknown"}

    def _write(self, number: int) -> None:
        content = {"run": self._me, "renewed": number, "holder": _holder()}
        self._target.write(LOCK, json.dumps(content).encode())
