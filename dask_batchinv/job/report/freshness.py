"""Whether a target is up to date with its source, as far as the stores tell: nothing of the data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import Job, contents_of, plan_for, prepare
from dask_batchinv.job.report.account import Account, account_in
from dask_batchinv.job.report.at_work import AtWork, rows_of
from dask_batchinv.job.seen import UNKNOWN, Flags, Numbers
from dask_batchinv.job.source.variable import group_of
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger, runs_of
from dask_batchinv.job.target.state import State, Target, options_of
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location, Place
from dask_batchinv.outcome import SourceError, TargetError
from dask_batchinv.places import locate
from dask_batchinv.shown import Row, Shown, counted
from dask_batchinv.text import clean, public
from dask_batchinv.urls import without

#: What a source begins with that is known by its name alone: a snapshot that was passed as a session, or a lazy one.
_NOT_TO_BE_OPENED = ("icechunk://", "lazy://")


@dataclass(frozen=True, kw_only=True)
class Freshness(Shown):
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

    def rows(self) -> list[Row]:
        """Return the answer, and why."""
        answer = {True: "yes", False: "no", None: "not known"}[self.up_to_date]
        return [("up to date", f"{answer}{': ' if self.reasons else ''}{'; '.join(self.reasons)}")]


@public
@dataclass(frozen=True)
class Status(Shown):
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

    def heading(self) -> str:
        """Return what was made from what."""
        return self.account.heading()

    def rows(self) -> list[Row]:
        """Return how far it is, who is at work on it, and whether it is up to date."""
        rows = [*rows_of(self.account, self.at_work), *([] if self.at_work is None else [self.at_work.row()])]
        if self.runs:
            last = self.runs[-1]
            ended = "" if last.get("stopped") is None else f"; it was stopped: {last['stopped']}"
            done = f"{counted(last.get('tiles_now') or 0, 'tile')} in {last.get('seconds', 0):.1f} s"
            done += f", {counted(last.get('workers') or 0, 'worker')}"
            rows.append(("last run", f"{last.get('started')}, {done}{ended}"))
        return rows + self.freshness.rows()


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
    account = account_in(location, target, ledger)
    try:
        options = options_of(
            target, missing="fill" if ledger.total("filled") else "error",
            bad_chunks="nan" if ledger.total("unreadable") and account.complete else "error",
            device="gpu" if made["kernel"].startswith("cuda") else "auto",
        )  # fmt: skip
        then = without(made["source"], made["variable"]) if made["variable"] else made["source"]
        if source is None and then.startswith(_NOT_TO_BE_OPENED):
            raise SourceError("it is known by a name alone, not by where it is")
        where = locate(then, given) if source is None else group_of(Location.parse(source), made["variable"])
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
    reasons += [f"{missing:,} of {counted(now.n_tiles, 'tile')} not done"] if missing else []
    reasons += [f"the source of {counted(changed, 'tile')} was written to since"] if changed else []
    if not (reasons or target.state is State.COMPLETE):
        reasons.append("the last run did not come to its end")
    up_to_date = None if unknown and not reasons else not reasons
    if unknown:
        reasons.append(
            f"of the source of {counted(unknown, 'tile')} it is not recorded what it was: the same job reads it again"
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
