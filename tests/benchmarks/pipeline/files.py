"""Ways to write a new file of a chunk, and to read one, in memory and on a disk: which of them pays."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.pipeline.stores import CHUNK_NBYTES

#: Files in a turn.
FILES = 8
Way = Callable[[str, memoryview], None]


def ways_to_touch_files(folders: dict[str, Path], repeat: int) -> dict[str, Any]:
    """Time all ways in turns, in seconds for the files of a turn; those that a file system refuses have none."""
    # Pages of their own, as direct access wants them.
    content = memoryview(mmap.mmap(-1, CHUNK_NBYTES))
    content[:] = os.urandom(CHUNK_NBYTES)
    return {where: _time_all(folder, content, repeat) for where, folder in folders.items()}


def _time_all(folder: Path, content: memoryview, repeat: int) -> dict[str, float | None]:
    folder.mkdir(exist_ok=True)
    times: dict[str, list[float] | None] = {}
    for _ in range(repeat):
        for name, way in _WRITING.items():
            _time(times, name, way, folder, content)
            _empty(folder)
        for name, way in _READING.items():
            for path in _paths(folder):
                _write(path, content)
            _forget(folder)
            _time(times, name, way, folder, content)
            _empty(folder)
    folder.rmdir()
    return {name: found and statistics.median(found) for name, found in times.items()}


def _time(times: dict[str, list[float] | None], name: str, way: Way, folder: Path, content: memoryview) -> None:
    start = time.perf_counter()
    try:
        for path in _paths(folder):
            way(path, content)
    except OSError:
        times[name] = None
    else:
        if (found := times.setdefault(name, [])) is not None:
            found.append(time.perf_counter() - start)


def _paths(folder: Path) -> list[str]:
    return [str(folder / f"{number}") for number in range(FILES)]


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _forget(folder: Path) -> None:
    """Have the system forget the pages of files on a disk."""
    for path in _paths(folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _write(path: str, content: memoryview, *, flags: int = 0, allocate: bool = False, sync: bool = False) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags)
    try:
        if allocate:
            os.posix_fallocate(handle, 0, len(content))
        os.write(handle, content)
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_over(path: str, content: memoryview) -> None:
    """Write over a file that is there: what reuse of a partial file would save."""
    handle = os.open(path, os.O_WRONLY)
    os.write(handle, content)
    os.close(handle)


def _read(path: str, content: memoryview, *, flags: int = 0, advise: bool = False) -> None:
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        if advise:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        os.readv(handle, [content])
    finally:
        os.close(handle)


_WRITING: dict[str, Way] = {
    "write": _write,
    "write, allocated first": lambda path, content: _write(path, content, allocate=True),
    "write, O_DIRECT": lambda path, content: _write(path, content, flags=os.O_DIRECT),
    "write and sync": lambda path, content: _write(path, content, sync=True),
    "write and sync, allocated first": lambda path, content: _write(path, content, allocate=True, sync=True),
    "write and sync, O_DIRECT": lambda path, content: _write(path, content, flags=os.O_DIRECT, sync=True),
}
_READING: dict[str, Way] = {
    "read": _read,
    "read, announced": lambda path, content: _read(path, content, advise=True),
    "read, O_DIRECT": lambda path, content: _read(path, content, flags=os.O_DIRECT),
    "write over what is there": _write_over,
}
