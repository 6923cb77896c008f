"""What is at an address: how to open it, and the bytes in it.

All that jobs do to stores beside Zarr goes through `Location`: another kind of store is a class with its methods.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import zarr.abc.store
import zarr.storage
from fsspec.implementations.local import LocalFileSystem

from dask_batchinv.address import Address
from dask_batchinv.disk import Stamp, is_file_or_absent, make_folders, stamp_of, write_file
from dask_batchinv.known import Known, known_of, told_of
from dask_batchinv.outcome import RefusedError
from dask_batchinv.text import CleanError, clean, harmless
from dask_batchinv.transaction import Transaction
from dask_batchinv.urls import CACHES, EXTRAS, is_chain, opened

T = TypeVar("T")

#: A metadata document may be so long.
JSON_NBYTES = 16 * 2**20
#: So many files are asked for at once, where none are listed.
_ASKED_AT_ONCE = 16


class TakenOverError(CleanError, ConnectionError):
    """What this process wrote last is not there any more: its target was removed, replaced, or taken over."""


@contextmanager
def raised_as(kind: type[Exception], what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a file system may raise into an error of ours, without credentials; refusals stay as they are."""
    try:
        yield
    except (RefusedError, TakenOverError):
        raise
    except Exception as error:
        raise kind(clean(f"{what}: {type(error).__name__}: {error}{advice}")) from harmless(error)


def json_object(text: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object that a text is; ValueError, with its name, if it is none that can be read."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {name}, got {type(content).__name__}")
    return content


@dataclass(frozen=True, repr=False)
class Location(Address):
    """A location in a file system that Zarr can use."""

    def __reduce__(self) -> tuple[type[Location], tuple[str, dict[str, Any]]]:
        # Made anew where it arrives, so that its credentials are known there too.
        return Location, (self.url, dict(self.options))

    @property
    def transaction(self) -> Transaction | None:
        """What makes writes last together, in a store that knows commits; None where each lasts by itself."""
        return None

    def commit(self, message: str) -> None:
        """Make what was written last, in a store that knows commits; elsewhere it does already."""

    def forked(self) -> Location:
        """Return a place for the writes of one task; itself, but where its `changes` must be merged."""
        return self

    @property
    def changes(self) -> Any:
        """What is to be merged of what was written to a place that was `forked`, or None."""
        return None

    def store(self, *, read_only: bool = False) -> zarr.abc.store.Store:
        """Return a Zarr store for this location."""
        if self.is_local:
            return zarr.storage.LocalStore(self.url, read_only=read_only)
        url, options = opened(self.url, self._options())
        try:
            return zarr.storage.FsspecStore.from_url(url, read_only=read_only, storage_options=options)
        except ImportError as error:
            raise _install(url, error) from error

    def _filesystem(self) -> tuple[Any, str]:
        """Return the (synchronous) fsspec file system and the path in it."""
        if self.is_local:  # whatever is in its name
            return LocalFileSystem(), self.url
        url, options = opened(self.url, self._options())
        try:
            fs, path = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise _install(url, error) from error
        return fs, path

    def _options(self) -> dict[str, Any]:
        if "::" in self.url:
            return dict(self.options)
        # A listing kept from before says that what was written since is not there. And s3fs asks for the size of all
        # that it might read in parts, which for chunks doubles the requests.
        few = {"max_concurrency": 1} if self.url.startswith("s3") else {}
        return few | dict(self.options) | {"use_listings_cache": False}

    def exists(self) -> bool:
        """Tell whether anything is here."""
        fs, path = self._filesystem()
        return bool(fs.exists(path))

    def is_kept(self, key: str) -> bool:
        """Tell whether something is stored under a key, or inside a folder of that name."""
        fs, path = self._filesystem()
        return bool(fs.exists(_under(path, key)))

    def is_writable(self) -> bool:
        """Tell whether it can be written, as far as that can be told beforehand."""
        path = self.url
        while self.is_local and not os.path.exists(path):
            path = os.path.dirname(path)
        return not self.is_local or os.access(path, os.W_OK)

    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return what is stored under `key`, or its first `limit` bytes; FileNotFoundError if there is no such key."""
        fs, path = self._filesystem()
        if self.is_local and not is_file_or_absent(_under(path, key)):
            raise ValueError(f"{key} of {self.name} is not a file")
        content: bytes = fs.cat_file(_under(path, key), start=None if limit is None else 0, end=limit)
        return content

    def write(self, key: str, content: bytes, *, synced: bool = False) -> Stamp:
        """Store bytes under `key`, as a whole: on a disk under another name first; return what `stamp` would.

        With `synced` they, and the folders that lead to them, are on the disk when it returns, if it is on one.
        """
        if self.is_local:
            file = os.path.join(self.url, key)
            make_folders(os.path.dirname(file), synced=synced)
            return write_file(file, [content], synced=synced)
        fs, path = self._filesystem()
        if self.is_memory:
            fs.makedirs(_under(path, key).rpartition("/")[0], exist_ok=True)
        fs.pipe_file(_under(path, key), content)
        return _digest(content)

    def stamp(self, key: str) -> Stamp:
        """Return what is known of what a key holds."""
        if self.is_local:
            return stamp_of(os.path.join(self.url, key))
        try:
            return _digest(self.read(key))
        except FileNotFoundError:
            return None

    def replace(self, key: str, content: bytes, expected: Stamp, *, synced: bool = False) -> Stamp:
        """Store bytes under `key` if it still holds what `expected` was returned for; return the new stamp.

        Where a store can do both at once, nobody can come between.

        Raises
        ------
        TakenOverError
            If it holds something else.
        """
        lost = TakenOverError(f"{key} of {self.name} was removed or replaced by somebody else while this run was on")
        if self.is_memory or self.is_local:
            if self.stamp(key) != expected:
                raise lost
            return self.write(key, content, synced=synced)
        fs, path = self._filesystem()
        path = _under(path, key)
        conditions = _conditions(fs, path, expected)
        if self.stamp(key) != expected:
            raise lost
        try:
            fs.pipe_file(path, content, **conditions)
        except Exception as error:
            if conditions and _knows_no_conditions(error):
                _without_conditions.add(fs)
                fs.pipe_file(path, content)
            elif not (conditions and _says_other(error)):
                raise
            # The answer to a first attempt may have been lost, and the second one met what the first had written.
            elif self.stamp(key) != _digest(content):
                raise lost from error
        return _digest(content)

    def copy_to(self, other: Location, key: str) -> None:
        """Store what is under `key` in another place of the same store, which does that by itself where it can."""
        fs, path = self._filesystem()
        _, there = other._filesystem()
        fs.cp_file(_under(path, key), _under(there, key))

    def delete(self, key: str) -> None:
        """Delete what is stored under `key`."""
        fs, path = self._filesystem()
        fs.rm_file(_under(path, key))

    def read_json(self, key: str) -> dict[str, Any] | None:
        """Return a JSON object stored under `key`, or None if there is no such key.

        Raises
        ------
        ValueError
            If it is not a file, longer than metadata ever are, or not a JSON object.
        """
        if self.is_local and os.path.isdir(os.path.join(self.url, key)):
            return None
        try:
            text = self.read(key, JSON_NBYTES + 1)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except ValueError:
            # Of a list in Parquet, which is of Zarr format 2, fsspec takes any other document for the key of a chunk.
            if self.url.startswith("reference:") and key.endswith("zarr.json"):
                return None
            raise
        if len(text) > JSON_NBYTES:
            raise ValueError(f"{key} of {self.name} is longer than {JSON_NBYTES >> 20} MiB, which metadata never are")
        return json_object(text, key)

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

    def look(self, keys: Callable[[], Iterable[tuple[str, T]]]) -> Iterator[tuple[str, T | None, Known]]:
        """Yield the key of each file inside, and what is known of it.

        On a disk, and where nothing is listed, only of those with some keys, with what comes with these; None else.
        """
        if self.is_local:
            for key, about in keys():
                with suppress(OSError):  # what is not there, or damaged: reading will tell
                    yield key, about, known_of(os.stat(f"{self.url}/{key}"))
            return
        fs, path = self._filesystem()
        if "http" not in self.url.partition("://")[0]:
            with suppress(FileNotFoundError):
                for name, found in fs.find(path, detail=True).items():
                    told = told_of(found)
                    yield name[len(path) :].lstrip("/"), None, told._replace(version="") if self._is_cached() else told
            return

        def ask(key_about: tuple[str, T]) -> tuple[str, T, Known] | None:
            key, about = key_about
            with suppress(FileNotFoundError):
                return key, about, told_of(fs.info(_under(path, key)))
            return None

        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            left = iter(keys())
            while some := list(itertools.islice(left, 64 * _ASKED_AT_ONCE)):
                yield from filter(None, pool.map(ask, some))

    def _is_cached(self) -> bool:
        """Tell whether a link of a chain keeps copies, which may be older than what the store tells."""
        return is_chain(self.url) and any(link.partition("://")[0] in CACHES for link in self.url.split("::"))

    def nbytes(self, key: str) -> int | None:
        """Return the size of what is stored under a key; None if nothing is."""
        if self.is_local:
            path = os.path.join(self.url, key)
            return os.path.getsize(path) if os.path.isfile(path) else None
        fs, path = self._filesystem()
        try:
            size = (
                fs.info(_under(path, key), refresh=True)["size"] if "s3" in fs.protocol else fs.size(_under(path, key))
            )
        except FileNotFoundError:
            return None
        return None if size is None else int(size)

    def keys(self) -> list[str]:
        """Return all keys that are inside, at any depth; links are keys, and not followed."""
        if self.is_local:
            walked = os.walk(self.url)
            found = (os.path.join(top, name) for top, folders, files in walked for name in _files(top, folders, files))
            return [os.path.relpath(path, self.url) for path in found]
        fs, path = self._filesystem()
        return [found[len(path) :].lstrip("/") for found in fs.find(path)]

    def delete_all(self, keys: Iterable[str]) -> None:
        """Delete keys, one by one, and on a disk the folders that are empty then."""
        if not self.is_local:
            fs, path = self._filesystem()
            if names := [_under(path, key) for key in keys]:
                fs.rm(names)
            return
        folders = set()
        for key in keys:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self.url, key))
            while key := os.path.dirname(key):
                folders.add(key)
        for folder in sorted(folders, reverse=True):  # what is inside comes first
            with suppress(OSError):
                os.rmdir(os.path.join(self.url, folder))


def _install(url: str, error: ImportError) -> ImportError:
    """Return an error that says how to get what a store needs."""
    protocol = url.rpartition("::")[2].partition("://")[0]
    extra = EXTRAS.get(protocol)
    how = (
        f"pip install 'dask_batchinv[{extra}]', here and on all workers" if extra else "install it on all workers, too"
    )
    return ImportError(f"{error}: {how}")


def _under(path: str, key: str) -> str:
    """Return the path of a key; at the root of a file system there may be none before it."""
    return f"{path}/{key}" if path else key


#: What can be parsed as a location, or is one.
Place = str | os.PathLike[str] | Location


def _files(top: str, folders: list[str], files: list[str]) -> list[str]:
    return files + [name for name in folders if os.path.islink(os.path.join(top, name))]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


#: File systems of servers that were found not to have conditional writes.
_without_conditions: set[Any] = set()


def _knows_no_conditions(error: Exception) -> bool:
    """Tell whether a server has no conditional writes: 501 NotImplemented, which s3fs makes an ENOSYS."""
    return getattr(error, "errno", None) == errno.ENOSYS or "NotImplemented" in str(error)


def _conditions(fs: Any, path: str, expected: Stamp) -> dict[str, Any]:
    """Return what makes a store refuse to write a key that has changed, where it can do that."""
    if "s3" not in fs.protocol or fs in _without_conditions:
        return {}
    if expected is None:
        return {"mode": "create"}
    try:
        return {"IfMatch": fs.info(path, refresh=True)["ETag"]}
    except (FileNotFoundError, KeyError):
        return {}


def _says_other(error: Exception) -> bool:
    """Tell whether a store refused to write because the key has changed: 412, which s3fs says in several ways."""
    return isinstance(error, FileExistsError) or "PreconditionFailed" in str(error) or "412" in str(error)
