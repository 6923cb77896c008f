"""The target of a job: a Zarr group with the outputs, our mark, and the ledger."""

from __future__ import annotations

import json
import os
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec

from dask_batchinv.attributes import of_inverse
from dask_batchinv.job.outputs import LEDGER, MEMBERS, OUTPUTS, Output
from dask_batchinv.job.target import ledger
from dask_batchinv.job.target.chunks import open_array, sync_path
from dask_batchinv.job.target.lock import LOCK
from dask_batchinv.job.target.state import Fingerprint, State, Target, decide
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location, raised_as
from dask_batchinv.outcome import TargetError
from dask_batchinv.stack import AssumeA
from dask_batchinv.storage import array_options, unspecified

#: The attribute that says a group is ours.
MARK = "dask_batchinv"
#: Raised when targets of older versions cannot be continued by this one.
FORMAT = 4

#: Attributes by which Xarray keeps what is stored otherwise here.
_OF_XARRAY = frozenset(["_ARRAY_DIMENSIONS", "coordinates"])
#: The chunks of an array lie in one folder. With the usual "/" each chunk of the inverse would have two folders to
#: itself: very small ones then took 1.8 times as long to write, and 3.5 times as long to read from a disk.
_FLAT: Any = {"name": "default", "separator": "."}
#: What Zarr writes a chunk to before it gives it its name.
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial$")


def parse_location(path: str | os.PathLike[str]) -> Location:
    """Return the location of a target, or raise TargetError."""
    try:
        return Location.parse(path)
    except ValueError as error:
        raise TargetError(str(error)) from error


def inspect(location: Location) -> Target:
    """Return what is known of the target at a location.

    Raises
    ------
    TargetError
        If something is there that is not ours, or the location cannot be read.
    """
    with raised_as(TargetError, f"the target {location.name} cannot be read"):
        return _inspect(location)


def _inspect(location: Location) -> Target:
    try:
        meta = location.read_json("zarr.json")
    except ValueError:  # not JSON, or the location makes no sense: then this is an error, too
        meta = {} if location.exists() else None
    if meta is None and not location.exists():
        return Target(State.ABSENT, {})
    if meta is None and set(location.children()) <= {LOCK}:
        return Target(State.ABSENT, {})
    attributes = (meta or {}).get("attributes") or {}
    mark = _read_mark(attributes)
    # Attributes travel with data that a user makes from a target; the ledger does not.
    copied = isinstance(mark, dict) and mark.get("ready") and (location / LEDGER).read_json("zarr.json") is None
    if not isinstance(mark, dict) or copied:
        raise TargetError(
            f"{location.name} exists and is not a target of dask_batchinv: choose another target path, or delete it "
            "yourself"
        )
    members = tuple(mark.get("names", ()))
    if mark.get("format") != FORMAT:
        return Target(State.OTHER_FORMAT, {"format": mark.get("format")}, members=members)
    ready = State.COMPLETE if attributes["complete"] else State.BEGUN
    return Target(
        state=ready if mark["ready"] else State.BEING_CREATED,
        fingerprint=mark["fingerprint"],
        generation=mark["generation"],
        tile=tuple(mark["tile"]),
        core=tuple(mark["core"]),
        members=members,
    )


def _read_mark(attributes: dict[str, Any]) -> Any:
    """Return our mark; a text, for that is what every format of files can hold that data are copied to."""
    mark = attributes.get(MARK)
    if isinstance(mark, str):
        with suppress(ValueError):
            return json.loads(mark)
    return mark


def _marked(complete: bool, mark: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a target. NetCDF has no truth values."""
    return {"complete": int(complete), MARK: json.dumps(mark)}


def existing(path: str | os.PathLike[str]) -> tuple[Location, Target]:
    """Return where a target is, and what is known of it; TargetError if none of ours is there to be read."""
    location = parse_location(path)
    target = inspect(location)
    if target.state is State.OTHER_FORMAT:
        raise TargetError(other_format(location, target))
    if not target.is_there:
        raise TargetError(f"there is no target of dask_batchinv at {location.name}")
    return location, target


def other_format(location: Location, target: Target) -> str:
    """Return what to say of a target that another version has written."""
    theirs = target.fingerprint["format"]
    return (
        f"{location.name} was written by another version (format {theirs}, this one writes {FORMAT}): use that version"
    )


def generation_of(location: Location) -> str | None:
    """Return which creation the target stems from that is there now; None if there is none."""
    meta = location.read_json("zarr.json")
    mark = _read_mark((meta or {}).get("attributes") or {})
    generation: str | None = mark.get("generation") if isinstance(mark, dict) else None
    return generation


def refuse_links(location: Location) -> None:
    """Raise TargetError if a part of a target is a link that leads out of it."""
    for name in MEMBERS:
        if not location.contains(location / name):
            raise TargetError(f"{name} in {location.name} is a link to elsewhere: replace it by the array itself")


def tiling_of(location: Location, target: Target) -> Tiling:
    """Return how a target that is there is cut into tiles."""
    array = open_array(location / "inverse", read_only=True)
    return Tiling(tuple(array.shape), target.core, target.tile)


@dataclass(frozen=True)
class Contents:
    """What a target is created with."""

    tiling: Tiling
    """Shape and tiles of the inverse."""
    dtype: np.dtype[Any]
    """Its dtype."""
    dims: tuple[str, ...]
    """Names of its dimensions."""
    coordinates: xr.Dataset | None
    """Coordinates, undecoded, in memory."""
    attributes: dict[str, Any]
    """Attributes of what is inverted."""
    group_attributes: dict[str, Any]
    """Attributes of the group that it is in."""
    assume_a: AssumeA
    """Structure of the matrices."""

    @property
    def names(self) -> list[str]:
        """Names of the coordinates."""
        return [] if self.coordinates is None else sorted(map(str, self.coordinates.variables))

    def attributes_of(self, output: Output) -> dict[str, Any]:
        """Return the attributes of an output."""
        found = output.attributes(self.assume_a)
        placing = {name: value for name, value in self.attributes.items() if name == "grid_mapping"}
        if not output.core:
            return found | placing
        inherited = {name: value for name, value in of_inverse(self.attributes).items() if name not in _OF_XARRAY}
        return found | inherited | ({"coordinates": " ".join(self.names)} if self.names else {})


def create(location: Location, fingerprint: Fingerprint, contents: Contents, *, overwrite: bool = False) -> None:
    """Create the target, metadata first. The mark is written before anything else, ``ready`` last.

    A creation that was interrupted is removed, and with `overwrite` the target of another job, but only if there is
    nothing in it that is not ours.

    Raises
    ------
    TargetError
        If the location holds what is not ours.
    OSError
        If it cannot be written.
    """
    old = inspect(location)  # again: time has passed since the job was prepared
    if decide(old.state, same_job=old.fingerprint == fingerprint, overwrite=overwrite) != "create":
        raise TargetError(f"another run has begun {location.name} meanwhile: wait for it, then run the command again")
    if old.state is not State.ABSENT:
        _clear(location, old)
    mark = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "generation": uuid.uuid4().hex,
        "tile": list(contents.tiling.tile),
        "core": list(contents.tiling.core),
        "ready": False,
        "names": [*MEMBERS, *contents.names],
    }
    with raised_as(OSError, f"the target {location.name} could not be created", "; run the command again"):
        # What was itself a target of ours is no more than a source here.
        group = zarr.create_group(location.store(), attributes=contents.group_attributes | _marked(False, mark))
        _create_outputs(group, contents)
        if contents.coordinates is not None:
            _write_coordinates(location, contents.coordinates, dict(group.attrs))
        ledger.create(group, contents.tiling.n_tiles)
        with unspecified():
            zarr.consolidate_metadata(location.store())
        set_attributes(location, _marked(False, mark | {"ready": True}))


def _clear(location: Location, old: Target) -> None:
    """Remove an old target of ours."""
    ours = {"zarr.json", LOCK, *old.members}
    if others := [name for name in location.children() if name not in ours and not _PARTIAL.search(name)]:
        raise TargetError(
            f"{location.name} contains what dask_batchinv did not put there ({', '.join(others[:5])}): move that first"
        )
    if old.is_there:
        # A break from here on must not leave something that looks finished.
        mark = {"format": FORMAT, "fingerprint": {}, "generation": "", "tile": [], "core": [], "ready": False}
        set_attributes(location, _marked(False, mark | {"names": old.members}))
    location.remove(last="zarr.json", keep=LOCK)  # so that a break leaves the mark in place


def _create_outputs(group: zarr.Group, contents: Contents) -> None:
    tiling = contents.tiling
    for output in OUTPUTS:
        axes, own = tiling.axes(output.core), output.dtype(contents.dtype)
        group.create_array(
            output.name,
            shape=tuple(tiling.shape[axis] for axis in axes),
            chunks=tuple(tiling.tile[axis] for axis in axes),
            dtype=own,
            dimension_names=[contents.dims[axis] for axis in axes],
            attributes=contents.attributes_of(output),
            chunk_key_encoding=_FLAT,
            **array_options(own) | {"fill_value": output.fill},
        )


def _write_coordinates(location: Location, coordinates: xr.Dataset, attributes: dict[str, Any]) -> None:
    with unspecified():
        # Xarray replaces the attributes of the group: by those that it has already.
        coordinates.assign_attrs(attributes).to_zarr(
            location.store(), mode="a", zarr_format=3, consolidated=False,
            encoding={str(name): {"compressors": [ZstdCodec(checksum=True)]} for name in coordinates.variables},
        )  # fmt: skip


def set_attributes(location: Location, attributes: dict[str, Any]) -> None:
    """Change attributes of a target; those not named stay."""
    with unspecified():
        zarr.open_group(location.store(), mode="r+").update_attributes(attributes)


def mark_incomplete(location: Location) -> None:
    """Mark a target as incomplete again."""
    set_attributes(location, {"complete": 0})


def remove_partial_chunks(location: Location) -> None:
    """Remove what killed workers left half written."""
    if location.is_local:
        for folder, _, files in os.walk(location.url):
            for name in files:
                if _PARTIAL.search(name):
                    with suppress(FileNotFoundError):
                        os.unlink(os.path.join(folder, name))


def finish(location: Location, *, durable: bool) -> None:
    """Mark the target as complete: the last write of a job."""
    set_attributes(location, {"complete": 1})
    if durable and location.is_local:
        sync_path(os.path.join(location.url, "zarr.json"))
        sync_path(location.url)
