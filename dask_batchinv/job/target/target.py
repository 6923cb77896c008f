"""The target of a job: a Zarr group with the outputs, our mark, and the ledger."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import xarray as xr

from dask_batchinv.disk import PARTIAL
from dask_batchinv.job.outputs import LEDGER, MEMBERS, OUTPUTS
from dask_batchinv.job.target.chunks import DamagedTargetError, open_array
from dask_batchinv.job.target.documents import ROOT, Contents, damaged_keys, make_documents
from dask_batchinv.job.target.holder import LOCK
from dask_batchinv.job.target.ledger import Ledger
from dask_batchinv.job.target.mark import FORMAT, Mark, attributes_of, marked, read_mark, with_attributes
from dask_batchinv.job.target.state import Fingerprint, State, Target
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location, TakenOverError, json_object, raised_as
from dask_batchinv.outcome import TargetError
from dask_batchinv.storage import MARK, FilesStore, unspecified
from dask_batchinv.text import harmless

#: The keys of the members of a target: metadata and chunks of outputs and coordinates, and what is in the ledger.
_OUTPUT_KEY = re.compile(r"zarr\.json|c(\.\d+)*")
_COORDINATE_KEY = re.compile(r"zarr\.json|c(/\d+)*")
_LEDGER_KEY = re.compile(r"(tiles/)?zarr\.json|tiles/c/\d+/\d+|runs\.json")


def parse_location(path: str | os.PathLike[str]) -> Location:
    """Return the location of a target, or raise TargetError."""
    try:
        return Location.parse(path)
    except ValueError as error:
        raise TargetError(str(error)) from harmless(error)


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
    root = _read_group(location)
    # Also asked where the document is damaged: a location that makes no sense is an error here.
    is_there = bool(root) or location.exists()
    if root is None and (not is_there or set(location.children()) <= {LOCK}):
        return Target(State.ABSENT, {})
    mark = read_mark(root or {})
    copy = read_mark(_read_group(location / LEDGER) or {})
    is_lost = not root or (MARK in root and mark is None)
    if is_lost and copy is not None:  # the document of the group was lost, or is damaged
        mark = copy | {"ready": True}
    # Attributes travel with data that a user makes from a target; the ledger does not.
    copied = mark is not None and mark.get("ready") and not location.is_kept(LEDGER)
    if mark is None or copied:
        raise TargetError(
            f"{location.name} exists and is not a target of dask_batchinv: choose another target path, or delete it "
            "yourself"
        )
    members = tuple(mark.get("names", ()))
    if mark.get("format") != FORMAT:
        return Target(State.OTHER_FORMAT, {"format": mark.get("format")}, members=members)
    is_complete = (root or {}).get("complete") == 1
    return Target(
        state=State.BEING_CREATED if not mark["ready"] else State.COMPLETE if is_complete else State.BEGUN,
        fingerprint=dict(mark["fingerprint"]),
        generation=_checked(mark["generation"], str),
        tile=tuple(_checked(size, int) for size in mark["tile"]),
        core=(_checked(mark["core"][0], int), _checked(mark["core"][1], int)) if mark["core"] else (-2, -1),
        members=members,
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


def refuse_links(location: Location, members: Iterable[str] = MEMBERS) -> None:
    """Raise TargetError if what must be a folder of a target is a link, or a file."""
    for name in [*members, *(f"{LEDGER}/{below}" for below in ("tiles", "tiles/c"))]:
        path = os.path.join(location.url, name)
        if location.is_local and os.path.lexists(path):
            if (location / name).url != path:
                raise TargetError(f"{name} in {location.name} is a link to elsewhere: replace it by the array itself")
            if not os.path.isdir(path):
                raise TargetError(f"{name} in {location.name} is not a folder: move it elsewhere, then run this again")


def tiling_of(location: Location, target: Target) -> Tiling:
    """Return how a target that is there is cut into tiles."""
    array = open_array(location / "inverse", read_only=True)
    return Tiling(tuple(array.shape), target.core, target.tile)


def read_ledger(location: Location, target: Target) -> Ledger:
    """Return the ledger of a target that is there, to be read."""
    return Ledger(location, target.generation, tiling_of(location, target).n_tiles)


def create(location: Location, fingerprint: Fingerprint, contents: Contents, writer: Writer, replaced: Target) -> None:
    """Create the target, its mark before anything else, ``ready`` last.

    `replaced`, the target that was found there, is removed, but only if it is still the same one, and there is nothing
    in it that is not ours.

    Raises
    ------
    TargetError
        If the location holds what is not ours.
    OSError
        If it cannot be written.
    """
    old = inspect(location)  # again: time has passed since the job was prepared
    if (old.state, old.generation) != (replaced.state, replaced.generation):
        raise TargetError(f"another run has begun {location.name} meanwhile: wait for it, then run the command again")
    with raised_as(OSError, f"the target {location.name} could not be created", "; run the command again"):
        mark = _mark_of(fingerprint, uuid.uuid4().hex, contents)
        documents = make_documents(contents, mark)
        if old.state is not State.ABSENT:
            _clear(location, old, writer)
        for key in sorted(documents, key=lambda key: key != ROOT):
            writer.create(key, documents[key])
        writer.change(
            ROOT, lambda root: with_attributes(root or documents[ROOT], marked(False, mark | {"ready": True}))
        )


def _mark_of(fingerprint: Fingerprint, generation: str, contents: Contents) -> Mark:
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "generation": generation,
        "tile": list(contents.tiling.tile),
        "core": list(contents.tiling.core),
        "ready": False,
        "names": contents.members,
    }


def _clear(location: Location, old: Target, writer: Writer) -> None:
    """Remove an old target of ours, key by key, if nothing else is in it."""
    refuse_links(location, (*MEMBERS, *old.members))
    keys = location.keys()
    if others := [key for key in keys if not _is_ours(key, old.members)]:
        raise TargetError(
            f"{location.name} contains what dask_batchinv did not put there ({', '.join(sorted(others)[:5])}): move "
            "that first"
        )
    if old.is_there:
        # A break from here on must not leave something that looks finished.
        mark = {"format": FORMAT, "fingerprint": {}, "generation": "", "tile": [], "core": [], "ready": False}
        writer.change(ROOT, lambda root: with_attributes(root or b"{}", marked(False, mark | {"names": old.members})))
    # The mark last, so that a break leaves it in place.
    writer.delete_all(sorted((key for key in keys if key not in (LOCK, ROOT)), key=lambda key: key.startswith(LEDGER)))
    writer.delete_all([ROOT])


def _is_ours(key: str, members: Iterable[str]) -> bool:
    """Tell whether a key is one that jobs write, or what one was half written to."""
    name, _, below = PARTIAL.sub("", key).partition("/")
    if not below:
        return name in (ROOT, LOCK)
    if name == LEDGER:
        return bool(_LEDGER_KEY.fullmatch(below))
    return name in members and bool((_OUTPUT_KEY if name in MEMBERS else _COORDINATE_KEY).fullmatch(below))


def mend(location: Location, target: Target, contents: Contents, writer: Writer) -> list[str]:
    """Write those documents of a target again that were lost or are damaged; return their keys."""
    documents = _documents(target, contents)
    keys = damaged_keys(location, documents)
    for key in keys:
        if key != ROOT:
            writer.create(key, documents[key])
    if ROOT in keys:
        fresh = with_attributes(documents[ROOT], {"complete": 0})
        writer.change(ROOT, lambda old: with_attributes(fresh, _attributes_in(old) | _attributes_in(fresh)))
    return keys


def damage(location: Location, target: Target, contents: Contents) -> list[str]:
    """Return the keys of those documents of a target that were lost or are damaged."""
    return damaged_keys(location, _documents(target, contents))


def _documents(target: Target, contents: Contents) -> dict[str, bytes]:
    mark = _mark_of(target.fingerprint, target.generation, contents)
    documents = make_documents(contents, mark)
    return documents | {ROOT: with_attributes(documents[ROOT], marked(False, mark | {"ready": True}))}


def _attributes_in(document: bytes | None) -> dict[str, Any]:
    """Return the attributes in a document, as far as it can be read."""
    with suppress(ValueError):
        return attributes_of(json_object(document or b"{}", ROOT))
    return {}


def lost_tiles(location: Location, tiling: Tiling, nbytes: tuple[int, ...]) -> list[int]:
    """Return the numbers of tiles of which a chunk is not there, or not of its size, of a target that is complete.

    `nbytes` are those of a chunk of each output. Nothing is decided by listing a store, which may be late: a chunk that
    is not listed as it must be is asked for by its key.
    """
    if 0 in tiling.shape:
        return []
    lost: set[int] = set()
    for output, expected in zip(OUTPUTS, nbytes, strict=True):
        inside = location / output.name
        listed = np.zeros(tiling.n_tiles, bool)
        for name, size in inside.known_sizes():
            if size == expected and (number := tiling.number_of(name, core=output.core)) is not None:
                listed[number] = True
        unseen = (int(number) for number in np.flatnonzero(~listed))
        lost |= {n for n in unseen if inside.nbytes(tiling.chunk_key(n, core=output.core)) != expected}
    return sorted(lost)


def open_as_reader(location: Location) -> None:
    """Open a target as those will who use it; DamagedTargetError if that fails."""
    try:
        store = FilesStore(location.store(read_only=True))
        with (
            unspecified(),
            xr.open_zarr(store, decode_cf=False, chunks=None, consolidated=True, create_default_indexes=False) as found,
        ):
            missing = [output.name for output in OUTPUTS if output.name not in found]
    except Exception as error:  # whatever Xarray and Zarr may raise
        text = f"{location.name} cannot be opened: {type(error).__name__}: {error}"
        raise DamagedTargetError(text) from harmless(error)
    if missing:
        raise DamagedTargetError(f"{location.name} has no {', '.join(missing)}")


def set_complete(writer: Writer, generation: str, complete: bool) -> None:
    """Mark a target as complete, the last write of a job, or as incomplete again.

    Raises
    ------
    TakenOverError
        If another creation of it is there.
    """

    def changed(root: bytes | None) -> bytes:
        if (read_mark(_attributes_in(root)) or {}).get("generation") != generation:
            raise TakenOverError("the target was removed or replaced by another run")
        return with_attributes(root or b"", {"complete": int(complete)})

    writer.change(ROOT, changed)


def remove_partial_chunks(location: Location, members: Iterable[str]) -> None:
    """Remove what killed workers left half written, in the members of a target."""
    if location.is_local:
        members = {*MEMBERS, *members}
        for folder, _, files in os.walk(location.url):
            paths = (os.path.join(folder, name) for name in files if PARTIAL.search(name))
            for path in paths:
                if _is_ours(os.path.relpath(path, location.url), members):
                    with suppress(FileNotFoundError):
                        os.unlink(path)
