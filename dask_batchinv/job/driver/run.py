"""One run of a job: create, read back, invert, finish; and what is done is recorded."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

import dask.config
import numpy as np

from dask_batchinv.job.driver.cluster import ClusterOptions, check_reach, check_versions, connect, count_gpus
from dask_batchinv.job.driver.dispatch import ClusterLostError, Dispatcher
from dask_batchinv.job.driver.executor import Executor, Heartbeat, Serial
from dask_batchinv.job.outputs import LEDGER
from dask_batchinv.job.plan.plan import Plan, Workers
from dask_batchinv.job.plan.prepare import Job, plan_for
from dask_batchinv.job.report.account import make_account
from dask_batchinv.job.report.job_report import JobReport
from dask_batchinv.job.report.run_record import OnProgress, Progress, RunRecord, RunTotals, ignore
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.ledger import ROWS_PER_CHUNK, Ledger, record_run
from dask_batchinv.job.target.lock import Lock, LockLostError, locked, remove_stale_lock
from dask_batchinv.job.target.state import State, Target
from dask_batchinv.job.versions import versions
from dask_batchinv.job.worker.invert_tiles import TileTask, invert_tiles
from dask_batchinv.job.worker.read_back import ReadBackTask, read_back_tiles
from dask_batchinv.location import raised_as
from dask_batchinv.outcome import TargetError
from dask_batchinv.stack import result_dtype
from dask_batchinv.text import redact

#: What to do about a store that fails.
AGAIN = "; run the command again"
#: Seconds between two writes of the ledger, at least.
FLUSH_SECONDS = 1.0
#: How often the ledger is written at the end of a run before that is given up, and seconds between, doubled each time.
FINAL_ATTEMPTS = 5
FLUSH_BACK_OFF_SECONDS = 0.25
#: Tiles of at most so many bytes are read back at a time.
READ_BACK_NBYTES = 2**26


def run_job(job: Job, options: ClusterOptions, on_progress: OnProgress | None = None) -> JobReport:
    """Run a prepared job to its end and return the report, whatever it says."""
    on_progress = on_progress or ignore
    if job.action == "check" and job.options.trust_ledger and Ledger(job.target, read_only=True).done.all():
        nobody = Workers(0, 0, None)  # nothing is left to do
        return Run(job, plan_for(job, nobody), nobody, Serial(), on_progress)()
    with connect(options) as (client, workers):
        if not options.is_local:  # local workers run this very environment
            check_versions(client)
            workers = replace(workers, gpus=count_gpus(job.options.device, client))
        plan = plan_for(job, workers)
        check_reach(client, job.source, job.target)
        return Run(job, plan, workers, Dispatcher(client), on_progress)()


@dataclass
class Run:
    """One run of a job."""

    job: Job
    """What to do."""
    plan: Plan
    """Its tiles."""
    workers: Workers
    """Who does it."""
    executor: Executor
    """How tiles get to them."""
    on_progress: OnProgress = ignore
    """Who wants to know."""
    totals: RunTotals = field(default_factory=RunTotals)
    """What was done so far."""

    def __call__(self) -> JobReport:
        """Bring the target to its end, and return the report."""
        job = self.job
        with ExitStack() as held:
            if job.action == "check":  # nothing is locked or written where nothing is wrong
                ledger = Ledger(job.target, read_only=True)
                self._read_back(ledger)
                if ledger.done.all():
                    remove_stale_lock(job.target)
                    return self.report(ledger)
            lock, target, ledger = self._begin(held)
            try:
                self._invert(target, ledger, lock)
                self._finish(target, ledger, lock)
            except LockLostError as error:  # nothing is written any more: the target is another run's
                self.totals.stopped = str(error)
            return self.report(ledger)

    def _begin(self, held: ExitStack) -> tuple[Lock, Target, Ledger]:
        """Lock the target until the run ends, create it where it is to be created, and open its ledger."""
        job, tiling = self.job, self.plan.tiling
        lock = held.enter_context(locked(job.target))
        if job.action == "create":
            source = job.source
            contents = targets.Contents(
                tiling, result_dtype(source.decoded_dtype), source.target_dims, source.read_coordinates(),
                source.attributes, source.group_attributes, job.options.assume_a,
            )  # fmt: skip
            targets.create(job.target, job.fingerprint, contents, overwrite=job.options.overwrite)
        target = targets.inspect(job.target)  # again: another run may have been at work until now
        if not target.is_there or target.fingerprint != job.fingerprint or target.tile != tiling.tile:
            raise TargetError(f"{job.target.name} was changed by another run meanwhile: run the command again")
        with raised_as(OSError, f"the {LEDGER} of {job.target.name} cannot be opened", AGAIN):
            ledger = Ledger(job.target, durable=job.options.durable)
        for result in self.totals.damaged:
            ledger.forget(result.number)
        return lock, target, ledger

    def _read_back(self, ledger: Ledger) -> None:
        """Read back what earlier runs have recorded, and forget those tiles that are not what was written."""
        if self.job.options.trust_ledger:
            return
        start, totals = time.monotonic(), self.totals
        recorded, matrices = int(ledger.done.sum()), ledger.total("matrices")
        task = ReadBackTask(uuid.uuid4().hex, self.job.target, self.plan.tiling)
        spans = spans_to_read_back(np.flatnonzero(ledger.done), self.plan.tile_nbytes)
        try:
            for result in self.executor.run(read_back_tiles, task, spans, attempts=1):
                if not isinstance(result, Heartbeat):
                    if result.value is not None:
                        totals.read_back += result.value
                    else:
                        totals.damaged.append(result)
                        ledger.forget(result.number)
                share = (totals.read_back + len(totals.damaged)) / max(1, recorded)
                seconds, damaged = time.monotonic() - start, len(totals.damaged)
                self.on_progress(Progress("checking", matrices, round(share * matrices), 0, 0, damaged, seconds))
        except ClusterLostError as error:
            totals.stopped = str(error)

    def _invert(self, target: Target, ledger: Ledger, lock: Lock) -> None:
        """Do the tiles that are not recorded, or not as they were written, and record them."""
        try:
            if self.job.action == "continue":
                self._read_back(ledger)
            if target.state is State.COMPLETE and not ledger.done.all():
                with raised_as(OSError, f"{self.job.target.name} cannot be written", AGAIN):
                    targets.mark_incomplete(self.job.target)
            if self.totals.stopped is None:
                self._invert_tiles(target.generation, ledger, lock)
        except ClusterLostError as error:
            self.totals.stopped = str(error)
        finally:
            # Also when interrupted: what is recorded is not done again, and damage that was found not forgotten.
            lock.check()
            self._flush(ledger, FINAL_ATTEMPTS)

    def _invert_tiles(self, generation: str, ledger: Ledger, lock: Lock) -> None:
        start, flushed, totals = time.monotonic(), -FLUSH_SECONDS, self.totals
        tiling, n_matrices = self.plan.tiling, self.plan.tiling.n_matrices
        before = done = ledger.total("matrices")
        without_inverse = sum(ledger.failed.values())
        spans = tiling.spans(map(int, np.flatnonzero(~ledger.done)), self.plan.tiles_per_task)
        attempts = int(dask.config.get("batchinv.job.attempts"))
        for result in self.executor.run(invert_tiles, self.task(generation), spans, attempts=attempts):
            lock.check()
            if not isinstance(result, Heartbeat):
                totals.add(result)
                if result.value is not None:
                    done += result.value.matrices
                    without_inverse += sum(result.value.failed.values())
                    ledger.record(result)
            now = time.monotonic()
            totals.seconds = now - start
            if now - flushed > FLUSH_SECONDS:
                self._flush(ledger)
                flushed = now
            self.on_progress(
                Progress("inverting", n_matrices, done, before, without_inverse, len(totals.failed), now - start)
            )

    def task(self, generation: str) -> TileTask:
        """Return what workers need to know to invert tiles of a target."""
        job = self.job
        return TileTask(uuid.uuid4().hex, job.source, job.target, generation, self.plan.tiling, job.options, versions())

    def _flush(self, ledger: Ledger, attempts: int = 1) -> None:
        """Write the ledger. What fails during a run is tried again later, by itself; at its end that must be known."""
        for attempt in range(attempts):
            try:
                ledger.flush()
                return
            except Exception as error:  # whatever a file system may raise
                cause = redact(f"the ledger cannot be written: {type(error).__name__}: {error}")
            if attempt < attempts - 1:
                time.sleep(FLUSH_BACK_OFF_SECONDS * 2**attempt)
        if attempts > 1:
            self.totals.stopped = self.totals.stopped or cause

    def _finish(self, target: Target, ledger: Ledger, lock: Lock) -> None:
        """Keep the record of the run, and mark the target as complete if it is."""
        location = self.job.target
        lock.check()
        with raised_as(OSError, f"{location.name} cannot be finished", AGAIN):
            targets.remove_partial_chunks(location)
            with suppress(Exception):  # the disk may be full: the report matters more
                if targets.generation_of(location) == target.generation:  # else it was moved or replaced
                    record_run(location, self._record().to_json())
            if ledger.done.all() and self.totals.stopped is None:
                targets.finish(location, durable=self.job.options.durable)

    def report(self, ledger: Ledger) -> JobReport:
        """Return what the ledger knows, and what this run did."""
        job = self.job
        done = bool(ledger.done.all())
        account = make_account(job.target, job.fingerprint, self.plan.tiling, ledger, complete=done)
        return JobReport.of(account, self._record(), job.options.max_failed)

    def _record(self) -> RunRecord:
        return self.totals.record(self.plan, self.workers, source_checked=self.job.source.checksummed)


def spans_to_read_back(numbers: np.ndarray[tuple[int], np.dtype[np.int64]], tile_nbytes: int) -> Iterator[range]:
    """Yield ascending tile numbers, many at a time, none of them from two chunks of the ledger."""
    longest = max(1, min(ROWS_PER_CHUNK, READ_BACK_NBYTES // max(1, tile_nbytes)))
    cuts = np.flatnonzero((np.diff(numbers) > 1) | (np.diff(numbers // ROWS_PER_CHUNK) > 0)) + 1
    for part in np.split(numbers, cuts):
        for start in range(0, len(part), longest):
            some = part[start : start + longest]
            yield range(int(some[0]), int(some[-1]) + 1)
