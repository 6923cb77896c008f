"""One run of a job: create, read back, invert, finish; and what is done is recorded."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np

from dask_batchinv.job.driver.batches import in_batches
from dask_batchinv.job.driver.cutting import spans_to_read_back, tasks_of
from dask_batchinv.job.driver.executor import ClusterLostError, Executor
from dask_batchinv.job.events import Heartbeat, WorkerEvent
from dask_batchinv.job.outputs import LEDGER
from dask_batchinv.job.plan.plan import Plan, Workers
from dask_batchinv.job.plan.prepare import Job, contents_of, encoding_of, refuse_overlap
from dask_batchinv.job.report.account import make_account
from dask_batchinv.job.report.job_report import JobReport
from dask_batchinv.job.report.run_record import Guarded, OnProgress, Progress, RunRecord, RunTotals, ignore
from dask_batchinv.job.report.tiles import FailedTile
from dask_batchinv.job.results import TileResult, TileRow
from dask_batchinv.job.seen import UNKNOWN, Flags, Numbers, Seen
from dask_batchinv.job.settings import settings
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.contents import Contents
from dask_batchinv.job.target.found import inspect
from dask_batchinv.job.target.ledger import Ledger, forget_begin, record_begin, record_run
from dask_batchinv.job.target.lock import Lock, holder, locked
from dask_batchinv.job.target.state import State, Target
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.job.worker.compare_tiles import CompareTask, compare_tiles
from dask_batchinv.job.worker.invert_tiles import TileTask, invert_tiles
from dask_batchinv.job.worker.read_back import ReadBackTask, read_back_tiles
from dask_batchinv.location import Location, TakenOverError, raised_as
from dask_batchinv.outcome import SourceError, TargetError, TargetInUseError
from dask_batchinv.requests import COUNT
from dask_batchinv.shown import counted
from dask_batchinv.text import clean

#: What to do about a store that fails.
AGAIN = "; run the job again"
#: Seconds between two writes of the ledger, at least.
FLUSH_SECONDS = 1.0
#: How often the ledger is written at the end of a run before that is given up, and seconds between, doubled each time.
FINAL_ATTEMPTS = 5
FLUSH_BACK_OFF_SECONDS = 0.25
#: What was written to the source before may still be written to at the same time, as the clocks of file systems tick.
SETTLING_SECONDS = 0.06
#: What to say of a store that tells too little.
MUTE = (
    "the store of the source tells neither versions nor times of its chunks, so that a change of it cannot be seen: "
    "`overwrite=True` does all again"
)


#: And of what is computed.
MUTE_LAZY = (
    "what a lazy source is computed from is not looked at: if that has changed, and not its name, `overwrite=True` "
    "does all again"
)


@dataclass
class Looks:
    """What was seen of the stores of a job."""

    source: Seen | None = None
    """Before anything of it is read."""
    target: Seen | None = None
    """Before anything of it is written."""


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
    looks: Looks = field(default_factory=Looks)
    """What was seen of the stores before anything is read."""

    def __post_init__(self) -> None:
        self._tell = Guarded(self.on_progress)
        self._made: dict[int, int] = {}
        self._has_record, self._begun = False, dict[str, Any]()
        COUNT.take()  # of what was before

    def __call__(self) -> JobReport:
        """Bring the target to its end, and return the report."""
        with ExitStack() as held:
            seen = self.looks.source = self.looks.source or self._look_at_source()
            self.totals.has_chunks = seen.count > 0
            try:
                lock, writer, target, ledger = self._begin(held)
            except TakenOverError as error:
                text = f"{self.job.target.name} was changed by another run meanwhile, run the job again: {error}"
                raise TargetInUseError(text) from error
            try:
                self._bring_up_to_date(target, ledger, writer, lock, seen)
                self._finish(target, ledger, writer, lock)
            except TakenOverError as error:  # nothing is written any more: the target is another run's, or has gone
                if isinstance(error.__context__, KeyboardInterrupt):  # what was recorded before could not be written
                    raise KeyboardInterrupt from error
                self.totals.stopped = str(error)
            except KeyboardInterrupt:
                self.totals.stopped = "interrupted"
                self._keep_record(writer)
                with suppress(Exception):
                    writer.commit("interrupted")
                raise
            return self.report(ledger)

    def nothing_to_do(self) -> Ledger | None:
        """Return the ledger of a complete target if neither its source has changed nor what is in it."""
        job = self.job
        if job.action != "check":
            return None
        location, target = job.target, job.found
        if not targets.follows(location, target, self.contents) or targets.damage(location, target, self.contents):
            return None
        ledger = Ledger(location, target)
        self._forget_unwanted(ledger)
        if not ledger.done.all():
            return None
        source = self.looks.source = self._look_at_source()
        if source.tells and source.differs(ledger.column("source_seen")).any():
            return None
        if not job.options.trust_ledger:
            found = self.looks.target = self._look_at_target()
            if not found.whole.all() or found.differs(ledger.column("target_seen")).any():
                return None
        return ledger

    def _look_at_source(self) -> Seen:
        seen = self.job.source.look(self.plan.tiling)
        if seen.unsure.any():
            time.sleep(SETTLING_SECONDS)
            seen = self.job.source.look(self.plan.tiling)
        note = MUTE_LAZY if self.job.source.is_lazy else MUTE
        if not seen.tells and note not in self.totals.notes:
            self.totals.notes.append(note)
        return seen

    def _look_at_target(self) -> Seen:
        return targets.look(self.job.target, self.contents)

    @cached_property
    def contents(self) -> Contents:
        """What the target is created with."""
        return contents_of(self.job, self.plan.tiling, self.totals.notes)

    def _begin(self, held: ExitStack) -> tuple[Lock, Writer, Target, Ledger]:
        """Lock the target until the run ends, create or mend it, and open its ledger."""
        job, tiling = self.job, self.plan.tiling
        lock = held.enter_context(locked(job.target))
        writer = self._writer = Writer(job.target, lock)
        if job.action == "create":
            refuse_overlap(job.source, job.target)  # again: something may have been mounted or linked meanwhile
            targets.create(job.target, job.fingerprint, self.contents, writer, job.found, job.replaces)
        target = inspect(job.target)  # again: another run may have been at work until now
        was = tiling if job.action == "create" else job.found.tiling
        if not target.is_there or (target.fingerprint, target.tiling) != (job.fingerprint, was):
            raise TargetError(f"{job.target.name} was changed by another run meanwhile: run the job again")
        with raised_as(OSError, f"{job.target.name} cannot be opened", AGAIN):
            if job.action != "create" and targets.follows(job.target, target, self.contents):
                self.totals.mended += targets.mend(job.target, target, self.contents, writer)
            elif job.action != "create":
                self.totals.grown_from = target.shape if target.shape != tiling.shape else None
                self.totals.followed = True
                target = targets.update(job.target, target, self.contents, writer)
            ledger = Ledger(job.target, target, writer=writer, durable=job.options.durable)
            # Until all has been looked at again; documents of format 2 may say so still, if a run was killed.
            if target.state is State.COMPLETE or (target.encoding.zarr_format == 2 and job.action != "create"):
                targets.set_complete(writer, target, False)
        self._forget_unwanted(ledger)
        with raised_as(OSError, f"{job.target.name} cannot be opened", AGAIN):
            writer.commit(f"begun, {counted(tiling.n_matrices, 'matrix')}")  # workers see what is committed
        return lock, writer, target, ledger

    def _bring_up_to_date(self, target: Target, ledger: Ledger, writer: Writer, lock: Lock, seen: Seen) -> None:
        """Do the tiles that are not recorded, not as they were written, or made from what the source has no more."""
        try:
            if self.job.action != "create":
                self._read_back(target, ledger, lock)
                self._compare(target, ledger, lock, seen, ledger.done)
            self._note_begin(ledger, lock)
            self._invert_tiles(ledger, lock, seen, ~ledger.done)
            self._look_again(target, ledger, lock, seen)
        except ClusterLostError as error:
            self.totals.stopped = str(error)
        finally:
            # Also when interrupted: what is recorded is not done again, and damage that was found not forgotten.
            self._flush(ledger, FINAL_ATTEMPTS)

    def _note_begin(self, ledger: Ledger, lock: Lock) -> None:
        """Note for others how far the target is; again with each commit, where these are the only signs."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._begun = self._begun or {
            "run": lock.run, "since": now, "matrices_before": ledger.total("matrices"), "where": self.plan.where,
            "workers": self.workers.count, "holder": holder(),
        }  # fmt: skip
        try:
            record_begin(self._writer, self._begun | {"at": now})
        except TakenOverError:
            raise
        except Exception:  # whatever a file system may raise: it is for others to look at, and no more
            return

    def _read_back(self, target: Target, ledger: Ledger, lock: Lock) -> None:
        """Read back what earlier runs have recorded and may have changed since; forget what is not as it was written.

        All that an interrupted run has left: nobody has looked at it.
        """
        if self.job.options.trust_ledger:
            return
        start, totals, job = time.monotonic(), self.totals, self.job
        found = self.looks.target = self.looks.target or self._look_at_target()
        suspects = np.flatnonzero(ledger.done & found.differs(ledger.column("target_seen")))
        matrices = int(ledger.column("matrices")[suspects].sum())
        task = ReadBackTask(
            uuid.uuid4().hex,
            job.target,
            self.plan.tiling,
            target.ledger,
            job.options.outputs,
            target.encoding,
            job.dtype,
        )
        for result in self._results(read_back_tiles, task, self._spans(suspects), 1, lock):
            if not isinstance(result, Heartbeat):
                if result.value is not None:
                    totals.read_back += result.value
                else:
                    totals.damaged.append(result)
                    ledger.forget(result.number)
            share = (totals.read_back + len(totals.damaged)) / max(1, len(suspects))
            seconds, damaged = time.monotonic() - start, len(totals.damaged)
            self._tell(Progress("checking", matrices, round(share * matrices), 0, 0, damaged, seconds))

    def _compare(self, target: Target, ledger: Ledger, lock: Lock, seen: Seen, among: Flags) -> None:
        """Read again what tiles were made from where the store of the source says something else of it than then.

        Those of which that is other numbers are forgotten, and of the others it is noted what the store says now.
        """
        if not seen.tells:
            return
        job, totals, start = self.job, self.totals, time.monotonic()
        suspects = np.flatnonzero(among & ledger.done & seen.differs(ledger.column("source_seen")))
        matrices, done, same = int(ledger.column("matrices")[suspects].sum()), 0, []
        task = CompareTask(
            uuid.uuid4().hex, job.source.for_workers(), job.target, target.ledger, self.plan.tiling, job.options.missing
        )
        for result in self._results(compare_tiles, task, self._spans(suspects), self._attempts, lock):
            if not isinstance(result, Heartbeat):
                done += int(ledger.column("matrices")[result.number])
                if result.value:
                    same.append(result.number)
                elif result.value is None and result.bad_chunks and job.options.bad_chunks == "nan":
                    # What was made of it stays: nothing says that it was made from other numbers.
                    totals.bad_chunks |= {chunk.key: chunk for chunk in result.bad_chunks}
                elif result.value is None:  # its source may come back as it was
                    totals.add(result)
                else:
                    (totals.changed_meanwhile if result.number in self._made else totals.changed).add(result.number)
                    ledger.forget(result.number)
            self._tell(Progress("comparing", matrices, done, 0, 0, len(totals.changed), time.monotonic() - start))
        numbers = np.array(same, np.int64)
        ledger.note("source_seen", numbers, seen.recorded[numbers])

    def _spans(self, numbers: Numbers) -> Iterator[range]:
        return spans_to_read_back(numbers, self.plan.tile_nbytes)

    @property
    def _attempts(self) -> int:
        return settings().attempts

    def _look_again(self, target: Target, ledger: Ledger, lock: Lock, seen: Seen) -> None:
        """Do again, once, what the source has changed since it was looked at before it was read."""
        for is_last in (False, True):
            if self.totals.stopped is not None:
                return
            try:
                shape, now = self.job.source.shape_now(), self._look_at_source()
            except SourceError as error:
                self.totals.stopped = str(error)
                return
            moved = ledger.done & now.differs(seen.marks) & seen.tells & now.tells
            if not moved.any():
                break
            if is_last:
                first = FailedTile.of(TileResult(int(moved.argmax()), None), self.plan.tiling)
                self.totals.stopped = (
                    f"the source is being written to: {counted(moved.sum(), 'tile')} changed again while being done "
                    f"anew, first {first.place}"
                )
                return
            self._flush(ledger, FINAL_ATTEMPTS)  # workers read what is recorded
            self._compare(target, ledger, lock, now, moved)
            self._invert_tiles(ledger, lock, now, moved)
            seen = now
        if shape != self.job.source.shape:
            self.totals.notes.append("the source has grown since this run began: run it again for the rest")

    def _forget_unwanted(self, ledger: Ledger) -> None:
        """Forget tiles in which chunks were filled, or left out, where that is an error now."""
        for number in np.flatnonzero(ledger.done & ledger.unwanted(self.job.options)):
            ledger.forget(int(number))

    def _results(
        self, work: Any, task: Any, spans: Iterable[range], attempts: int, lock: Lock | None
    ) -> Iterator[TileResult[Any] | Heartbeat]:
        """Yield the results of tiles, and note what happens to workers."""
        holder = lock.run if lock is not None and lock.run else None
        for result in self.executor.run(work, task, spans, attempts=attempts, holder=holder):
            if isinstance(result, WorkerEvent):
                self.totals.events.append(result)
                if lock is not None:  # they may not find a target that is not there any more
                    lock.confirm()
            elif lock is not None:
                lock.check()
            yield result

    def _invert_tiles(self, ledger: Ledger, lock: Lock, seen: Seen, among: Flags) -> None:
        """Invert tiles that are not done, among some, and record them."""
        if self.totals.stopped is not None:
            return
        start, flushed, totals = time.monotonic() - self.totals.seconds, -FLUSH_SECONDS, self.totals
        n_matrices = self.plan.tiling.n_matrices
        before = done = ledger.total("matrices")
        recorded = seen.recorded
        without_inverse = sum(ledger.failed.values())
        numbers = np.flatnonzero(among & ~ledger.done)
        spans = tasks_of(numbers, self.plan, self.workers.count * self.workers.threads)
        for result in self._inverted(spans, ledger, lock):
            if not isinstance(result, Heartbeat):
                totals.add(result, self.job.options.bad_chunks)
                if result.value is not None:
                    done += result.value.matrices
                    without_inverse += sum(result.value.failed.values())
                    ledger.record(result, int(recorded[result.number]))
                    self._made[result.number] = result.value.written
            now = time.monotonic()
            totals.seconds = now - start
            totals.timeline.note(totals.seconds, totals.matrices)
            if cause := totals.common_cause():
                totals.stopped = f"the first {len(totals.failed):,} tiles failed, all for one cause: {cause}"
                return
            if ledger.has_changes and now - flushed > FLUSH_SECONDS and self.job.target.transaction is None:
                self._flush(ledger)
                flushed = now
            self._tell(
                Progress("inverting", n_matrices, done, before, without_inverse, len(totals.failed), now - start)
            )

    def _inverted(
        self, spans: Iterator[range], ledger: Ledger, lock: Lock
    ) -> Iterator[TileResult[TileRow] | Heartbeat]:
        """Yield the results of tiles."""
        target, task = self.job.target, self.task(lock.run)
        transaction = target.transaction

        def invert(place: Location, some: Iterable[range]) -> Iterator[TileResult[TileRow] | Heartbeat]:
            # What is kept open for a run is that of its batch.
            mine = task if transaction is None else replace(task, run=uuid.uuid4().hex, target=place)
            return self._results(invert_tiles, mine, some, self._attempts, lock)

        def commit() -> bool:
            self._note_begin(ledger, lock)
            self._flush(ledger, FINAL_ATTEMPTS)
            return self.totals.stopped is None

        if transaction is None:
            yield from invert(target, spans)
        else:
            threads = self.workers.count * self.workers.threads
            yield from in_batches(target, transaction, spans, threads, commit, invert)

    def task(self, holder: str) -> TileTask:
        """Return what workers need to know to invert tiles of a target."""
        job = self.job
        return TileTask(
            uuid.uuid4().hex, job.source.for_workers(), job.target, holder, self.plan.tiling, job.options, job.dtype,
            encoding_of(job, self.plan.tiling), self.plan.together, self.plan.ahead,
        )  # fmt: skip

    def _flush(self, ledger: Ledger, attempts: int = 1) -> None:
        """Write the ledger. What fails during a run is tried again later, by itself; at its end that must be known."""
        for attempt in range(attempts):
            try:
                ledger.flush()
                ledger.commit()
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
            if self._is_done(ledger):
                self._look_for_losses(target, ledger)
            self._keep_record(writer)
            if self._is_done(ledger):
                targets.open_as_reader(location)
                targets.set_complete(writer, target, True)
            writer.commit("complete" if self._is_done(ledger) else "stopped")

    def _keep_record(self, writer: Writer) -> None:
        if self._has_record:
            return
        self._has_record = True
        with suppress(Exception):  # the disk may be full: the report matters more
            record_run(writer, self._record().to_json())
            forget_begin(writer)

    def _is_done(self, ledger: Ledger) -> bool:
        return bool(ledger.done.all()) and self.totals.stopped is None and not self.totals.failed

    def _look_for_losses(self, target: Target, ledger: Ledger) -> None:
        """Look for all that was made: something may have been removed or emptied while the job ran.

        What is seen of it is noted: of what no run has to look at again, unless that changes.
        """
        location, found, before = self.job.target, self._look_at_target(), self.looks.target
        if keys := targets.damage(location, target, self.contents):
            self.totals.stopped = f"{', '.join(keys[:3])} of {location.name} was removed or damaged meanwhile"
        elif (others := np.flatnonzero(targets.changed_by_others(location, self.contents))).size:
            for number in map(int, others):
                ledger.forget(number)
            self.totals.stopped = (
                f"{counted(len(others), 'tile')} of {location.name} changed by other commits meanwhile"
            )
        elif (lost := np.flatnonzero(~found.whole)).size:
            for number in map(int, lost):
                ledger.forget(number)
            self.totals.stopped = (
                f"chunks of {counted(len(lost), 'tile')} of {location.name} were removed or damaged meanwhile"
            )
        else:
            # Of what this run has neither written nor looked at before, it does not know what it is.
            known = np.zeros(len(found.marks), bool) if before is None else ~found.differs(before.marks)
            for number, written in self._made.items():
                known[number] = written in (UNKNOWN, found.marks[number])
            numbers = np.flatnonzero(known)
            ledger.note("target_seen", numbers, found.recorded[numbers])
            if location.transaction is not None:
                ledger.flush()  # in the last commit
                return
        self._flush(ledger, FINAL_ATTEMPTS)

    def report(self, ledger: Ledger) -> JobReport:
        """Return what the ledger knows, and what this run did."""
        job = self.job
        done = bool(ledger.done.all()) and not self.totals.failed
        account = make_account(
            job.target, job.fingerprint, self.plan.tiling, job.options.outputs, ledger, complete=done
        )
        if account.masked and account.masked == account.matrices:
            self.totals.notes.append(
                f"all matrices are left out by the mask {job.options.mask}: is it the other way round?"
            )
        return JobReport.of(account, self._record(), job.options.max_failed)

    def _record(self) -> RunRecord:
        workers = replace(self.workers, count=max(self.workers.count, len(self.executor.used)))
        return self.totals.record(self.plan, workers, self.job.source, self._tell.notes, self.executor.used)
