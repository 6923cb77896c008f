"""A store of chunks that gives none which is longer or shorter than it could be, and knows which were not there."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import zarr.abc.store
import zarr.storage
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dask_batchinv.chunks.decompression import compressed_nbytes
from dask_batchinv.requests import COUNT
from dask_batchinv.storage import ChunkSizeError, GuardedStore, MissingChunkError, StrictStore, innermost

#: Of so many chunks it is known whether they were there; of others the store is asked again.
_REMEMBERED = 2**16


@dataclass(frozen=True)
class Stored:
    """How long a chunk can be in its store."""

    whole: int
    """At most, all of it."""
    part: int
    """At most, what is read by itself."""
    least: int = 1
    """At least, all of it: a shard has an index."""

    @classmethod
    def of(cls, nbytes: int) -> Stored:
        """Return that of chunks of `nbytes` bytes, however they are compressed."""
        return cls(compressed_nbytes(nbytes), compressed_nbytes(nbytes))


class BoundedStore(GuardedStore):
    """A store that gives no chunk which is longer or shorter than it could be, and on a disk nothing but files."""

    def __init__(self, store: zarr.abc.store.Store, stored: Stored):
        super().__init__(store)
        self._stored = stored
        inner = innermost(store)
        self._root = str(inner.root) if isinstance(inner, zarr.storage.LocalStore) else None
        self._found: OrderedDict[str, bool] = OrderedDict()

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the value of a key; ChunkSizeError if it is too long or too short."""
        COUNT.add()
        if self._root is not None:
            self._check_file(key)
        if isinstance(byte_range, RangeByteRequest):
            _check_longest(key, byte_range.end - byte_range.start, self._stored.part)
        value = await self._store.get(key, prototype, byte_range)
        self._remember(key, value is not None)
        if value is not None:
            _check_longest(key, len(value), self._stored.whole)
            # What is not there of a shard would pass for chunks that were never written.
            check_least(f"the chunk {key}", len(value), least_nbytes(byte_range, self._stored.least))
        return value

    def fetch(self, key: str, part: range | None = None) -> Any:
        """Return the bytes under a key, or a part of them, which is no file on this machine; None if there are none."""
        wanted = None if part is None else RangeByteRequest(part.start, part.stop)
        value = sync(self.get(key, default_buffer_prototype(), wanted))
        return None if value is None else value.as_numpy_array()

    def gives(self, key: str) -> bool:
        """Tell whether all of a key can be read now, whatever is in it."""
        try:
            return sync(self.get(key, default_buffer_prototype())) is not None
        except Exception:  # whatever a file system may raise
            return False

    @property
    def is_local(self) -> bool:
        """Whether its chunks are files on this machine."""
        return self._root is not None

    @contextmanager
    def opened(self, key: str) -> Iterator[tuple[int, int] | None]:
        """Open the file of a chunk on this machine, and give its handle and its bytes; None if there is none.

        Raises
        ------
        ChunkSizeError
            If it is too long or too short, or no file.
        """
        assert self._root is not None
        COUNT.add()
        path = os.path.join(self._root, key)
        try:
            # A pipe would else be waited for.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._check_file(key)
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):  # it is there, and cannot be read
                raise
            self._remember(key, False)
            if isinstance(self._store, StrictStore):
                raise MissingChunkError(f"chunk {key} is not in the store") from None
            yield None
            return
        try:
            nbytes = self._check_opened(path, os.fstat(handle))
            self._remember(key, True)
            check_least(f"the chunk {key}", nbytes, self._stored.least)
            yield handle, nbytes
        finally:
            os.close(handle)

    def count_missing(self, keys: Iterable[str]) -> int:
        """Return how many of some chunks are not there; those that were read are not asked for again."""
        known = ((key, self._found.get(key)) for key in keys)
        return sum(not (sync(self._exists(key)) if found is None else found) for key, found in known)

    async def _exists(self, key: str) -> bool:
        if self._root is not None:
            self._check_file(key)
        return await self._store.exists(key)

    def _remember(self, key: str, found: bool) -> None:
        self._found.pop(key, None)
        self._found[key] = found
        while len(self._found) > _REMEMBERED:
            self._found.popitem(last=False)

    def _check_file(self, key: str) -> None:
        assert self._root is not None
        path = os.path.join(self._root, key)
        try:
            found = os.stat(path)
        except OSError:
            _refuse_detached(self._root, path)
            return  # it is not there, or reading will say what it is
        self._check_opened(path, found)

    def _check_opened(self, path: str, found: os.stat_result) -> int:
        if not stat.S_ISREG(found.st_mode):
            raise ChunkSizeError(f"{path} is not a file: a chunk of the source was expected")
        _check_longest(path, found.st_size, self._stored.whole)
        return found.st_size


def _refuse_detached(root: str, path: str) -> None:
    """Raise an error if a chunk is not simply missing: what leads to it is damaged, or all is gone."""
    if not any(os.path.exists(os.path.join(root, name)) for name in ("zarr.json", ".zarray")):
        raise OSError(f"the source {root} is gone: it was removed, or its disk is not mounted here any more")
    chunk = path
    while path != root and not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.exists(path):
        raise ChunkSizeError(f"{path} is a link to nothing: a chunk of the source was expected. Restore it")
    if path != chunk and not os.path.isdir(path):
        raise ChunkSizeError(f"{path} is not a folder: chunks of the source were expected in it")


def least_nbytes(byte_range: Any, least: int) -> int:
    """Return how many bytes must come of a range, or at `least` of a whole value."""
    if isinstance(byte_range, RangeByteRequest):
        return max(1, byte_range.end - byte_range.start)  # for Zarr a part of no length is one never written
    return byte_range.suffix if isinstance(byte_range, SuffixByteRequest) else least


def _check_longest(key: str, nbytes: int, limit: int) -> None:
    if nbytes > limit:
        raise ChunkSizeError(
            f"the chunk {key} of the source has {nbytes} bytes where by its metadata it cannot have more than {limit}: "
            "it is corrupt, or a decompression bomb. Rewrite the source"
        )


def check_least(what: str, nbytes: int, least: int) -> None:
    """Raise ChunkSizeError if a chunk, or a part of one, is shorter than it must be."""
    if nbytes < least:
        raise ChunkSizeError(
            f"{what} of the source ends too early: expected {least} bytes, got {nbytes}. It was emptied or cut short: "
            "restore it from where it came from"
        )
