"""What a worker does with one tile: read, invert, let go of the input, write, and tell in a few numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv import storage
from dask_batchinv.job.plan import Tiling
from dask_batchinv.job.source import Missing, Source
from dask_batchinv.kernels import invert_block
from dask_batchinv.outcome import Info
from dask_batchinv.place import Place, redact
from dask_batchinv.stack import AssumeA, Device, result_dtype

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TileTask:
    """All that a worker needs to know of a job."""

    run: str
    """Unique to one run, so that arrays kept open by a worker are not those of an earlier target."""
    source: Source
    """Where to read."""
    target: Place
    """Where to write."""
    tiling: Tiling
    """Which region each tile has."""
    assume_a: AssumeA
    """Structure of the matrices."""
    device: Device
    """Where to invert."""
    min_rcond: float
    """Below it a matrix counts as failed."""
    missing: Missing
    """What a missing chunk of the source means."""


@dataclass(frozen=True)
class TileResult:
    """What came of one tile."""

    number: int
    """Which tile."""
    row: dict[str, int] | None
    """Its row for the ledger; None if it failed."""
    error: str | None = None
    """Why it failed, without credentials."""


def run_tile(task: TileTask, number: int) -> TileResult:
    """Do one tile. May be done again, by anyone: it writes the same bytes to the same keys."""
    start = time.perf_counter()

    def work() -> dict[str, int]:
        inverse, info, rcond = _read_and_invert(task, number)
        index, region = task.tiling.index(number), task.tiling.region(number)
        _open_target(task.run, task.target, "inverse")[index] = inverse
        _open_target(task.run, task.target, "rcond")[region] = rcond
        _open_target(task.run, task.target, "info")[region] = info
        return count(info, rcond) | {"milliseconds": round(1000 * (time.perf_counter() - start))}

    return guarded(number, work)


def guarded(number: int, work: Callable[[], dict[str, int]]) -> TileResult:
    """Return what `work` makes of a tile; an exception becomes the error of the result."""
    try:
        return TileResult(number, work())
    except Exception as error:  # a failure is data here: the driver decides what it means
        return TileResult(number, None, redact(f"{type(error).__name__}: {error}"))


def read_stack(run: str, source: Source, missing: Missing, tiling: Tiling, number: int) -> Array:
    """Read a tile of the source, core dimensions last."""
    block = _open_source(run, source, missing)[tiling.index(number)]
    return np.moveaxis(np.asarray(block), tiling.core, (-2, -1))


def _read_and_invert(task: TileTask, number: int) -> tuple[Array, Array, Array]:
    # A function of its own so that the input is gone before the output is encoded.
    stack = read_stack(task.run, task.source, task.missing, task.tiling, number)
    inverse, info, rcond = invert_block(
        stack,
        dtype=result_dtype(stack.dtype),
        assume_a=task.assume_a,
        device=task.device,
        min_rcond=task.min_rcond,
    )
    return np.moveaxis(inverse, (-2, -1), task.tiling.core), info, rcond


def count(info: Array, rcond: Array) -> dict[str, int]:
    """Return the counts of a tile for the ledger."""
    good = info == Info.GOOD
    smallest = np.float64(rcond[good].min() if good.any() else np.nan)
    return {
        "done": 1,
        "matrices": info.size,
        "singular": int((info > 0).sum()),
        "not_finite": int((info == Info.NOT_FINITE).sum()),
        "overflow": int((info == Info.OVERFLOW).sum()),
        "below_min_rcond": int((info == Info.BELOW_MIN_RCOND).sum()),
        "ill_conditioned": int((good & (rcond < np.finfo(rcond.dtype).eps)).sum()),
        "smallest_rcond_bits": int(smallest.view(np.int64)),
    }


@lru_cache(maxsize=8)
def _open_source(run: str, source: Source, missing: Missing) -> zarr.Array[Any]:
    return source.open(missing)


@lru_cache(maxsize=24)
def _open_target(run: str, target: Place, name: str) -> zarr.Array[Any]:
    return storage.open_array(target / name)
