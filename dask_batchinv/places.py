"""What people have in hand for a place: paths, URLs, mappings of fsspec, arrays, groups and stores of Zarr."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import fsspec
import zarr.storage
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.dirfs import DirFileSystem

from dask_batchinv.location import Location
from dask_batchinv.repositories.locate import PREFIX, locate_repository
from dask_batchinv.storage import innermost

#: Of a file system, what is not of the store but of the process that uses it.
_OF_THE_PROCESS = ("asynchronous", "loop")


def locate(place: Any, options: Mapping[str, Any] | None = None) -> Location:
    """Return the location of a place, with what its file system is given.

    Parameters
    ----------
    place : str, path, UPath, fsspec.FSMap, zarr.Array, zarr.Group or zarr store
        The place.
    options : mapping, optional
        What the file system of fsspec takes, such as credentials and ``endpoint_url``; before those that `place` has.

    Raises
    ------
    ValueError
        If it is none that other processes can open.
    """
    if isinstance(place, Location):
        return place
    if is_repository(place):
        return locate_repository(place, options)
    path = ""
    if isinstance(place, (zarr.Array, zarr.Group)):
        place, path = place.store_path.store, place.store_path.path
    place = innermost(place)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options of a file system are a mapping, got a {type(options).__name__}")
    url, own = _url_of(place)
    location = Location.parse(url, {**own, **(options or {})})
    if location.is_local and options:
        raise ValueError(f"{location.name} is on a disk of this machine, which takes no options: {', '.join(options)}")
    return location / path if path else location


def is_repository(place: Any) -> bool:
    """Tell whether a place is a repository of Icechunk, or a URL of one."""
    if isinstance(place, str):
        return place.startswith(PREFIX)
    return type(place).__module__.partition(".")[0] == "icechunk" and hasattr(place, "readonly_session")


def _url_of(place: Any) -> tuple[str | os.PathLike[str], Mapping[str, Any]]:
    """Return the URL or path of a place, and the options of its file system."""
    if isinstance(place, zarr.storage.LocalStore):
        return place.root, {}
    if isinstance(place, zarr.storage.FsspecStore):
        return _url_in(place.fs, place.path)
    if isinstance(place, zarr.storage.ZipStore):
        return f"zip://::{os.path.abspath(place.path)}", {}
    if isinstance(place, fsspec.FSMap):
        return _url_in(place.fs, place.root)
    if hasattr(place, "storage_options") and hasattr(place, "protocol"):  # UPath
        return str(place), place.storage_options
    if isinstance(place, (str, os.PathLike)):
        return place, {}
    if type(place).__module__ == "zarr.storage._obstore" or type(place).__module__.partition(".")[0] == "obstore":
        return _url_of_obstore(getattr(place, "store", place))
    if type(place).__module__.partition(".")[0] == "icechunk":
        raise ValueError(f"of Icechunk pass the repository, which a {type(place).__name__} does not tell")
    raise ValueError(
        f"a {type(place).__name__} is no place that worker processes could open: pass its path or URL, and what the "
        "file system of fsspec needs as source_options or target_options. For arrays in memory there is `inverse`"
    )


#: What obstore's options of S3 are called by s3fs.
_OF_S3 = {"access_key_id": "key", "secret_access_key": "secret", "session_token": "token", "endpoint": "endpoint_url"}


def _url_of_obstore(store: Any) -> tuple[str, Mapping[str, Any]]:
    """Return what fsspec calls a place of obstore, on a disk or in S3."""
    kind = type(store).__name__
    if kind == "LocalStore" and store.prefix is not None:
        return str(store.prefix), {}
    if kind != "S3Store":
        raise ValueError(f"of an obstore {kind} pass the URL, and what the file system of fsspec needs as options")
    known = {name.removeprefix("aws_"): value for name, value in store.config.items()}
    bucket = known.pop("bucket", None) or known.pop("bucket_name")
    options = {theirs: known.pop(ours) for ours, theirs in _OF_S3.items() if ours in known}
    if str(known.pop("skip_signature", "")).lower() == "true":
        options["anon"] = True
    if region := known.pop("region", None):
        options["client_kwargs"] = {"region_name": region}
    if other := sorted(known.keys() - {"virtual_hosted_style_request", "allow_http"}):
        raise ValueError(f"an obstore S3Store with {', '.join(other)}: pass the URL, and what s3fs needs as options")
    prefix = "" if store.prefix is None else f"/{str(store.prefix).strip('/')}"
    return f"s3://{bucket}{prefix}", options


def unwrapped(fs: Any, path: str) -> tuple[Any, str]:
    """Return the file system in which bytes are, and their path there.

    What is wrapped around it is asynchronous, keeps copies, or gives a folder.
    """
    while inner := getattr(fs, "sync_fs", None) or (
        fs.fs if isinstance(fs, (CachingFileSystem, DirFileSystem)) else None
    ):
        path = f"{fs.path}/{path}" if isinstance(fs, DirFileSystem) else path
        fs = inner
    return fs, path


def _url_in(fs: Any, path: str) -> tuple[str, Mapping[str, Any]]:
    fs, path = unwrapped(fs, path)
    options = {name: value for name, value in fs.storage_options.items() if name not in _OF_THE_PROCESS}
    url: str = fs.unstrip_protocol(path)
    if fs.storage_args or "fo" in options:  # which archive, or which host: that is not in the URL
        raise ValueError(f"of a {type(fs).__name__} pass the URL: its parts are not told otherwise")
    if (host := options.get("host")) and host not in url:
        url = url.replace("://", f"://{host}/", 1).replace("//", "/").replace(":/", "://", 1)
    return url, options
