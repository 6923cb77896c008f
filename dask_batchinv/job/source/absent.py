"""What there is where a Zarr array or group was looked for."""

from __future__ import annotations

import difflib
import itertools
import os
from contextlib import suppress

from dask_batchinv.location import Location
from dask_batchinv.text import clean

#: How files of HDF5 begin, which those of NetCDF are, and those of NetCDF's older formats.
_ARRAYS_IN_FILES = (b"\x89HDF\r\n\x1a\n", b"CDF\x01", b"CDF\x02", b"CDF\x05")
#: A name is looked for among so many.
_NAMES = 10_000


def what_is_there(place: Location) -> str:
    """Return in words what there is at a place that has no Zarr array or group."""
    if not place.is_local:
        return f"there is no Zarr array or group at {place.name}"
    if not os.path.lexists(place.url):
        return f"there is nothing at {place.name}{_did_you_mean(place.url)}"
    if not os.path.isfile(place.url):
        return f"there is no Zarr array or group at {place.name}"
    with suppress(OSError), open(place.url, "rb") as file:
        if file.read(8).startswith(_ARRAYS_IN_FILES):
            return f"{place.name} is a file of NetCDF or HDF5: open it with Xarray, in Python, and pass what that gives"
    return f"{place.name} is a file, and no Zarr array or group"


def _did_you_mean(path: str) -> str:
    folder, name = os.path.split(path)
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, _NAMES) if not entry.name.startswith(".")]
        for like in difflib.get_close_matches(name, names, 1):
            return f". Did you mean {clean(os.path.join(folder, like))}?"
    return ""
