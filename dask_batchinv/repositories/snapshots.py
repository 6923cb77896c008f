"""Icechunk: a snapshot of a repository as a place, which is read as it is whatever is committed meanwhile."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import zarr
import zarr.abc.store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dask_batchinv.address import Address
from dask_batchinv.known import Known
from dask_batchinv.location import Location
from dask_batchinv.storage import GuardedStore

T = TypeVar("T")

#: What keys of a session can be: of documents of Zarr format 3, and of chunks.
_KEY = re.compile(r"(.+/)?(zarr\.json|c(/\d+)*)")
#: So many chunks are asked for their sizes at a time.
_ASKED_AT_ONCE = 256


def locate_snapshot(place: Any, token: str | None) -> SnapshotLocation:
    """Return the place of a store or a session of Icechunk.

    Parameters
    ----------
    place
        What Icechunk's ``readonly_session`` returns, or its store.
    token
        By what it is known, whichever snapshot of it is read; by default by that, so that another is another source.

    Raises
    ------
    ValueError
        If it could change while it is read.
    """
    session = getattr(place, "session", place)
    if not hasattr(session, "snapshot_id") or not session.read_only:
        raise ValueError(
            f"of Icechunk pass the repository, or the store of a session that cannot change, "
            f"repo.readonly_session(...).store, not a {type(place).__name__}"
        )
    return SnapshotLocation(f"icechunk://{token or session.snapshot_id}", {}, session)


class _Prefixed(GuardedStore):
    """A store of what lies under a path of another one."""

    def __init__(self, store: zarr.abc.store.Store, prefix: str):
        super().__init__(store)
        self._prefix = f"{prefix}/" if prefix else ""

    def _with_store(self, store: Any) -> Any:
        # What Zarr makes of it to read alone.
        return _Prefixed(store, self._prefix.rstrip("/"))

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the value of a key."""
        return await self._store.get(self._prefix + key, prototype, byte_range)

    async def set(self, key: str, value: Any) -> None:
        """Store the value of a key."""
        await self._store.set(self._prefix + key, value)

    async def exists(self, key: str) -> bool:
        """Tell whether there is a key."""
        return await self._store.exists(self._prefix + key)


@dataclass(frozen=True, repr=False)
class SnapshotLocation(Location):
    """A location in a snapshot."""

    session: Any = field(default=None, compare=False)
    """Icechunk's, of this snapshot alone."""
    path: str = ""
    """The path in it."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return SnapshotLocation, (self.url, {}, self.session, self.path)

    def __truediv__(self, part: str) -> SnapshotLocation:
        return replace(self, url=f"{self.url}/{part}", path=f"{self.path}/{part}".lstrip("/"))

    def contains(self, other: Address) -> bool:
        """Tell whether `other` is this location: what is read of a snapshot does not change, whatever lies in it."""
        return isinstance(other, SnapshotLocation) and (self._repository, self.path) == (other._repository, other.path)

    def holds(self, other: Address) -> bool:
        """Tell whether `other` is this location or lies inside it."""
        if not isinstance(other, SnapshotLocation) or self._repository != other._repository:
            return False
        return f"{other.path}/".startswith(f"{self.path}/".lstrip("/"))

    @property
    def _repository(self) -> str:
        return self.url.partition("?")[0] if "?" in self.url else self.url.removesuffix(self.path)

    @property
    def is_memory(self) -> bool:
        """Whether it lives in the memory of one process."""
        return self.url.startswith("icechunk+memory:")

    def store(self, *, read_only: bool = False) -> zarr.abc.store.Store:
        """Return a Zarr store for this location."""
        return _Prefixed(self.session.store, self.path)

    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return what is stored under `key`; FileNotFoundError if there is no such key."""
        value = sync(self.store().get(key, default_buffer_prototype())) if _KEY.fullmatch(key) else None
        if value is None:
            raise FileNotFoundError(f"{key} is not in {self.name}")
        content: bytes = value.to_bytes()
        return content[:limit]

    def exists(self) -> bool:
        """Tell whether anything is here."""
        return bool(self.children())

    def is_kept(self, key: str) -> bool:
        """Tell whether something is stored under a key, or inside a folder of that name."""
        return (self / key).exists() or key in self.children()

    def children(self) -> list[str]:
        """Return the names of what is directly inside."""
        return sorted(self._listed("list_dir"))

    def keys(self) -> list[str]:
        """Return all keys that are inside, at any depth."""
        return [key.removeprefix(f"{self.path}/") for key in self._listed("list_prefix")]

    def _listed(self, how: str) -> list[str]:
        async def listed() -> list[str]:
            return [key async for key in getattr(self.session.store, how)(self.path)]

        return sync(listed())

    def nbytes(self, key: str) -> int | None:
        """Return the size of what is stored under a key; None if nothing is."""
        return self._sizes([key])[0]

    def _sizes(self, keys: list[str]) -> list[int | None]:
        """Return the sizes of what is stored under some keys."""
        store, prefix = self.session.store, f"{self.path}/" if self.path else ""

        async def size(key: str) -> int | None:
            try:
                return int(await store.getsize(prefix + key))
            except (FileNotFoundError, KeyError):
                return None

        async def sizes() -> list[int | None]:
            found: list[int | None] = []
            for start in range(0, len(keys), _ASKED_AT_ONCE):
                found += await asyncio.gather(*map(size, keys[start : start + _ASKED_AT_ONCE]))
            return found

        return sync(sizes())

    def look(self, keys: Callable[[], Iterable[tuple[str, T]]]) -> Iterator[tuple[str, T | None, Known]]:
        """Yield the key of each chunk of the array here, and what is known of it: of a snapshot which that is."""
        places = self._chunks()
        for key in map(key_of, places):
            yield key, None, Known(None, str(self.session.snapshot_id), None)

    def _chunks(self) -> list[tuple[int, ...]]:
        """Return the places of the chunks of the array here that are stored."""

        async def listed() -> list[tuple[int, ...]]:
            found = self.session.chunk_coordinates(f"/{self.path}")
            return [tuple(place) async for place in found]

        return sync(listed()) if "zarr.json" in self.children() else []

    def _filesystem(self) -> tuple[Any, str]:
        raise ValueError(f"{self.name} is a snapshot of Icechunk: it can be read, but not be written")


def key_of(place: tuple[int, ...]) -> str:
    """Return the key of a chunk."""
    return "/".join(("c", *map(str, place)))
