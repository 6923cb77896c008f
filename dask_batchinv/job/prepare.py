"""Everything that is decided before the first byte is read: what the job is, whether it may run, and its plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import dask.config
import llvmlite
import numpy as np
import scipy
import zarr
from dask.utils import parse_bytes

from dask_batchinv._version import __version__
from dask_batchinv.job import target as targets
from dask_batchinv.job.cluster import Workers
from dask_batchinv.job.plan import Layout, Limits, Plan, make_plan
from dask_batchinv.job.source import Missing, Source, open_source
from dask_batchinv.kernels import Kernel, choose_kernel
from dask_batchinv.kernels.cuda import staging
from dask_batchinv.outcome import RefusedError, TargetError
from dask_batchinv.place import Place
from dask_batchinv.stack import AssumeA, Device, parse_choice, real_dtype, result_dtype


@dataclass(frozen=True)
class Options:
    """The parameters of a job."""

    variable: str | None = None
    """Name of the stack in a group."""
    dims: Sequence[str] | None = None
    """Names of the core dimensions."""
    assume_a: AssumeA = "general"
    """Structure of the matrices."""
    min_rcond: float = 0.0
    """Below it a matrix counts as failed."""
    max_failed: int | None = 0
    """How many matrices may fail; None for any number."""
    device: Device = "auto"
    """Where to invert."""
    missing: Missing = "error"
    """What a missing chunk of the source means."""
    tile_size: str | int | None = None
    """Bytes of a tile; by default the Dask configuration ``batchinv.job.tile-size``."""
    overwrite: bool = False
    """Replace a target of ours that belongs to another job."""
    trust_ledger: bool = False
    """Do not read back what earlier runs have recorded."""
    durable: bool = False
    """Record a tile only when it is on the disk."""

    def __post_init__(self) -> None:
        try:
            parse_choice("assume_a", self.assume_a, AssumeA)
            parse_choice("missing", self.missing, Missing)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        if not 0 <= self.min_rcond <= 1:
            raise RefusedError(f"min_rcond must be between 0 and 1, got {self.min_rcond}")
        if self.max_failed is not None and self.max_failed < 0:
            raise RefusedError(f"max_failed must be 0 or more, got {self.max_failed}")
        if self.tile_nbytes <= 0:
            raise RefusedError(f"tile_size must be more than 0 bytes, got {self.tile_size}")

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a tile."""
        size = self.tile_size or dask.config.get("batchinv.job.tile-size")
        try:
            return int(parse_bytes(size))
        except (ValueError, OverflowError) as error:
            raise RefusedError(f"tile_size {size!r} is not a number of bytes such as 32MiB") from error


@dataclass(frozen=True)
class Job:
    """A job that may run."""

    source: Source
    """Where it reads."""
    target: Place
    """Where it writes."""
    options: Options
    """Its parameters."""
    kernel: Kernel
    """What inverts the matrices."""
    fingerprint: targets.Fingerprint
    """What the target is made of."""
    begun: targets.Begun | None
    """What is there already of the same job."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.begun is not None and self.begun.complete


def prepare(source: str | os.PathLike[str], target: str | os.PathLike[str], options: Options) -> Job:
    """Open source and target, metadata only, and refuse what is not safe.

    Raises
    ------
    SourceError, TargetError, RefusedError
        With what to change; nothing was written.
    """
    opened = open_source(source, options.variable, options.dims)
    place = targets.parse_place(target)
    targets.refuse_overlap(opened, place)
    kernel = choose_kernel(options.assume_a, options.device)
    fingerprint = _fingerprint(opened, options, kernel)
    begun = _known_target(place, fingerprint, options.overwrite)
    return Job(opened, place, options, kernel, fingerprint, begun)


def _fingerprint(source: Source, options: Options, kernel: Kernel) -> targets.Fingerprint:
    """Return all that decides the bits of the target."""
    return {
        "source": source.place.name,
        "variable": source.variable,
        "source metadata": source.digest,
        "dims": [source.dims[axis] for axis in source.core],
        "assume_a": options.assume_a,
        "min_rcond": options.min_rcond,
        "kernel": kernel.name,
        "versions": {
            "dask_batchinv": __version__,
            "llvmlite": llvmlite.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
    }


def _known_target(place: Place, fingerprint: targets.Fingerprint, overwrite: bool) -> targets.Begun | None:
    """Return the target to continue, or None if it is to be created."""
    begun = targets.look(place)
    if begun is None:
        return None
    changed = targets.differences(begun.fingerprint, fingerprint)
    if overwrite and changed:
        return None
    if changed:
        raise TargetError(
            f"{place.name} belongs to another job: {'; '.join(changed)}. Choose another target, or pass --overwrite "
            "to replace it"
        )
    targets.refuse_links(place)
    # A creation that was interrupted left nothing worth keeping.
    return begun if begun.ready else None


def plan_for(job: Job, workers: Workers) -> Plan:
    """Return the plan of a job for given workers, or raise PlanError."""
    source = job.source
    dtype = result_dtype(source.dtype)
    layout = Layout(
        shape=source.shape,
        core=source.core,
        read_unit=source.read_unit,
        itemsize_in=source.dtype.itemsize,
        itemsize_out=dtype.itemsize,
        itemsize_rcond=real_dtype(dtype).itemsize,
        converts=source.dtype != dtype or source.core != (len(source.shape) - 2, len(source.shape) - 1),
    )
    scratch = job.kernel.scratch_nbytes(source.n, dtype)
    if workers.gpus:
        scratch = max(scratch, staging.scratch_nbytes(source.n, dtype))
    limits = Limits(
        memory=workers.memory,
        threads=workers.threads,
        scratch=scratch,
        compiling=job.kernel.compile_nbytes(source.n, dtype),
        read_concurrency=None if source.sharded else int(zarr.config.get("async.concurrency")),
    )
    tile = job.begun.tile if job.begun else None
    return make_plan(layout, limits, tile_nbytes=job.options.tile_nbytes, tile=tile)
