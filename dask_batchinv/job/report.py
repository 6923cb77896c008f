"""What came of a job, for people and for machines."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from dask.utils import format_bytes

from dask_batchinv import storage
from dask_batchinv.job import target as targets
from dask_batchinv.job.ledger import FAILED, Ledger
from dask_batchinv.job.plan import Tiling
from dask_batchinv.job.tile import TileResult
from dask_batchinv.outcome import NAMED, Index, Info, TargetError
from dask_batchinv.place import Place

_WORDS = {
    "singular": "singular (or not positive definite)",
    "not_finite": "with NaN or infinity",
    "overflow": "whose inverse overflows",
    "below_min_rcond": "with rcond below the minimum",
}


@dataclass(frozen=True)
class FailedTile:
    """A tile that could not be done."""

    number: int
    """Its number in the plan."""
    region: tuple[tuple[int, int], ...]
    """Its (start, stop) along each batch dimension."""
    cause: str
    """Why."""

    @classmethod
    def of(cls, result: TileResult, tiling: Tiling) -> FailedTile:
        """Return the failure that a result tells of."""
        spans = tuple((span.start, span.stop) for span in tiling.region(result.number))
        return cls(result.number, spans, result.error or "")

    def __str__(self) -> str:
        spans = ", ".join(f"{start}:{stop}" for start, stop in self.region)
        return f"tile {self.number} [{spans}]: {self.cause}"


@dataclass(frozen=True)
class JobReport:
    """What came of a job."""

    source: str
    """Where it read."""
    target: str
    """Where it wrote."""
    matrices: int
    """Matrices in the stack."""
    matrices_done: int
    """Matrices accounted for."""
    failed: dict[str, int]
    """Matrices without an inverse, by kind."""
    first_failed: dict[str, list[Index]]
    """The first of them by their indices in the whole stack, by kind; all of them are in ``info``."""
    ill_conditioned: int
    """Good matrices with rcond below the machine epsilon: their inverses may have no correct digit."""
    smallest_rcond: float | None
    """Of the good matrices."""
    max_failed: int | None
    """How many failed matrices were allowed."""
    tiles: int
    """Tiles of the plan."""
    tiles_done: int
    """Tiles recorded in the ledger."""
    tiles_now: int
    """Of these, done by this run."""
    tiles_proven: int
    """Tiles of earlier runs that this one has read back and found as they were written."""
    damaged_tiles: tuple[FailedTile, ...]
    """Tiles of earlier runs that were not, and were done again."""
    failed_tiles: tuple[FailedTile, ...]
    """Tiles that could not be done."""
    stopped: str | None
    """What ended the run before its time: a full disk, a lost cluster."""
    retries: int
    """Tiles tried again in this run."""
    seconds: float
    """Time of this run."""
    bytes_read: int
    """Bytes of the source, decoded, read by this run."""
    bytes_written: int
    """Bytes of the target written by this run."""
    workers: int
    """Workers of this run."""
    threads_per_worker: int
    """Threads of each."""
    kernel: str
    """What inverted the matrices."""
    devices: dict[str, int]
    """Tiles in the ledger by the device that inverted them, "cpu" or "gpu"."""
    source_checked: bool
    """Whether the source carries checksums; without them damage to it goes unnoticed."""
    notes: tuple[str, ...] = field(default=())
    """What else the reader should know."""

    @property
    def n_failed(self) -> int:
        """Matrices without an inverse."""
        return sum(self.failed.values())

    @property
    def complete(self) -> bool:
        """Whether every tile is done."""
        return self.tiles_done == self.tiles

    @property
    def exit_code(self) -> int:
        """0 done; 1 some tiles could not be done; 3 more matrices failed than were allowed."""
        if not self.complete or self.stopped is not None:
            return 1
        return 3 if self.max_failed is not None and self.n_failed > self.max_failed else 0

    def to_json(self) -> dict[str, Any]:
        """Return the report for machines."""
        return asdict(self) | {"complete": self.complete, "exit_code": self.exit_code}

    def __str__(self) -> str:
        share = f" of {self.matrices:,}" if not self.complete else ""
        lines = [
            f"{'NOT COMPLETE' if self.exit_code == 1 else 'done'}: {self.source} -> {self.target}",
            f"matrices         {self.matrices_done:,}{share}, {self.n_failed:,} without an inverse",
        ]
        for kind, number in self.failed.items():
            if number:
                named = ", ".join(map(str, self.first_failed[kind]))
                more = ", ..." if number > len(self.first_failed[kind]) else ""
                lines.append(f"  {number:,} {_WORDS[kind]}: {named}{more}")
        if self.smallest_rcond is not None:
            lines.append(
                f"smallest rcond   {self.smallest_rcond:.3g}, {self.ill_conditioned:,} below the machine epsilon"
            )
        lines.append(f"tiles            {self.tiles_done:,} of {self.tiles:,}, {self.tiles_now:,} in this run, "
                     f"{self.retries:,} tried again")  # fmt: skip
        if self.tiles_proven or self.damaged_tiles:
            lines.append(f"read back        {self.tiles_proven:,} tiles of earlier runs are as they were written, "
                         f"{len(self.damaged_tiles):,} were damaged and done again")  # fmt: skip
            lines += named_tiles(self.damaged_tiles)
        if self.failed_tiles:
            lines.append(f"failed           {len(self.failed_tiles):,} tiles")
            lines += named_tiles(self.failed_tiles)
        if self.stopped:
            lines.append(f"stopped          {self.stopped}")
        if self.tiles_now and self.seconds:
            rate = self.bytes_read / self.seconds
            lines.append(
                f"time             {self.seconds:.1f} s, {format_bytes(self.bytes_read)} read at "
                f"{format_bytes(rate)}/s, {format_bytes(self.bytes_written)} written"
            )
            lines.append(f"workers          {self.workers} with {self.threads_per_worker} thread(s), {self.kernel}")
        if self.devices["gpu"]:
            lines.append(f"devices          {self.devices['gpu']:,} tiles on GPUs, {self.devices['cpu']:,} on CPUs")
        lines += [f"note             {note}" for note in self.notes]
        return "\n".join(lines)


def named_tiles(tiles: tuple[FailedTile, ...]) -> list[str]:
    """Return lines that name the first tiles and count the rest."""
    lines = [f"  {tile}" for tile in tiles[:NAMED]]
    return lines + ([f"  and {len(tiles) - NAMED} more tiles"] if len(tiles) > NAMED else [])


@dataclass(frozen=True)
class JobStatus:
    """How far a job is."""

    target: str
    """Where it writes."""
    source: str
    """Where it reads."""
    complete: bool
    """Whether it is finished."""
    tiles: int
    """Tiles of the plan."""
    tiles_done: int
    """Tiles recorded in the ledger."""
    matrices: int
    """Matrices in the stack."""
    matrices_done: int
    """Matrices accounted for."""
    failed: dict[str, int]
    """Matrices without an inverse, by kind."""

    def to_json(self) -> dict[str, Any]:
        """Return the status for machines."""
        return asdict(self)

    def __str__(self) -> str:
        state = "complete" if self.complete else "not complete: run the same command again to continue"
        kinds = ", ".join(f"{number:,} {_WORDS[kind]}" for kind, number in self.failed.items() if number)
        return (
            f"{self.source} -> {self.target}\n"
            f"state            {state}\n"
            f"tiles            {self.tiles_done:,} of {self.tiles:,}\n"
            f"matrices         {self.matrices_done:,} of {self.matrices:,}\n"
            f"without inverse  {kinds or 'none'}"
        )


def status_of(target: str | os.PathLike[str]) -> JobStatus:
    """Return how far the job that writes `target` is, from its ledger."""
    place = targets.parse_place(target)
    begun = targets.look(place)
    if begun is None or not begun.ready:
        raise TargetError(f"there is no target of dask_batchinv at {place.name}")
    tiling = targets.tiling_of(place, begun)
    ledger = Ledger(place, read_only=True)
    return JobStatus(
        target=place.name,
        source=begun.fingerprint["source"],
        complete=begun.complete,
        tiles=tiling.n_tiles,
        tiles_done=int(ledger.done.sum()),
        matrices=tiling.n_matrices,
        matrices_done=ledger.total("matrices"),
        failed=ledger.failed,
    )


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
            first = report.stopped or (report.failed_tiles[0].cause if report.failed_tiles else "unknown")
            missing = report.tiles - report.tiles_done
            return (f"{missing} of {report.tiles} tiles could not be done, first cause: {first}. "
                    f"Once it is mended, the same call does the rest.\n{report}")  # fmt: skip
        return (f"{report.n_failed} matrices have no inverse, {report.max_failed} were allowed. The target is "
                f"complete, with NaN in their place; pass max_failed to allow them.\n{report}")  # fmt: skip


def first_failed(target: Place, tiling: Tiling, ledger: Ledger) -> dict[str, list[Index]]:
    """Return the first failed matrices of each kind, from the ``info`` of those tiles that have any.

    Of a target that cannot be read at the moment, none: the counts are known all the same.
    """
    with suppress(Exception):
        return _first_failed(target, tiling, ledger)
    return {kind: [] for kind in FAILED}


def _first_failed(target: Place, tiling: Tiling, ledger: Ledger) -> dict[str, list[Index]]:
    info = storage.open_array(target / "info", read_only=True)
    found: dict[str, list[Index]] = {kind: [] for kind in FAILED}
    for kind, code in zip(FAILED, (None, Info.NOT_FINITE, Info.OVERFLOW, Info.BELOW_MIN_RCOND), strict=True):
        for number in np.flatnonzero(ledger.done & (ledger.column(kind) > 0)):
            region = tiling.region(int(number))
            block = np.asarray(info[region])
            hits = np.argwhere(block > 0 if code is None else block == code)[: NAMED - len(found[kind])]
            starts = [span.start for span in region]
            found[kind] += [tuple(int(i) + start for i, start in zip(hit, starts, strict=True)) for hit in hits]
            if len(found[kind]) == NAMED:
                break
    return found
