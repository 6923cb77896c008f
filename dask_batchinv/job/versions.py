"""The versions that must be the same in every process of a job, or its tiles would not be of one piece."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import zarr
import zarr.storage

from dask_batchinv._version import __version__
from dask_batchinv.outcome import RefusedError

#: What brings LAPACK, so that its version may change bits where that computes.
LAPACKS = ("numpy", "scipy")
PACKAGES = ("dask_batchinv", "llvmlite", *LAPACKS, "zarr", "numcodecs", "crc32c", "distributed")

Versions = dict[str, str]


def check_optimized() -> None:
    """Raise RefusedError where Python runs with ``-O`` and Zarr cannot: 3.1 reads metadata of groups in an assert."""
    if __debug__:
        return
    group = zarr.create_group(zarr.storage.MemoryStore())
    group.create_group("inner")
    try:
        list(group.groups())
    except TypeError as error:
        raise RefusedError(
            f"Python runs without asserts, and Zarr {zarr.__version__} cannot read groups in groups then: run it "
            "without -O, and without PYTHONOPTIMIZE in the environment"
        ) from error


def versions() -> Versions:
    """Return the versions of this process."""
    return dict(_versions())


@cache  # they are looked for in files
def _versions() -> Versions:
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "dask_batchinv": __version__}
    for name in set(PACKAGES) - set(found):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def differing(mine: Versions, theirs: Versions) -> str:
    """Return in words what differs, or an empty string."""
    names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return ", ".join(f"{name} is {theirs.get(name)} there and {mine.get(name)} here" for name in names)
