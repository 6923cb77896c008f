"""The driver: keeps a bounded window of tiles on the cluster, and records what is done."""

from __future__ import annotations

import heapq
import os
import queue
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dask.config
import numpy as np
from distributed import Client, Future
from distributed.client import CancelledError
from distributed.comm import CommClosedError

from dask_batchinv.job import target as targets
from dask_batchinv.job.cluster import ClusterOptions, Workers, check_reach, connect
from dask_batchinv.job.ledger import FAILED, Ledger
from dask_batchinv.job.plan import Plan
from dask_batchinv.job.prepare import Job, Options, plan_for, prepare
from dask_batchinv.job.report import FailedTile, JobFailedError, JobReport, first_failed
from dask_batchinv.job.source import Missing
from dask_batchinv.job.tile import TileResult, TileTask, run_tile
from dask_batchinv.place import redact
from dask_batchinv.stack import AssumeA, Device

#: Tiles on the cluster per thread: one at work, two that keep the thread from waiting for us.
WINDOW_PER_THREAD = 3
#: Seconds between two writes of the ledger, at least.
FLUSH_SECONDS = 1.0
#: Seconds before a failed tile is tried again, doubled each time.
BACK_OFF_SECONDS = 0.25


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

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


class ClusterLostError(ConnectionError):
    """The scheduler was lost while a job was running."""


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
    on_progress: OnProgress | None = None,
) -> JobReport:
    """Invert every matrix of a Zarr store into another, on a Dask cluster.

    Call it again after an interruption, of any kind: it does what is left, with the same bits. If nothing is
    left it returns at once.

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
        missing=missing, tile_size=tile_size, overwrite=overwrite,
    )  # fmt: skip
    cluster = ClusterOptions(client, scheduler, workers, threads_per_worker, memory_limit)
    report = run_job(prepare(source, target, options), cluster, on_progress)
    if report.exit_code:
        raise JobFailedError(report)
    return report


def run_job(job: Job, options: ClusterOptions, on_progress: OnProgress | None = None) -> JobReport:
    """Run a prepared job to its end and return the report, whatever it says."""
    if job.complete and (ledger := Ledger(job.target, read_only=True)).done.all():
        nobody = Workers(0, 0, None)
        return _report(job, plan_for(job, nobody), nobody, _Outcome(), ledger)
    with connect(options) as (client, workers):
        plan = plan_for(job, workers)
        check_reach(client, job.source, job.target)
        if job.begun is None:
            targets.create(job.target, job.source, plan.tiling, job.fingerprint, overwrite=job.options.overwrite)
        task = TileTask(
            run=uuid.uuid4().hex,
            source=job.source,
            target=job.target,
            tiling=plan.tiling,
            assume_a=job.options.assume_a,
            device=job.options.device,
            min_rcond=job.options.min_rcond,
            missing=job.options.missing,
        )
        ledger = Ledger(job.target)
        outcome = _invert_tiles(client, workers, task, ledger, on_progress or _nobody_looks)
    if ledger.done.all():
        targets.finish(job.target)
    return _report(job, plan, workers, outcome, ledger)


@dataclass
class _Outcome:
    """What one run did."""

    tiles: int = 0
    retries: int = 0
    seconds: float = 0.0
    failed: tuple[TileResult, ...] = ()
    lost: str | None = None


def _invert_tiles(
    client: Client, workers: Workers, task: TileTask, ledger: Ledger, on_progress: OnProgress
) -> _Outcome:
    outcome, failed = _Outcome(), []
    start, flushed = time.monotonic(), -FLUSH_SECONDS
    before = done = ledger.total("matrices")
    without_inverse = sum(ledger.failed.values())
    todo = np.flatnonzero(~ledger.done).tolist()
    try:
        for result, attempts in run_tiles(client, workers, run_tile, task, todo):
            outcome.retries += max(0, attempts - 1)
            if result is None:
                pass
            elif result.row is None:
                failed.append(result)
            else:
                outcome.tiles += 1
                done += result.row["matrices"]
                without_inverse += sum(result.row[kind] for kind in FAILED)
                ledger.record(result.number, result.row | {"attempts": attempts})
            now = time.monotonic()
            if now - flushed > FLUSH_SECONDS:
                ledger.flush()
                flushed = now
            on_progress(
                Progress(
                    matrices=task.tiling.n_matrices,
                    matrices_done=done,
                    matrices_before=before,
                    failed=without_inverse,
                    failed_tiles=len(failed),
                    seconds=now - start,
                )
            )
    except ClusterLostError as error:
        outcome.lost = str(error)
    finally:
        # Also when interrupted: what is recorded is not done again.
        ledger.flush()
    outcome.seconds = time.monotonic() - start
    outcome.failed = tuple(sorted(failed, key=lambda result: result.number))
    return outcome


def run_tiles(
    client: Client,
    workers: Workers,
    function: Callable[[Any, int], TileResult],
    task: Any,
    numbers: Iterable[int],
    *,
    attempts: int | None = None,
) -> Iterator[tuple[TileResult | None, int]]:
    """Run ``function(task, number)`` on the cluster for all `numbers`, a few at a time.

    A tile that fails is tried again, `attempts` times in all; by default the Dask configuration
    ``batchinv.job.attempts`` says how often.

    Yields
    ------
    result, attempts
        Each tile once, with how often it was tried; its result has an error if it failed every time. A result of
        None is a sign of life, yielded every second.

    Raises
    ------
    ClusterLostError
        If the scheduler is lost.
    """
    window = _Window(client, function, task, attempts or int(dask.config.get("batchinv.job.attempts")))
    most = WINDOW_PER_THREAD * workers.count * workers.threads
    todo = iter(numbers)
    exhausted = False
    try:
        while True:
            window.retry_due()
            while not exhausted and window.size < most:
                if (number := next(todo, None)) is None:
                    exhausted = True
                else:
                    window.submit(number)
            if exhausted and window.size == 0:
                return
            yield from window.collect()
    finally:
        window.cancel()


class _Window:
    """The tiles that are on the cluster, or wait to be tried again."""

    def __init__(self, client: Client, function: Callable[[Any, int], TileResult], task: Any, attempts: int):
        self._client = client
        self._function = function
        self._task = task
        self._attempts = attempts
        self._tried: dict[int, int] = {}
        self._running: dict[Future, int] = {}
        self._waiting: list[tuple[float, int]] = []
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()

    @property
    def size(self) -> int:
        return len(self._running) + len(self._waiting)

    def submit(self, number: int) -> None:
        self._tried[number] = self._tried.get(number, 0) + 1
        future = self._client.submit(
            self._function, self._task, number, pure=False, key=f"tile-{number}-{uuid.uuid4().hex}"
        )
        self._watch(future, number)

    def _watch(self, future: Future, number: int) -> None:
        self._running[future] = number
        future.add_done_callback(self._finished.put)

    def retry_due(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            self.submit(heapq.heappop(self._waiting)[1])

    def collect(self) -> Iterator[tuple[TileResult | None, int]]:
        """Wait up to a second for tiles to finish, and yield those that are not to be tried again."""
        patience = 1.0
        if self._waiting:
            patience = min(patience, max(0.01, self._waiting[0][0] - time.monotonic()))
        try:
            futures = [self._finished.get(timeout=patience)]
        except queue.Empty:
            if self._client.status not in ("running", "connecting"):
                raise ClusterLostError("the connection to the scheduler was closed") from None
            yield None, 0
            return
        while not self._finished.empty():
            futures.append(self._finished.get())
        for future in futures:
            number = self._running.pop(future)
            result = self._result(future, number)
            if result is None:
                # The worker died with the result. Dask does the tile again by itself.
                self._watch(future, number)
                continue
            tried = self._tried[number]
            if result.error is not None and tried < self._attempts:
                due = time.monotonic() + BACK_OFF_SECONDS * 2 ** (tried - 1)
                heapq.heappush(self._waiting, (due, number))
            else:
                del self._tried[number]
                yield result, tried

    def _result(self, future: Future, number: int) -> TileResult | None:
        status = future.status
        if status in ("pending", "lost"):
            return None
        try:
            result: TileResult = future.result()
            return result
        except (CancelledError, CommClosedError) as error:
            raise ClusterLostError("the scheduler was lost") from error
        except Exception as error:  # not of the tile's own making: a worker that died too often, for one
            return TileResult(number, None, redact(f"{type(error).__name__}: {error}"))

    def cancel(self) -> None:
        if self._running and self._client.status == "running":
            self._client.cancel(list(self._running), force=True)


def _nobody_looks(progress: Progress) -> None:
    """Take no notice of progress."""


def _notes(outcome: _Outcome) -> tuple[str, ...]:
    notes = []
    if not outcome.tiles and not outcome.failed and not outcome.lost:
        notes.append("nothing was left to do")
    if any("MissingChunkError" in (result.error or "") for result in outcome.failed):
        notes.append("if chunks that are not stored stand for matrices of the fill value, pass --missing fill")
    if outcome.lost:
        notes.append(outcome.lost)
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
        failed_tiles=tuple(FailedTile.of(result, plan.tiling) for result in outcome.failed),
        retries=outcome.retries,
        seconds=outcome.seconds,
        bytes_read=round(plan.nbytes_in * share),
        bytes_written=round(plan.nbytes_out * share),
        workers=workers.count,
        threads_per_worker=workers.threads,
        kernel=job.kernel.name,
        source_checked=job.source.checksummed,
        notes=_notes(outcome),
    )
