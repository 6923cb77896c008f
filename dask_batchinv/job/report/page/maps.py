"""Where in a stack matrices failed, and how they are conditioned: coarsened to pixels. Arrays in, arrays out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_batchinv.job.target.ledger import Ledger
from dask_batchinv.job.tiling import Tiling, cuts
from dask_batchinv.outcome import FAILURE_KINDS, Info, failures_of

Array = npt.NDArray[Any]
#: Pixels along an axis of a map, at most.
MOST_PIXELS = 256
#: Maps and histograms are made of so many matrices at most, one by one: 12 bytes of each are read.
MOST_MATRICES = 2**22
#: And of so many tiles, spread evenly, where there are more matrices.
MOST_TILES = 64
#: What else than a failure a pixel may be, behind the numbers of the kinds of failures.
GOOD, MASKED, PENDING = range(len(FAILURE_KINDS), len(FAILURE_KINDS) + 3)


@dataclass(frozen=True)
class Map:
    """A stack seen from above: along two of its batch dimensions, or one, and the worst along all others."""

    dims: tuple[str, ...]
    """The dimensions: of rows and columns of pixels, or of these alone."""
    extent: tuple[int, int, int, int]
    """Where the pixels begin and end: along columns, then rows, in matrices. The last may reach beyond the stack."""
    lengths: tuple[int, int]
    """How long the stack is: along columns, then rows."""
    matrices: int
    """Matrices in a pixel, at most."""
    kinds: Array
    """By pixel, the commonest failure in it, as a number in `FAILURE_KINDS`; else what else it is."""
    share: Array
    """By pixel, which share of its matrices failed."""
    log_rcond: Array
    """By pixel, log10 of the smallest rcond of good matrices; NaN where there is none."""
    by_tile: bool
    """Whether a pixel is never less than a tile: then it was drawn from the ledger alone."""

    def to_json(self) -> dict[str, Any]:
        """Return the map for machines, kinds by their names."""
        names = [*FAILURE_KINDS, "good", "masked", "pending"]
        return {
            "dims": self.dims,
            "extent": self.extent,
            "matrices": self.matrices,
            "kinds": [[names[kind] for kind in row] for row in self.kinds],
            "log_rcond": [[float(x) if np.isfinite(x) else None for x in row] for row in self.log_rcond],
            "share": self.share.tolist(),
            "by_tile": self.by_tile,
        }


def axes_of_map(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the two longest of some axes, in their order, or as many as there are that are not of length 1.

    Examples
    --------
    >>> axes_of_map((3, 200, 100)), axes_of_map((1, 5)), axes_of_map((1,))
    ((1, 2), (1,), ())
    """
    longest = sorted((axis for axis, length in enumerate(lengths) if length > 1), key=lambda axis: -lengths[axis])
    return tuple(sorted(longest[:2]))


def map_of_matrices(info: Array, rcond: Array, dims: tuple[str, ...]) -> Map | None:
    """Return the map of a stack of which all is known, or None if it has no dimension to be drawn along."""
    axes = axes_of_map(info.shape)
    if not (axes and info.size):
        return None
    codes = np.full(info.shape, GOOD, np.int8)
    for number, failure in enumerate(failures_of("general")):
        codes[failure.includes(info)] = number
    codes[info == int(Info.MASKED)], codes[info == int(Info.PENDING)] = MASKED, PENDING
    steps = tuple(cuts(size, MOST_PIXELS) if axis in axes else size for axis, size in enumerate(info.shape))
    counts = np.stack([_summed(codes == number, steps) for number in range(PENDING + 1)])
    least = _reduced(np.fmin, np.where(codes == GOOD, rcond, np.nan), steps)
    extent = tuple(cuts(info.shape[axis], steps[axis]) * steps[axis] for axis in axes)
    return _map(dims, axes, info.shape, extent, counts, least, by_tile=False)


def map_of_tiles(ledger: Ledger, tiling: Tiling, dims: tuple[str, ...]) -> Map | None:
    """Return the map of a stack by its ledger alone."""
    lengths = tuple(tiling.shape[axis] for axis in tiling.batch)
    axes = axes_of_map(tiling.grid)  # along others there is but one pixel
    if not (axes and tiling.n_matrices):
        return None
    columns = [ledger.column(kind) for kind in FAILURE_KINDS]
    masked, done = ledger.column("masked"), ledger.done
    good = np.where(done, ledger.column("matrices") - masked - sum(columns), 0)
    steps = tuple(cuts(cut, MOST_PIXELS) if axis in axes else cut for axis, cut in enumerate(tiling.grid))
    numbers = [*columns, good, masked, np.where(done, 0, tiling.matrices())]
    counts = np.stack([_summed(column.reshape(tiling.grid), steps) for column in numbers])
    least = _reduced(np.fmin, ledger.smallest_rconds().reshape(tiling.grid), steps)
    tiles = [tiling.tile[axis] for axis in tiling.batch]
    extent = tuple(cuts(tiling.grid[axis], steps[axis]) * steps[axis] * tiles[axis] for axis in axes)
    return _map(dims, axes, lengths, extent, counts, least, by_tile=True)


def _map(
    dims: tuple[str, ...],
    axes: tuple[int, ...],
    lengths: tuple[int, ...],
    extent: tuple[int, ...],
    counts: Array,
    least: Array,
    *,
    by_tile: bool,
) -> Map:
    """Return a map of how many matrices of each kind there are by pixel, along all axes but those of length 1."""
    shape = (1, *(least.shape[axis] for axis in axes))[-2:]
    counts, least = counts.reshape(-1, *shape), least.reshape(shape)
    failed = counts[: len(FAILURE_KINDS)]
    kinds = np.where(failed.any(axis=0), failed.argmax(axis=0), GOOD)
    no_failure = ~failed.any(axis=0)
    kinds[no_failure & (counts[GOOD] == 0)] = MASKED
    kinds[no_failure & (counts[PENDING] > 0)] = PENDING
    with np.errstate(divide="ignore", invalid="ignore"):
        log_rcond = np.log10(least)
    height, width = (1, *extent)[-2:]
    rows, columns = (1, *(lengths[axis] for axis in axes))[-2:]
    total = counts.sum(axis=0)
    return Map(
        dims=tuple(dims[axis] for axis in axes),
        extent=(0, width, 0, height),
        lengths=(columns, rows),
        matrices=int(total.max()),
        kinds=kinds,
        share=failed.sum(axis=0) / np.maximum(1, total),
        log_rcond=np.where(np.isfinite(log_rcond), log_rcond, np.nan),
        by_tile=by_tile,
    )


def _summed(numbers: Array, steps: tuple[int, ...]) -> Array:
    return _reduced(np.add, numbers.astype(np.int64), steps)


def _reduced(reduce: np.ufunc, numbers: Array, steps: tuple[int, ...]) -> Array:
    for axis, step in enumerate(steps):
        if step > 1:
            numbers = reduce.reduceat(numbers, np.arange(0, numbers.shape[axis], step), axis=axis)
    return numbers


def tiles_to_read(tiling: Tiling, done: Array) -> Iterator[int]:
    """Yield some tiles that are done, spread evenly, of which matrices are looked at one by one."""
    numbers = np.flatnonzero(done)
    largest = math.prod(tiling.tile[axis] for axis in tiling.batch)
    most = max(1, min(MOST_TILES, MOST_MATRICES // max(1, largest), len(numbers)))
    if len(numbers):
        yield from map(int, numbers[np.linspace(0, len(numbers) - 1, most).round().astype(int)])
