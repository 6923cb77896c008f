"""The target of a job: a Zarr group with ``inverse``, ``info`` and ``rcond``, our mark, and the ledger."""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec

from dask_batchinv import storage
from dask_batchinv.job import ledger
from dask_batchinv.job.lock import LOCK
from dask_batchinv.job.plan import Tiling
from dask_batchinv.job.source import Source, array_names
from dask_batchinv.outcome import Info, SourceError, TargetError
from dask_batchinv.place import Place, redact
from dask_batchinv.stack import real_dtype, result_dtype

#: The attribute that says a group is ours.
MARK = "dask_batchinv"
#: Raised when targets of older versions cannot be continued by this one.
FORMAT = 3

#: The chunks of an array lie in one folder. With the usual "/" each chunk of the inverse would have two folders to
#: itself: very small ones then took 1.8 times as long to write, and 3.5 times as long to read from a disk.
_FLAT: Any = {"name": "default", "separator": "."}
#: What Zarr writes a chunk to before it gives it its name.
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.partial$")

Fingerprint = dict[str, Any]


@dataclass(frozen=True)
class Begun:
    """A target that a job of ours has begun."""

    fingerprint: Fingerprint
    """What it is made of: source, parameters, versions."""
    generation: str
    """Which creation it stems from."""
    tile: tuple[int, ...]
    """Its tiles, which stay whatever limits a later run has."""
    ready: bool
    """Whether all its metadata were created."""
    complete: bool
    """Whether it is finished."""
    names: tuple[str, ...]
    """What else than its metadata is in it."""


def parse_place(location: str | os.PathLike[str]) -> Place:
    """Return the place of a target, or raise TargetError."""
    try:
        return Place.parse(location)
    except ValueError as error:
        raise TargetError(str(error)) from error


def look(place: Place) -> Begun | None:
    """Return what is known of the target at a place, or None if nothing is there.

    The fingerprint of a target of another format is empty: it differs from every other.

    Raises
    ------
    TargetError
        If something is there that is not ours, or the place cannot be looked at.
    """
    try:
        return _look(place)
    except TargetError:
        raise
    except Exception as error:  # whatever a file system may raise
        text = f"the target {place.name} cannot be looked at: {type(error).__name__}: {error}"
        raise TargetError(redact(text)) from error


def _look(place: Place) -> Begun | None:
    try:
        meta = place.read_json("zarr.json")
    except ValueError:
        meta = {}
    if meta is None and not place.exists():
        return None
    fs, path = place.filesystem()
    if meta is None and fs.isdir(path) and set(place.children()) <= {LOCK}:
        return None
    attributes = (meta or {}).get("attributes") or {}
    mark = attributes.get(MARK)
    # Attributes travel with data that a user makes from a target; the ledger does not.
    copied = isinstance(mark, dict) and mark.get("ready") and (place / "ledger").read_json("zarr.json") is None
    if not isinstance(mark, dict) or copied:
        raise TargetError(
            f"{place.name} exists and is not a target of dask_batchinv: choose another place, or remove it yourself"
        )
    names = tuple(mark.get("names", ()))
    if mark.get("format") != FORMAT:
        return Begun({"format": mark.get("format")}, "", (), ready=False, complete=False, names=names)
    return Begun(
        fingerprint=mark["fingerprint"],
        generation=mark["generation"],
        tile=tuple(mark["tile"]),
        ready=mark["ready"],
        complete=attributes["complete"],
        names=names,
    )


def generation_of(place: Place) -> str | None:
    """Return which creation the target stems from that is there now; None if there is none."""
    meta = place.read_json("zarr.json")
    generation: str | None = ((meta or {}).get("attributes") or {}).get(MARK, {}).get("generation")
    return generation


def refuse_links(place: Place) -> None:
    """Raise TargetError if a part of a target is a link that leads out of it."""
    for name in ("inverse", "rcond", "info", "ledger"):
        if not place.contains(place / name):
            raise TargetError(f"{name} in {place.name} is a link to elsewhere: put the array itself there")


def tiling_of(place: Place, begun: Begun) -> Tiling:
    """Return how a target that was begun is cut into tiles."""
    array = storage.open_array(place / "inverse", read_only=True)
    dims = list(array.metadata.dimension_names)  # type: ignore[union-attr, arg-type]  # ours are format 3 and named
    row, col = begun.fingerprint["dims"]
    return Tiling(tuple(array.shape), (dims.index(row), dims.index(col)), begun.tile)


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return what differs between two fingerprints, in words."""
    keys = sorted({*old, *new})
    return [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def refuse_overlap(source: Source, target: Place) -> None:
    """Raise TargetError if source and target are one place, or one lies inside the other."""
    for place in (source.root, source.place):
        if place.contains(target):
            raise TargetError(f"the target {target.name} is, or lies inside, the source {place.name}")
        if target.contains(place):
            raise TargetError(f"the source {place.name} lies inside the target {target.name}")


def create(place: Place, source: Source, tiling: Tiling, fingerprint: Fingerprint, *, overwrite: bool = False) -> None:
    """Create the target, metadata first. The mark is written before anything else, ``ready`` last.

    A creation that was interrupted is removed, and with `overwrite` the target of another job, but only if there is
    nothing in it that is not ours.

    Raises
    ------
    SourceError
        If a coordinate cannot be read.
    TargetError
        If the place holds what is not ours.
    OSError
        If it cannot be written.
    """
    coordinates = _read_coordinates(source)
    if (old := look(place)) is not None:  # again: time has passed since the job was prepared
        if old.ready and (not overwrite or old.fingerprint == fingerprint):
            raise TargetError(f"another run has begun {place.name} meanwhile: wait for it, then run the command again")
        _clear(place, old)
    names = ["inverse", "rcond", "info", "ledger", *source.coordinates]
    mark = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "generation": uuid.uuid4().hex,
        "tile": list(tiling.tile),
        "ready": False,
        "names": names,
    }
    try:
        _create(place, source, tiling, coordinates, {"complete": False, MARK: mark})
    except Exception as error:  # whatever a file system may raise
        text = f"the target {place.name} could not be created: {type(error).__name__}: {error}; run the command again"
        raise OSError(redact(text)) from error


def _clear(place: Place, begun: Begun) -> None:
    """Remove an old target of ours."""
    ours = {"zarr.json", LOCK, *begun.names}
    if others := [name for name in place.children() if name not in ours and not _UNFINISHED.search(name)]:
        raise TargetError(
            f"{place.name} holds what dask_batchinv did not put there ({', '.join(others[:5])}): move that away first"
        )
    if begun.ready or begun.complete:
        # A break from here on must not leave something that looks finished.
        mark = {"format": FORMAT, "fingerprint": {}, "generation": "", "tile": [], "ready": False, "names": begun.names}
        set_attributes(place, {"complete": False, MARK: mark})
    place.remove(last="zarr.json", keep=LOCK)  # so that a break leaves the mark in place


def _create(place: Place, source: Source, tiling: Tiling, found: xr.Dataset | None, attributes: dict[str, Any]) -> None:
    group = zarr.create_group(place.store(), attributes=attributes)
    dtype = result_dtype(source.dtype)
    batch = [source.dims[axis] for axis in tiling.batch]
    batch_shape = tuple(source.shape[axis] for axis in tiling.batch)
    batch_tile = tuple(tiling.tile[axis] for axis in tiling.batch)
    coordinates = {"coordinates": " ".join(source.coordinates)} if source.coordinates else {}
    group.create_array(
        "inverse", shape=source.shape, chunks=tiling.tile, dtype=dtype, dimension_names=source.dims,
        attributes={"long_name": "matrix inverse", **coordinates}, chunk_key_encoding=_FLAT,
        **storage.array_options(dtype),
    )  # fmt: skip
    group.create_array(
        "rcond", shape=batch_shape, chunks=batch_tile, dtype=real_dtype(dtype), dimension_names=batch,
        attributes={"long_name": "reciprocal condition number in the 1-norm", "units": "1"},
        chunk_key_encoding=_FLAT, **storage.array_options(real_dtype(dtype)),
    )  # fmt: skip
    group.create_array(
        "info", shape=batch_shape, chunks=batch_tile, dtype=np.int32, dimension_names=batch,
        attributes={"long_name": "0 good, k > 0 pivot k is zero, -1 not finite, -2 overflow, -3 rcond below minimum"},
        chunk_key_encoding=_FLAT, **storage.array_options(np.int32) | {"fill_value": int(Info.PENDING)},
    )  # fmt: skip
    if found is not None:
        with _unspecified():
            # Xarray replaces the attributes of the group: by those that it has already.
            found.assign_attrs(attributes).to_zarr(
                place.store(), mode="a", zarr_format=3, consolidated=False,
                encoding={str(name): {"compressors": [ZstdCodec(checksum=True)]} for name in found.variables},
            )  # fmt: skip
    ledger.create(group, tiling.n_tiles)
    with _unspecified():
        zarr.consolidate_metadata(place.store())
    set_attributes(place, {MARK: attributes[MARK] | {"ready": True}})


def _read_coordinates(source: Source) -> xr.Dataset | None:
    """Read the coordinates of the source, undecoded, into memory."""
    if not source.coordinates or source.group is None:
        return None
    try:
        others = [name for name in array_names(source.group) if name not in source.coordinates]
        with _unspecified(), dask.config.set(scheduler="threads"):
            found = xr.open_zarr(
                source.group.store(read_only=True), consolidated=False, drop_variables=others, chunks={},
                mask_and_scale=False, decode_times=False,
            ).load()  # fmt: skip
    except Exception as error:  # whatever a file system or a codec may raise
        text = f"the coordinates of {source.group.name} cannot be read: {type(error).__name__}: {error}"
        raise SourceError(redact(text)) from error
    # What the source had for codecs and chunks is not for the target.
    bare: xr.Dataset = found.drop_encoding().drop_attrs(deep=False)
    return bare


def set_attributes(place: Place, attributes: dict[str, Any]) -> None:
    """Change attributes of a target; those not named stay."""
    with _unspecified():
        zarr.open_group(place.store(), mode="r+").update_attributes(attributes)


@contextmanager
def _unspecified() -> Iterator[None]:
    """Silence Zarr where it warns that consolidated metadata and text labels are not in its specification yet.

    Xarray wants the former, and users have the latter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def reopen(place: Place) -> None:
    """Take the word back that a target is complete."""
    set_attributes(place, {"complete": False})


def sweep(place: Place) -> None:
    """Remove what killed workers left half written."""
    if place.is_local:
        for folder, _, files in os.walk(place.url):
            for name in files:
                if _UNFINISHED.search(name):
                    with suppress(FileNotFoundError):
                        os.unlink(os.path.join(folder, name))


def finish(place: Place, *, durable: bool) -> None:
    """Mark the target as complete: the last write of a job."""
    set_attributes(place, {"complete": True})
    if durable and place.is_local:
        storage.sync_path(os.path.join(place.url, "zarr.json"))
        storage.sync_path(place.url)
