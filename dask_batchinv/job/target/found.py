"""What is found at the location of a target, and whose it is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dask_batchinv.disk import PARTIAL
from dask_batchinv.job.outputs import LEDGER, ROLES, Outputs, named
from dask_batchinv.job.source.absent import what_is_there
from dask_batchinv.job.target.contents import OF_FORMAT_2
from dask_batchinv.job.target.documents import ROOT
from dask_batchinv.job.target.encoding import Encoding, parse_compress
from dask_batchinv.job.target.holder import LOCK
from dask_batchinv.job.target.mark import FORMAT, Mark, attributes_of, read_mark
from dask_batchinv.job.target.state import State, Target
from dask_batchinv.job.tiling import LARGEST_COUNT, Tiling
from dask_batchinv.location import Location, Place, raised_as
from dask_batchinv.outcome import TargetError
from dask_batchinv.storage import MARK, METADATA_KEYS
from dask_batchinv.text import harmless

#: The keys in the members of a target: metadata and chunks of outputs or coordinates, and what is in the ledger.
_MEMBER_KEY = re.compile(r"zarr\.json|\.zarray|\.zattrs|c?(\.?\d+)*|c?(/?\d+)*")
_ROWS = re.compile(r"tiles(-\d{1,9})?")
_LEDGER_KEY = re.compile(r"(tiles(-\d+)?/)?zarr\.json|tiles(-\d+)?/c/\d+/\d+|runs?\.json")


def parse_location(path: Place) -> Location:
    """Return the location of a target, or raise TargetError."""
    try:
        return Location.parse(path)
    except ValueError as error:
        raise TargetError(str(error)) from harmless(error)


class _NotOursError(TargetError):
    """Something is there that we did not make."""


def inspect(location: Location, *, advice: bool = True) -> Target:
    """Return what is known of the target at a location; with an `advice` to who wants one there where it is not ours.

    Raises
    ------
    TargetError
        If something is there that is not ours, or the location cannot be read.
    """
    try:
        with raised_as(TargetError, f"the target {location.name} cannot be read"):
            return _inspect(location)
    except _NotOursError as error:
        is_zarr = any(location.is_kept(key) for key in METADATA_KEYS)
        if advice:
            source = "; if this is the source, put it first" if is_zarr else ""
            text = f"exists, and dask_batchinv did not make it: nothing was written. Choose another target path{source}"
        elif is_zarr:
            text = "is not a target of dask_batchinv: name the target that was made from it"
        else:
            text = "exists and is not a target of dask_batchinv"
        raise TargetError(f"{location.name} {text}") from error


def _inspect(location: Location) -> Target:
    root = _read_group(location)
    # Also asked where the document is damaged: a location that makes no sense is an error here.
    is_there = bool(root) or location.exists()
    # A store in memory keeps folders in which nothing is any more.
    inside = location.keys if location.is_memory else location.children
    if root is None and (not is_there or {*inside()} <= {LOCK}):
        return Target(State.ABSENT, {})
    mark = read_mark(root or {})
    copy = read_mark(_read_group(location / LEDGER) or {})
    is_lost = not root or (MARK in root and mark is None)
    if is_lost and copy is not None:  # the document of the group was lost, or is damaged
        mark = copy | {"ready": True}
    # Attributes travel with data that a user makes from a target; the ledger does not.
    copied = mark is not None and mark.get("ready") and not location.is_kept(LEDGER)
    if mark is None or copied:
        raise _NotOursError
    members = tuple(mark.get("names", ()))
    if mark.get("format") != FORMAT:
        return Target(State.OTHER_FORMAT, {"format": mark.get("format")}, members=members)
    is_complete = (root or {}).get("complete") == 1
    return Target(
        state=State.BEING_CREATED if not mark["ready"] else State.COMPLETE if is_complete else State.BEGUN,
        fingerprint=dict(mark["fingerprint"]),
        generation=_generation_in(mark),
        replaces=_checked(mark.get("replaces", ""), str),
        members=members,
        outputs=_outputs_in(mark),
        encoding=_encoding_in(mark),
        ledger=_ledger_in(mark),
        **_tiling_in(mark),
    )


def _read_group(location: Location) -> dict[str, Any] | None:
    """Return the attributes of a group; None if it is not there, and none where its document is damaged."""
    try:
        meta = location.read_json(ROOT)
    except ValueError:
        return {}
    return None if meta is None else attributes_of(meta)


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its mark is damaged: expected {kind.__name__}, got {value!r}")
    return value


def _generation_in(mark: Mark) -> str:
    generation: str = _checked(mark["generation"], str)
    if mark["ready"] and not re.fullmatch("[0-9a-f]{32}", generation):
        raise ValueError(f"its mark is damaged: {generation[:100]!r} is no generation")
    return generation


def _ledger_in(mark: Mark) -> str:
    name: str = _checked(mark["ledger"], str)
    if not _ROWS.fullmatch(name):
        raise ValueError(f"its mark is damaged: its ledger cannot be called {name[:100]!r}")
    return name


def _outputs_in(mark: Mark) -> Outputs:
    names: dict[str, str] = _checked(mark["outputs"], dict)
    if not {*names} <= {*ROLES}:
        raise ValueError("its mark is damaged: it names outputs that there are not")
    return named((role, _checked(name, str)) for role, name in names.items())


def _encoding_in(mark: Mark) -> Encoding:
    known: dict[str, Any] = _checked(mark["encoding"], dict)
    inner, zarr_format, separator = known.get("inner"), known.get("format"), known.get("separator", ".")
    sizes_are_right = all(type(size) is int and size > 0 for size in inner or ())
    if zarr_format not in (2, 3) or separator not in (".", "/") or not sizes_are_right:
        raise ValueError("its mark is damaged: how its chunks are stored makes no sense")
    inner = None if inner is None else tuple(inner)
    return Encoding(parse_compress(known.get("compress")), inner, zarr_format, separator)


def _tiling_in(mark: Mark) -> dict[str, Any]:
    """Return shape, tile and core dimensions by a mark; ValueError if no job makes such."""
    shape, tile, core = (tuple(_checked(size, int) for size in mark[name]) for name in ("shape", "tile", "core"))
    if not mark["ready"] and not shape:  # it is being removed
        return {}
    axes = range(len(shape))
    ok = (
        len(shape) == len(tile) and len(core) == 2 and core[0] != core[1] and all(axis in axes for axis in core)
        and all(0 <= size < 2**63 for size in shape) and all(1 <= size < 2**63 for size in tile)
    )  # fmt: skip
    if not ok or Tiling(shape, (core[0], core[1]), tile).n_tiles > LARGEST_COUNT:
        raise ValueError("its mark is damaged: shape and tiles make no sense")
    return {"shape": shape, "tile": tile, "core": (core[0], core[1])}


def existing(path: Place) -> tuple[Location, Target]:
    """Return where a target is, and what is known of it; TargetError if none of ours is there to be read."""
    location = parse_location(path)
    target = inspect(location, advice=False)
    if target.state is State.OTHER_FORMAT:
        raise TargetError(other_format(location, target))
    if not location.exists():
        raise TargetError(what_is_there(location))
    if not target.is_there:
        raise TargetError(f"there is no target of dask_batchinv at {location.name}")
    return location, target


def other_format(location: Location, target: Target) -> str:
    """Return what to say of a target that another version has written."""
    theirs = target.fingerprint["format"]
    return (
        f"{location.name} was written by another version (format {theirs}, this one writes {FORMAT}): use that version"
    )


def refuse_links(location: Location, target: Target) -> None:
    """Raise TargetError if what must be a folder of a target is a link, or a file."""
    folders = [name for name in target.members if name not in OF_FORMAT_2]
    for name in [*folders, *(f"{LEDGER}/{target.ledger}{below}" for below in ("", "/c"))]:
        path = os.path.join(location.url, name)
        if location.is_local and os.path.lexists(path):
            if (location / name).url != path:
                raise TargetError(f"{name} in {location.name} is a link to elsewhere: replace it by the array itself")
            if not os.path.isdir(path):
                raise TargetError(f"{name} in {location.name} is not a folder: move it elsewhere, then run this again")


def refuse_foreign(location: Location, old: Target, keys: Sequence[str] | None = None) -> None:
    """Raise TargetError if there is something in a target that is to be replaced which is not ours."""
    if others := foreign_keys(location.keys() if keys is None else keys, old):
        raise TargetError(
            f"{location.name} contains what dask_batchinv did not put there ({', '.join(others[:5])}): move that first"
        )


def foreign_keys(keys: Iterable[str], target: Target) -> list[str]:
    """Return those keys in a target that are none of ours."""
    return sorted(key for key in keys if not is_ours(key, target.members))


def is_ours(key: str, members: Iterable[str]) -> bool:
    """Tell whether a key is one that jobs write, or what one was half written to."""
    name, _, below = PARTIAL.sub("", key).partition("/")
    if not below:
        return name in (ROOT, LOCK) or (name in OF_FORMAT_2 and name in members)
    if name == LEDGER:
        return bool(_LEDGER_KEY.fullmatch(below))
    return name in members and bool(_MEMBER_KEY.fullmatch(below))
