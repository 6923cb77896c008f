"""Verifies tiles on a worker: reads all outputs, checks their account, multiplies matrices with their inverses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from dask_batchinv.job.options import Missing
from dask_batchinv.job.outputs import OUTPUTS
from dask_batchinv.job.results import LARGEST_RATIO, Array, TileResult, TileRow, as_results
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.target.chunks import checksum
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.job.worker.invert_tiles import open_output
from dask_batchinv.job.worker.read_source import Reader
from dask_batchinv.kernels import invert_block, read_part
from dask_batchinv.location import Location
from dask_batchinv.outcome import Info
from dask_batchinv.stack import AssumeA, result_dtype
from dask_batchinv.storage import DamagedChunkError, MissingChunkError

#: The multiples of the golden ratio, taken modulo 1, are spread evenly.
_GOLDEN = (5**0.5 - 1) / 2
#: Bytes of matrices multiplied at a time.
_GROUP_NBYTES = 2**20


@dataclass(frozen=True)
class VerifyTask:
    """All that a worker needs to know to verify a tile."""

    run: str
    """Unique to one run."""
    target: Location
    """What to verify."""
    tiling: Tiling
    """Its tiles."""
    source: Source | None
    """What it must be the inverse of."""
    assume_a: AssumeA
    """Structure of the matrices."""
    lower: bool
    """Whether symmetric ones were read from their lower triangles."""
    min_rcond: float
    """Below it a matrix counts as failed."""
    sample: float
    """The share of tiles that are compared with the source."""


@dataclass(frozen=True)
class VerifiedTile:
    """A tile whose account is right."""

    row: TileRow
    """Its account, from its outputs."""
    residuals: int
    """Matrices multiplied with their inverse."""
    largest_ratio: float
    """The largest of `residual_ratios`."""
    refuted: str | None = None
    """What the source says against it."""
    missing: str | None = None
    """Which chunk of the source is not there."""


def verify_tiles(task: VerifyTask, numbers: range) -> list[TileResult[VerifiedTile]]:
    """Verify tiles."""
    return [result for number in numbers for result in as_results(number, partial(_verify_tile, task, number))]


def _verify_tile(task: VerifyTask, number: int) -> list[TileResult[VerifiedTile]]:
    region, parts, checksums = task.tiling.region(number), {}, {}
    for output in OUTPUTS:
        key = task.tiling.chunk_key(number, core=output.core)
        with _reading(f"{output.name}/{key} of the target"):
            array = open_output(task.run, task.target, output.name, read_only=True)
            parts[output.name] = np.asarray(array[task.tiling.region(number, core=output.core)])
        checksums[output.name] = checksum(array, key)
    info, rcond = parts["info"].reshape(-1), parts["rcond"].reshape(-1)
    n = task.tiling.n
    inverse = np.moveaxis(parts["inverse"], task.tiling.core, (-2, -1)).reshape(info.size, n, n)
    _check_account(inverse, info, rcond, region)
    ratios, refuted, missing = np.empty(0), None, None
    if task.source is not None and n and _is_sampled(number, task.sample):
        with _reading("the source"):
            stack, missing = _read_source(task, task.source, number, (info == int(Info.UNREADABLE)).any())
        stack = stack.reshape(info.size, n, n)
        good = info == int(Info.GOOD)
        ratios = residual_ratios(read_part(stack[good], task.assume_a, lower=task.lower), inverse[good])
        try:
            _compare_with_source(task, stack, info, rcond, ratios, region)
        except ValueError as error:
            refuted = str(error)
    row = TileRow.of(info, rcond, checksums)
    return [TileResult(number, VerifiedTile(row, len(ratios), float(ratios.max(initial=0.0)), refuted, missing))]


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Say in errors what could not be read."""
    try:
        yield
    except MissingChunkError as error:
        raise MissingChunkError(f"{what} is missing") from error
    except Exception as error:
        raise DamagedChunkError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def _read_source(task: VerifyTask, source: Source, number: int, in_parts: bool) -> tuple[Array, str | None]:
    """Return a tile of the source, and which chunk is filled because it was not there."""

    def stack(missing: Missing) -> Array:
        reader = Reader(task.run, source, missing, task.tiling)
        if in_parts:
            with ExitStack() as lent:
                block = source.decode(reader.read_in_parts(range(number, number + 1), lent).numbers.copy())
        else:
            block = source.read_block(reader.array, task.tiling.region(number, core=True))
        return np.moveaxis(block, task.tiling.core, (-2, -1))

    try:
        return stack("error"), None
    except MissingChunkError as error:
        return stack("fill"), str(error)


def _compare_with_source(
    task: VerifyTask, stack: Array, info: Array, rcond: Array, ratios: Array, region: tuple[slice, ...]
) -> None:
    """Raise ValueError where matrices are not as the target says of them: good, failed, or below the minimum."""
    good = info == int(Info.GOOD)
    large = np.zeros(len(info), bool)
    large[good] = ~(ratios <= LARGEST_RATIO)
    _refuse(large, region, f"not the inverses: their residuals are over {LARGEST_RATIO:g} n eps |A| |X|")
    _refuse(good & (rcond < task.min_rcond), region, f"good, but their rcond is below {task.min_rcond:g}")
    failed = ~good & (info != int(Info.UNREADABLE))
    if not failed.any():
        return
    again = invert_block(
        stack[failed], dtype=result_dtype(stack.dtype), assume_a=task.assume_a, lower=task.lower, device="cpu",
        min_rcond=task.min_rcond,
    )  # fmt: skip
    differs = np.zeros(len(info), bool)
    # Another device may have found a zero where rounding leaves next to nothing.
    nearly = (again.info == int(Info.GOOD)) & (again.rcond < np.finfo(again.rcond.dtype).eps)
    kinds = (np.minimum(codes, 1) for codes in (again.info, info[failed]))  # every zero pivot is one kind
    differs[failed] = np.not_equal(*kinds) & ~nearly
    _refuse(differs, region, "called failed, but are not, or for another reason")


def _check_account(inverse: Array, info: Array, rcond: Array, region: tuple[slice, ...]) -> None:
    """Raise ValueError where inverse, info and rcond contradict each other."""
    if (info == int(Info.PENDING)).any():
        raise ValueError("some matrices were never computed")
    good = info == int(Info.GOOD)
    _refuse(good & ~np.isfinite(inverse).all(axis=(1, 2)), region, "not finite, but info says good")
    if inverse.shape[-1]:
        _refuse(~good & ~np.isnan(inverse).all(axis=(1, 2)), region, "not NaN, but info says failed")
    # A little over 1 by rounding; NaN is neither.
    _refuse(good & ~((rcond >= 0) & (rcond < 1.1)), region, "good, but their rcond is not between 0 and 1")
    _refuse((info > 0) & (rcond != 0), region, "singular, but their rcond is not 0")


def _refuse(wrong: Array, region: tuple[slice, ...], what: str) -> None:
    if wrong.any():
        shape = tuple(span.stop - span.start for span in region)
        inside = np.unravel_index(int(wrong.argmax()), shape) if shape else ()
        first = tuple(int(i) + span.start for i, span in zip(inside, region, strict=True))
        raise ValueError(f"{int(wrong.sum())} matrices are {what}; first {first}")


def _is_sampled(number: int, share: float) -> bool:
    """Choose about that share of all tiles, spread evenly over them, and always the same."""
    return number * _GOLDEN % 1.0 < share


def residual_ratios(a: Array, x: Array) -> Array:
    """Return min(‖XA - I‖₁, ‖AX - I‖₁) / (n eps ‖A‖₁ ‖X‖₁) per matrix, as LAPACK's dget03.

    The better side, because an inverse that is stable in LAPACK's sense has only one of the two small.
    """
    n, eps = x.shape[-1], np.finfo(x.dtype).eps
    wide = np.result_type(x.dtype, np.float64)
    ratios = np.empty(len(x))
    step = max(1, _GROUP_NBYTES // (n * n * wide.itemsize))
    with np.errstate(all="ignore"):
        for start in range(0, len(x), step):
            # Norms first brought to 1: products of numbers at the ends of the range must not overflow.
            ag, norm_a, exponent_a = _normed(a[start : start + step].astype(wide))
            xg, norm_x, exponent_x = _normed(x[start : start + step].astype(wide))
            unit = np.ldexp(np.eye(n) / norm_a / norm_x, -exponent_a - exponent_x)
            left, right = (_norm1(product - unit) for product in (xg @ ag, ag @ xg))
            ratios[start : start + step] = np.minimum(left, right) / (n * eps)
    return ratios


def _normed(a: Array) -> tuple[Array, Array, Array]:
    """Return matrices of norm 1, and the norms that they had: a factor, and the exponent of a power of two."""
    parts = np.ascontiguousarray(a).view(a.real.dtype)  # of complex numbers: their magnitude may overflow
    exponent = np.frexp(np.abs(parts).max(axis=(1, 2), keepdims=True))[1]
    scaled = np.ldexp(parts, -exponent).view(a.dtype)
    norm = np.abs(scaled).sum(axis=1, keepdims=True).max(axis=2, keepdims=True)
    return scaled / norm, norm, exponent


def _norm1(a: Array) -> Array:
    norm: Array = np.abs(a).sum(axis=1).max(axis=1)
    return norm
