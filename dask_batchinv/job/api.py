"""Jobs from Python: what users call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.driver.run_job import plan_job, run_job
from dask_batchinv.job.form import Packed
from dask_batchinv.job.options import BadChunks, JobOptions, Missing
from dask_batchinv.job.outputs import Keep
from dask_batchinv.job.plan.plan import Plan
from dask_batchinv.job.plan.prepare import Job, prepare
from dask_batchinv.job.report import display
from dask_batchinv.job.report.freshness import Status, status_of
from dask_batchinv.job.report.interrupted import INTERRUPTED_CALL, InterruptedJob
from dask_batchinv.job.report.job_report import JobFailedError, JobReport
from dask_batchinv.job.report.page.target_report import TargetReport, report_of
from dask_batchinv.job.report.run_record import OnProgress, all_of
from dask_batchinv.job.report.verify_report import VerifyReport
from dask_batchinv.job.source.selection import as_text
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.state import options_of
from dask_batchinv.job.target.swap import InterruptedWhenDone
from dask_batchinv.job.versions import check_optimized
from dask_batchinv.location import Location
from dask_batchinv.outcome import RefusedError, SourceError, TargetError
from dask_batchinv.places import is_repository, locate
from dask_batchinv.repositories.snapshots import locate_snapshot
from dask_batchinv.stack import AssumeAWord, Device, Precision
from dask_batchinv.text import harmless

if TYPE_CHECKING:
    import numpy.typing as npt

    # to import Dask's cluster takes as long as a small job
    from distributed import Client


#: What people have in hand for a place: a path, a URL, a UPath, a mapping of fsspec, an array, group or store of Zarr.
AnyPlace = Any


def invert_store(
    source: AnyPlace,
    target: AnyPlace,
    *,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    token: str | None = None,
    variable: str | None = None,
    dims: Sequence[str] | None = None,
    packed: Packed | None = None,
    complex_dim: str | None = None,
    imag: str | None = None,
    select: Mapping[str, Any] | None = None,
    mask: str | None = None,
    assume_a: AssumeAWord = "general",
    lower: bool = False,
    min_rcond: float = 0.0,
    precision: Precision = "same",
    max_failed: int | str | None = 0,
    device: Device = "auto",
    client: Client | None = None,
    scheduler: str | None = None,
    scheduler_file: str | os.PathLike[str] | None = None,
    wait_for_workers: int | None = None,
    wait: str | float | None = None,
    only_workers: Sequence[str] = (),
    workers: int | None = None,
    threads_per_worker: int | None = None,
    memory_limit: str | int | None = None,
    tile_size: str | int | None = None,
    missing: Missing = "error",
    bad_chunks: BadChunks = "error",
    keep: Keep = "inverse",
    logdet: bool = False,
    dtype: npt.DTypeLike | None = None,
    like_source: bool = False,
    names: Mapping[str, str] | None = None,
    compress: str | None = None,
    chunks: Mapping[str, int] | None = None,
    shards: Mapping[str, int] | None = None,
    zarr_format: Literal[2, 3] = 3,
    overwrite: bool = False,
    trust_ledger: bool = False,
    durable: bool = False,
    insecure: bool = False,
    restart_stalled: bool = False,
    dashboard: int | None = None,
    progress: bool | None = None,
    on_progress: OnProgress | None = None,
) -> JobReport:
    """Invert every matrix of a Zarr store into another, on a Dask cluster.

    Call it again after an interruption, of any kind: it reads back what is recorded as done, by its checksums, and
    does what is left or damaged, with the same bits. Call it again on a finished target: it does what has changed in
    the source since, as far as its store tells, and what has been appended. One run at a time may work on a target.

    Parameters
    ----------
    source : str, path, UPath, fsspec mapping, zarr.Array, zarr.Group, zarr store, dask.array.Array or Xarray object
        A Zarr array ``(*, n, n)``, or a group with `variable` in it; format 2 or 3, a path or an fsspec URL, or what
        stands for one. Packed numbers (``scale_factor``, ``_FillValue``, …) are decoded as Xarray decodes them, missing
        ones to NaN. A Dask array, a DataArray or a Dataset is computed tile by tile, and stored nowhere: so stacks in
        any format that Xarray opens are inverted. Where memory is planned, what computing it takes is not known. Of
        Icechunk the store of a session that cannot change, or a repository, or its URL.
    target : as `source`
        A Zarr group to create, or to continue: ``inverse`` ``(*, n, n)``, ``info`` and ``rcond`` ``(*,)``, with
        the dimension names, coordinates and attributes that `Dataset.linalg.inv` would give. `xarray.open_zarr` opens
        it at any time; its attribute ``complete`` says whether it is finished: 1 or 0.
    source_options, target_options : mapping, optional
        What the file systems of fsspec are given (``storage_options``), such as credentials, ``anon`` or
        ``endpoint_url``. Workers get them, and they are never shown. By default credentials come from the environment,
        as the file system expects them. Of a repository of Icechunk, its ``group`` and ``branch``.
    token : str, optional
        By what a lazy source is known, so that the job goes on with the same one; by default Dask's own name of it,
        which for what is random, or made by functions without a name, is another one in each process. Or a repository
        of Icechunk, whichever snapshot is read; by default the snapshot, so that another one is another source.
    variable : str, optional
        Name of the stack in a group that has several.
    dims : (row, column), optional
        Names of the core dimensions; by default the last two, where nothing else could be meant.
    packed : {"lower by rows", "lower by columns", "upper by rows", "upper by columns"}, optional
        The last dimension of the source, or that named by ``dims=(name,)``, has the n (n + 1) / 2 numbers of a triangle
        of each matrix, in this order. The other one is the same, or its conjugate for "hermitian" and "positive
        definite", or 0 for triangular matrices.
    complex_dim : str, optional
        A dimension of length two has the real and the imaginary parts. (Records with fields r and i are taken for
        complex numbers by themselves.)
    imag : str, optional
        Name of the array that has the imaginary parts of `variable`.
    select : mapping, optional
        Invert a part of the stack: labels of batch dimensions, or slices of them, as Xarray's ``sel`` takes them,
        ``{"time": "2026-01-02", "y": slice(0, 99)}``; of dimensions without labels numbers. No dimension goes.
    mask : str, optional
        Name of an array in the group that is not 0, or missing, where a matrix is to be left out, as in NumPy's masked
        arrays; with a ``~`` before it, ``"~valid"``, where it is 0 or missing. Its dimensions are among those of the
        stack. Such matrices get ``info`` -5 and NaN, and are no failures. What is not stored of it is its fill value.
    assume_a, lower, device, precision
        As in `dask_batchinv.inverse`.
    min_rcond : float
        A matrix whose rcond is smaller gets ``info`` -3 and NaN.
    max_failed : int, str or None
        How many matrices may fail before `JobFailedError` is raised: a number, a share such as ``"0.1%"``, None for any
        number; or by kind, ``"not_finite=any,singular=0"``, where kinds that are not named count together against what
        has no name, by default 0. The target is complete all the same.
    client : distributed.Client, optional
        The cluster to use; by default the active one, as everything in Dask does, or in a Dask task that of the task.
    scheduler : str, optional
        Address of a scheduler to connect to instead, ``tcp://host:port``; by default that of the Dask configuration,
        ``scheduler-address``. With none of these, a cluster of local processes is started, which import nothing of the
        caller's script. A job that reads and writes no more than ``batchinv.job.in-process`` runs on threads of this
        process instead, unless something is said of the cluster.
    scheduler_file : str or path, optional
        The file to which a scheduler has written its address.
    wait_for_workers : int, optional
        Begin when a running cluster has so many workers; by default one.
    wait : str or float, optional
        How long to wait for them, and for `scheduler_file`, ``"2h"`` or in seconds; by default half a minute.
    only_workers : sequence of str
        Of a running cluster, use only workers whose name, address or host matches one of these patterns, ``"gpu-*"``,
        or that have a resource, ``"resource:NAME"``.
    workers, threads_per_worker, memory_limit
        Of that local cluster: by default a process per core with one thread and its share of the memory.
    tile_size : int or str
        Bytes of a tile, the unit of work and the chunk of the target.
    missing : {"error", "fill"}
        What it means if a chunk of the source is not in its store: damage, or matrices of its fill value.
    bad_chunks : {"error", "nan"}
        What becomes of a target if chunks of the source cannot be read: the matrices in them are NaN with ``info`` -4,
        all others are inverted, and the target is not complete; with "nan" it is, and they count as failed.
    keep : {"inverse", "diagonal"}
        What of the inverses goes to the target; the diagonal of one has n numbers, ``diagonal`` ``(*, n)``.
    logdet : bool
        Whether also ``logdet`` ``(*,)``, the logarithm of the absolute value of each determinant, and its ``sign``
        (complex: its phase) go there.
    dtype : str or dtype, optional
        As what the results are stored: "float32", "float64", "complex64" or "complex128", by default that of
        `inverse`. They are computed in the wider one of the two; what has no room in it overflows, ``info`` -2.
    like_source : bool
        With `packed`, `complex_dim` or `imag`: store the inverses in that form, too, the imaginary parts in ``imag``.
    names : mapping, optional
        Other names for arrays of the target, ``{"inverse": "precision"}``.
    compress : str, optional
        By what its chunks are compressed: "zstd" or "blosc" (Zstandard, bytes shuffled), or with a level, "zstd:9".
        Inverses of measured numbers lose a tenth of their bytes at most.
    chunks : mapping, optional
        How long its chunks are along batch dimensions, ``{"y": 100, "x": 100}``; along others as `tile_size` has it.
        Matrices are not cut.
    shards : mapping, optional
        Let many chunks stand in one shard, so long along these dimensions: a shard is the unit of work then, and the
        chunks in it are as long as `chunks` says.
    zarr_format : {3, 2}
        With 2 the target has documents of format 2 as well, for programs that read nothing else. Its chunks then carry
        no checksums of their own; the ledger has them all the same.
    overwrite : bool
        Replace a target of dask_batchinv, of another job or of this one, from the beginning. A finished one stays as it
        is, for those who read it, until the new one, which is built beside it, takes its place: there must be room for
        both. What is not a target of dask_batchinv is never replaced.
    trust_ledger : bool
        Do not read back what earlier runs have recorded, nor look whether it is still there.
    durable : bool
        Record a tile only when the operating system says that it is on the disk, so that a power failure loses
        nothing that is recorded; slower. Without it that takes only a file system that orders its writes.
    insecure : bool
        Allow a `scheduler` on another machine that is not reached by ``tls://``.
    restart_stalled : bool
        Restart workers that give no result for ``batchinv.job.patience`` even if the cluster is not our own: whatever
        others have on them is lost.
    dashboard : int, optional
        Port of this machine on which the local cluster serves Dask's dashboard; by default there is none.
    progress : bool, optional
        Whether to show how far the job is, on standard error; by default on a terminal and in a notebook.
    on_progress : callable, optional
        Called with a `Progress` every now and then.

    Returns
    -------
    JobReport

    Raises
    ------
    RefusedError
        `SourceError`, `TargetError`, `PlanError` or `ClusterError`, before anything was written.
    JobFailedError
        If tiles could not be done, or more than `max_failed` matrices have no inverse; its ``report`` has all.
    InterruptedJob
        The `KeyboardInterrupt` of a job: the same call goes on with the rest.
    """
    job, cluster = _prepared(locals())
    try:
        with display.shown(enabled=progress) as show:
            report = run_job(job, cluster, all_of(show, on_progress))
    except InterruptedWhenDone:
        raise
    except KeyboardInterrupt as error:
        raise InterruptedJob(INTERRUPTED_CALL) from error
    if report.exit_code:
        raise JobFailedError(report)
    return report


def plan_store(source: AnyPlace, target: AnyPlace, **options: Any) -> Plan:
    """Return what `invert_store` would do with the same arguments: tiles, bytes, the memory of a worker.

    Nothing is written. A cluster that is named, or in use, is asked for its workers.

    Parameters
    ----------
    source, target, **options
        As for `invert_store`.

    Raises
    ------
    RefusedError
        As `invert_store` would.
    """
    call = inspect.signature(invert_store).bind(source, target, **options)
    call.apply_defaults()
    job, cluster = _prepared(call.arguments)
    return plan_job(job, cluster)


def status(
    target: AnyPlace,
    *,
    source: AnyPlace | None = None,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
) -> Status:
    """Return how far a target is, whether a run is at work on it, and whether it is up to date with its source.

    Of the source coordinates are read; its chunks are listed.

    Parameters
    ----------
    target : as for `invert_store`
        What it has written, or writes.
    source : as for `invert_store`, optional
        What it was made from, if that has another address now.
    source_options, target_options : mapping, optional
        What the file systems of fsspec are given.

    Raises
    ------
    TargetError
        If there is no target of ours.
    """
    there = _located(target, target_options, TargetError)
    if source is None:
        return status_of(there, given=source_options)
    return status_of(there, _located(source, source_options, SourceError))


def report_store(target: AnyPlace, *, target_options: Mapping[str, Any] | None = None) -> TargetReport:
    """Return what a target tells, complete or not, while a run is at work on it or not.

    Failures by kind, with the indices and coordinates of the first; where in the stack they are; how the other matrices
    are conditioned; what runs, workers and tiles have done. In a notebook it shows itself in short;
    ``to_html("report.html")`` writes a page with pictures, for which Matplotlib is needed.

    It takes seconds for any stack: where that has more than four million matrices, or 4,096 tiles, pictures are drawn
    from the ledger and from some tiles, and say so.

    Parameters
    ----------
    target : as for `invert_store`
        What it has written, or writes.
    target_options : mapping, optional
        What its file system is given.

    Raises
    ------
    TargetError
        If there is no target of ours.
    """
    return report_of(_located(target, target_options, TargetError))


def verify_store(
    target: AnyPlace,
    *,
    source: AnyPlace | None = None,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    sample: float = 1.0,
    client: Client | None = None,
    scheduler: str | None = None,
    scheduler_file: str | os.PathLike[str] | None = None,
    wait_for_workers: int | None = None,
    wait: str | float | None = None,
    only_workers: Sequence[str] = (),
    workers: int | None = None,
    threads_per_worker: int | None = None,
    memory_limit: str | int | None = None,
    insecure: bool = False,
    dashboard: int | None = None,
    progress: bool | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Read a target back, every chunk of its three arrays, and check it.

    Each tile must be there with the checksums that the ledger has of it, its inverses NaN exactly where ``info`` is
    not 0, and its counts those of the ledger. With `source`, every good inverse is multiplied with its matrix.
    What it finds, `invert_store` repairs.

    Parameters
    ----------
    target : as for `invert_store`
        What it has written.
    source : as for `invert_store`, optional
        What it was made from.
    source_options, target_options : mapping, optional
        What the file systems of fsspec are given.
    sample : float
        Share of the tiles whose inverses are multiplied; every chunk is read all the same.
    client, scheduler, scheduler_file, wait_for_workers, wait, only_workers
        The cluster, as for `invert_store`.
    workers, threads_per_worker, memory_limit, insecure
        The cluster, as for `invert_store`.
    dashboard, progress, on_progress
        As for `invert_store`.

    Returns
    -------
    VerifyReport
        Its ``ok`` says whether all is well.

    Raises
    ------
    RefusedError
        If there is no target of ours, or `source` is not what it was made from.
    InterruptedJob
        The `KeyboardInterrupt` of a verification.
    """
    from dask_batchinv.job.driver.verify import verify

    check_optimized()
    cluster = _cluster_options(locals())
    there = _located(target, target_options, TargetError)
    options = JobOptions() if source is None else options_of(existing(there)[1])
    made_from = None if source is None else _source(source, source_options, options, None)
    try:
        with display.shown(enabled=progress) as show:
            return verify(there, made_from, cluster, sample, all_of(show, on_progress))
    except KeyboardInterrupt as error:
        raise InterruptedJob("Interrupted: the target was not verified to its end.") from error


def _prepared(given: Mapping[str, Any]) -> tuple[Job, ClusterOptions]:
    """Return the job that the arguments of `invert_store` describe, and the cluster for it."""
    check_optimized()
    taken = {field.name: given[field.name] for field in fields(JobOptions)}
    taken |= {
        "select": as_text(given["select"]),
        **{name: {} if given[name] is None else given[name] for name in ("names", "chunks")},
    }
    options, cluster = JobOptions(**taken), _cluster_options(given)
    source = _source(given["source"], given["source_options"], options, given["token"])
    return prepare(source, _located(given["target"], given["target_options"], TargetError), options), cluster


def _cluster_options(given: Mapping[str, Any]) -> ClusterOptions:
    return ClusterOptions(**{field.name: given[field.name] for field in fields(ClusterOptions) if field.name in given})


def _source(
    place: AnyPlace, given: Mapping[str, Any] | None, options: JobOptions, token: str | None
) -> Location | Source:
    """Return where a source is, or what it is computed from."""
    package = type(place).__module__.partition(".")[0]
    if package == "icechunk" and not is_repository(place):
        try:
            return locate_snapshot(place, token)
        except ValueError as error:
            raise SourceError(str(error)) from error
    if package not in ("dask", "xarray"):
        return _located(place, given, SourceError)
    from dask_batchinv.job.source.lazy import open_lazy  # with it Dask's arrays are imported

    return open_lazy(place, options, token)


def _located(place: AnyPlace, options: Mapping[str, Any] | None, refusal: type[RefusedError]) -> Location:
    try:
        return locate(place, options)
    except ValueError as error:
        raise refusal(str(error)) from harmless(error)
