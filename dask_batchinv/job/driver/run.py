"""One run of a job: create, read back, invert, finish; and what is done is recorded."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import dask.config
import numpy as np

from dask_batchinv.job.driver.cluster import ClusterOptions, connect, count_gpus, meet_workers
from dask_batchinv.job.driver.dispatch import Dispatcher
from dask_batchinv.job.driver.executor import Executor, Serial
from dask_batchinv.job.driver.roster import ClusterLostError
from dask_batchinv.job.events import Heartbeat, WorkerEvent
from dask_batchinv.job.outputs import LEDGER, OUTPUTS
from dask_batchinv.job.plan.plan import Plan, Workers
from dask_batchinv.job.plan.prepare import Job, plan_for, refuse_overlap
from dask_batchinv.job.report.account import make_account
from dask_batchinv.job.report.job_report import JobReport
from dask_batchinv.job.report.run_record import Guarded, OnProgress, Progress, RunRecord, RunTotals, ignore
from dask_batchinv.job.results import TileResult
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.chunks import CHECKSUM_NBYTES, DamagedTargetError
from dask_batchinv.job.target.documents import Contents
from dask_batchinv.job.target.ledger import ROWS_PER_CHUNK, Ledger, record_run
from dask_batchinv.job.target.lock import Lock, locked, refuse_held, remove_stale_lock
from dask_batchinv.job.target.state import State, Target
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.job.worker.invert_tiles import TileTask, invert_tiles
from dask_batchinv.job.worker.read_back import ReadBackTask, read_back_tiles
from dask_batchinv.location import TakenOverError, raised_as
from dask_batchinv.outcome import TargetError
from dask_batchinv.stack import result_dtype
from dask_batchinv.text import clean

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
    if job.action == "check" and job.options.trust_ledger:
        nobody = Workers(0, 0, None)
        run = Run(job, plan_for(job, nobody), nobody, Serial(), on_progress)
        if run.is_all_there():
            return run()
    if job.action != "check":
        refuse_held(job.target)  # before workers are started, or asked
    with connect(options) as (client, workers):
        if not options.is_local:
            workers = replace(workers, gpus=count_gpus(job.options.device, client))
        plan = plan_for(job, workers)
        introduction, silent = meet_workers(client, job.source, job.target)
        executor = Dispatcher(client, introduction, is_own=options.is_local, restart_stalled=options.restart_stalled)
        return Run(job, plan, workers, executor, on_progress, RunTotals(events=list(silent)))()


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

    def __post_init__(self) -> None:
        self._tell = Guarded(self.on_progress)

    def __call__(self) -> JobReport:
        """Bring the target to its end, and return the report."""
        job = self.job
        with ExitStack() as held:
            if job.action == "check" and (ledger := self._check()) is not None:
                remove_stale_lock(job.target)
                return self.report(ledger)
            lock, writer, target, ledger = self._begin(held)
            try:
                self._invert(target, ledger, writer, lock)
                self._finish(target, ledger, writer, lock)
            except TakenOverError as error:  # nothing is written any more: the target is another run's, or has gone
                self.totals.stopped = str(error)
            return self.report(ledger)

    def _check(self) -> Ledger | None:
        """Read a complete target back, and return its ledger if nothing is wrong: then nothing is locked or written."""
        if not self._has_metadata():
            return None
        ledger, totals = self._ledger_as_found(), self.totals
        self._read_back(ledger, None)
        if totals.stopped is not None:  # perhaps no worker was sure to see this target: the lock will tell
            totals.stopped, totals.has_read_back, totals.read_back = None, False, 0
            totals.damaged.clear()
        elif ledger.done.all() and not self._damage():
            return ledger
        return None

    def is_all_there(self) -> bool:
        """Tell whether all tiles are recorded, and nothing of the metadata is damaged."""
        return self._has_metadata() and bool(self._ledger_as_found().done.all()) and not self._damage()

    def _ledger_as_found(self) -> Ledger:
        """Return the ledger of the target that was found, to be read, without tiles that are not wanted."""
        ledger = targets.read_ledger(self.job.target, self.job.found)
        self._forget_filled(ledger)
        return ledger

    def _has_metadata(self) -> bool:
        try:
            targets.tiling_of(self.job.target, self.job.found)
        except (DamagedTargetError, ValueError):
            return False
        return True

    def _damage(self) -> list[str]:
        return targets.damage(self.job.target, self.job.found, self.contents)

    @cached_property
    def contents(self) -> Contents:
        """What the target is created with."""
        source = self.job.source
        return Contents(
            self.plan.tiling, result_dtype(source.decoded_dtype), source.target_dims,
            source.read_coordinates(self.totals.notes), source.attributes, source.group_attributes,
            self.job.options.assume_a,
        )  # fmt: skip

    def _begin(self, held: ExitStack) -> tuple[Lock, Writer, Target, Ledger]:
        """Lock the target until the run ends, create or mend it, and open its ledger."""
        job, tiling = self.job, self.plan.tiling
        lock = held.enter_context(locked(job.target))
        writer = Writer(job.target, lock)
        if job.action == "create":
            refuse_overlap(job.source, job.target)  # again: something may have been mounted or linked meanwhile
            targets.create(job.target, job.fingerprint, self.contents, writer, job.found)
        target = targets.inspect(job.target)  # again: another run may have been at work until now
        if not target.is_there or target.fingerprint != job.fingerprint or target.tile != tiling.tile:
            raise TargetError(f"{job.target.name} was changed by another run meanwhile: run the command again")
        with raised_as(OSError, f"{job.target.name} cannot be opened", AGAIN):
            if job.action != "create":
                self.totals.mended += targets.mend(job.target, target, self.contents, writer)
            ledger = Ledger(job.target, target.generation, tiling.n_tiles, writer=writer, durable=job.options.durable)
        self._forget_filled(ledger)
        for result in self.totals.damaged:
            ledger.forget(result.number)
        return lock, writer, target, ledger

    def _read_back(self, ledger: Ledger, lock: Lock | None) -> None:
        """Read back what earlier runs have recorded, and forget those tiles that are not what was written."""
        if self.job.options.trust_ledger:
            return
        start, totals, job = time.monotonic(), self.totals, self.job
        totals.has_read_back = True
        recorded, matrices = int(ledger.done.sum()), ledger.total("matrices")
        task = ReadBackTask(
            uuid.uuid4().hex, job.target, self.plan.tiling, self._chunk_nbytes(), job.source.for_workers()
        )
        spans = spans_to_read_back(np.flatnonzero(ledger.done), self.plan.tile_nbytes)
        try:
            for result in self._results(read_back_tiles, task, spans, 1, lock):
                if not isinstance(result, Heartbeat):
                    if result.value is not None:
                        totals.read_back += result.value
                    else:
                        totals.damaged.append(result)
                        ledger.forget(result.number)
                share = (totals.read_back + len(totals.damaged)) / max(1, recorded)
                seconds, damaged = time.monotonic() - start, len(totals.damaged)
                self._tell(Progress("checking", matrices, round(share * matrices), 0, 0, damaged, seconds))
        except ClusterLostError as error:
            totals.stopped = str(error)

    def _forget_filled(self, ledger: Ledger) -> None:
        """Forget tiles in which chunks are filled that were not there, where that is not wanted any more."""
        if self.job.options.missing == "error":
            for number in np.flatnonzero(ledger.done & (ledger.column("filled") > 0)):
                ledger.forget(int(number))

    def _chunk_nbytes(self) -> tuple[int, ...]:
        """Return the bytes of a stored chunk of each output."""
        tiling, dtype = self.plan.tiling, self.contents.dtype
        return tuple(
            tiling.chunk_elements(core=output.core) * output.dtype(dtype).itemsize + CHECKSUM_NBYTES
            for output in OUTPUTS
        )

    def _results(
        self, work: Any, task: Any, spans: Iterable[range], attempts: int, lock: Lock | None
    ) -> Iterator[TileResult[Any] | Heartbeat]:
        """Yield the results of tiles, and note what happens to workers."""
        holder = None if lock is None else lock.run
        for result in self.executor.run(work, task, spans, attempts=attempts, holder=holder):
            if isinstance(result, WorkerEvent):
                self.totals.events.append(result)
                if lock is not None:  # they may not find a target that is not there any more
                    lock.confirm()
            elif lock is not None:
                lock.check()
            yield result

    def _invert(self, target: Target, ledger: Ledger, writer: Writer, lock: Lock) -> None:
        """Do the tiles that are not recorded, or not as they were written, and record them."""
        try:
            if self.job.action != "create" and not self.totals.has_read_back:
                self._read_back(ledger, lock)
            if target.state is State.COMPLETE and not ledger.done.all():
                with raised_as(OSError, f"{self.job.target.name} cannot be written", AGAIN):
                    targets.set_complete(writer, target.generation, False)
            if self.totals.stopped is None:
                self._invert_tiles(ledger, lock)
        except ClusterLostError as error:
            self.totals.stopped = str(error)
        finally:
            # Also when interrupted: what is recorded is not done again, and damage that was found not forgotten.
            self._flush(ledger, FINAL_ATTEMPTS)

    def _invert_tiles(self, ledger: Ledger, lock: Lock) -> None:
        start, flushed, totals = time.monotonic(), -FLUSH_SECONDS, self.totals
        tiling, n_matrices = self.plan.tiling, self.plan.tiling.n_matrices
        before = done = ledger.total("matrices")
        without_inverse = sum(ledger.failed.values())
        spans = tiling.spans(map(int, np.flatnonzero(~ledger.done)), self.plan.tiles_per_task)
        attempts = int(dask.config.get("batchinv.job.attempts"))
        for result in self._results(invert_tiles, self.task(lock.run), spans, attempts, lock):
            if not isinstance(result, Heartbeat):
                totals.add(result)
                if result.value is not None:
                    done += result.value.matrices
                    without_inverse += sum(result.value.failed.values())
                    ledger.record(result)
            now = time.monotonic()
            totals.seconds = now - start
            if ledger.has_changes and now - flushed > FLUSH_SECONDS:
                self._flush(ledger)
                flushed = now
            self._tell(
                Progress("inverting", n_matrices, done, before, without_inverse, len(totals.failed), now - start)
            )

    def task(self, holder: str) -> TileTask:
        """Return what workers need to know to invert tiles of a target."""
        job = self.job
        return TileTask(uuid.uuid4().hex, job.source.for_workers(), job.target, holder, self.plan.tiling, job.options)

    def _flush(self, ledger: Ledger, attempts: int = 1) -> None:
        """Write the ledger. What fails during a run is tried again later, by itself; at its end that must be known."""
        for attempt in range(attempts):
            try:
                ledger.flush()
                return
            except TakenOverError:
                raise
            except Exception as error:  # whatever a file system may raise
                cause = clean(f"the {LEDGER} cannot be written: {type(error).__name__}: {error}")
            if attempt < attempts - 1:
                time.sleep(FLUSH_BACK_OFF_SECONDS * 2**attempt)
        if attempts > 1:
            self.totals.stopped = self.totals.stopped or cause

    def _finish(self, target: Target, ledger: Ledger, writer: Writer, lock: Lock) -> None:
        """Keep the record of the run; and if the target is complete, and can be opened, mark it so."""
        location = self.job.target
        lock.confirm()
        with raised_as(OSError, f"{location.name} cannot be finished", AGAIN):
            targets.remove_partial_chunks(location, target.members)
            if ledger.done.all() and self.totals.stopped is None:
                self._look_for_losses(target, ledger)
            with suppress(Exception):  # the disk may be full: the report matters more
                record_run(writer, self._record().to_json())
            if ledger.done.all() and self.totals.stopped is None:
                targets.open_as_reader(location)
                targets.set_complete(writer, target.generation, True)

    def _look_for_losses(self, target: Target, ledger: Ledger) -> None:
        """Look for all that was made: something may have been removed or emptied while the job ran."""
        location = self.job.target
        if keys := targets.damage(location, target, self.contents):
            self.totals.stopped = f"{', '.join(keys[:3])} of {location.name} was removed or damaged meanwhile"
        elif lost := targets.lost_tiles(location, self.plan.tiling, self._chunk_nbytes()):
            for number in lost:
                ledger.forget(number)
            self._flush(ledger, FINAL_ATTEMPTS)
            self.totals.stopped = f"chunks of {len(lost)} tiles of {location.name} were removed or damaged meanwhile"

    def report(self, ledger: Ledger) -> JobReport:
        """Return what the ledger knows, and what this run did."""
        job = self.job
        done = bool(ledger.done.all())
        account = make_account(job.target, job.fingerprint, self.plan.tiling, ledger, complete=done)
        return JobReport.of(account, self._record(), job.options.max_failed)

    def _record(self) -> RunRecord:
        return self.totals.record(self.plan, self.workers, self.job.source, notes=self._tell.notes)


def spans_to_read_back(numbers: np.ndarray[tuple[int], np.dtype[np.int64]], tile_nbytes: int) -> Iterator[range]:
    """Yield ascending tile numbers, many at a time, none of them from two chunks of the ledger."""
    longest = max(1, min(ROWS_PER_CHUNK, READ_BACK_NBYTES // max(1, tile_nbytes)))
    cuts = np.flatnonzero((np.diff(numbers) > 1) | (np.diff(numbers // ROWS_PER_CHUNK) > 0)) + 1
    for part in np.split(numbers, cuts):
        for start in range(0, len(part), longest):
            some = part[start : start + longest]
            yield range(int(some[0]), int(some[-1]) + 1)
