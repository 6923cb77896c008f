"""Where a store is: its one true name, and whether two places overlap."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import fsspec

from dask_batchinv.disk import chunk_folders, identity
from dask_batchinv.text import clean, remember_options, remember_url, without_user
from dask_batchinv.urls import is_chain, joined, resolved

#: File systems take names of 255 bytes.
_NAME_NBYTES = 200


@dataclass(frozen=True)
class Address:
    """An address in a file system that Zarr can use."""

    url: str
    """As opened: an absolute real path, or an fsspec URL. May hold credentials: print `name` instead."""
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What its file system is given besides, such as credentials."""

    def __post_init__(self) -> None:
        remember_url(self.url)
        remember_options(self.options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @classmethod
    def parse(cls, path: str | os.PathLike[str] | Self, options: Mapping[str, Any] | None = None) -> Self:
        """Return the location that a path or URL names: symlinks, ``..`` and trailing slashes are resolved."""
        if isinstance(path, Address):
            return path
        text, options = os.fspath(path), options or {}
        remember_url(text)  # before it is resolved: a slash or a dot may be part of a credential
        if not text:
            raise ValueError("expected a path or a URL, got an empty string")
        if (archive := options.get("fo")) and isinstance(archive, (str, os.PathLike)) and not is_chain(text):
            # Which archive, or which references: that belongs to the name of the place.
            text, options = f"{text}::{os.fspath(archive)}", {k: v for k, v in options.items() if k != "fo"}
        if text.startswith(("file://", "local://")) and not is_chain(text):
            text = text.partition("://")[2]
        if is_chain(text):  # fsspec knows what it means
            above, _, last = text.rstrip("/").rpartition("::")
            if last and "://" not in last:  # a path, which other processes know by its whole name alone
                last = os.path.realpath(os.path.expanduser(last))
            return cls(f"{above}::{last}", options)
        if "://" in text:
            head, _, query = text.partition("?")
            protocol, _, rest = head.partition("://")
            authority, _, inner = rest.partition("/")
            parts = resolved([part for part in inner.split("/") if part], text)
            if authority or protocol != "memory":  # to fsspec a place in memory begins with a slash, or does not
                parts = [authority, *parts]
            return cls(f"{protocol}://{'/'.join(parts)}" + (f"?{query}" if query else ""), options)
        return cls(os.path.realpath(os.path.expanduser(text)), options)

    @property
    def name(self) -> str:
        """The location for people: without credentials, and on one line."""
        return clean(self.url)

    @property
    def is_local(self) -> bool:
        """Whether it is a path on a mounted disk."""
        return os.path.isabs(self.url)

    @property
    def is_memory(self) -> bool:
        """Whether it lives in the memory of one process."""
        return self.url.startswith("memory://")

    def beside(self, ending: str) -> Self | None:
        """Return the place of a hidden folder beside this one, by its name and an ending; None if there is none."""
        above, _, name = self.url.rstrip("/").rpartition("/")
        if self.is_local:
            # What is mounted cannot change places with anything.
            fits = len(os.fsencode(name)) <= _NAME_NBYTES
            possible = fits and not os.path.ismount(self.url) and os.access(above or "/", os.W_OK)
        else:
            possible = not is_chain(self.url) and "?" not in self.url and above.count("/") >= 2 and bool(name)
        return replace(self, url=f"{above}/.{name}{ending}") if possible else None

    def __truediv__(self, part: str) -> Self:
        if self.is_local:
            return replace(self, url=os.path.realpath(os.path.join(self.url, part)))
        return replace(self, url=joined(self.url, part))

    def contains(self, other: Address) -> bool:
        """Tell whether `other` is this location or lies inside it, also where it has another name for that.

        On a disk folders are compared, not names alone: a bind mount is another name for one folder, and so is one in
        capital letters where a file system does not tell them apart. Of a chain of file systems the last counts, in
        which the bytes are.
        """
        mine, others = self._parts(), other._parts()
        if self._endpoint and other._endpoint and self._endpoint != other._endpoint:
            return False
        if mine == others[: len(mine)]:
            return True
        if mine[0] != others[0] or mine[0] != "file":
            return False
        folder = identity("/" + "/".join(mine[1:]))
        above = ("/" + "/".join(others[1:end]) for end in range(len(others), 0, -1))
        return folder is not None and any(identity(path) == folder for path in above)

    def holds(self, other: Address) -> bool:
        """Tell whether what is written here may be written to `other`."""
        return self.contains(other)

    def has_chunks_in(self, others: Iterable[Address]) -> bool:
        """Tell whether files of the Zarr array here lie among the chunks of others, by whatever link or mount."""
        paths = [path for other in others if (path := other._folder())]
        if not paths or not (own := self._folder()):
            return False
        mine = chunk_folders(own, linked=True)
        return any(not mine.isdisjoint(chunk_folders(path, linked=False)) for path in paths)

    def folders(self) -> list[Self]:
        """Return what is directly inside and a folder on a disk."""
        if not self.is_local or not os.path.isdir(self.url):
            return []
        with os.scandir(self.url) as entries:
            return [self / entry.name for entry in entries if entry.is_dir()]

    @property
    def _endpoint(self) -> str | None:
        """Which server its options name, where several have the same URLs."""
        client = self.options.get("client_kwargs")
        given = {**self.options, **(client if isinstance(client, Mapping) else {})}
        return next((str(given[name]) for name in ("endpoint_url", "account_name") if given.get(name)), None)

    def _folder(self) -> str | None:
        """Return the path of the folder on a disk that this is, if it is one."""
        protocol, *parts = self._parts()
        path = "/" + "/".join(parts)
        return path if protocol == "file" and os.path.isdir(path) else None

    def _parts(self) -> list[str]:
        """Return the file system, and the way to the location in it."""
        # User and query do not identify the data.
        base = self.url.rpartition("::")[2] if is_chain(self.url) else self.url
        protocol, mark, rest = base.partition("://")
        if not mark or protocol in ("file", "local"):
            return ["file", *(part for part in os.path.realpath(rest or base).split("/") if part)]
        url = without_user(base.partition("?")[0])
        try:  # several protocols may be one file system, such as s3 and s3a
            kind = fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError):
            path = url
        else:
            path = kind._strip_protocol(url)
            protocol = kind.protocol if isinstance(kind.protocol, str) else kind.protocol[0]
        return [protocol, *(part for part in path.rpartition("://")[2].split("/") if part)]
