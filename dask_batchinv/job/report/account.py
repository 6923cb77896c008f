"""The account of a target: what its ledger knows, for anyone at any time."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dask_batchinv.job.outputs import Outputs, name_of
from dask_batchinv.job.target.chunks import open_array
from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger
from dask_batchinv.job.target.state import Fingerprint, State, Target
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location
from dask_batchinv.outcome import FAILURE_KINDS, NAMED, Index, failures_of
from dask_batchinv.shown import Row, Shown
from dask_batchinv.stack import AssumeA


@dataclass(frozen=True, kw_only=True)
class Account(Shown):
    """How far a target is, and what happened to its matrices."""

    source: str
    """Where the job reads."""
    target: str
    """Where it writes."""
    assume_a: AssumeA
    """Structure of the matrices."""
    kernel: str
    """What inverts them."""
    complete: bool
    """Whether every tile is done."""
    matrices: int
    """Matrices in the stack."""
    matrices_done: int
    """Matrices accounted for."""
    failed: dict[str, int]
    """Matrices without an inverse, by kind."""
    masked: int
    """Matrices that a mask leaves out; they count as done."""
    first_failed: dict[str, list[Index]]
    """The first of them by their indices in the whole stack, by kind; all of them are in ``info``."""
    ill_conditioned: int
    """Good matrices with rcond below the machine epsilon: their inverses may have no correct digit."""
    smallest_rcond: float | None
    """Of the good matrices."""
    tiles: int
    """Tiles of the plan."""
    tiles_done: int
    """Tiles recorded in the ledger."""
    devices: dict[str, int]
    """Tiles in the ledger by the device that inverted them, "cpu" or "gpu"."""

    @property
    def n_failed(self) -> int:
        """Matrices without an inverse."""
        return sum(self.failed.values())

    def failures(self) -> list[str]:
        """Return a line for each kind of failure that there is, with the first matrices."""
        lines = []
        for failure in failures_of(self.assume_a):
            first, number = self.first_failed[failure.kind], self.failed[failure.kind]
            named = [*map(str, first), *(["..."] if number > len(first) else [])]
            if number:
                lines.append(f"{number:,} {failure.words}" + (f": {', '.join(named)}" if first else ""))
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the account for machines."""
        return asdict(self)

    def heading(self) -> str:
        """Return what was made from what."""
        return f"{self.source} -> {self.target}"

    @property
    def state(self) -> str:
        """Whether it is complete, in words."""
        if self.complete and self.tiles_done < self.tiles:
            return "complete, but its ledger is damaged: run the job again to mend it"
        return "complete" if self.complete else "not complete: run the job again to continue"

    def rows(self) -> list[Row]:
        """Return how far it is."""
        kinds = [f"{self.failed[f.kind]:,} {f.words}" for f in failures_of(self.assume_a) if self.failed[f.kind]]
        rows = [
            ("state", self.state),
            ("tiles", f"{self.tiles_done:,} of {self.tiles:,}"),
            ("matrices", f"{self.matrices_done:,} of {self.matrices:,}"),
            ("without inverse", ", ".join(kinds) or "none"),
        ]
        return rows + ([("left out", f"{self.masked:,} by the mask")] if self.masked else [])


def account_of(path: str | os.PathLike[str]) -> Account:
    """Return the account of a target, whoever writes to it.

    Raises
    ------
    TargetError
        If there is none of ours.
    """
    location, target = existing(path)
    ledger = Ledger(location, target)
    return account_in(location, target, ledger)


def account_in(location: Location, target: Target, ledger: Ledger) -> Account:
    """Return the account of a target that was looked at, and whose ledger is open."""
    complete = target.state is State.COMPLETE
    return make_account(location, target.fingerprint, target.tiling, target.outputs, ledger, complete=complete)


def make_account(
    target: Location, fingerprint: Fingerprint, tiling: Tiling, outputs: Outputs, ledger: Ledger, *, complete: bool
) -> Account:
    """Return the account of a target whose ledger is open."""
    return Account(
        source=fingerprint["source"],
        target=target.name,
        assume_a=fingerprint["assume_a"],
        kernel=fingerprint["kernel"],
        complete=complete,
        matrices=tiling.n_matrices,
        matrices_done=ledger.total("matrices"),
        failed=ledger.failed,
        masked=ledger.total("masked"),
        first_failed=_first_failed(target / name_of("info", outputs), tiling, ledger),
        ill_conditioned=ledger.total("ill_conditioned"),
        smallest_rcond=ledger.smallest_rcond,
        tiles=tiling.n_tiles,
        tiles_done=int(ledger.done.sum()),
        devices=ledger.devices,
    )


def _first_failed(place: Location, tiling: Tiling, ledger: Ledger) -> dict[str, list[Index]]:
    """Return the first failed matrices of each kind, from the ``info`` of those tiles that have any."""
    found: dict[str, list[Index]] = {kind: [] for kind in FAILURE_KINDS}
    with suppress(Exception):  # a target that cannot be read at the moment: the counts are known all the same
        info = open_array(place, read_only=True)
        for failure in failures_of("general"):
            first = found[failure.kind]
            for number in np.flatnonzero(ledger.done & (ledger.column(failure.kind) > 0)):
                region = tiling.region(int(number))
                hits = np.argwhere(failure.includes(np.asarray(info[region])))[: NAMED - len(first)]
                starts = [span.start for span in region]
                first += [tuple(int(i) + start for i, start in zip(hit, starts, strict=True)) for hit in hits]
                if len(first) == NAMED:
                    break
    return found
