"""Verifies a whole target: every chunk is read, its account checked, and what is not right left to the next run."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dask_batchinv.job.driver.cluster_options import ClusterOptions, own_task
from dask_batchinv.job.driver.executor import Executor, InProcess
from dask_batchinv.job.driver.placing import is_small, threads_here
from dask_batchinv.job.plan.prepare import fingerprint_of
from dask_batchinv.job.report.run_record import Guarded, OnProgress, Progress, ignore
from dask_batchinv.job.report.tiles import FailedTile
from dask_batchinv.job.report.verify_report import VerifyReport
from dask_batchinv.job.results import TileResult, TileRow
from dask_batchinv.job.seen import UNKNOWN
from dask_batchinv.job.settings import settings
from dask_batchinv.job.source.formed import open_any
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.source.variable import group_of
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.chunks import DamagedTargetError
from dask_batchinv.job.target.documents import visibly_damaged_keys
from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger
from dask_batchinv.job.target.lock import locked
from dask_batchinv.job.target.state import State, Target, differences, options_of, shrunk
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.job.worker.verify_tiles import VerifiedTile, VerifyTask, verify_tiles
from dask_batchinv.location import Location, Place
from dask_batchinv.outcome import FAILURE_KINDS, RefusedError, TargetError
from dask_batchinv.stack import is_share
from dask_batchinv.text import clean

#: So many tiles that are not recorded are named.
_NAMED_TILES = 100
#: What mends a target.
AGAIN = ": run the job again that made it"


@dataclass
class _Found:
    """What was found so far."""

    verified: list[VerifiedTile] = field(default_factory=list)
    bad: list[TileResult[Any]] = field(default_factory=list)
    refuted: list[int] = field(default_factory=list)
    doubted: list[int] = field(default_factory=list)
    unrecorded: int = 0
    matrices: int = 0


def verify(
    path: Place,
    source: Place | Source | None,
    cluster: ClusterOptions,
    sample: float = 1.0,
    on_progress: OnProgress = ignore,
) -> VerifyReport:
    """Do what `verify_store` promises."""
    if not is_share(sample):
        raise RefusedError(f"`sample=` must be between 0 and 1, got {sample!r}")
    settings()  # what it says is asked for later, too
    location, target = existing(path)
    tiling = target.tiling
    opened = None if source is None else _same_source(source, target)
    ledger, found, problems = Ledger(location, target), _Found(), []
    made = target.fingerprint
    task = VerifyTask(
        uuid.uuid4().hex, location, tiling, opened and opened.for_workers(), options_of(target),
        np.dtype(made["stored as"]), target.encoding, sample,
    )  # fmt: skip
    try:
        targets.open_as_reader(location)
        if keys := visibly_damaged_keys(location, target):
            problems.append(f"{', '.join(keys[:3])} of {location.name} are lost or damaged{AGAIN}")
    except DamagedTargetError as error:
        problems.append(f"{error}{AGAIN}")
    nbytes = (1 + (opened is not None)) * math.prod(tiling.shape) * np.dtype(made["dtype"]).itemsize
    start, tell = time.monotonic(), Guarded(on_progress)
    with _executor(cluster, opened, location, nbytes) as executor:
        spans = (range(number, number + 1) for number in range(tiling.n_tiles))
        for result in executor.run(verify_tiles, task, spans, attempts=1):
            if isinstance(result, TileResult):
                _add(result, ledger, found)
            seconds = time.monotonic() - start
            tell(Progress("verifying", tiling.n_matrices, found.matrices, 0, 0, len(found.bad), seconds))
    if (found.refuted or found.doubted) and (problem := _hand_over(location, target, found)):
        problems.append(problem)
    if found.unrecorded > _NAMED_TILES:
        problems.append(f"{found.unrecorded:,} tiles are not recorded in the ledger, of which {_NAMED_TILES} are named")
    rows = [tile.row for tile in found.verified]
    return VerifyReport(
        target=location.name,
        complete=target.state is State.COMPLETE,
        tiles=tiling.n_tiles,
        tiles_read=len(found.verified),
        bad_tiles=tuple(FailedTile.of(result, tiling) for result in sorted(found.bad, key=lambda bad: bad.number)),
        problems=tuple(problems),
        matrices=sum(row.matrices for row in rows),
        failed={kind: sum(row.failed[kind] for row in rows) for kind in FAILURE_KINDS},
        masked=sum(row.masked for row in rows),
        residuals=sum(tile.residuals for tile in found.verified),
        largest_ratio=max((tile.largest_ratio for tile in found.verified), default=0.0),
    )


@contextmanager
def _executor(options: ClusterOptions, source: Source | None, target: Location, nbytes: int) -> Iterator[Executor]:
    """Yield what reads so many bytes: workers, or threads of this process where that is sooner done."""
    is_here = target.is_memory or (source is not None and source.location.is_memory)
    found = options.resolved(is_here=is_here)
    if (options if own_task() else found).is_open and is_small(nbytes):
        yield InProcess(threads_here())
        return
    # Not before it is needed: to import Dask's cluster takes as long as a small job.
    from dask_batchinv.job.driver.cluster import connect, meet_workers
    from dask_batchinv.job.driver.dispatch import Dispatcher

    with connect(found) as (client, _):
        introduction, _silent = meet_workers(client, source, target, found.only_workers, writes=False)
        yield Dispatcher(
            client, introduction, lambda threads, memory: threads, is_own=found.is_local,
            restart_stalled=found.restart_stalled, only=found.only_workers,
        )  # fmt: skip


def _add(result: TileResult[VerifiedTile], ledger: Ledger, found: _Found) -> None:
    """Compare a tile with the ledger, and add it to what was found."""
    error, is_done = result.error, bool(ledger.done[result.number])
    if not is_done:
        found.unrecorded += 1
        # Of a target that was just begun there are many, all alike.
        error = "not recorded in the ledger: run the job again" if found.unrecorded <= _NAMED_TILES else None
    elif (tile := result.value) is not None:
        recorded = ledger.row(result.number)
        if unlike := _unlike_ledger(tile.row, recorded):
            found.doubted.append(result.number)
        if tile.missing and not recorded.filled:  # what stands in its place proves nothing
            error = f"the source has changed: {tile.missing}"
        else:
            error = tile.refuted or unlike or tile.unread
            if tile.refuted:
                found.refuted.append(result.number)
    else:
        found.doubted.append(result.number)
    if result.value is not None and is_done:
        found.verified.append(result.value)
        found.matrices += result.value.row.matrices
    if error:
        found.bad.append(TileResult(result.number, None, error))


def _hand_over(location: Location, target: Target, found: _Found) -> str | None:
    """Leave to the next run what was found: it does what a source refutes, and reads back what else is not right.

    Return why that failed. What cannot be read now may be right, so that this is not taken out of the ledger.
    """
    try:
        with locked(location) as lock:
            writer = Writer(location, lock)
            ledger = Ledger(location, target, writer=writer, durable=True)
            doubted = np.array(found.doubted, np.int64)
            ledger.note("target_seen", doubted, np.full(len(doubted), UNKNOWN))
            for number in found.refuted:
                ledger.forget(number)
            if found.refuted:
                targets.set_complete(writer, target, False)
            ledger.flush()
            ledger.commit()
    except Exception as error:  # whatever a file system may raise
        return clean(f"what is not right could not be noted in the ledger, for the next run: {error}")
    return None


def _same_source(path: Place | Source, target: Target) -> Source:
    fingerprint = target.fingerprint
    options = options_of(target)
    source = path if isinstance(path, Source) else open_any(group_of(Location.parse(path), options.variable), options)
    found = fingerprint_of(source)
    if changed := differences({name: fingerprint.get(name) for name in found}, found):
        raise TargetError(
            f"the target was made from {fingerprint['source']}, but {source.location.name} is another array: "
            f"{'; '.join(changed)}"
        )
    if smaller := shrunk(target.shape, source.shape, source.dims):
        raise TargetError(f"the target was made from {fingerprint['source']} as it was before: {'; '.join(smaller)}")
    return source


def _unlike_ledger(row: TileRow, recorded: TileRow) -> str | None:
    """Return in what a tile is not as it is recorded, or None."""
    for role, found in row.checksums.items():
        if recorded.checksums[role] != found:
            return f"{role} is not what was written"
    for name, found in row.counts.items():
        if (known := recorded.counts[name]) != found:
            return f"{found} {name}, but the ledger says {known}"
    return None
