"""Machine code on disk: one file per kernel, replaced whole, so that many processes may share it."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_DIGEST_NBYTES = 32
#: Permission to write for anybody but the owner.
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache folder; as XDG has it, a relative one is as good as none."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "dask_batchinv"


def digest_of_sources(folder: Path) -> bytes:
    """Return a digest of the Python modules of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def cached(name: str, facts: bytes, make: Callable[[], bytes]) -> bytes:
    """Return machine code from the cache; if it is not there, what `make` returns, which is kept.

    `facts` is a digest of all that decides on the code of this name: what writes it, the compiler, the processor.
    """
    path = _path(name, facts)
    code = _read(path)
    if code is None:
        code = make()
        _keep(path, code)
    return code


def _path(name: str, facts: bytes) -> Path | None:
    """Return the file of a kernel, or None where the cache cannot be trusted: it holds code that will run."""
    try:
        # Links are followed here and nowhere else: they may be others'.
        folder = Path(os.path.realpath(cache_folder()))
        trusted = all(_is_safe_folder(each, above=each != folder) for each in (*reversed(folder.parents), folder))
    except (OSError, RuntimeError):
        return None
    key = hashlib.sha256(facts + name.encode()).hexdigest()[:24]
    return folder / f"{name}-{key}.o" if trusted else None


def _is_safe_folder(folder: Path, *, above: bool) -> bool:
    """Tell whether nobody but root and this user can exchange what is in a folder; make it if it is not there.

    `above` is for the folders above the cache. Some are sticky: there everybody may add something, but exchange only
    what is their own.
    """
    try:
        found = folder.lstat()
    except FileNotFoundError:
        with suppress(FileExistsError):  # another process was faster
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    writable = found.st_mode & _BY_OTHERS and not (above and found.st_mode & stat.S_ISVTX)
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.geteuid()) and not writable


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not _is_safe_file(os.fstat(descriptor)):
                return None
            with open(descriptor, "rb", closefd=False) as file:
                found = file.read()
        finally:
            os.close(descriptor)
    except OSError:
        return None
    digest, code = found[:_DIGEST_NBYTES], found[_DIGEST_NBYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _is_safe_file(found: os.stat_result) -> bool:
    """Tell whether a file is this user's alone, from what is known of it after it was opened."""
    mine = found.st_uid == os.geteuid() and not found.st_mode & _BY_OTHERS
    return mine and stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _keep(path: Path | None, code: bytes) -> None:
    if path is None:
        return
    # A full or read-only disk costs the next process its compilation, nothing else.
    with suppress(OSError):
        descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(partial, path)
        except OSError:
            os.unlink(partial)
            raise
