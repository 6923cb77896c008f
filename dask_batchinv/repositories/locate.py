"""Repositories of Icechunk by a URL: ``icechunk+s3://bucket/prefix?branch=main&group=covariances``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from dask_batchinv.repositories.branches import Branch, BranchLocation
from dask_batchinv.repositories.snapshots import SnapshotLocation
from dask_batchinv.text import clean, harmless, remember_options

PREFIX = "icechunk+"
#: What a URL may say besides of which repository it is.
_ASKED = ("branch", "group", "snapshot_id", "tag")
#: What storages call what stands before ``://``.
_PROTOCOLS = {"local filesystem": "file", "GCS": "gs", "Azure": "az", "in-memory": "memory"}


def locate_repository(place: Any, options: Mapping[str, Any] | None = None) -> SnapshotLocation:
    """Return the place of a group in a repository, on a branch, or of a snapshot or tag.

    Parameters
    ----------
    place : str or icechunk.Repository
        The repository, or a URL of it.
    options : mapping, optional
        Of a repository ``group``, ``branch`` (by default main), ``snapshot_id`` or ``tag``, which a URL says itself; of
        a URL what Icechunk's function for such a storage takes, such as credentials: they come from the environment by
        default.

    Raises
    ------
    ValueError
        If there is none.
    """
    if not isinstance(options, (Mapping, type(None))):
        raise ValueError(f"options of a repository are a mapping, got a {type(options).__name__}")
    if isinstance(place, str):
        base, _, query = place.partition("?")
        pairs = parse_qsl(query, keep_blank_values=True)
        asked: dict[str, Any] = dict(pairs)
        if len(asked) < len(pairs):
            raise ValueError(f"{base}?... says something twice")
        base, repository = _opened(base, options or {})
    else:
        base, asked, repository = _url_of(place), dict(options or {}), place
    if wrong := sorted(str(name) for name, value in asked.items() if not isinstance(value, str)):
        raise ValueError(f"of a repository of Icechunk {', '.join(wrong)} is a text")
    if others := sorted(asked.keys() - {*_ASKED}):
        raise ValueError(f"of a repository of Icechunk {', '.join(_ASKED)} can be said, not {', '.join(others)}")
    path = "/".join(filter(None, str(asked.get("group", "")).split("/")))
    fixed: dict[str, str] = {name: str(asked[name]) for name in ("snapshot_id", "tag") if name in asked}
    branch = str(asked.get("branch", "main"))
    url = f"{base}?{urlencode((fixed or {'branch': branch}) | ({'group': path} if path else {}), safe='/')}"
    try:
        if fixed:
            return SnapshotLocation(url, {}, repository.readonly_session(**fixed), path)
        return BranchLocation(url, {}, Branch(repository, branch), path)
    except Exception as error:  # whatever Icechunk may raise
        raise ValueError(_cause(f"{base} cannot be opened", error)) from harmless(error)


def _cause(what: str, error: Exception) -> str:
    return clean(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _url_of(repository: Any) -> str:
    """Return the URL of a repository, by what its storage says of itself."""
    lines = [line.partition(": ") for line in str(repository.storage).splitlines()]
    said = {name.strip(): value.strip() for name, mark, value in lines if mark}
    kind = said.get("type", "storage")
    protocol = _PROTOCOLS.get(kind, "s3" if kind.startswith("S3") else kind.partition(" ")[0].lower())
    parts = [said[name].strip("/") for name in ("path", "account", "container", "bucket", "prefix") if said.get(name)]
    if protocol == "file":
        parts = [os.path.realpath(said["path"]).lstrip("/")]
    elif protocol == "memory":
        parts = [f"{id(repository):x}"]
    return f"{PREFIX}{protocol}://{'/' if protocol == 'file' else ''}{'/'.join(parts)}"


def _opened(url: str, options: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the one name of a repository, and the repository."""
    remember_options(options)
    protocol, _, rest = url.removeprefix(PREFIX).partition("://")
    protocol = {"s3a": "s3", "gcs": "gs", "abfs": "az"}.get(protocol, protocol)
    rest = os.path.realpath(rest) if protocol == "file" else rest.strip("/")
    try:
        import icechunk  # an extra
    except ImportError as error:
        raise ValueError(
            f"{error}: pip install 'dask_batchinv[icechunk]', here and on all workers; it needs Python 3.12"
        ) from error
    first, _, prefix = rest.partition("/")
    named = options or {"from_env": True}
    try:
        if protocol == "file":
            storage = icechunk.local_filesystem_storage(rest, **options)
        elif protocol == "s3":
            storage = icechunk.s3_storage(bucket=first, prefix=prefix, **named)
        elif protocol == "gs":
            storage = icechunk.gcs_storage(bucket=first, prefix=prefix, **named)
        elif protocol == "az":
            container, _, prefix = prefix.partition("/")
            storage = icechunk.azure_storage(account=first, container=container, prefix=prefix, **named)
        else:
            raise ValueError(f"expected {PREFIX}file://, s3://, gs:// or az://, got {url}")
        return f"{PREFIX}{protocol}://{rest}", icechunk.Repository.open(storage)
    except icechunk.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no repository of Icechunk at {url}: create one first, icechunk.Repository.create(...)"
        ) from harmless(error)
    except Exception as error:  # whatever Icechunk may raise
        if isinstance(error, ValueError) and PREFIX in str(error):
            raise
        raise ValueError(_cause(f"{url} cannot be opened", error)) from harmless(error)
