"""The result of a job, as text and as JSON: the account of its target, and the record of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dask.utils import format_bytes

from dask_batchinv.job.allowed import Allowed, MaxFailed
from dask_batchinv.job.report.account import Account
from dask_batchinv.job.report.run_record import RunRecord
from dask_batchinv.job.report.tiles import named_tiles
from dask_batchinv.outcome import NAMED
from dask_batchinv.text import clean


@dataclass(frozen=True, kw_only=True)
class JobReport(RunRecord, Account):
    """The result of a job."""

    max_failed: MaxFailed
    """How many failed matrices were allowed."""

    @classmethod
    def of(cls, account: Account, record: RunRecord, max_failed: MaxFailed) -> JobReport:
        """Return the report of a run on a target."""
        return cls(**vars(account), **vars(record), max_failed=max_failed)

    @property
    def exit_code(self) -> int:
        """0 done; 1 some tiles could not be done; 3 more matrices failed than were allowed."""
        if not self.complete or self.stopped is not None:
            return 1
        return 3 if self.too_many else 0

    @property
    def too_many(self) -> str | None:
        """Which matrices failed that were not allowed to, in words."""
        return Allowed.parse(self.max_failed).exceeded(self.failed, self.matrices_done)

    def to_json(self) -> dict[str, Any]:
        """Return the report for machines."""
        return asdict(self) | {"exit_code": self.exit_code}

    def __str__(self) -> str:
        share = f" of {self.matrices:,}" if not self.complete else ""
        lines = [
            f"{self._outcome()}: {self.source} -> {self.target}",
            f"matrices         {self.matrices_done:,}{share}, {self.n_failed:,} without an inverse",
            *(f"  {line}" for line in self.failures()),
            *self._others(),
        ]
        lines.append(f"tiles            {self.tiles_done:,} of {self.tiles:,}, {self.tiles_now:,} in this run, "
                     f"{self.retries:,} tried again")  # fmt: skip
        if self.tiles_proven or self.damaged_tiles:
            lines.append(f"read back        {self.tiles_proven:,} tiles of earlier runs are as they were written, "
                         f"{len(self.damaged_tiles):,} were damaged")  # fmt: skip
            lines += named_tiles(self.damaged_tiles)
        if self.grown_from:
            lines.append(f"source grown     it had the shape {self.grown_from}; what was done of it stays")
        if self.changed_tiles:
            lines.append(f"source changed   {self.changed_tiles:,} of {self.tiles:,} tiles done again")
        if self.changed_meanwhile:
            lines.append(f"source changed   {self.changed_meanwhile:,} tiles while they were read: done again")
        if self.failed_tiles:
            lines += [f"failed           {len(self.failed_tiles):,} tiles", *named_tiles(self.failed_tiles)]
        if self.bad_chunks:
            lines.append(f"unreadable       {len(self.bad_chunks):,} chunks of the source")
            lines += [f"  {chunk}" for chunk in self.bad_chunks[:NAMED]]
            lines += [f"  and {len(self.bad_chunks) - NAMED:,} more"] if len(self.bad_chunks) > NAMED else []
        if self.mended:
            lines.append(f"mended           {', '.join(self.mended[:NAMED])}: lost or damaged, written again")
        if self.stopped:
            lines.append(f"stopped          {self.stopped}")
        lines += [f"note             {event}" for event in self.worker_events[:NAMED]]
        lines += [*self._cost(), *(f"note             {note}" for note in self.notes)]
        return "\n".join(map(clean, lines))

    def _others(self) -> list[str]:
        """Return the lines about matrices that did not fail."""
        lines = [f"left out         {self.masked:,} by the mask"] if self.masked else []
        if self.smallest_rcond is not None:
            lines.append(
                f"smallest rcond   {self.smallest_rcond:.3g}, {self.ill_conditioned:,} below the machine epsilon"
            )
        return lines

    def _outcome(self) -> str:
        if self.exit_code == 1:
            return "NOT COMPLETE"
        return f"done, but {self.too_many}" if self.exit_code == 3 else "done"

    def _cost(self) -> list[str]:
        """Return the lines about time and workers."""
        lines = []
        if self.tiles_now and self.seconds:
            lines = [
                f"time             {self.seconds:.1f} s, {format_bytes(self.bytes_read)} read at "
                f"{format_bytes(self.bytes_read / self.seconds)}/s, {format_bytes(self.bytes_written)} written",
                f"computing        {self.cpu_seconds:.1f} s of CPU time, {self.requests:,} requests for chunks",
                f"workers          {self.workers} with {self.threads_per_worker} thread(s): {self.where}; "
                f"{self.kernel}",
            ]
        if self.devices["gpu"]:
            lines.append(f"devices          {self.devices['gpu']:,} tiles on GPUs, {self.devices['cpu']:,} on CPUs")
        return lines


class JobFailedError(RuntimeError):
    """A job ended without the result that was asked for; `report` says what it has.

    Its ``report.exit_code`` is 1 if tiles are missing (run the same command again), 3 if more matrices than
    ``max_failed`` have no inverse.
    """

    def __init__(self, report: JobReport):
        self.report = report
        super().__init__(report)

    def __str__(self) -> str:
        report = self.report
        if report.exit_code == 1:
            if report.stopped and not report.failed_tiles:
                return (f"{clean(report.stopped)}. Fix the cause and make the same call again: it does what is not "
                        f"done.\n{report}")  # fmt: skip
            first = report.stopped or (report.failed_tiles[0].cause if report.failed_tiles else "unknown")
            missing = max(report.tiles - report.tiles_done, len(report.failed_tiles))
            return (f"{missing} of {report.tiles} tiles failed, first cause: {clean(first)}. Fix the cause and "
                    f"make the same call again: it does what is not done.\n{report}")  # fmt: skip
        return (f"{report.too_many}. The target is complete, with NaN in their place; pass max_failed to allow them."
                f"\n{report}")  # fmt: skip
