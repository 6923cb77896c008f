"""What a target tells of itself, as facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dask_batchinv.job.report.account import Account
from dask_batchinv.job.report.at_work import AtWork, rows_of
from dask_batchinv.job.report.page.maps import Map
from dask_batchinv.job.target.state import Fingerprint
from dask_batchinv.outcome import Index
from dask_batchinv.shown import Row, Shown
from dask_batchinv.text import clean_values


@dataclass(frozen=True)
class FailedMatrix:
    """A matrix without an inverse."""

    index: Index
    """Its index in the whole stack."""
    why: str
    """What happened to it."""
    coordinates: dict[str, Any]
    """What the coordinates of the target say of it: `Dataset.sel` takes those of dimensions."""


@dataclass(frozen=True)
class Histogram:
    """How many good matrices have which rcond."""

    edges: tuple[float, ...]
    """Of the bins, in log10 of rcond."""
    counts: tuple[int, ...]
    """In each bin."""
    matrices: int
    """Good matrices that were looked at."""
    tiles: int | None
    """Of how many tiles they are, spread evenly, where not all were looked at."""


@dataclass(frozen=True)
class SlowTile:
    """A tile that took its time."""

    place: str
    """Its number and region."""
    seconds: float
    """How long it took."""
    attempts: int
    """How often it was tried."""


@dataclass(frozen=True, kw_only=True)
class Findings(Shown):
    """All that a target tells."""

    account: Account
    """How far it is, and what happened to its matrices."""
    at_work: AtWork | None
    """The run that is at work on it."""
    made: str
    """When this report was made, in UTC."""
    shape: tuple[int, ...]
    """Shape of the stack."""
    tile: tuple[int, ...]
    """Shape of a tile."""
    n: int
    """Rows of a matrix."""
    dims: tuple[str, ...]
    """Names of the batch dimensions."""
    asked: Fingerprint
    """What was asked for: by this a target belongs to a job."""
    failed: tuple[FailedMatrix, ...]
    """The first matrices of each kind of failure."""
    map: Map | None
    """Where in the stack they are, and the rcond of the others."""
    ticks: dict[str, tuple[tuple[int, Any], ...]]
    """By dimension of the map, some places along it and their coordinates."""
    histogram: Histogram | None
    """Of rcond; None where there is no good matrix, or they cannot be read."""
    slowest: tuple[SlowTile, ...]
    """The tiles that took longest."""
    retried: int
    """Tiles that were tried more than once."""
    runs: tuple[dict[str, Any], ...]
    """The records of the last runs, the first of them first."""
    notes: tuple[str, ...]
    """What could not be found out."""

    def heading(self) -> str:
        """Return what was made from what."""
        return self.account.heading()

    def rows(self) -> list[Row]:
        """Return the account, the first failed matrices, and why it is not complete."""
        named = [("", f"{list(each.index)}{_in_words(each.coordinates)}: {each.why}") for each in self.failed]
        at_work = [] if self.at_work is None else [self.at_work.row()]
        notes = [("note", note) for note in self.notes]
        return rows_of(self.account, self.at_work) + named + self.obstacles() + at_work + notes

    def obstacles(self) -> list[Row]:
        """Return why the last run has not completed it."""
        if self.account.complete or not self.runs:
            return []
        last = self.runs[-1]
        stopped = [("stopped", str(last["stopped"]))] if last.get("stopped") else []
        tiles = [("failed", f"tile {tile.get('number')}: {tile.get('cause')}") for tile in last["failed_tiles"]]
        chunks = [("unreadable", f"{chunk.get('key')}: {chunk.get('cause')}") for chunk in last["bad_chunks"]]
        return stopped + tiles + chunks + [("note", note) for note in last["notes"]]

    def to_json(self) -> dict[str, Any]:
        """Return the report for machines."""
        found = {name: value for name, value in vars(self).items() if name not in ("account", "at_work", "map")}
        told: dict[str, Any] = clean_values(
            found
            | {name: [asdict(part) for part in found[name]] for name in ("failed", "slowest")}
            | {"account": self.account.to_json(), "at_work": self.at_work and asdict(self.at_work)}
            | {"histogram": self.histogram and asdict(self.histogram), "map": self.map and self.map.to_json()}
            | {"exit_code": 0}
        )
        return told


def _in_words(coordinates: dict[str, Any]) -> str:
    return f" ({', '.join(f'{name} {as_text(value)}' for name, value in coordinates.items())})" if coordinates else ""


def as_text(coordinate: Any) -> str:
    """Return a coordinate for people: numbers with ten digits, so that places a metre apart on a globe stay apart."""
    return f"{coordinate:.10g}" if isinstance(coordinate, float) else str(coordinate)
