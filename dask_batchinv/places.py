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
    raise ValueError(
        f"a {type(place).__name__} is no place that worker processes could open: pass its path or URL, and what the "
        "file system of fsspec needs as source_options or target_options. For arrays in memory there is `inverse`"
    )


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
