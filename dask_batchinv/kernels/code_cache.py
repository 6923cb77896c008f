"""Machine code on disk: one file per kernel, replaced whole, so that many processes may share it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_DIGEST_NBYTES = 32


def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dask_batchinv"


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
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        return None
    key = hashlib.sha256(facts + name.encode()).hexdigest()[:24]
    return folder / f"{name}-{key}.o"


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        found = path.read_bytes()
    except OSError:
        return None
    digest, code = found[:_DIGEST_NBYTES], found[_DIGEST_NBYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


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
