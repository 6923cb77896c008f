"""The result of a job, as text and as JSON: the account of its target, and the record of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dask.utils import format_bytes

from dask_batchinv.job.allowed import Allowed, MaxFailed
from dask_batchinv.job.report.account import Account
from dask_batchinv.job.report.page.target_report import report_of
from dask_batchinv.job.report.run_record import RunRecord
from dask_batchinv.job.report.tiles import named_tiles
from dask_batchinv.outcome import NAMED
from dask_batchinv.places import locate
from dask_batchinv.shown import Row, counted
from dask_batchinv.text import clean, public


@public
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

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, target_options: Mapping[str, Any] | None = None
    ) -> str:
        """Return a page on the target as it is now: `report_store` tells more of it.

        Parameters
        ----------
        path : str or path, optional
            Also write it to this file.
        target_options : mapping, optional
            What the file system of the target is given; a report keeps no credentials.
        """
        return report_of(locate(self.target, target_options)).to_html(path)

    def heading(self) -> str:
        """Return how it ended, and what was made from what."""
        return f"{self._outcome()}: {self.source} -> {self.target}"

    def rows(self) -> list[Row]:
        """Return the report for people."""
        share = f" of {self.matrices:,}" if not self.complete else ""
        now = f"{self.tiles_now:,} in this run, {self.retries:,} tried again"
        rows = [
            ("matrices", f"{self.matrices_done:,}{share}, {self.n_failed:,} without an inverse"),
            *(("", line) for line in self.failures()),
            *self._others(),
            ("tiles", f"{self.tiles_done:,} of {self.tiles:,}, {now}"),
        ]
        if self.tiles_proven or self.damaged_tiles:
            proven = f"{counted(self.tiles_proven, 'tile')} of earlier runs found as written"
            rows.append(("read back", f"{proven}, {len(self.damaged_tiles):,} damaged"))
            rows += named_tiles(self.damaged_tiles)
        if self.grown_from:
            rows.append(("source grown", f"it had the shape {self.grown_from}; what was done of it stays"))
        if self.changed_tiles:
            rows.append(("source changed", f"{self.changed_tiles:,} of {counted(self.tiles, 'tile')} done again"))
        if self.changed_meanwhile:
            rows.append(("source changed", f"{counted(self.changed_meanwhile, 'tile')} while it was read: done again"))
        if self.failed_tiles:
            rows += [("failed", counted(len(self.failed_tiles), "tile")), *named_tiles(self.failed_tiles)]
        if self.bad_chunks:
            rows.append(("unreadable", f"{counted(len(self.bad_chunks), 'chunk')} of the source"))
            rows += [("", str(chunk)) for chunk in self.bad_chunks[:NAMED]]
            rows += [("", f"and {len(self.bad_chunks) - NAMED:,} more")] if len(self.bad_chunks) > NAMED else []
        if self.mended:
            rows.append(("mended", f"{', '.join(self.mended[:NAMED])}: lost or damaged, written again"))
        if self.stopped:
            rows.append(("stopped", self.stopped))
        rows += [("note", event) for event in self.worker_events[:NAMED]]
        return rows + self._cost() + [("note", note) for note in self.notes]

    def _others(self) -> list[Row]:
        """Return the rows about matrices that did not fail."""
        rows = [("left out", f"{self.masked:,} by the mask")] if self.masked else []
        if self.smallest_rcond is not None:
            smallest = f"{self.smallest_rcond:.3g}, {self.ill_conditioned:,} below the machine epsilon"
            rows.append(("smallest rcond", smallest))
        return rows

    def _outcome(self) -> str:
        if self.exit_code == 1:
            return "NOT COMPLETE"
        return f"done, but {self.too_many}" if self.exit_code == 3 else "done"

    def _cost(self) -> list[Row]:
        """Return the rows about time and workers."""
        rows = []
        if self.tiles_now and self.seconds:
            speed = f"{format_bytes(self.bytes_read)} read at {format_bytes(round(self.bytes_read / self.seconds))}/s"
            threads = counted(self.threads_per_worker, "thread")
            rows = [
                ("time", f"{self.seconds:.1f} s, {speed}, {format_bytes(self.bytes_written)} written"),
                ("computing", f"{self.cpu_seconds:.1f} s of CPU time, {counted(self.requests, 'request')} for chunks"),
                ("workers", f"{self.workers} with {threads}: {self.where}; {self.kernel}"),
            ]
        if self.devices["gpu"]:
            rows.append(("devices", f"{counted(self.devices['gpu'], 'tile')} on GPUs, {self.devices['cpu']:,} on CPUs"))
        return rows


@public
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
            return (f"{missing:,} of {counted(report.tiles, 'tile')} failed, first cause: {clean(first)}. Fix the "
                    f"cause and make the same call again: it does what is not done.\n{report}")  # fmt: skip
        return (f"{report.too_many}. The target is complete, with NaN in their place; pass max_failed to allow them."
                f"\n{report}")  # fmt: skip
