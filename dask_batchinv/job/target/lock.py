"""One run at a time: the lock of a target, which dies with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from typing import Any

from dask_batchinv.disk import make_folders
from dask_batchinv.job.target.holder import LOCK, read_lock
from dask_batchinv.location import Location, TakenOverError, raised_as
from dask_batchinv.outcome import TargetError, TargetInUseError
from dask_batchinv.text import harmless

#: A lease is renewed this often, and given up for dead after so many renewals that did not come.
RENEWAL_SECONDS = 5.0
RENEWALS = 3
#: Of two runs that take a lease over at the same moment, the one that writes last keeps it.
_SETTLING_SECONDS = 1.0
_ATTEMPTS = 10
#: A lease that was renewed so many seconds ago, by two clocks, is that of a run which was killed; times `RENEWALS`.
_OLD_SECONDS = 20.0
#: Who asks whether a lock is held has it for less than this.
_ASKING_SECONDS = 0.05
#: No lock of ours is longer.
_LOCK_NBYTES = 4096


class Lock:
    """What a run holds while it may write to a target."""

    def __init__(self, target: Location):
        self._target = target
        self.run = uuid.uuid4().hex
        """What the lock says of this run, and workers look for."""

    def check(self) -> None:
        """Raise TakenOverError if this run is known to hold the target no more."""

    def confirm(self) -> None:
        """Look whether this run holds the target still; TakenOverError if not."""
        raise NotImplementedError

    def _lost(self) -> TakenOverError:
        return TakenOverError(f"{self._target.name} was removed, replaced or taken over by another run")

    def _content(self, **more: Any) -> bytes:
        return json.dumps({"run": self.run, "holder": holder(), "at": _now(), **more}).encode()


class _Nobody(Lock):
    """What a run holds of a store that knows commits: nothing that anyone could look for."""

    def __init__(self, target: Location):
        super().__init__(target)
        self.run = ""

    def confirm(self) -> None:
        """Nobody can take over."""


class _FileLock(Lock):
    """A lock of the operating system, on a file in the target."""

    def __init__(self, target: Location, handle: int, *, made_folder: bool):
        super().__init__(target)
        self._handle, self._made_folder = handle, made_folder
        self._path = os.path.join(target.url, LOCK)
        os.truncate(handle, 0)
        os.write(handle, self._content())

    def confirm(self) -> None:
        """Look whether the file is there still: a target that was removed or replaced has it no more."""
        self.check()
        if not _is_at(self._handle, self._path):
            raise self._lost()

    def release(self) -> None:
        """Remove the file, if it is there still, and the folder, if it was made for it and nothing else is in it."""
        # Removed while it is still locked: who waits for it sees that the file has gone, and makes another.
        with suppress(OSError):
            if _is_at(self._handle, self._path):
                os.unlink(self._path)
                if self._made_folder:
                    os.rmdir(self._target.url)
        os.close(self._handle)


def who_holds(target: Location) -> dict[str, Any] | None:
    """Return what a run says of itself that is at work on a target; None if none is.

    On a disk that is asked of the lock; of a store it is what the last renewal of the lease says.
    """
    if not (found := read_lock(target)):
        return None
    if not target.is_local:
        return None if _age_of(found) > RENEWALS * _OLD_SECONDS else found
    try:
        handle = os.open(os.path.join(target.url, LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return found if isinstance(error, BlockingIOError) else None
    finally:
        os.close(handle)
    return None  # it was killed


@contextmanager
def locked(target: Location) -> Iterator[Lock]:
    """Hold the lock of a target.

    On a disk it is a lock of the operating system, which ends with the process. Where there is none, as in an object
    store, it is a lease that is renewed: a run that finds one watches it for a while, by its own clock, and takes it
    over if nobody renews it. Where a store knows commits, nothing is locked: what others have changed meanwhile shows
    when changes are committed, and what is not committed at the end is forgotten.

    Raises
    ------
    TargetError
        If another run is at work on the target, or what has the name of the lock is none of ours.
    """
    if (transaction := target.transaction) is not None:
        transaction.begin()
        try:
            yield _Nobody(target)
        finally:
            transaction.end()
        return
    held = _lock_file(target) if target.is_local else None
    if held is None:
        with _Lease(target) as lease:
            yield lease
        return
    try:
        yield held
    finally:
        held.release()


def refuse_held(target: Location) -> None:
    """Raise the TargetError that `locked` would, where that can be told at once; a stale lock is removed."""
    if target.is_local and os.path.lexists(os.path.join(target.url, LOCK)) and (held := _lock_file(target)):
        held.release()


def remove_stale_lock(target: Location) -> None:
    """Remove the lock of a run that was killed, if it left one."""
    if LOCK in target.children():
        with suppress(TargetError), locked(target):  # unless a run is at work
            pass


def _lock_file(target: Location) -> _FileLock | None:
    """Return the locked file, or None where the file system has no locks."""
    path = os.path.join(target.url, LOCK)
    for attempt in count():
        try:
            made_folder = make_folders(target.url, synced=True)
            # A link in its place would lead to another file, and what is not a file might never open.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            handle = os.open(path, flags, 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS:
                continue  # another run has just removed the folder, having done nothing
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _not_ours(target) from error
            raise TargetError(f"the target {target.name} cannot be written: {error}") from harmless(error)
        try:
            if not _is_lock_of_ours(handle):
                raise _not_ours(target)
            if _is_taken(handle, path):
                return _FileLock(target, handle, made_folder=made_folder)
        except BaseException as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise _busy(target, (read_lock(target) or {}).get("holder")) from None
            if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return None
            raise
        os.close(handle)
    raise AssertionError("counting has no end")


def _is_taken(handle: int, path: str) -> bool:
    """Lock an open file; tell whether it is the lock of the target from now on."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # it may be somebody who only asks whether it is held
        time.sleep(_ASKING_SECONDS)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not _is_at(handle, path):
        return False
    if os.fstat(handle).st_nlink > 1:  # a killed run's, which is in a snapshot too: there it stays as it is
        os.unlink(path)
        return False
    return True


def _is_lock_of_ours(handle: int) -> bool:
    """Tell whether a file may be replaced: it says what locks of ours say, or is empty and has no other name."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > _LOCK_NBYTES:
        return False
    content = os.pread(handle, _LOCK_NBYTES, 0)
    if not content:
        return found.st_nlink <= 1
    if content.startswith(b"process "):  # by versions before 0.2
        return True
    try:
        return "run" in json.loads(content)
    except (ValueError, TypeError, RecursionError):
        return False


def _not_ours(target: Location) -> TargetError:
    return TargetError(
        f"{LOCK} in {target.name} was not made by dask_batchinv: look what it is, and remove it yourself"
    )


def _is_at(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _age_of(lease: dict[str, Any]) -> float:
    """Return how many seconds ago a lease was renewed; 0 if it does not say."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(lease["at"])).total_seconds()
    except (KeyError, TypeError, ValueError):
        return 0.0


def holder() -> str:
    """Return what is said of this process."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _busy(target: Location, holder: object) -> TargetInUseError:
    return TargetInUseError(f"another run is writing to {target.name} ({holder or 'unknown'}): wait for it or stop it")


class _Lease(Lock):
    """A lease: a key in the target, renewed with a counter."""

    def __init__(self, target: Location):
        super().__init__(target)
        self._is_lost = False
        self._released = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        """Raise TakenOverError if another run has taken over, as far as is known."""
        if self._is_lost:
            raise self._lost()

    def confirm(self) -> None:
        """Read the lease: this process may have been stopped for longer than it lasts."""
        self.check()
        if not self._is_mine():
            self._is_lost = True
            raise self._lost()

    def __enter__(self) -> _Lease:
        with raised_as(TargetError, f"the target {self._target.name} cannot be written"):
            self._acquire()
        self._renewing.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._released.set()
        self._renewing.join()
        with suppress(Exception):
            self.confirm()
            self._target.delete(LOCK)

    def _acquire(self) -> None:
        if (seen := read_lock(self._target)) is not None:
            self._watch(seen)
        self._write(0)
        time.sleep(_SETTLING_SECONDS)
        if not self._is_mine():
            raise _busy(self._target, (read_lock(self._target) or {}).get("holder"))

    def _watch(self, seen: dict[str, Any]) -> None:
        deadline = time.monotonic() + RENEWALS * RENEWAL_SECONDS
        while time.monotonic() < deadline:
            time.sleep(RENEWAL_SECONDS / 5)
            now = read_lock(self._target)
            if now is None:
                return
            if now != seen:
                raise _busy(self._target, now.get("holder"))

    def _renew(self) -> None:
        number = 0
        while not self._released.wait(RENEWAL_SECONDS):
            # What fails now may succeed the next time; if it never does, another run may take over, and we see that.
            with suppress(Exception):
                if not self._is_mine():
                    self._is_lost = True
                    return
                self._write(number := number + 1)

    def _is_mine(self) -> bool:
        return (read_lock(self._target) or {}).get("run") == self.run

    def _write(self, number: int) -> None:
        self._target.write(LOCK, self._content(renewed=number))
