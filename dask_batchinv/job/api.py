"""`invert_store` and `verify_store`: what users call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.driver.run import run_job
from dask_batchinv.job.options import JobOptions, Missing
from dask_batchinv.job.plan.prepare import prepare
from dask_batchinv.job.report.job_report import JobFailedError, JobReport
from dask_batchinv.job.report.run_record import OnProgress
from dask_batchinv.job.report.verify_report import VerifyReport
from dask_batchinv.job.versions import check_optimized
from dask_batchinv.stack import AssumeAWord, Device

if TYPE_CHECKING:  # to import Dask's cluster takes as long as a small job
    from distributed import Client


def invert_store(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    variable: str | None = None,
    dims: Sequence[str] | None = None,
    assume_a: AssumeAWord = "general",
    lower: bool = False,
    min_rcond: float = 0.0,
    max_failed: int | None = 0,
    device: Device = "auto",
    client: Client | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    threads_per_worker: int | None = None,
    memory_limit: str | int | None = None,
    tile_size: str | int | None = None,
    missing: Missing = "error",
    overwrite: bool = False,
    trust_ledger: bool = False,
    durable: bool = False,
    insecure: bool = False,
    restart_stalled: bool = False,
    on_progress: OnProgress | None = None,
) -> JobReport:
    """Invert every matrix of a Zarr store into another, on a Dask cluster.

    Call it again after an interruption, of any kind: it reads back what is recorded as done, by its checksums, and
    does what is left or damaged, with the same bits. Call it again on a finished target: it does what has changed in
    the source since, as far as its store tells, and what has been appended. One run at a time may work on a target.

    Parameters
    ----------
    source : str or path
        A Zarr array ``(*, n, n)``, or a group with `variable` in it; format 2 or 3, a path or an fsspec URL. Packed
        numbers (``scale_factor``, ``_FillValue``, …) are decoded as Xarray decodes them, missing ones to NaN.
        Credentials come from the environment, as the file system expects them.
    target : str or path
        A Zarr group to create, or to continue: ``inverse`` ``(*, n, n)``, ``info`` and ``rcond`` ``(*,)``, with
        the dimension names, coordinates and attributes that `Dataset.linalg.inv` would give. `xarray.open_zarr` opens
        it at any time; its attribute ``complete`` says whether it is finished: 1 or 0.
    variable : str, optional
        Name of the stack in a group that has several.
    dims : (row, column), optional
        Names of the core dimensions; by default the last two, where nothing else could be meant.
    assume_a, lower, device
        As in `dask_batchinv.inverse`.
    min_rcond : float
        A matrix whose rcond is smaller gets ``info`` -3 and NaN.
    max_failed : int or None
        How many matrices may fail before `JobFailedError` is raised; None for any number. The target is complete
        all the same.
    client : distributed.Client, optional
        The cluster to use.
    scheduler : str, optional
        Address of a scheduler to connect to instead, ``tcp://host:port``. With neither, a cluster of local
        processes is started; a script then needs an ``if __name__ == "__main__":`` around its call. A job that reads
        and writes no more than ``batchinv.job.in-process`` runs on threads of this process instead, unless something
        is said of the cluster.
    workers, threads_per_worker, memory_limit
        Of that local cluster: by default a process per core with one thread and its share of the memory.
    tile_size : int or str
        Bytes of a tile, the unit of work and the chunk of the target.
    missing : {"error", "fill"}
        What it means if a chunk of the source is not in its store: damage, or matrices of its fill value.
    overwrite : bool
        Replace a target of dask_batchinv, of another job or of this one, from the beginning. What is not a target of
        dask_batchinv is never replaced.
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
    """
    check_optimized()
    options = JobOptions(
        variable=variable, dims=dims, lower=lower, min_rcond=min_rcond, max_failed=max_failed, device=device,
        assume_a=assume_a,  # type: ignore[arg-type]  # may be short; its long form is what is kept
        missing=missing, tile_size=tile_size, overwrite=overwrite, trust_ledger=trust_ledger, durable=durable,
    )  # fmt: skip
    cluster = ClusterOptions(
        client,
        scheduler,
        workers,
        threads_per_worker,
        memory_limit,
        insecure=insecure,
        device=device,
        restart_stalled=restart_stalled,
    )
    report = run_job(prepare(source, target, options), cluster, on_progress)
    if report.exit_code:
        raise JobFailedError(report)
    return report


def verify_store(
    target: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    sample: float = 1.0,
    client: Client | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    threads_per_worker: int | None = None,
    memory_limit: str | int | None = None,
    insecure: bool = False,
) -> VerifyReport:
    """Read a target back, every chunk of its three arrays, and check it.

    Each tile must be there with the checksums that the ledger has of it, its inverses NaN exactly where ``info`` is
    not 0, and its counts those of the ledger. With `source`, every good inverse is multiplied with its matrix.
    What it finds, `invert_store` repairs.

    Parameters
    ----------
    target : str or path
        What `invert_store` has written.
    source : str or path, optional
        What it was made from.
    sample : float
        Share of the tiles whose inverses are multiplied; every chunk is read all the same.
    client, scheduler, workers, threads_per_worker, memory_limit, insecure
        The cluster, as for `invert_store`.

    Returns
    -------
    VerifyReport
        Its ``ok`` says whether all is well.

    Raises
    ------
    RefusedError
        If there is no target of ours, or `source` is not what it was made from.
    """
    from dask_batchinv.job.driver.verify import verify

    check_optimized()
    cluster = ClusterOptions(client, scheduler, workers, threads_per_worker, memory_limit, insecure=insecure)
    return verify(target, source, cluster, sample)
