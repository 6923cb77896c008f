"""Where a store is: its one true name, whether two overlap, how to open it, and the bytes in it.

All that jobs do to stores beside Zarr goes through `Location`: another kind of store is a class with its methods.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import zarr.abc.store
import zarr.storage

from dask_batchinv.outcome import RefusedError
from dask_batchinv.text import clean, harmless, remember_url, without_user

#: A metadata document may be so long.
_JSON_NBYTES = 16 * 2**20


@contextmanager
def raised_as(kind: type[Exception], what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a file system may raise into an error of ours, without credentials; refusals stay as they are."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        raise kind(clean(f"{what}: {type(error).__name__}: {error}{advice}")) from harmless(error)


@dataclass(frozen=True)
class Location:
    """A location in a file system that Zarr can use."""

    url: str
    """As opened: an absolute real path, or an fsspec URL. May hold credentials: print `name` instead."""

    def __post_init__(self) -> None:
        remember_url(self.url)

    def __reduce__(self) -> tuple[type[Location], tuple[str]]:
        # Made anew where it arrives, so that its credentials are known there too.
        return Location, (self.url,)

    def __repr__(self) -> str:
        return f"Location({self.name!r})"

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> Location:
        """Return the location that a path or URL names: symlinks, ``..`` and trailing slashes are resolved."""
        text = os.fspath(path)
        remember_url(text)  # before it is resolved: a slash or a dot may be part of a credential
        if not text:
            raise ValueError("expected a path or a URL, got an empty string")
        if text.startswith(("file://", "local://")):
            text = text.partition("://")[2]
        if "::" in text:  # a chain of file systems: fsspec knows what it means
            return cls(text.rstrip("/"))
        if "://" in text:
            head, _, query = text.partition("?")
            protocol, _, rest = head.partition("://")
            authority, _, inner = rest.partition("/")
            parts = _resolved([part for part in inner.split("/") if part], text)
            return cls(f"{protocol}://{'/'.join([authority, *parts])}" + (f"?{query}" if query else ""))
        return cls(os.path.realpath(os.path.expanduser(text)))

    @property
    def name(self) -> str:
        """The location for people: without credentials, and on one line."""
        return clean(self.url)

    @property
    def is_local(self) -> bool:
        """Whether it is a path on a mounted disk."""
        return "://" not in self.url

    @property
    def is_memory(self) -> bool:
        """Whether it lives in the memory of one process."""
        return self.url.startswith("memory://")

    def __truediv__(self, part: str) -> Location:
        if self.is_local:
            return replace(self, url=os.path.realpath(os.path.join(self.url, part)))
        head, mark, query = self.url.partition("?")
        return replace(self, url=f"{head}/{part}{mark}{query}")

    def contains(self, other: Location) -> bool:
        """Tell whether `other` is this location or lies inside it."""
        return self._parts() == other._parts()[: len(self._parts())]

    def _parts(self) -> list[str]:
        # User and query do not identify the data.
        url = self.url if self.is_local else without_user(self.url.partition("?")[0])
        return [part for part in url.split("/") if part]

    def store(self, *, read_only: bool = False) -> zarr.abc.store.Store:
        """Return a Zarr store for this location."""
        if self.is_local:
            return zarr.storage.LocalStore(self.url, read_only=read_only)
        return zarr.storage.FsspecStore.from_url(self.url, read_only=read_only, storage_options=self._options())

    def _filesystem(self) -> tuple[Any, str]:
        """Return the (synchronous) fsspec file system and the path in it."""
        fs, path = fsspec.core.url_to_fs(self.url, **self._options())
        return fs, path

    def _options(self) -> dict[str, Any]:
        if self.is_local or "::" in self.url:
            return {}
        # A listing kept from before says that what was written since is not there. And s3fs asks for the size of all
        # that it might read in parts, which for chunks doubles the requests.
        return {"use_listings_cache": False} | ({"max_concurrency": 1} if self.url.startswith("s3") else {})

    def exists(self) -> bool:
        """Tell whether anything is here."""
        fs, path = self._filesystem()
        return bool(fs.exists(path))

    def is_writable(self) -> bool:
        """Tell whether it can be written, as far as that can be told beforehand."""
        path = self.url
        while self.is_local and not os.path.exists(path):
            path = os.path.dirname(path)
        return not self.is_local or os.access(path, os.W_OK)

    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return what is stored under `key`, or its first `limit` bytes; FileNotFoundError if there is no such key."""
        fs, path = self._filesystem()
        content: bytes = fs.cat_file(f"{path}/{key}", start=None if limit is None else 0, end=limit)
        return content

    def write(self, key: str, content: bytes) -> None:
        """Store bytes under `key`."""
        fs, path = self._filesystem()
        if self.is_local or self.is_memory:
            fs.makedirs(path, exist_ok=True)
        fs.pipe_file(f"{path}/{key}", content)

    def delete(self, key: str) -> None:
        """Delete what is stored under `key`."""
        fs, path = self._filesystem()
        fs.rm_file(f"{path}/{key}")

    def read_json(self, key: str) -> dict[str, Any] | None:
        """Return a JSON object stored under `key`, or None if there is no such key.

        Raises
        ------
        ValueError
            If it is not a file, longer than metadata ever are, or not a JSON object.
        """
        found = os.path.join(self.url, key)
        if self.is_local and os.path.exists(found) and not os.path.isfile(found):
            if os.path.isdir(found):
                return None
            raise ValueError(f"{key} of {self.name} is not a file")
        try:
            text = self.read(key, _JSON_NBYTES + 1)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        if len(text) > _JSON_NBYTES:
            raise ValueError(f"{key} of {self.name} is longer than {_JSON_NBYTES >> 20} MiB, which metadata never are")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object in {key}, got {type(content).__name__}")
        return content

    def children(self) -> list[str]:
        """Return the names of what is directly inside."""
        fs, path = self._filesystem()
        return sorted(child.rstrip("/").rpartition("/")[2] for child in fs.ls(path, detail=False))

    def known_children(self) -> list[str]:
        """Return `children`; none where a web server does not list them."""
        try:
            return self.children()
        except Exception:  # whatever a web server's answer becomes
            if "http" in self.url.partition("://")[0]:
                return []
            raise

    def remove(self, *, first: str | None = None, last: str | None = None, keep: str | None = None) -> None:
        """Delete everything here, the file `first` before and the file `last` after all others, but not `keep`."""
        fs, path = self._filesystem()
        children = [child for child in self.children() if child != keep]
        for child in sorted(children, key=lambda child: (child != first, child == last)):
            fs.rm(f"{path}/{child}", recursive=True)
        if keep is None:
            fs.rm(path, recursive=True)


def _resolved(parts: list[str], url: str) -> list[str]:
    done: list[str] = []
    for part in parts:
        if part == "..":
            if not done:
                raise ValueError(f"{clean(url)} leads out of its store by '..'")
            done.pop()
        elif part != ".":
            done.append(part)
    return done
