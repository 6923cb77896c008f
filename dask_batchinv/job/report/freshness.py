"""Whether a target is up to date with its source, as far as the stores tell: nothing of the data is read."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import Job, plan_for
from dask_batchinv.job.report.account import Account, account_of
from dask_batchinv.job.seen import UNKNOWN, look_at_source
from dask_batchinv.job.source.metadata import StoredArray, open_stored
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.ledger import Ledger
from dask_batchinv.job.target.state import State, Target, shrunk
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location, raised_as
from dask_batchinv.outcome import SourceError
from dask_batchinv.text import clean


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


@dataclass(frozen=True)
class Status:
    """How far a target is, and whether it is up to date."""

    account: Account
    """What its ledger knows."""
    freshness: Freshness
    """What its source says."""

    @property
    def exit_code(self) -> int:
        """That of its freshness."""
        return self.freshness.exit_code

    def to_json(self) -> dict[str, Any]:
        """Return it for machines."""
        return self.account.to_json() | {"freshness": self.freshness.to_json(), "exit_code": self.exit_code}

    def __str__(self) -> str:
        return f"{self.account}\n{self.freshness}"


def status_of(path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> Status:
    """Return the status of a target.

    Parameters
    ----------
    path
        The target.
    source
        The array that it was made from, where its address is no more what it was then, or has credentials in it; by
        default that which the target names.

    Raises
    ------
    TargetError
        If there is no target of ours.
    """
    location, target = targets.existing(path)
    account = account_of(path)
    try:
        stored = open_stored(Location.parse(source or target.fingerprint["source"]))
        if changed := [name for name, fact in stored.facts.items() if target.fingerprint[name] != fact]:
            raise SourceError(f"the source is another array now: {', '.join(changed)} differs")
        freshness = freshness_of(location, target, stored)
    except Exception as error:  # whatever a file system may raise
        freshness = _unknown(target, f"the source cannot be compared: {error}")
    return Status(account, freshness)


def check_job(job: Job) -> Freshness:
    """Return whether the target of a job is up to date.

    Raises
    ------
    SourceError
        If the source cannot be listed.
    """
    source = StoredArray(job.source.location, job.source.chunk_grid, job.source.facts)
    if job.action == "create":
        why = "there is no target yet" if job.found.state is State.ABSENT else "the target is to be made anew"
        tiles = plan_for(job, Workers(0, 0, None)).tiling.n_tiles
        return Freshness(
            up_to_date=False, tiles=tiles, tiles_missing=tiles, tiles_changed=0, tiles_unknown=0,
            shape=job.source.shape, reasons=(why,),
        )  # fmt: skip
    with raised_as(SourceError, f"the source {source.location.name} cannot be listed"):
        return freshness_of(job.target, job.found, source)


def freshness_of(location: Location, target: Target, source: StoredArray) -> Freshness:
    """Return whether a target that is there is up to date; OSError if the source cannot be listed."""
    if smaller := shrunk(target.shape, source.grid.shape, tuple(map(str, target.fingerprint["dimensions"]))):
        raise SourceError("; ".join(smaller))
    old, now = target.tiling, Tiling(source.grid.shape, target.core, target.tile)
    ledger = Ledger(location, target)
    numbers = old.numbers_in(now)
    recorded = np.full(now.n_tiles, UNKNOWN, np.int64)
    recorded[numbers] = ledger.column("source_seen")
    done = np.zeros(now.n_tiles, bool)
    done[numbers] = ledger.done & (old.matrices() == now.matrices()[numbers])
    seen = look_at_source(source.location, source.grid, now)
    differs = done & seen.differs(recorded)
    unknown = int((differs & (recorded == UNKNOWN)).sum()) if seen.tells else int(done.sum())
    changed = int((differs & (recorded != UNKNOWN)).sum()) if seen.tells else 0
    missing = int((~done).sum())
    reasons = [f"the source has grown from {old.shape} to {now.shape}"] if old.shape != now.shape else []
    reasons += [f"{missing:,} of {now.n_tiles:,} tiles are not done"] if missing else []
    reasons += [f"the source of {changed:,} tiles was written to since"] if changed else []
    if unknown:
        reasons.append(
            f"of the source of {unknown:,} tiles it is not recorded what it was: the same command reads it again"
            if seen.tells
            else "the store of the source tells neither versions nor times of its chunks"
        )
    fresh = not (missing or changed or old.shape != now.shape)
    return Freshness(
        up_to_date=None if fresh and unknown else fresh, tiles=now.n_tiles, tiles_missing=missing,
        tiles_changed=changed, tiles_unknown=unknown, shape=now.shape, reasons=tuple(reasons),
    )  # fmt: skip


def _unknown(target: Target, why: str) -> Freshness:
    tiles = target.tiling.n_tiles
    return Freshness(
        up_to_date=None, tiles=tiles, tiles_missing=0, tiles_changed=0, tiles_unknown=tiles, shape=target.shape,
        reasons=(clean(why),),
    )  # fmt: skip
