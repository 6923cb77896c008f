"""The run that is at work on a target, as others see it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from dask_batchinv.job.report.account import Account, account_in
from dask_batchinv.job.report.run_record import Progress
from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger, begin_of, sign_of
from dask_batchinv.job.target.lock import who_holds
from dask_batchinv.location import Location, Place
from dask_batchinv.shown import Row
from dask_batchinv.text import clean

#: How long to wait before one looks again, and how many times as long as to look took: it must not hold up who works.
LOOK_SECONDS, LOOK_TIMES = 1.0, 10


@dataclass(frozen=True, kw_only=True)
class AtWork:
    """A run that is at work on a target."""

    holder: str
    """Who."""
    since: str | None
    """Since when it inverts, in UTC, as ISO 8601 has it; None as long as it does not."""
    last_sign: str | None
    """When it said last that it is at work."""
    where: str | None
    """Where it runs."""
    seconds: float
    """For how long it has inverted."""
    matrices_before: int
    """Matrices that earlier runs had done."""
    matrices_per_second: float | None
    """How fast it has been."""
    seconds_left: float | None
    """How long it has to go on at that rate."""

    @classmethod
    def on(cls, target: Location, account: Account) -> AtWork | None:
        """Return the run that is at work on a target; None if none is."""
        if (found := who_holds(target) or sign_of(target)) is None:
            return None
        begin = begin_of(target, str(found.get("run"))) or {}
        rate, seconds, before = None, 0.0, account.matrices_done
        with suppress(KeyError, TypeError, ValueError, OverflowError):
            seconds = (datetime.now(UTC) - datetime.fromisoformat(begin["since"])).total_seconds()
            before = int(begin["matrices_before"])
            rate = (account.matrices_done - before) / max(1.0, seconds)
        return cls(
            holder=clean(str(found.get("holder", "unknown"))),
            since=begin.get("since"),
            last_sign=found.get("at"),
            where=begin.get("where"),
            seconds=seconds,
            matrices_before=before,
            matrices_per_second=rate,
            seconds_left=(account.matrices - account.matrices_done) / rate if rate else None,
        )

    def progress(self, account: Account) -> Progress:
        """Return how far it is, as it would say itself."""
        return Progress(
            "inverting",
            account.matrices,
            account.matrices_done,
            self.matrices_before,
            account.n_failed,
            0,
            self.seconds,
        )

    def row(self) -> Row:
        """Return who, since when and how fast."""
        text = self.holder
        if self.since is not None:
            text += f", inverting since {self.since}"
        if self.matrices_per_second and self.seconds_left is not None:
            text += f", {self.matrices_per_second:,.0f} matrices/s, about {self.seconds_left:,.0f} s left"
        if self.last_sign is not None:
            text += f"; last sign of it {self.last_sign}"
        return "at work", text


def state_of(account: Account, at_work: AtWork | None) -> str:
    """Return whether a target is complete, in words, and what to do if it is not."""
    if at_work is None:
        return account.state
    return f"{'complete' if account.complete else 'not complete'}: a run is at work"


def rows_of(account: Account, at_work: AtWork | None) -> list[Row]:
    """Return how far a target is."""
    return [("state", state_of(account, at_work)), *account.rows()[1:]]


def watch(path: Place) -> Iterator[tuple[Account, AtWork]]:
    """Yield how far a target is and who is at work on it, every now and then until nobody is.

    Raises
    ------
    TargetError
        If there is no target of ours.
    """
    while True:
        start = time.monotonic()
        location, target = existing(path)
        account = account_in(location, target, Ledger(location, target))
        if (at_work := AtWork.on(location, account)) is None:
            return
        yield account, at_work
        time.sleep(max(LOOK_SECONDS, LOOK_TIMES * (time.monotonic() - start)))
