"""The target of a job: a Zarr group with the outputs, our mark, and the ledger."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import zarr

from dask_batchinv.disk import PARTIAL
from dask_batchinv.job.outputs import LEDGER, ROLES, Outputs, named
from dask_batchinv.job.seen import ChunkGrid, Seen, Written, look_at_target
from dask_batchinv.job.target.at_once import for_each
from dask_batchinv.job.target.chunks import DamagedTargetError
from dask_batchinv.job.target.contents import OF_FORMAT_2, Contents
from dask_batchinv.job.target.documents import (
    ROOT,
    Documents,
    changed_names,
    damaged_keys,
    digests_of,
    make_documents,
    recorded_digests,
)
from dask_batchinv.job.target.encoding import Encoding, parse_compress
from dask_batchinv.job.target.format_2 import ATTRIBUTES, CONSOLIDATED, with_complete
from dask_batchinv.job.target.holder import LOCK
from dask_batchinv.job.target.ledger import Ledger, chunk_shape
from dask_batchinv.job.target.mark import FORMAT, Mark, attributes_of, marked, read_mark, with_attributes
from dask_batchinv.job.target.state import Fingerprint, State, Target
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.job.tiling import LARGEST_COUNT, Tiling
from dask_batchinv.location import Location, Place, TakenOverError, json_object, raised_as
from dask_batchinv.outcome import TargetError
from dask_batchinv.storage import MARK, FilesStore, unspecified
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


def create(
    location: Location,
    fingerprint: Fingerprint,
    contents: Contents,
    writer: Writer,
    replaced: Target,
    replaces: str = "",
) -> None:
    """Create the target, its mark before anything else, ``ready`` last.

    `replaced`, the target that was found there, is removed, but only if it is still the same one, and there is nothing
    in it that is not ours. What it `replaces` is the generation of one elsewhere.

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
        mark = _mark_of(Target(State.BEGUN, fingerprint, uuid.uuid4().hex, replaces), contents)
        documents = make_documents(contents, mark)
        if old.state is not State.ABSENT:
            _clear(location, old, writer)
        writer.create(ROOT, documents[ROOT])
        # What describes an array before what is in it.
        others = sorted(documents.keys() - {ROOT}, key=lambda key: not key.endswith(ROOT))
        for_each(location, lambda key: writer.create(key, documents[key]), others)
        writer.change(
            ROOT, lambda root: with_attributes(root or documents[ROOT], marked(False, mark | {"ready": True}))
        )


def _mark_of(target: Target, contents: Contents) -> Mark:
    return {
        "format": FORMAT,
        "fingerprint": target.fingerprint,
        "generation": target.generation,
        "replaces": target.replaces,
        "outputs": {output.role: output.name for output in contents.outputs},
        "encoding": {
            "compress": contents.encoding.compress,
            "inner": contents.encoding.inner,
            "format": contents.encoding.zarr_format,
            "separator": contents.encoding.separator,
        },
        "ledger": target.ledger,
        "shape": list(contents.tiling.shape),
        "tile": list(contents.tiling.tile),
        "core": list(contents.tiling.core),
        "ready": False,
        "names": contents.members,
    }


def _clear(location: Location, old: Target, writer: Writer) -> None:
    """Remove an old target of ours, key by key, if nothing else is in it."""
    refuse_links(location, old)
    keys = location.keys()
    refuse_foreign(location, old, keys)
    if old.is_there:
        # A break from here on must not leave something that looks finished.
        mark = {"format": FORMAT, "fingerprint": {}, "generation": "", "ledger": "tiles", "outputs": {}, "shape": [],
                "encoding": {"format": 3}, "tile": [], "core": [], "ready": False}  # fmt: skip
        writer.change(ROOT, lambda root: with_attributes(root or b"{}", marked(False, mark | {"names": old.members})))
    # The mark last, so that a break leaves it in place.
    writer.delete_all(sorted((key for key in keys if key not in (LOCK, ROOT)), key=lambda key: key.startswith(LEDGER)))
    writer.delete_all([ROOT])


def refuse_foreign(location: Location, old: Target, keys: Sequence[str] | None = None) -> None:
    """Raise TargetError if there is something in a target that is to be replaced which is not ours."""
    if others := foreign_keys(location.keys() if keys is None else keys, old):
        raise TargetError(
            f"{location.name} contains what dask_batchinv did not put there ({', '.join(others[:5])}): move that first"
        )


def foreign_keys(keys: Iterable[str], target: Target) -> list[str]:
    """Return those keys in a target that are none of ours."""
    return sorted(key for key in keys if not _is_ours(key, target.members))


def _is_ours(key: str, members: Iterable[str]) -> bool:
    """Tell whether a key is one that jobs write, or what one was half written to."""
    name, _, below = PARTIAL.sub("", key).partition("/")
    if not below:
        return name in (ROOT, LOCK) or (name in OF_FORMAT_2 and name in members)
    if name == LEDGER:
        return bool(_LEDGER_KEY.fullmatch(below))
    return name in members and bool(_MEMBER_KEY.fullmatch(below))


def mend(location: Location, target: Target, contents: Contents, writer: Writer) -> list[str]:
    """Write those documents of a target again that were lost or are damaged; return their keys."""
    _refuse_taken(location, target, contents)
    documents = _documents(target, contents)
    keys = damaged_keys(location, documents)
    _write(writer, {key: documents[key] for key in keys}, contents, set())
    return keys


def _refuse_taken(location: Location, target: Target, contents: Contents) -> None:
    if taken := [name for name in contents.names if name not in target.members and location.is_kept(name)]:
        raise TargetError(f"{', '.join(taken)} in {location.name} is not ours, and now a coordinate of the source has "
                          "that name: move it elsewhere, then run this again")  # fmt: skip


def _write(writer: Writer, documents: Documents, contents: Contents, changed: set[str]) -> None:
    """Write documents of a target in place of others, the group's own last, and leave to users what is theirs."""
    for key in sorted(documents, key=lambda key: (key == ROOT, not key.endswith(ROOT))):
        if key in (ROOT, *(f"{output.name}/{ROOT}" for output in contents.outputs)):
            writer.change(key, partial(_with_theirs, documents[key], contents.outputs, changed))
        else:
            writer.create(key, documents[key])


def _with_theirs(fresh: bytes, outputs: Outputs, changed: set[str], old: bytes | None) -> bytes:
    """Return a fresh document with what users have put into the old one: attributes, and arrays that are not ours."""
    meta, before = json_object(fresh, ROOT), {}
    with suppress(ValueError):
        before = json_object(old or b"{}", ROOT)
    names = [output.name for output in outputs]
    ours = (MARK, "complete", "coordinates", *(["units"] if names[0] in changed else []))
    meta["attributes"] = _merged(meta, before, ours)
    inner, theirs = _consolidated(meta), _consolidated(before)
    then = (read_mark(attributes_of(before)) or {}).get("names", ())
    for name, node in theirs.items():
        if name in inner and name in names:
            inner[name]["attributes"] = _merged(inner[name], node, ours)
        elif name.partition("/")[0] not in {LEDGER, *then, *inner}:
            inner[name] = node
    return json.dumps(meta, indent=2).encode()


def _merged(fresh: dict[str, Any], old: dict[str, Any], ours: tuple[str, ...]) -> dict[str, Any]:
    new, theirs = attributes_of(fresh), attributes_of(old)
    kept = {name: value for name, value in theirs.items() if name not in ours}
    return kept | {name: new[name] for name in ours if name in new} if theirs else new


def _consolidated(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the nodes that are consolidated in a group."""
    found = meta.get("consolidated_metadata")
    nodes = found.get("metadata") if isinstance(found, dict) else None
    return nodes if isinstance(nodes, dict) else {}


def follows(location: Location, target: Target, contents: Contents) -> bool:
    """Tell whether a target has the shape, the coordinates and the units of its source as they are now."""
    changed = changed_names(recorded_digests(location), digests_of(contents))
    return not changed and target.shape == contents.tiling.shape and {*target.members} == {*contents.members}


def update(location: Location, target: Target, contents: Contents, writer: Writer) -> Target:
    """Let a target follow its source, to its shape, coordinates and units; return what it is then.

    What was done stays done. The group's own document is changed in one write, and from then on says what all else must
    be like: what a break leaves behind, the next run mends.

    Raises
    ------
    TargetError
        If something of others has the name of a new coordinate.
    """
    _refuse_taken(location, target, contents)
    now = replace(target, shape=contents.tiling.shape, tile=contents.tiling.tile, members=tuple(contents.members))
    with raised_as(OSError, f"the target {location.name} could not be updated", "; run the command again"):
        changed = changed_names(recorded_digests(location), digests_of(contents))
        if _moves_rows(target.tiling, now.tiling):
            number = int(target.ledger.partition("-")[2] or 0) + 1
            now = replace(now, ledger=f"tiles-{number}")
            Ledger(location, target).moved_to(location, now, writer).flush()
        documents = _documents(now, contents)
        _write(writer, {ROOT: documents[ROOT]}, contents, changed)
        damaged = [key for key in damaged_keys(location, documents) if key != ROOT]
        _write(writer, {key: documents[key] for key in damaged}, contents, changed)
        gone = {*target.members} - {*now.members}
        for folder in [*sorted(gone), *([f"{LEDGER}/{target.ledger}"] if now.ledger != target.ledger else [])]:
            _delete(location, writer, folder, {LEDGER, *gone})
    return now


def _delete(location: Location, writer: Writer, folder: str, members: Iterable[str]) -> None:
    """Delete what is ours in a folder of a target."""
    inside = (location / folder).keys()
    keys = [f"{folder}/{key}" for key in inside]
    writer.delete_all([key for key in keys if _is_ours(key, members)])


def _moves_rows(old: Tiling, new: Tiling) -> bool:
    """Tell whether a target that has grown needs another ledger: where tiles get other numbers, or are many more.

    They keep them where only the first dimension has grown.
    """
    return old.n_tiles > 0 and (old.grid[1:], chunk_shape(old.n_tiles)) != (new.grid[1:], chunk_shape(new.n_tiles))


def damage(location: Location, target: Target, contents: Contents) -> list[str]:
    """Return the keys of those documents of a target that were lost or are damaged."""
    return damaged_keys(location, _documents(target, contents))


def _documents(target: Target, contents: Contents) -> dict[str, bytes]:
    mark = _mark_of(target, contents)
    documents = make_documents(contents, mark)
    return documents | {ROOT: with_attributes(documents[ROOT], marked(False, mark | {"ready": True}))}


def _attributes_in(document: bytes | None) -> dict[str, Any]:
    """Return the attributes in a document, as far as it can be read."""
    with suppress(ValueError):
        return attributes_of(json_object(document or b"{}", ROOT))
    return {}


def look(location: Location, contents: Contents) -> Seen:
    """Return what the store says of the chunks of each tile, and whether all of them are there.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    tiling, encoding, arrays = contents.tiling, contents.encoding, []
    for output in contents.outputs:
        shape, chunk = tiling.shape_of(output.extent), tiling.chunk_of(output.extent)
        if 0 not in shape:  # else it has no chunks
            grid = ChunkGrid(shape, chunk, encoding.prefix(output.extent, tiling), encoding.separator)
            bound = encoding.bound(tiling, output, contents.dtype)
            key = partial(encoding.key, tiling, extent=output.extent)
            arrays.append(Written(output.name, output.extent, grid, key, *bound))
    with raised_as(OSError, f"the target {location.name} cannot be looked at"):
        return look_at_target(location, arrays, tiling)


def open_as_reader(location: Location) -> None:
    """Open a target as those will who use it; DamagedTargetError if that fails.

    Without what others have put beside it, which may be as long as it was before it has grown.
    """
    try:
        root = location.read_json(ROOT) or {}
        mark = read_mark(attributes_of(root)) or {}
        ours, outputs = {*mark.get("names", ())} - {*OF_FORMAT_2}, {*mark.get("outputs", {}).values()}
        store = FilesStore(location.store(read_only=True))
        with unspecified():
            if ours == {LEDGER, *outputs}:  # then Xarray would read nothing that Zarr does not
                found: Any = zarr.open_group(store, mode="r", use_consolidated=True)
            else:
                theirs = [name for name in _consolidated(root) if name not in ours]
                found = _open_dataset(store, theirs)
            missing = sorted(name for name in outputs if name not in found)
    except Exception as error:  # whatever Xarray and Zarr may raise
        text = f"{location.name} cannot be opened: {type(error).__name__}: {error}"
        raise DamagedTargetError(text) from harmless(error)
    if missing:
        raise DamagedTargetError(f"{location.name} has no {', '.join(missing)}")


def _open_dataset(store: FilesStore, left_out: Sequence[str]) -> Any:
    import xarray as xr  # not before it is needed: that takes longer than a small job

    return xr.open_zarr(
        store, decode_cf=False, chunks=None, consolidated=True, create_default_indexes=False, drop_variables=left_out
    )


def set_complete(writer: Writer, target: Target, complete: bool) -> None:
    """Mark a target as complete, the last write of a job, or as incomplete again.

    Raises
    ------
    TakenOverError
        If another creation of it is there.
    """

    def changed(root: bytes | None) -> bytes:
        if (read_mark(_attributes_in(root)) or {}).get("generation") != target.generation:
            raise TakenOverError("the target was removed or replaced by another run")
        return with_attributes(root or b"", {"complete": int(complete)})

    if target.encoding.zarr_format == 2:
        for key in (ATTRIBUTES, CONSOLIDATED):
            writer.change(key, lambda old, key=key: with_complete(key, old, complete))  # type: ignore[misc]
    writer.change(ROOT, changed)


def remove_partial_chunks(location: Location, members: Iterable[str]) -> None:
    """Remove what killed workers left half written, in the members of a target."""
    if location.is_local:
        members = {*members}
        for folder, _, files in os.walk(location.url):
            paths = (os.path.join(folder, name) for name in files if PARTIAL.search(name))
            for path in paths:
                if _is_ours(os.path.relpath(path, location.url), members):
                    with suppress(FileNotFoundError):
                        os.unlink(path)
