"""Finds out what a target tells of itself: from its ledger, the records of its runs, ``info`` and ``rcond`` alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_batchinv.job.outputs import name_of
from dask_batchinv.job.report.account import Account, account_in
from dask_batchinv.job.report.at_work import AtWork
from dask_batchinv.job.report.page.findings import FailedMatrix, Findings, Histogram, SlowTile
from dask_batchinv.job.report.page.labels import Labels
from dask_batchinv.job.report.page.maps import MOST_MATRICES, Map, map_of_matrices, map_of_tiles, tiles_to_read
from dask_batchinv.job.report.page.page import check_output, page_of
from dask_batchinv.job.report.page.records import sound
from dask_batchinv.job.report.tiles import spans_of
from dask_batchinv.job.target.chunks import open_array
from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger, runs_of
from dask_batchinv.job.target.state import Target
from dask_batchinv.job.tiling import describe_tile
from dask_batchinv.location import Location, Place
from dask_batchinv.outcome import NAMED, Info, explain, failures_of
from dask_batchinv.text import clean, public

Array = npt.NDArray[Any]
#: Stacks of more tiles are not read whole: it would take longer than people wait for a page.
_MOST_TILES = 4096
#: Bins of the histogram in a decade.
_BINS_PER_DECADE = 4


@public
class TargetReport(Findings):
    """All that a target tells: `report_store` makes it, of any target at any time.

    In a notebook it shows itself in short; `to_html` is a page with pictures, `to_json` all of it for machines.
    """

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as a page that needs nothing else: pictures, tables, no scripts.

        Parameters
        ----------
        path : str or path, optional
            Also write it to this file.

        Raises
        ------
        RefusedError
            If Matplotlib, which draws the pictures, is not installed, or `path` is in the target or in its source.
        """
        if path is not None:
            check_output(path, self.account.target, self.account.source, self.asked.get("variable"))
        page = page_of(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page


def report_of(path: Place) -> TargetReport:
    """Return what a target tells.

    Raises
    ------
    TargetError
        If there is no target of ours.
    """
    location, target = existing(path)
    ledger, notes = Ledger(location, target), list[str]()
    account = account_in(location, target, ledger)
    info, rcond = _open(location, target, "info", notes), _open(location, target, "rcond", notes)
    dims = _dims(info, len(target.tiling.batch))
    numbers = _read(info, rcond, target, ledger, notes, whole=account.complete)
    labels, seen = Labels(location, dims, notes), _map(numbers, ledger, target, dims)
    milliseconds, attempts = ledger.column("milliseconds"), ledger.column("attempts")
    return TargetReport(
        account=account,
        at_work=AtWork.on(location, account),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        shape=target.shape,
        tile=target.tile,
        n=target.tiling.n,
        dims=dims,
        asked=target.fingerprint,
        failed=_failed(account, info, labels),
        map=seen,
        ticks={} if seen is None else {dim: labels.ticks(dim) for dim in seen.dims},
        histogram=_histogram(numbers),
        slowest=tuple(
            SlowTile(
                describe_tile(number, spans_of(target.tiling, number)),
                float(milliseconds[number]) / 1000,
                int(attempts[number]),
            )
            for number in map(int, np.argsort(milliseconds)[::-1][:NAMED])
            if ledger.done[number]
        ),
        retried=int((attempts[ledger.done] > 1).sum()),
        runs=sound(runs_of(location)),
        notes=tuple(notes),
    )


def _open(location: Location, target: Target, role: str, notes: list[str]) -> Any:
    try:
        return open_array(location / name_of(role, target.outputs), read_only=True)
    except Exception as error:  # whatever Zarr and a file system may raise: the ledger is told of all the same
        notes.append(clean(f"{role} cannot be read: {error}"))
    return None


def _dims(info: Any, count: int) -> tuple[str, ...]:
    names = None if info is None else info.metadata.dimension_names
    return tuple(f"axis {axis}" if not names or names[axis] is None else str(names[axis]) for axis in range(count))


@dataclass(frozen=True)
class _Numbers:
    """``info`` and ``rcond`` of a stack, or of some tiles of it."""

    info: Array
    rcond: Array
    tiles: int | None


def _read(info: Any, rcond: Any, target: Target, ledger: Ledger, notes: list[str], *, whole: bool) -> _Numbers | None:
    """Read what is looked at one by one; None where nothing can be."""
    if info is None or rcond is None:
        return None
    tiling = target.tiling
    # What is not done is not there, so that tiles must be read one by one.
    most = _MOST_TILES if whole else _MOST_TILES // 8
    is_small = tiling.n_matrices <= MOST_MATRICES and tiling.n_tiles <= most
    try:
        if info.shape != rcond.shape:
            raise ValueError(f"their shapes are {info.shape} and {rcond.shape}")
        if is_small and whole:
            return _Numbers(np.asarray(info[...]), np.asarray(rcond[...]), None)
        if is_small:
            numbers = _Numbers(np.full(info.shape, Info.PENDING, np.int32), np.full(info.shape, np.nan), None)
            for tile in np.flatnonzero(ledger.done):
                region = tiling.region(int(tile))
                numbers.info[region], numbers.rcond[region] = info[region], rcond[region]
            return numbers
        regions = [tiling.region(tile) for tile in tiles_to_read(tiling, ledger.done)]
        if not regions:
            return None
        found = [np.concatenate([np.ravel(array[region]) for region in regions]) for array in (info, rcond)]
        return _Numbers(found[0], found[1], len(regions))
    except Exception as error:  # whatever Zarr and a file system may raise
        notes.append(clean(f"info or rcond cannot be read: {error}"))
    return None


def _map(numbers: _Numbers | None, ledger: Ledger, target: Target, dims: tuple[str, ...]) -> Map | None:
    if numbers is not None and numbers.tiles is None:
        return map_of_matrices(numbers.info, numbers.rcond, dims)
    return map_of_tiles(ledger, target.tiling, dims)


def _histogram(numbers: _Numbers | None) -> Histogram | None:
    if numbers is None:
        return None
    good = numbers.rcond[(numbers.info == int(Info.GOOD)) & (numbers.rcond > 0)].astype(np.float64)
    good = good[np.isfinite(good)]
    if not good.size:
        return None
    logs = np.log10(good)
    first, last = np.floor(logs.min()), max(0.0, np.ceil(logs.max()))
    counts, edges = np.histogram(logs, max(1, round((last - first) * _BINS_PER_DECADE)), (first, max(last, first + 1)))
    return Histogram(tuple(map(float, edges)), tuple(map(int, counts)), good.size, numbers.tiles)


def _failed(account: Account, info: Any, labels: Labels) -> tuple[FailedMatrix, ...]:
    """Return the first failed matrices, with their coordinates."""
    first = [index for failure in failures_of(account.assume_a) for index in account.first_failed[failure.kind]]
    if not first or info is None:
        return ()
    return tuple(FailedMatrix(index, explain(int(info[index]), account.assume_a), labels.of(index)) for index in first)
