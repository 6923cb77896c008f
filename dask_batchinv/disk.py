"""Files and folders on a disk: written whole, by names that nobody else can have made, and put on the disk for good."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

#: What a file is written to before it gets its name; Zarr's are called the same.
PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial$")
#: A part of the name of a chunk: ``c``, ``0``, ``0.1``, ``c.0.1``.
_CHUNK_PART = re.compile(r"c|(c\.)?\d+(\.\d+)*")
#: Of Linux: paths are as they are given, and change places.
_HERE, _EXCHANGE = -100, 2
#: What is known of what a key holds, to tell whether it still does; None where it holds nothing.
Stamp = str | None


def identity(path: str) -> tuple[int, int] | None:
    """Return what two paths have in common if and only if they lead to one file or folder; None if to none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def chunk_folders(path: str, *, linked: bool) -> set[tuple[int, int]]:
    """Return the identities of all folders in which chunks of a Zarr array are, be those mounts or links.

    With `linked` also of folders with files to which links in those lead.
    """
    found: set[tuple[int, int]] = set()
    todo = [path]
    while todo:
        folder = todo.pop()
        if (own := identity(folder)) is None or own in found:
            continue
        found.add(own)
        with suppress(OSError), os.scandir(folder) as entries:  # what cannot be listed, nobody will read
            for entry in entries:
                if _CHUNK_PART.fullmatch(entry.name) and entry.is_dir():
                    todo.append(entry.path)
                elif linked and entry.is_symlink() and (above := _identity_above(entry.path)):
                    found.add(above)
    return found


def _identity_above(link: str) -> tuple[int, int] | None:
    return identity(os.path.dirname(os.path.realpath(link)))


def exchange(a: str, b: str) -> None:
    """Let two folders change places: in one step, where the system can do that, else in three.

    A break between the three leaves what was `b` under the name that `between` returns.
    """
    try:
        done = ctypes.CDLL(None, use_errno=True).renameat2(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE)
    except AttributeError:  # not Linux
        done = -1
    if done != 0:
        aside = between(a)
        os.rename(b, aside)
        try:
            os.rename(a, b)
        except OSError:
            os.rename(aside, b)
            raise
        os.rename(aside, a)


def between(a: str) -> str:
    """Return where the other folder is meanwhile that changes places with `a` in several steps."""
    return f"{a}-aside"


def is_file_or_absent(path: str) -> bool:
    """Tell whether a path does not lead to what is no file, such as a pipe, which might never end, or a broken link."""
    return os.path.isfile(path) or not os.path.lexists(path)


def stamp_of(path: str) -> Stamp:
    """Return what is known of a file; a link is a file of its own."""
    try:
        return _stamp(os.lstat(path))
    except FileNotFoundError:
        return None


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns}"


def write_file(path: str, pieces: Sequence[Any], *, synced: bool) -> str:
    """Write bytes to a file of a name that nobody else can have made, then rename it: a link is not followed."""
    partial = f"{path}.{os.urandom(16).hex()}.partial"
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            for piece in pieces:
                _write_all(handle, piece)
            if synced:
                os.fsync(handle)
            stamp = _stamp(os.fstat(handle))
        finally:
            os.close(handle)
        try:
            os.replace(partial, path)
        except IsADirectoryError:
            os.rmdir(path)  # if nothing is in it
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    if synced:
        sync_path(os.path.dirname(path))
    return stamp


def _write_all(handle: int, content: Any) -> None:
    left = memoryview(content).cast("B")
    while left:
        left = left[os.write(handle, left) :]


def make_folders(path: str, *, synced: bool) -> bool:
    """Make a folder and those above it; with `synced` they are on the disk. Return whether it was not there."""
    if os.path.isdir(path):
        return False
    above = os.path.dirname(path)
    make_folders(above, synced=synced)
    try:
        os.mkdir(path)
    except FileExistsError:
        if os.path.isdir(path):  # made by another meanwhile
            return False
        raise
    if synced:
        sync_path(above)
    return True


def sync_path(path: str) -> None:
    """Have the operating system put a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
