"""Verifies a whole target: every chunk is read, and its account checked."""

from __future__ import annotations

import os
import uuid

from dask_batchinv.job.driver.cluster import ClusterOptions, check_reach, check_versions, connect
from dask_batchinv.job.driver.dispatch import Dispatcher
from dask_batchinv.job.driver.executor import Heartbeat
from dask_batchinv.job.report.tiles import FailedTile
from dask_batchinv.job.report.verify_report import VerifyReport
from dask_batchinv.job.results import TileResult, TileRow
from dask_batchinv.job.source.source import Source, open_source
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.ledger import Ledger
from dask_batchinv.job.target.state import Fingerprint, State
from dask_batchinv.job.worker.verify_tiles import VerifiedTile, VerifyTask, verify_tiles
from dask_batchinv.outcome import FAILURE_KINDS, RefusedError, TargetError


def verify(
    path: str | os.PathLike[str], source: str | os.PathLike[str] | None, cluster: ClusterOptions, sample: float = 1.0
) -> VerifyReport:
    """Do what `verify_store` promises."""
    if not 0 <= sample <= 1:
        raise RefusedError(f"sample must be between 0 and 1, got {sample}")
    location, target = targets.existing(path)
    tiling = targets.tiling_of(location, target)
    opened = None if source is None else _same_source(source, target.fingerprint)
    made = target.fingerprint
    task = VerifyTask(uuid.uuid4().hex, location, tiling, opened, made["assume_a"], made["lower"], sample)
    ledger = Ledger(location, read_only=True)
    verified: list[VerifiedTile] = []
    bad: list[TileResult[VerifiedTile]] = []
    with connect(cluster) as (client, _):
        check_versions(client)
        check_reach(client, opened, location)
        spans = (range(number, number + 1) for number in range(tiling.n_tiles))
        for result in Dispatcher(client).run(verify_tiles, task, spans, attempts=1):
            if isinstance(result, Heartbeat):
                continue
            if result.value is not None:
                verified.append(result.value)
                if problem := _unlike_ledger(result.value.row, ledger, result.number):
                    result = TileResult(result.number, None, problem)
            if result.error:
                bad.append(result)
    rows = [tile.row for tile in verified]
    return VerifyReport(
        target=location.name,
        complete=target.state is State.COMPLETE,
        tiles=tiling.n_tiles,
        tiles_read=len(verified),
        bad_tiles=tuple(FailedTile.of(result, tiling) for result in sorted(bad, key=lambda bad: bad.number)),
        matrices=sum(row.matrices for row in rows),
        failed={kind: sum(row.failed[kind] for row in rows) for kind in FAILURE_KINDS},
        residuals=sum(tile.residuals for tile in verified),
        largest_ratio=max((tile.largest_ratio for tile in verified), default=0.0),
    )


def _same_source(path: str | os.PathLike[str], fingerprint: Fingerprint) -> Source:
    source = open_source(path, fingerprint["variable"], fingerprint["dims"])
    if source.digest != fingerprint["source metadata"]:
        raise TargetError(f"the target was made from {fingerprint['source']}, but the metadata of "
                          f"{source.location.name} differ")  # fmt: skip
    return source


def _unlike_ledger(row: TileRow, ledger: Ledger, number: int) -> str | None:
    """Return in what a tile is not as it is recorded, or None."""
    if not ledger.done[number]:
        return "not recorded in the ledger: run the job again"
    recorded = ledger.row(number)
    for name, found in row.checksums.items():
        if recorded.checksums[name] != found:
            return f"{name} is not what was written"
    for name, found in {"matrices": row.matrices, **row.failed}.items():
        if (known := {"matrices": recorded.matrices, **recorded.failed}[name]) != found:
            return f"{found} {name}, but the ledger says {known}"
    return None
