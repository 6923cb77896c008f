"""Everything that is decided before the first byte is read: what the job is, whether it may run, and its plan."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import zarr

from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.outputs import LEDGER, Outputs, nbytes_per_matrix
from dask_batchinv.job.plan.plan import Limits, Plan, StackLayout, Workers, make_plan
from dask_batchinv.job.source.formed import open_any
from dask_batchinv.job.source.mask import Mask
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.target.contents import Contents
from dask_batchinv.job.target.documents import refuse_long
from dask_batchinv.job.target.encoding import Encoding, parse_compress
from dask_batchinv.job.target.found import inspect, other_format, parse_location, refuse_foreign, refuse_links
from dask_batchinv.job.target.state import Action, Fingerprint, State, Target, decide, differences, shrunk
from dask_batchinv.job.target.swap import place_beside
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.job.versions import LAPACKS, versions
from dask_batchinv.kernels import GENERATION, Kernel, choose_kernel
from dask_batchinv.location import Location, Place
from dask_batchinv.outcome import RefusedError, SourceError, TargetError
from dask_batchinv.stack import computed_dtype
from dask_batchinv.storage import METADATA_KEYS
from dask_batchinv.text import clean

#: What the files of ours begin with that are no arrays.
_OURS = ".dask_batchinv"


@dataclass(frozen=True)
class Job:
    """A job that may run."""

    source: Source
    """Where it reads."""
    target: Location
    """Where it writes."""
    options: JobOptions
    """Its parameters."""
    kernel: Kernel
    """What inverts the matrices."""
    fingerprint: Fingerprint
    """What the target is made of."""
    found: Target
    """What is there already."""
    action: Action
    """What is to be done with that; never "refuse"."""
    replaces: str = ""
    """The generation of the target whose place this one is to take."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As what the inverses are stored."""
        return self.options.stored_dtype(self.source.decoded_dtype)

    @property
    def computed_dtype(self) -> np.dtype[Any]:
        """In what they are computed."""
        return computed_dtype(self.source.decoded_dtype, self.dtype, self.options.precision)


def prepare(source: Place | Source, target: Place, options: JobOptions, *, moved: bool = False) -> Job:
    """Open source and target, metadata only, and refuse what is not safe.

    Parameters
    ----------
    source, target, options
        The job.
    moved
        Whether the source may have another address than it had when the target was made.

    Raises
    ------
    SourceError, TargetError, RefusedError
        With what to change; nothing was written.
    """
    location = parse_location(target)
    _refuse_file_above(location)
    opened = source if isinstance(source, Source) else _open_source(source, options, location)
    _refuse_reserved_names(opened, options.outputs)
    _check_encoding(opened, options, location)
    options.stored_dtype(opened.decoded_dtype)
    _refuse_long_attributes(opened)
    refuse_overlap(opened, location)
    kernel = choose_kernel(options.assume_a, options.device)
    fingerprint = _fingerprint(opened, options, kernel)
    found = inspect(location)
    if moved and found.fingerprint:
        fingerprint |= {"source": found.fingerprint["source"]}
    changed = differences(found.fingerprint, fingerprint) or shrunk(found.shape, opened.shape, opened.dims)
    action = decide(found.state, same_job=not changed, overwrite=options.overwrite)
    if action == "refuse" and found.state is State.OTHER_FORMAT:
        raise TargetError(f"{other_format(location, found)}, or pass `overwrite=True` to replace it")
    if action == "refuse" and not found.fingerprint:
        raise TargetError(
            f"{location.name} is what was left when a target was being replaced: pass `overwrite=True` again, or "
            "choose another target"
        )
    if action == "refuse":
        raise TargetError(
            f"{location.name} belongs to another job: {'; '.join(changed)}. Choose another target, or pass "
            "`overwrite=True` to replace it"
        )
    if found.state is not State.ABSENT and not changed:
        refuse_links(location, found)
    return Job(opened, location, options, kernel, fingerprint, found, action)


def replacement(job: Job) -> Job | None:
    """Return the job that builds what is to take the place of a finished target, beside it; None where none is.

    It goes on where an interrupted one has ended that was to replace this very target, unless the source does not tell
    whether it has changed since.

    Raises
    ------
    TargetError, SourceError
        If something is there, or in the target, that is not ours.
    """
    # One that was begun may be what readers had until a replacement of it was interrupted while keys were copied.
    if job.action != "create" or job.found.state not in (State.COMPLETE, State.OTHER_FORMAT, State.BEGUN):
        return None
    if (beside := place_beside(job.target)) is None:
        return None
    refuse_links(job.target, job.found)
    refuse_foreign(job.target, job.found)
    refuse_overlap(job.source, beside)
    found = inspect(beside)
    if job.found.state is State.BEGUN and (found.state, found.replaces) != (State.COMPLETE, job.found.generation):
        return None
    goes_on = (
        found.is_there and found.replaces == job.found.generation and found.shape == job.source.shape
        and not differences(found.fingerprint, job.fingerprint)
        and job.source.look(found.tiling).tells
    )  # fmt: skip
    action = decide(found.state, same_job=True, overwrite=not goes_on)
    return replace(job, target=beside, found=found, action=action, replaces=job.found.generation)


def _open_source(source: Place, options: JobOptions, target: Location) -> Source:
    """Open a source; where it does not say which dimensions are the core ones, a target that is there does."""
    try:
        return open_any(source, options)
    except SourceError as error:
        dims = None
        if options.dims is None and options.form.is_usual:
            with suppress(Exception):  # whatever is there: it is looked at later
                dims = inspect(target).fingerprint.get("dims")
        if dims is None:
            raise
        with suppress(SourceError):
            return open_any(source, replace(options, dims=dims))
        raise error


def contents_of(job: Job, tiling: Tiling, notes: list[str]) -> Contents:
    """Return what the target of a job consists of beside its numbers.

    `notes` gets a sentence for each coordinate that is damaged, and left out.

    Raises
    ------
    SourceError
        If one is left out that the target has.
    """
    source = job.source
    coordinates = source.read_coordinates(notes)
    readable = set() if coordinates is None else set(map(str, coordinates.variables))
    broken = {*source.left_out, *source.target_names(source.coordinate_names)} - readable
    if job.action != "create" and (lost := sorted(broken & {*job.found.members})):
        raise SourceError(
            f"{', '.join(lost)} of {source.location.name} cannot be read, and the target has it: put it right, or "
            f"remove it from the source. {' '.join([*source.notes, *notes])}"
        )
    return Contents(
        tiling, job.dtype, job.options.outputs, encoding_of(job, tiling), source.target_dims, source.form_dims,
        coordinates, source.attributes, _with_history(source), job.options.assume_a,
    )  # fmt: skip


def _with_history(source: Source) -> dict[str, Any]:
    """Return the attributes of the source's group with one more line of history, the latest first, as CF has it."""
    attributes = dict(source.group_attributes)
    # Without the time, which is in the records of runs: the same job makes the same target.
    line = f"dask_batchinv {versions()['dask_batchinv']}: inverses of {source.location.name}"
    before = attributes.get("history")
    attributes["history"] = f"{line}\n{before}" if isinstance(before, str) and before else line
    return attributes


def encoding_of(job: Job, tiling: Tiling) -> Encoding:
    """Return how the chunks of a target are stored."""
    options, inner = job.options, None
    if options.shards is not None:
        sizes = zip(job.source.dims, tiling.tile, strict=True)
        inner = tuple(min(size, options.chunks.get(dim, size)) for dim, size in sizes)
    separator: Literal[".", "/"] = "." if job.target.transaction is None else "/"
    return Encoding(parse_compress(options.compress), inner, options.zarr_format, separator)


def _refuse_file_above(target: Location) -> None:
    """Raise TargetError if a target would lie in a file."""
    above = os.path.dirname(target.url)
    while target.is_local and not os.path.isdir(above):
        if os.path.lexists(above):
            raise TargetError(f"{clean(above)} is a file, so that no target can be in it")
        above = os.path.dirname(above)


def _check_encoding(source: Source, options: JobOptions, target: Location) -> None:
    """Raise RefusedError if the chunks of the target cannot be stored as is wanted."""
    parse_compress(options.compress)
    if options.zarr_format == 2 and target.transaction is not None:
        raise RefusedError(f"{target.name} can hold no Zarr format 2: Icechunk stores format 3 alone")
    if options.zarr_format == 2 and options.shards is not None:
        raise RefusedError("there are no shards in Zarr format 2: leave `shards=` out")
    batch = [dim for axis, dim in enumerate(source.dims) if axis not in source.core]
    for name, sizes in (("chunks", options.chunks), ("shards", options.shards or {})):
        if unknown := sorted({*sizes} - {*batch}):
            raise RefusedError(
                f"`{name}=` takes lengths along {', '.join(batch) or 'no dimension'}, and not along "
                f"{', '.join(unknown)}{': matrices are not cut' if {*unknown} & {*source.dims} else ''}"
            )
        if any(type(size) is not int or size < 1 for size in sizes.values()):
            raise RefusedError(f"`{name}=` takes whole numbers from 1 on")
    if cut := [dim for dim, size in (options.shards or {}).items() if size % options.chunks.get(dim, size)]:
        raise RefusedError(f"shards have whole chunks: along {cut[0]} they do not")


def _refuse_reserved_names(source: Source, outputs: Outputs) -> None:
    """Raise SourceError if a target has something of a name itself, on file systems that do not tell case apart too."""
    coordinates = [*source.target_names(source.coordinate_names), *source.dims]
    for output in outputs:
        if output.name != output.role and output.name in coordinates:
            raise RefusedError(f"the target has the coordinate {output.name} already: give {output.role} another name")
    reserved = {name.casefold() for name in (LEDGER, *METADATA_KEYS, *(output.name for output in outputs))}
    names = {*source.dims, *source.target_names(source.coordinate_names)}
    if taken := sorted(name for name in names if name.casefold() in reserved or name.casefold().startswith(_OURS)):
        raise SourceError(
            f"{', '.join(taken)} of {source.location.name} are names that the target needs itself: rename those "
            "dimensions or coordinates first, or give the arrays of the target other names"
        )


def _refuse_long_attributes(source: Source) -> None:
    members = {coordinate.name: coordinate.node.attributes for coordinate in source.coordinates}
    members["inverse"] = source.attributes
    consolidated = {"metadata": {name: {"attributes": attributes} for name, attributes in members.items()}}
    refuse_long(len(json.dumps({"attributes": source.group_attributes, "consolidated": consolidated}, indent=2)))


def refuse_overlap(source: Source, target: Location) -> None:
    """Raise TargetError if source and target are one location, or one lies inside the other, by any of their names."""
    inside = [target, *target.folders()]  # what is in a target may have another name, too
    for location in (source.root, *source.locations):
        if location.contains(target):
            raise TargetError(f"the target {target.name} is, or lies inside, the source {location.name}")
        if any(part.holds(location) for part in inside):
            raise TargetError(f"the source {location.name} lies inside the target {target.name}")
    for location in (*source.locations, *(coordinate.node.location for coordinate in source.coordinates)):
        if location.has_chunks_in(inside):
            raise TargetError(f"chunks of the source {location.name} lie inside the target {target.name}, by links")


def fingerprint_of(source: Source) -> Fingerprint:
    """Return what of a source decides the bits of a target, and what they mean: not how its bytes are stored."""
    return {
        "n": source.n,
        "dtype": source.dtype.name,
        "packing": json.dumps(source.packings, sort_keys=True, default=str),
        "dimensions": list(source.dims),
        "dims": [source.dims[axis] for axis in source.core],
        "exchanged": source.exchange.value,
        "labels": source.labels,
    }


def _fingerprint(source: Source, options: JobOptions, kernel: Kernel) -> Fingerprint:
    """Return all that decides the bits of the target."""
    here, stored = versions(), options.stored_dtype(source.decoded_dtype)
    computing = LAPACKS if options.logdet else ()
    return {
        "source": source.location.name,
        "variable": source.variable,
        **fingerprint_of(source),
        "packed": options.packed or "no",
        "packed_dims": None if options.packed is None or options.dims is None else list(options.dims),
        "complex_dim": options.complex_dim or "no",
        "imag": options.imag or "no",
        "select": dict(options.select),
        "mask": options.mask or "none",
        "assume_a": options.assume_a,
        "lower": options.lower,
        "min_rcond": options.min_rcond,
        "precision": options.precision,
        "like_source": options.like_source,
        "outputs": {output.role: output.name for output in options.outputs},
        "stored as": stored.name,
        "compress": parse_compress(options.compress) or "no",
        "chunks": dict(options.chunks),
        "shards": "no" if options.shards is None else dict(options.shards),
        "zarr_format": options.zarr_format,
        "kernel": kernel.name,
        "generation of the kernel": GENERATION,
        **{f"version of {name}": here[name] for name in computing},
    }


def _mask_nbytes(mask: Mask | None) -> int:
    """Return what chunks of a mask take that are decoded at a time."""
    if mask is None:
        return 0
    count = min(math.prod(mask.chunk_grid.counts), int(zarr.config.get("async.concurrency")))
    return count * math.prod(mask.read_unit) * mask.itemsize_held


def _by_axis(source: Source, sizes: Mapping[str, int]) -> dict[int, int]:
    return {source.dims.index(dim): size for dim, size in sizes.items()}


def plan_for(job: Job, workers: Workers) -> Plan:
    """Return the plan of a job for given workers, or raise PlanError."""
    source = job.source
    dtype, outputs = job.computed_dtype, job.options.outputs
    beside = tuple(output for output in outputs if output.extent != "matrix" or output.dtype(job.dtype) != dtype)
    layout = StackLayout(
        shape=source.shape,
        core=source.core,
        start=source.start,
        read_unit=source.read_unit,
        itemsize_in=source.dtype.itemsize,
        itemsize_held=source.itemsize_held,
        direct_nbytes=None
        if source.plain is None
        else source.plain.longest_nbytes(in_store=not source.location.is_local),
        waits=not ((source.location.is_local or source.is_lazy) and job.target.is_local),
        in_part=source.plain is not None and source.plain.is_read_in_part,
        mask_nbytes=_mask_nbytes(source.mask),
        itemsize_decoded=source.decoded_dtype.itemsize if source.packing else 0,
        itemsize_out=dtype.itemsize,
        nbytes_per_matrix=nbytes_per_matrix(outputs, source.n, job.dtype),
        nbytes_beside=nbytes_per_matrix(beside, source.n, job.dtype),
        fixed=_by_axis(source, job.options.chunks if job.options.shards is None else job.options.shards),
        multiples=_by_axis(source, {} if job.options.shards is None else job.options.chunks),
        is_encoded=not encoding_of(job, Tiling(source.shape, source.core, source.shape)).is_plain,
        needs_copy=source.decoded_dtype != dtype or source.core != (len(source.shape) - 2, len(source.shape) - 1),
    )
    kernels = [job.kernel, *([choose_kernel(job.options.assume_a, "gpu")] if workers.gpus else [])]
    limits = Limits(
        memory=workers.memory,
        threads=workers.threads,
        scratch=max(kernel.scratch_nbytes(source.n, dtype) for kernel in kernels),
        compile_nbytes=job.kernel.compile_nbytes(source.n, dtype),
        read_concurrency=None if source.sharded else int(zarr.config.get("async.concurrency")),
        are_ours=workers.are_ours,
    )
    # The tiles of a target that is empty were not made for what has come since.
    tile = None if job.action == "create" or not job.found.tiling.n_tiles else job.found.tile
    return make_plan(layout, limits, tile_nbytes=job.options.tile_nbytes, tile=tile)
