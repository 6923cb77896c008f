"""Everything that is decided before the first byte is read: what the job is, whether it may run, and its plan."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import zarr

from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.outputs import nbytes_per_matrix
from dask_batchinv.job.plan.plan import Limits, Plan, StackLayout, Workers, make_plan
from dask_batchinv.job.source.source import Source, open_source
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.documents import refuse_long
from dask_batchinv.job.target.state import Action, Fingerprint, State, Target, decide, differences, shrunk
from dask_batchinv.job.versions import LAPACKS, versions
from dask_batchinv.kernels import GENERATION, Kernel, choose_kernel
from dask_batchinv.location import Location
from dask_batchinv.outcome import TargetError
from dask_batchinv.stack import result_dtype


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


def prepare(source: str | os.PathLike[str], target: str | os.PathLike[str], options: JobOptions) -> Job:
    """Open source and target, metadata only, and refuse what is not safe.

    Raises
    ------
    SourceError, TargetError, RefusedError
        With what to change; nothing was written.
    """
    opened = open_source(source, options.variable, options.dims)
    _refuse_long_attributes(opened)
    location = targets.parse_location(target)
    refuse_overlap(opened, location)
    kernel = choose_kernel(options.assume_a, options.device)
    fingerprint = _fingerprint(opened, options, kernel)
    found = targets.inspect(location)
    changed = differences(found.fingerprint, fingerprint) or shrunk(found.shape, opened.shape, opened.dims)
    action = decide(found.state, same_job=not changed, overwrite=options.overwrite)
    if found.is_there and action != "refuse" and 0 in found.shape and found.shape != opened.shape:
        action = "create"  # nothing is in it, and its tiles were not made for what has come
    if action == "refuse" and found.state is State.OTHER_FORMAT:
        raise TargetError(f"{targets.other_format(location, found)}, or pass --overwrite to replace it")
    if action == "refuse" and not found.fingerprint:
        raise TargetError(
            f"{location.name} is what was left when a target was being replaced: pass --overwrite again, or choose "
            "another target"
        )
    if action == "refuse":
        raise TargetError(
            f"{location.name} belongs to another job: {'; '.join(changed)}. Choose another target, or pass --overwrite "
            "to replace it"
        )
    if found.state is not State.ABSENT and not changed:
        targets.refuse_links(location, found)
    return Job(opened, location, options, kernel, fingerprint, found, action)


def _refuse_long_attributes(source: Source) -> None:
    members = {coordinate.name: coordinate.node.attributes for coordinate in source.coordinates}
    members["inverse"] = source.attributes
    consolidated = {"metadata": {name: {"attributes": attributes} for name, attributes in members.items()}}
    refuse_long(len(json.dumps({"attributes": source.group_attributes, "consolidated": consolidated}, indent=2)))


def refuse_overlap(source: Source, target: Location) -> None:
    """Raise TargetError if source and target are one location, or one lies inside the other, by any of their names."""
    inside = [target, *target.folders()]  # what is in a target may have another name, too
    for location in (source.root, source.location):
        if location.contains(target):
            raise TargetError(f"the target {target.name} is, or lies inside, the source {location.name}")
        if any(part.contains(location) for part in inside):
            raise TargetError(f"the source {location.name} lies inside the target {target.name}")
    for location in (source.location, *(coordinate.node.location for coordinate in source.coordinates)):
        if location.has_chunks_in(inside):
            raise TargetError(f"chunks of the source {location.name} lie inside the target {target.name}, by links")


def _fingerprint(source: Source, options: JobOptions, kernel: Kernel) -> Fingerprint:
    """Return all that decides the bits of the target."""
    here, dtype = versions(), result_dtype(source.decoded_dtype)
    computing = () if kernel.is_ours(source.n, dtype) else LAPACKS
    return {
        "source": source.location.name,
        "variable": source.variable,
        **source.facts,
        "dimensions": list(source.dims),
        "dims": [source.dims[axis] for axis in source.core],
        "n": source.n,
        "exchanged": source.exchange.value,
        "labels": source.labels,
        "assume_a": options.assume_a,
        "lower": options.lower,
        "min_rcond": options.min_rcond,
        "kernel": kernel.name,
        "generation of the kernel": GENERATION,
        **{f"version of {name}": here[name] for name in computing},
    }


def plan_for(job: Job, workers: Workers) -> Plan:
    """Return the plan of a job for given workers, or raise PlanError."""
    source = job.source
    dtype = result_dtype(source.decoded_dtype)
    layout = StackLayout(
        shape=source.shape,
        core=source.core,
        read_unit=source.read_unit,
        itemsize_in=source.dtype.itemsize,
        itemsize_held=source.itemsize_held,
        itemsize_decoded=source.decoded_dtype.itemsize if source.packing else 0,
        itemsize_out=dtype.itemsize,
        nbytes_per_matrix=nbytes_per_matrix(dtype),
        needs_copy=source.decoded_dtype != dtype or source.core != (len(source.shape) - 2, len(source.shape) - 1),
    )
    kernels = [job.kernel, *([choose_kernel(job.options.assume_a, "gpu")] if workers.gpus else [])]
    limits = Limits(
        memory=workers.memory,
        threads=workers.threads,
        scratch=max(kernel.scratch_nbytes(source.n, dtype) for kernel in kernels),
        compile_nbytes=job.kernel.compile_nbytes(source.n, dtype),
        read_concurrency=None if source.sharded else int(zarr.config.get("async.concurrency")),
    )
    tile = None if job.action == "create" else job.found.tile
    return make_plan(layout, limits, tile_nbytes=job.options.tile_nbytes, tile=tile)
