"""Whether a target is up to date with its source, as far as the stores tell: nothing of the data is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import Job, contents_of, plan_for, prepare
from dask_batchinv.job.report.account import Account, make_account
from dask_batchinv.job.seen import UNKNOWN, Flags, Numbers
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger, begin_of, runs_of, sign_of
from dask_batchinv.job.target.lock import who_holds
from dask_batchinv.job.target.state import State, Target, options_of
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location, Place
from dask_batchinv.outcome import SourceError, TargetError
from dask_batchinv.places import locate
from dask_batchinv.text import clean
from dask_batchinv.urls import without

#: What a source begins with that is known by its name alone: a snapshot that was passed as a session, or a lazy one.
_NOT_TO_BE_OPENED = ("icechunk://", "lazy://")


@dataclass(frozen=True, kw_only=True)
class Freshness:
    """Whether a target is up to date with its source."""

    up_to_date: bool | None
    """Whether the same command would find nothing to do; None if that cannot be told."""
    tiles: int
    """Tiles that the target has once it is."""
    tiles_missing: int
    """Of these, those that were not done, or not with all that they have now."""
    tiles_changed: int
    """Those of whose source chunks the store says something else than when they were made."""
    tiles_unknown: int
    """Those of which nothing is recorded to compare with."""
    shape: tuple[int, ...]
    """Shape of the source."""
    reasons: tuple[str, ...]
    """Why it is not up to date, or why that cannot be told."""

    @property
    def exit_code(self) -> int:
        """0 up to date; 4 not; 5 it cannot be told."""
        return {True: 0, False: 4, None: 5}[self.up_to_date]

    def to_json(self) -> dict[str, Any]:
        """Return it for machines."""
        return asdict(self) | {"exit_code": self.exit_code}

    def __str__(self) -> str:
        answer = {True: "yes", False: "no", None: "not known"}[self.up_to_date]
        return clean(f"up to date       {answer}{': ' if self.reasons else ''}{'; '.join(self.reasons)}")


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
        rate = None
        with suppress(KeyError, TypeError, ValueError):
            seconds = (datetime.now(UTC) - datetime.fromisoformat(begin["since"])).total_seconds()
            rate = (account.matrices_done - int(begin["matrices_before"])) / max(1.0, seconds)
        return cls(
            holder=clean(str(found.get("holder", "unknown"))),
            since=begin.get("since"),
            last_sign=found.get("at"),
            where=begin.get("where"),
            matrices_per_second=rate,
            seconds_left=(account.matrices - account.matrices_done) / rate if rate else None,
        )

    def __str__(self) -> str:
        text = f"at work          {self.holder}"
        if self.since is not None:
            text += f", inverting since {self.since}"
        if self.matrices_per_second and self.seconds_left is not None:
            text += f", {self.matrices_per_second:,.0f} matrices/s, about {self.seconds_left:,.0f} s left"
        if self.last_sign is not None:
            text += f"; last sign of it {self.last_sign}"
        return clean(text)


@dataclass(frozen=True)
class Status:
    """How far a target is, and whether it is up to date."""

    account: Account
    """What its ledger knows."""
    freshness: Freshness
    """What its source says."""
    at_work: AtWork | None
    """The run that is at work on it."""
    runs: tuple[dict[str, Any], ...] = ()
    """The records of the last runs."""

    @property
    def exit_code(self) -> int:
        """6 if a run is at work; else that of its freshness."""
        return self.freshness.exit_code if self.at_work is None else 6

    def to_json(self) -> dict[str, Any]:
        """Return it for machines."""
        return self.account.to_json() | {
            "freshness": self.freshness.to_json(), "at_work": self.at_work and asdict(self.at_work),
            "runs": list(self.runs), "exit_code": self.exit_code,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [str(self.account), *([] if self.at_work is None else [str(self.at_work)])]
        if self.runs:
            last = self.runs[-1]
            ended = "" if last.get("stopped") is None else f"; it was stopped: {last['stopped']}"
            done = f"{last.get('tiles_now')} tiles in {last.get('seconds', 0):.1f} s, {last.get('workers')} worker(s)"
            lines.append(clean(f"last run         {last.get('started')}, {done}{ended}"))
        return "\n".join([*lines, str(self.freshness)])


def status_of(path: Place, source: Place | None = None, given: Mapping[str, Any] | None = None) -> Status:
    """Return the status of a target.

    Parameters
    ----------
    path
        The target.
    source
        What it was made from, as for the job, where that has another address now, or one with credentials in it; by
        default what the target names.
    given
        What the file system of that is given.

    Raises
    ------
    TargetError
        If there is no target of ours.
    """
    location, target = existing(path)
    ledger, made = Ledger(location, target), target.fingerprint
    account = make_account(location, made, target.tiling, ledger, complete=target.state is State.COMPLETE)
    try:
        options = options_of(
            target, missing="fill" if ledger.total("filled") else "error",
            bad_chunks="nan" if ledger.total("unreadable") and account.complete else "error",
            device="gpu" if made["kernel"].startswith("cuda") else "auto",
        )  # fmt: skip
        then = without(made["source"], made["variable"]) if made["variable"] else made["source"]
        if source is None and then.startswith(_NOT_TO_BE_OPENED):
            raise SourceError("it is known by a name alone, not by where it is")
        where = locate(then, given) if source is None else source
        freshness = check_job(prepare(where, path, options, moved=source is not None), ledger)
    except TargetError as error:
        freshness = _cannot_tell(target, str(error), up_to_date=False)
    except Exception as error:  # whatever a file system may raise
        freshness = _cannot_tell(target, f"the source cannot be compared: {error}", up_to_date=None)
    return Status(account, freshness, AtWork.on(location, account), tuple(runs_of(location)))


def check_job(job: Job, ledger: Ledger | None = None) -> Freshness:
    """Return whether the target of a job is up to date with its source.

    Parameters
    ----------
    job
        What made it.
    ledger
        That of the target, if it was read already.

    Raises
    ------
    SourceError
        If the source cannot be read or listed.
    """
    location, target, now = job.target, job.found, plan_for(job, Workers(0, 0, None)).tiling
    if job.action == "create":
        why = "there is no target yet" if target.state is State.ABSENT else "the target is to be made anew"
        return Freshness(
            up_to_date=False, tiles=now.n_tiles, tiles_missing=now.n_tiles, tiles_changed=0, tiles_unknown=0,
            shape=job.source.shape, reasons=(why,),
        )  # fmt: skip
    recorded, done = _recorded(target, ledger or Ledger(location, target), now, job.options)
    seen = job.source.look(now)
    differs = done & seen.differs(recorded)
    unknown = int((differs & (recorded == UNKNOWN)).sum()) if seen.tells else int(done.sum())
    changed = int((differs & (recorded != UNKNOWN)).sum()) if seen.tells else 0
    missing = int((~done).sum())
    reasons = _beside(job, now)
    reasons += [f"{missing:,} of {now.n_tiles:,} tiles are not done"] if missing else []
    reasons += [f"the source of {changed:,} tiles was written to since"] if changed else []
    if not (reasons or target.state is State.COMPLETE):
        reasons.append("the last run did not come to its end")
    up_to_date = None if unknown and not reasons else not reasons
    if unknown:
        reasons.append(
            f"of the source of {unknown:,} tiles it is not recorded what it was: the same command reads it again"
            if seen.tells
            else "the store of the source tells neither versions nor times of its chunks"
        )
    return Freshness(
        up_to_date=up_to_date, tiles=now.n_tiles, tiles_missing=missing, tiles_changed=changed, tiles_unknown=unknown,
        shape=now.shape, reasons=tuple(reasons),
    )  # fmt: skip


def _recorded(target: Target, ledger: Ledger, now: Tiling, options: JobOptions) -> tuple[Numbers, Flags]:
    """Return what is recorded of the source of each tile, as they are now, and which tiles are done and count."""
    recorded, done = np.full(now.n_tiles, UNKNOWN, np.int64), np.zeros(now.n_tiles, bool)
    old = target.tiling
    if old.n_tiles:
        numbers = old.numbers_in(now)
        counts = ledger.done & (old.matrices() == now.matrices()[numbers])
        done[numbers] = counts & ~ledger.unwanted(options)
        recorded[numbers] = ledger.column("source_seen")
    return recorded, done


def _beside(job: Job, now: Tiling) -> list[str]:
    """Return in what else than its numbers a target is not up to date."""
    location, target = job.target, job.found
    contents = contents_of(job, now, [])
    if target.shape != now.shape:
        return [f"the source has grown from {target.shape} to {now.shape}"]
    if not targets.follows(location, target, contents):
        return ["coordinates or units of the source have changed"]
    keys = targets.damage(location, target, contents)
    return [f"{', '.join(keys[:3])} of the target are lost or damaged"] if keys else []


def _cannot_tell(target: Target, why: str, *, up_to_date: bool | None) -> Freshness:
    tiles = target.tiling.n_tiles
    return Freshness(
        up_to_date=up_to_date, tiles=tiles, tiles_missing=0, tiles_changed=0, tiles_unknown=tiles, shape=target.shape,
        reasons=(clean(why),),
    )  # fmt: skip
