"""The target of a job: a Zarr group with the outputs, our mark, and the ledger."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import zarr

from dask_batchinv.disk import PARTIAL
from dask_batchinv.job.outputs import LEDGER, Outputs
from dask_batchinv.job.seen import ChunkGrid, Flags, Seen, Written, look_at_target, tiles_of
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
from dask_batchinv.job.target.format_2 import ATTRIBUTES, CONSOLIDATED, with_complete
from dask_batchinv.job.target.found import inspect, is_ours, refuse_foreign, refuse_links
from dask_batchinv.job.target.holder import LOCK
from dask_batchinv.job.target.ledger import Ledger, chunk_shape
from dask_batchinv.job.target.mark import FORMAT, Mark, attributes_of, marked, read_mark, with_attributes
from dask_batchinv.job.target.state import Fingerprint, State, Target
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location, TakenOverError, json_object, raised_as
from dask_batchinv.outcome import TargetError
from dask_batchinv.storage import MARK, FilesStore, unspecified
from dask_batchinv.text import harmless


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
        raise TargetError(f"another run has begun {location.name} meanwhile: wait for it, then run the job again")
    with raised_as(OSError, f"the target {location.name} could not be created", "; run the job again"):
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
    with raised_as(OSError, f"the target {location.name} could not be updated", "; run the job again"):
        changed = changed_names(recorded_digests(location), digests_of(contents))
        moves = _moves_rows(target.tiling, now.tiling)
        if moves:
            number = int(target.ledger.partition("-")[2] or 0) + 1
            now = replace(now, ledger=f"tiles-{number}")
        documents = _documents(now, contents)
        if moves:
            key = f"{LEDGER}/{now.ledger}/{ROOT}"
            writer.create(key, documents[key])
            Ledger(location, target).moved_to(location, now, writer).flush()
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
    writer.delete_all([key for key in keys if is_ours(key, members)])


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


def changed_by_others(location: Location, contents: Contents) -> Flags:
    """Return of which tiles others have changed chunks since this run has begun, where a store with commits says so."""
    tiling, changed = contents.tiling, np.zeros(contents.tiling.n_tiles, bool)
    if (transaction := location.transaction) is not None:
        for array in _written(contents):
            places = np.array([*transaction.changed_by_others(location / array.name)], np.int64)
            for numbers, _ in tiles_of(places, array.grid, tiling, tiling.axes(array.extent)) if len(places) else ():
                changed[numbers] = True
    return changed


def look(location: Location, contents: Contents) -> Seen:
    """Return what the store says of the chunks of each tile, and whether all of them are there.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with raised_as(OSError, f"the target {location.name} cannot be looked at"):
        return look_at_target(location, _written(contents), contents.tiling)


def _written(contents: Contents) -> list[Written]:
    """Return the arrays of a target that have chunks."""
    tiling, encoding, arrays = contents.tiling, contents.encoding, []
    for output in contents.outputs:
        shape, chunk = tiling.shape_of(output.extent), tiling.chunk_of(output.extent)
        if 0 not in shape:  # else it has no chunks
            grid = ChunkGrid(shape, chunk, encoding.prefix(output.extent, tiling), encoding.separator)
            bound = encoding.bound(tiling, output, contents.dtype)
            key = partial(encoding.key, tiling, extent=output.extent)
            arrays.append(Written(output.name, output.extent, grid, key, *bound))
    return arrays


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
                if is_ours(os.path.relpath(path, location.url), members):
                    with suppress(FileNotFoundError):
                        os.unlink(path)
