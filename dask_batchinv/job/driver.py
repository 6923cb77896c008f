"""The driver: keeps a bounded window of tiles on the cluster, and records what is done."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from distributed import Client

from dask_batchinv.job import target as targets
from dask_batchinv.job.cluster import ClusterOptions, Workers, check_reach, check_versions, connect, count_gpus
from dask_batchinv.job.ledger import FAILED, Ledger
from dask_batchinv.job.lock import Lock, LockLostError, locked, sweep
from dask_batchinv.job.plan import Plan
from dask_batchinv.job.prepare import Job, Options, plan_for, prepare
from dask_batchinv.job.proof import ProofTask, prove_tiles, spans_to_prove
from dask_batchinv.job.report import FailedTile, JobFailedError, JobReport, first_failed
from dask_batchinv.job.source import Missing
from dask_batchinv.job.tile import TileResult, TileTask, run_tiles
from dask_batchinv.job.versions import versions
from dask_batchinv.job.window import ClusterLostError, run_on_cluster
from dask_batchinv.outcome import TargetError
from dask_batchinv.place import redact
from dask_batchinv.stack import AssumeA, Device

#: Seconds between two writes of the ledger, at least.
FLUSH_SECONDS = 1.0
#: How often the ledger is written at the end of a run before that is given up, and seconds between, doubled each time.
FINAL_ATTEMPTS = 5
BACK_OFF_SECONDS = 0.25


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    activity: Literal["checking", "inverting"]
    """What it does: read back what earlier runs have done, or the rest."""
    matrices: int
    """Matrices in the stack."""
    matrices_done: int
    """Matrices accounted for, by earlier runs too."""
    matrices_before: int
    """Of these, by earlier runs."""
    failed: int
    """Matrices without an inverse."""
    failed_tiles: int
    """Tiles given up."""
    seconds: float
    """Time since this run began."""


OnProgress = Callable[[Progress], None]


def invert_store(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    variable: str | None = None,
    dims: Sequence[str] | None = None,
    assume_a: AssumeA = "general",
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
    on_progress: OnProgress | None = None,
) -> JobReport:
    """Invert every matrix of a Zarr store into another, on a Dask cluster.

    Call it again after an interruption, of any kind: it reads back what is recorded as done, by its checksums, and
    does what is left or damaged, with the same bits. One run at a time may work on a target.

    Parameters
    ----------
    source : str or path
        A Zarr array ``(*, n, n)``, or a group with `variable` in it; format 2 or 3, a path or an fsspec URL.
        Credentials come from the environment, as the file system expects them.
    target : str or path
        A Zarr group to create, or to continue: ``inverse`` ``(*, n, n)``, ``info`` and ``rcond`` ``(*,)``, with
        the dimension names and coordinates of the source. `xarray.open_zarr` opens it at any time; its attribute
        ``complete`` says whether it is finished.
    variable : str, optional
        Name of the stack in a group that has several.
    dims : (row, column), optional
        Names of the core dimensions; by default the last two.
    assume_a, device
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
        processes is started; a script then needs an ``if __name__ == "__main__":`` around its call.
    workers, threads_per_worker, memory_limit
        Of that local cluster: by default a process per core with one thread and its share of the memory.
    tile_size : int or str
        Bytes of a tile, the unit of work and the chunk of the target.
    missing : {"error", "fill"}
        What it means if a chunk of the source is not in its store: damage, or matrices of its fill value.
    overwrite : bool
        Replace a target that belongs to another job. What is not a target of dask_batchinv is never replaced.
    trust_ledger : bool
        Do not read back what earlier runs have recorded.
    durable : bool
        Record a tile only when the operating system says that it is on the disk, so that a power failure loses
        nothing that is recorded; slower. Without it that takes only a file system that orders its writes.
    insecure : bool
        Allow a `scheduler` on another machine that is not reached by ``tls://``.
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
    options = Options(
        variable=variable, dims=dims, assume_a=assume_a, min_rcond=min_rcond, max_failed=max_failed, device=device,
        missing=missing, tile_size=tile_size, overwrite=overwrite, trust_ledger=trust_ledger, durable=durable,
    )  # fmt: skip
    cluster = ClusterOptions(
        client, scheduler, workers, threads_per_worker, memory_limit, insecure=insecure, device=device
    )
    report = run_job(prepare(source, target, options), cluster, on_progress)
    if report.exit_code:
        raise JobFailedError(report)
    return report


def run_job(job: Job, options: ClusterOptions, on_progress: OnProgress | None = None) -> JobReport:
    """Run a prepared job to its end and return the report, whatever it says."""
    on_progress = on_progress or _nobody_looks
    if job.complete and job.options.trust_ledger and (ledger := Ledger(job.target, read_only=True)).done.all():
        nobody = Workers(0, 0, None)
        return _report(job, plan_for(job, nobody), nobody, _Outcome(), ledger)
    with connect(options) as (client, workers):
        if not options.embedded:  # whose workers are what we are
            check_versions(client)
            workers = replace(workers, gpus=count_gpus(job.options.device, client))
        plan = plan_for(job, workers)
        check_reach(client, job.source, job.target)
        run = _Run(client, workers, job, plan, on_progress)
        if job.complete:
            ledger = Ledger(job.target, read_only=True)
            run.prove(ledger)
            if ledger.done.all():  # nothing is locked or written where nothing is wrong
                sweep(job.target)
                return _report(job, plan, workers, run.outcome, ledger)
        with locked(job.target) as lock:
            return run.under(lock)


@dataclass
class _Outcome:
    """What one run did."""

    tiles: int = 0
    retries: int = 0
    seconds: float = 0.0
    proven: int | None = None
    failed: list[TileResult] = field(default_factory=list)
    damaged: list[TileResult] = field(default_factory=list)
    stopped: str | None = None


@dataclass
class _Run:
    """One run of a job on a cluster."""

    client: Client
    workers: Workers
    job: Job
    plan: Plan
    on_progress: OnProgress
    outcome: _Outcome = field(default_factory=_Outcome)

    def under(self, lock: Lock) -> JobReport:
        """Create the target or continue it, while nobody else may."""
        job, plan, outcome = self.job, self.plan, self.outcome
        if job.begun is None:
            targets.create(job.target, job.source, plan.tiling, job.fingerprint, overwrite=job.options.overwrite)
        begun = targets.look(job.target)  # again: another run may have been at work until now
        if begun is None or begun.fingerprint != job.fingerprint or begun.tile != plan.tiling.tile:
            raise TargetError(f"{job.target.name} was changed by another run meanwhile: run the command again")
        with _as_os_error(f"the ledger of {job.target.name} cannot be opened"):
            ledger = Ledger(job.target, durable=job.options.durable)
        try:
            for result in outcome.damaged:
                ledger.forget(result.number)
            if outcome.proven is None and job.begun is not None and not job.options.trust_ledger:
                self.prove(ledger)
            if begun.complete and not ledger.done.all():
                with _as_os_error(f"{job.target.name} cannot be written"):
                    targets.reopen(job.target)
            if outcome.stopped is None:
                self._invert(begun.generation, ledger, lock)
        finally:
            # Also when interrupted: what is recorded is not done again.
            self._flush(ledger, FINAL_ATTEMPTS)
        with _as_os_error(f"{job.target.name} cannot be finished"):
            targets.sweep(job.target)
            if ledger.done.all() and outcome.stopped is None:
                targets.finish(job.target, durable=job.options.durable)
        return _report(job, plan, self.workers, outcome, ledger)

    def prove(self, ledger: Ledger) -> None:
        """Read back what earlier runs have recorded, and forget those tiles that are not what was written."""
        start, outcome = time.monotonic(), self.outcome
        outcome.proven, recorded, matrices = 0, int(ledger.done.sum()), ledger.total("matrices")
        spans = spans_to_prove(np.flatnonzero(ledger.done), self.plan.tile_nbytes)
        task = ProofTask(uuid.uuid4().hex, self.job.target, self.plan.tiling)
        try:
            for result, _ in run_on_cluster(self.client, prove_tiles, task, spans, attempts=1):
                if result is not None and result.row is not None:
                    outcome.proven += result.row["proven"]
                elif result is not None:
                    outcome.damaged.append(result)
                    ledger.forget(result.number)
                share = (outcome.proven + len(outcome.damaged)) / max(1, recorded)
                self.on_progress(
                    Progress(
                        activity="checking",
                        matrices=matrices,
                        matrices_done=round(share * matrices),
                        matrices_before=0,
                        failed=0,
                        failed_tiles=len(outcome.damaged),
                        seconds=time.monotonic() - start,
                    )
                )
        except ClusterLostError as error:
            outcome.stopped = str(error)

    def _invert(self, generation: str, ledger: Ledger, lock: Lock) -> None:
        start, flushed, outcome = time.monotonic(), -FLUSH_SECONDS, self.outcome
        before = done = ledger.total("matrices")
        without_inverse = sum(ledger.failed.values())
        task, tiling = self._task(generation), self.plan.tiling
        spans = tiling.spans(map(int, np.flatnonzero(~ledger.done)), self.plan.span)
        try:
            for result, attempts in run_on_cluster(self.client, run_tiles, task, spans):
                lock.check()
                outcome.retries += max(0, attempts - 1)
                if result is not None and result.row is not None:
                    outcome.tiles += 1
                    done += result.row["matrices"]
                    without_inverse += sum(result.row[kind] for kind in FAILED)
                    ledger.record(result.number, result.row | {"attempts": attempts})
                elif result is not None:
                    outcome.failed.append(result)
                    if result.stops:
                        outcome.stopped = result.error
                now = time.monotonic()
                outcome.seconds = now - start
                if now - flushed > FLUSH_SECONDS:
                    self._flush(ledger)
                    flushed = now
                self.on_progress(
                    Progress(
                        activity="inverting",
                        matrices=tiling.n_matrices,
                        matrices_done=done,
                        matrices_before=before,
                        failed=without_inverse,
                        failed_tiles=len(outcome.failed),
                        seconds=now - start,
                    )
                )
        except (ClusterLostError, LockLostError) as error:
            outcome.stopped = str(error)
        outcome.failed.sort(key=lambda result: result.number)

    def _task(self, generation: str) -> TileTask:
        job = self.job
        return TileTask(
            run=uuid.uuid4().hex,
            source=job.source,
            target=job.target,
            generation=generation,
            tiling=self.plan.tiling,
            assume_a=job.options.assume_a,
            device=job.options.device,
            min_rcond=job.options.min_rcond,
            missing=job.options.missing,
            durable=job.options.durable,
            versions=tuple(sorted(versions().items())),
        )

    def _flush(self, ledger: Ledger, attempts: int = 1) -> None:
        """Write the ledger. What fails during a run is tried again later, by itself; at its end that must be known."""
        for attempt in range(attempts):
            try:
                ledger.flush()
                return
            except Exception as error:  # whatever a file system may raise
                cause = redact(f"the ledger cannot be written: {type(error).__name__}: {error}")
            if attempt < attempts - 1:
                time.sleep(BACK_OFF_SECONDS * 2**attempt)
        if attempts > 1:
            self.outcome.stopped = self.outcome.stopped or cause


@contextmanager
def _as_os_error(what: str) -> Iterator[None]:
    """Turn whatever a file system may raise into an OSError, without credentials."""
    try:
        yield
    except Exception as error:
        raise OSError(redact(f"{what}: {type(error).__name__}: {error}; run the command again")) from error


def _nobody_looks(progress: Progress) -> None:
    """Take no notice of progress."""


def _notes(job: Job, outcome: _Outcome) -> tuple[str, ...]:
    notes = []
    if not outcome.tiles and not outcome.failed and outcome.stopped is None:
        notes.append("nothing was left to do")
    if any("MissingChunkError" in (result.error or "") for result in outcome.failed):
        notes.append("if chunks that are not stored stand for matrices of the fill value, pass --missing fill")
    if not job.source.checksummed:
        notes.append("unchecked: the source has no checksums, so that damage to it cannot be noticed")
    return tuple(notes)


def _report(job: Job, plan: Plan, workers: Workers, outcome: _Outcome, ledger: Ledger) -> JobReport:
    tiles_done = int(ledger.done.sum())
    share = outcome.tiles / max(1, plan.tiling.n_tiles)
    return JobReport(
        source=job.source.place.name,
        target=job.target.name,
        matrices=plan.tiling.n_matrices,
        matrices_done=ledger.total("matrices"),
        failed=ledger.failed,
        first_failed=first_failed(job.target, plan.tiling, ledger),
        ill_conditioned=ledger.total("ill_conditioned"),
        smallest_rcond=ledger.smallest_rcond,
        max_failed=job.options.max_failed,
        tiles=plan.tiling.n_tiles,
        tiles_done=tiles_done,
        tiles_now=outcome.tiles,
        tiles_proven=outcome.proven or 0,
        damaged_tiles=tuple(FailedTile.of(result, plan.tiling) for result in outcome.damaged),
        failed_tiles=tuple(FailedTile.of(result, plan.tiling) for result in outcome.failed),
        stopped=outcome.stopped,
        retries=outcome.retries,
        seconds=outcome.seconds,
        bytes_read=round(plan.nbytes_in * share),
        bytes_written=round(plan.nbytes_out * share),
        workers=workers.count,
        threads_per_worker=workers.threads,
        kernel=job.kernel.name,
        devices=ledger.devices,
        source_checked=job.source.checksummed,
        notes=_notes(job, outcome),
    )
