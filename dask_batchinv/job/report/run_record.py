"""What a run does: its progress, and its record, which is kept in the target."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from dask_batchinv.job.events import WorkerEvent
from dask_batchinv.job.options import BadChunks
from dask_batchinv.job.plan.plan import Plan, Workers
from dask_batchinv.job.report.tiles import FailedTile
from dask_batchinv.job.results import BadChunk, TileResult, WorkerFigures
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.versions import versions
from dask_batchinv.outcome import NAMED
from dask_batchinv.text import clean

#: So much is kept of why a tile failed.
_CAUSE_LENGTH = 500
#: So many events are kept, and so many workers by name.
_EVENTS = 100
#: And so many points of how far it was.
MOST_POINTS = 100


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one run did."""

    tiles_now: int
    """Tiles done by this run."""
    tiles_proven: int
    """Tiles of earlier runs that this one has read back and found as they were written."""
    damaged_tiles: tuple[FailedTile, ...]
    """Tiles of earlier runs that were not; they are done again unless the run is stopped."""
    failed_tiles: tuple[FailedTile, ...]
    """Tiles that could not be done."""
    bad_chunks: tuple[BadChunk, ...]
    """Chunks of the source that could not be read: the matrices that they have a part of are NaN, and ``info`` -4."""
    stopped: str | None
    """What ended the run before its time: a full disk, a lost cluster."""
    changed_tiles: int
    """Tiles of earlier runs that were made from other numbers than the source has now; they are done again."""
    changed_meanwhile: int
    """Tiles that were written to in the source while this run read them, and were done again."""
    grown_from: tuple[int, ...] | None
    """Shape of the source that earlier runs have seen, if it has grown since."""
    retries: int
    """Tiles tried again in this run, because they failed or a worker was lost with them."""
    deaths: int
    """Workers that died with tiles."""
    restarts: int
    """Workers that this run has restarted, because they gave no result."""
    worker_events: tuple[str, ...]
    """What else happened to workers, and to these: the first hundred, by their addresses."""
    mended: tuple[str, ...]
    """Metadata and coordinates of the target that were lost or damaged, and were written again."""
    started: str
    """When this run began, in UTC, as ISO 8601 has it."""
    ended: str
    """When it ended, likewise."""
    seconds: float
    """Time of this run in which it inverted."""
    cpu_seconds: float
    """For how long of that threads have computed, all together; without those of libraries that they waited for."""
    requests: int
    """Requests to stores: for chunks, or parts of them, read or written."""
    per_worker: dict[str, WorkerFigures]
    """What each worker did, by its address; nothing where the job ran in its own process."""
    bytes_read: int
    """Bytes of the source, decoded, read by this run."""
    bytes_written: int
    """Bytes of the target written by this run."""
    source_decoded_times: float
    """How many times the average chunk of the source was decoded, where tiles are smaller."""
    workers: int
    """Workers of this run."""
    threads_per_worker: int
    """Threads of each."""
    where: str
    """Where it ran, in words."""
    source_checked: bool
    """Whether the source carries checksums; without them damage to it goes unnoticed."""
    timeline: tuple[tuple[float, int], ...]
    """Seconds in which it inverted, and how many matrices it had done by then, now and then."""
    versions: dict[str, str]
    """What it ran."""
    notes: tuple[str, ...] = ()
    """What else the reader should know."""

    def to_json(self) -> dict[str, Any]:
        """Return what is kept in the target: of its tiles the numbers, and the first ones by name."""
        tiles = {"damaged_tiles": self.damaged_tiles, "failed_tiles": self.failed_tiles}
        counts = {f"n_{name}": len(some) for name, some in tiles.items()}
        named = {name: [asdict(tile) | {"cause": tile.cause[:_CAUSE_LENGTH]} for tile in some[:NAMED]]
                 for name, some in tiles.items()}  # fmt: skip
        bad = {"n_bad_chunks": len(self.bad_chunks), "bad_chunks": [asdict(each) for each in self.bad_chunks[:NAMED]]}
        some = dict(itertools.islice(self.per_worker.items(), _EVENTS))
        workers = {address: asdict(figures) for address, figures in some.items()}
        return asdict(self) | counts | named | bad | {"per_worker": workers}


class Timeline:
    """How far a run was, and when: some points of it, however long it takes.

    Examples
    --------
    >>> timeline = Timeline()
    >>> for second in range(1, 1000):
    ...     timeline.note(second, 5 * second)
    >>> len(timeline.points()) <= MOST_POINTS + 1, timeline.points()[0], timeline.points()[-1]
    (True, (0.0, 0), (999, 4995))
    """

    def __init__(self) -> None:
        self._points = [(0.0, 0)]
        self._last, self._step = self._points[0], 0.0

    def note(self, seconds: float, count: int) -> None:
        """Note how far it is."""
        self._last = (seconds, count)
        if seconds - self._points[-1][0] >= self._step:
            self._points.append(self._last)
        if len(self._points) > MOST_POINTS:
            self._points = self._points[::2]
            self._step = 2 * seconds / MOST_POINTS

    def points(self) -> tuple[tuple[float, int], ...]:
        """Return the points, the first and the last one among them."""
        points = self._points if self._last == self._points[-1] else [*self._points, self._last]
        return tuple((round(seconds, 3), count) for seconds, count in points)


#: A run of which so many tiles have failed, all for one cause and none of them done, ends.
HOPELESS = 50


@dataclass
class RunTotals:
    """What a run has done so far."""

    tiles: int = 0
    matrices: int = 0
    retries: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    requests: int = 0
    read_back: int = 0
    failed: list[TileResult[Any]] = field(default_factory=list)
    bad_chunks: dict[str, BadChunk] = field(default_factory=dict)
    damaged: list[TileResult[Any]] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)
    changed_meanwhile: set[int] = field(default_factory=set)
    grown_from: tuple[int, ...] | None = None
    followed: bool = False
    has_chunks: bool = True
    done: set[int] = field(default_factory=set)
    stopped: str | None = None
    events: list[WorkerEvent] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    timeline: Timeline = field(default_factory=Timeline)

    def add(self, result: TileResult[Any], bad_chunks: BadChunks = "error") -> None:
        """Count a tile that was done or given up, or of which a part was done."""
        self.retries += result.attempts - 1
        self.cpu_seconds += result.cpu_milliseconds / 1000
        self.requests += result.requests
        self.bad_chunks |= {chunk.key: chunk for chunk in result.bad_chunks}
        if result.value is not None:
            self.tiles += 1
            self.matrices += result.value.matrices
            self.done.add(result.number)
        if result.value is None or (result.bad_chunks and bad_chunks == "error"):
            self.failed.append(result)
            if result.stops:
                self.stopped = result.error

    def common_cause(self) -> str | None:
        """Return why all tiles fail, where many have been tried and none was done: nothing of their own chunks."""
        if self.tiles or len(self.failed) != HOPELESS or any(result.is_final for result in self.failed):
            return None
        causes = [result.error or "" for result in self.failed]
        return causes[0] if len({cause.partition(":")[0] for cause in causes}) == 1 else None

    def record(
        self, plan: Plan, workers: Workers, source: Source, notes: list[str], used: Mapping[str, WorkerFigures]
    ) -> RunRecord:
        """Return the record of the run."""
        share = self.tiles / max(1, plan.tiling.n_tiles)
        failed = sorted(self.failed, key=lambda result: result.number)
        return RunRecord(
            tiles_now=len(self.done),
            tiles_proven=self.read_back,
            damaged_tiles=tuple(FailedTile.of(result, plan.tiling) for result in self.damaged),
            failed_tiles=tuple(FailedTile.of(result, plan.tiling) for result in failed),
            bad_chunks=tuple(self.bad_chunks.values()),
            stopped=self.stopped,
            changed_tiles=len(self.changed),
            changed_meanwhile=len(self.changed_meanwhile),
            grown_from=self.grown_from,
            retries=self.retries + sum(event.tiles for event in self.events),
            deaths=sum(event.kind == "died" for event in self.events),
            restarts=sum(event.kind == "restarted" for event in self.events),
            worker_events=tuple(map(str, self.events[:_EVENTS])),
            mended=tuple(self.mended),
            started=self.started.isoformat(timespec="seconds"),
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=self.seconds,
            cpu_seconds=round(self.cpu_seconds, 3),
            # Where there are workers, also for tiles that were tried again.
            requests=sum(figures.requests for figures in used.values()) or self.requests,
            per_worker={clean(address): figures for address, figures in used.items()},
            bytes_read=round(plan.nbytes_in * share),
            bytes_written=round(plan.nbytes_out * share),
            source_decoded_times=plan.read_amplification,
            workers=workers.count,
            threads_per_worker=workers.threads,
            where=plan.where,
            source_checked=source.checksummed,
            timeline=self.timeline.points(),
            versions=versions(),
            notes=tuple([*notes, *self.notes, *self._notes(source), *(_on_amplification(plan) if self.tiles else [])]),
        )

    def _notes(self, source: Source) -> list[str]:
        notes = list(source.notes)
        if self.followed and self.grown_from is None:
            notes.append("coordinates and units were brought up to date")
        if not (self.tiles or self.failed or self.mended or self.followed) and self.stopped is None:
            notes.append("nothing was left to do")
        if any(chunk.cause.startswith("MissingChunkError") for chunk in self.bad_chunks.values()):
            notes.append(
                "if chunks that are not stored stand for matrices of the fill value, pass `missing='fill'`"
                if self.has_chunks
                else f"not one chunk of {source.location.name} was found: is it the right array, and all of it there?"
            )
        if any(result.value is not None for result in self.failed):
            notes.append(
                "all other matrices of tiles with unreadable chunks are inverted; `bad_chunks='nan'` lets the target "
                "be complete without those"
            )
        if not source.checksummed:
            notes.append("unchecked: the source has no checksums, so damage to it cannot be detected")
        return notes


def _on_amplification(plan: Plan) -> list[str]:
    if plan.advice is None:
        return []
    return [f"each chunk of the source was decoded {plan.read_amplification:.1f} times: {plan.advice}"]


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    activity: Literal["checking", "comparing", "inverting", "verifying"]
    """What it does: read back what earlier runs have done, read what they have done it from, or the rest; or verify."""
    matrices: int
    """Matrices in the stack; while checking or comparing, those that are looked at."""
    matrices_done: int
    """Matrices accounted for, by earlier runs too."""
    matrices_before: int
    """Of these, by earlier runs."""
    failed: int
    """Matrices without an inverse."""
    failed_tiles: int
    """Tiles given up; while checking, those that are damaged, and while comparing, that have changed."""
    seconds: float
    """Time since this run began."""


OnProgress = Callable[[Progress], None]


class Guarded:
    """A callback for progress that cannot end a job: if it fails it is not called again, and `notes` say so."""

    def __init__(self, on_progress: OnProgress):
        self._on_progress = on_progress
        self.notes: list[str] = []

    def __call__(self, progress: Progress) -> None:
        """Tell of progress, unless that failed before."""
        if self.notes:
            return
        try:
            self._on_progress(progress)
        except Exception as error:  # whatever a callback may raise; Ctrl-C passes
            self.notes.append(clean(f"on_progress failed and was not called again: {type(error).__name__}: {error}"))


def ignore(progress: Progress) -> None:
    """Discard progress."""


def all_of(*callbacks: OnProgress | None) -> OnProgress:
    """Return a callback that calls those of some that there are."""
    there = [callback for callback in callbacks if callback is not None]

    def tell(progress: Progress) -> None:
        for callback in there:
            callback(progress)

    return tell if there else ignore
