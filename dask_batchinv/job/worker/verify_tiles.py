"""Verifies tiles on a worker: reads all outputs, checks their account, multiplies matrices with their inverses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import zarr

from dask_batchinv.job.form import Form
from dask_batchinv.job.options import JobOptions, Missing
from dask_batchinv.job.outputs import Output
from dask_batchinv.job.results import LARGEST_RATIO, Array, TileResult, TileRow, as_results
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.target.chunks import checksum
from dask_batchinv.job.target.encoding import Encoding
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.job.worker.invert_tiles import open_output
from dask_batchinv.job.worker.products import Products, products
from dask_batchinv.job.worker.read_source import Reader, Stored
from dask_batchinv.kernels import InverseEx, invert_block, read_part
from dask_batchinv.location import Location
from dask_batchinv.outcome import Info
from dask_batchinv.stack import computed_dtype
from dask_batchinv.storage import DamagedChunkError, MissingChunkError
from dask_batchinv.text import clean

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
    options: JobOptions
    """By which it was made."""
    dtype: np.dtype[Any]
    """As what the inverses are stored."""
    encoding: Encoding
    """How its chunks are stored."""
    sample: float
    """The share of tiles that are compared with the source."""

    def for_span(self, span: range) -> VerifyTask:
        """Return it with what some tiles need, where they are computed."""
        return self if self.source is None else replace(self, source=self.source.part_for(self.tiling, span))


@dataclass(frozen=True)
class VerifiedTile:
    """A tile whose account is right."""

    row: TileRow
    """Its account, from its outputs."""
    residuals: int
    """Matrices multiplied with their inverse, or inverted again."""
    largest_ratio: float
    """The largest of `residual_ratios`, or of those of what is not an inverse."""
    refuted: str | None = None
    """What the source says against it."""
    missing: str | None = None
    """Which chunk of the source is not there."""
    unread: str | None = None
    """Why the source could not be compared with it."""


def verify_tiles(task: VerifyTask, numbers: range) -> list[TileResult[VerifiedTile]]:
    """Verify tiles."""
    return [result for number in numbers for result in as_results(number, partial(_verify_tile, task, number))]


def _verify_tile(task: VerifyTask, number: int) -> list[TileResult[VerifiedTile]]:
    region, parts, checksums = task.tiling.region(number), {}, {}
    for output in task.options.outputs:
        key = task.encoding.key(task.tiling, number, output.extent)
        with _reading(f"{output.name}/{key} of the target"):
            array = open_output(task.run, task.target, output.name, read_only=True)
            parts[output.role] = np.asarray(array[task.tiling.region(number, output.extent)])
            checksums[output.role] = _checksum(task, array, output, key)
    found = _as_computed(parts, task)
    _check_account(found, region)
    row = TileRow.of(found["info"], found["rcond"], checksums)
    ratios, refuted, missing = np.empty(0), None, None
    if task.source is not None and task.tiling.n and _is_sampled(number, task.sample):
        try:
            with _reading("the source"):
                stack, codes, missing = _read_source(task, task.source, number, found["info"])
        except Exception as error:
            unread = clean(f"{type(error).__name__}: {error}")
            return [TileResult(number, VerifiedTile(row, 0, 0.0, unread=unread))]
        try:
            masked = np.zeros(len(found["info"]), bool) if codes is None else codes.reshape(-1) == int(Info.MASKED)
            _refuse((found["info"] == int(Info.MASKED)) != masked, region, "not masked as the source has it")
            ratios = _compare_with_source(task, stack.reshape(-1, *stack.shape[-2:]), found, region)
        except ValueError as error:
            refuted = str(error)
    return [TileResult(number, VerifiedTile(row, len(ratios), float(ratios.max(initial=0.0)), refuted, missing))]


def _checksum(task: VerifyTask, array: zarr.Array[Any], output: Output, key: str) -> int:
    """Return the checksum of a chunk that was read."""
    if task.encoding.is_plain or not array.size:
        return checksum(array, key)
    most, _ = task.encoding.bound(task.tiling, output, task.dtype)
    return task.encoding.checksum(task.target.read(f"{output.name}/{key}", most + 1))


def _as_computed(parts: dict[str, Array], task: VerifyTask) -> Products:
    """Return what a tile has of each output, an entry for each matrix."""
    tiling, found = task.tiling, dict(parts)
    row, col = tiling.core
    if "inverse" in found:
        found["inverse"] = _whole(found["inverse"], found.pop("imag", None), task)
    if "diagonal" in found:
        found["diagonal"] = np.moveaxis(found["diagonal"], row - (col < row), -1)
    core = {"inverse": 2, "diagonal": 1}
    return {
        role: part.reshape(
            math.prod(part.shape[: part.ndim - core.get(role, 0)]), *part.shape[part.ndim - core.get(role, 0) :]
        )
        for role, part in found.items()
    }


def _whole(inverse: Array, imaginary: Array | None, task: VerifyTask) -> Array:
    """Return inverses as ``(*, n, n)`` from the form in which they are stored."""
    options, tiling = task.options, task.tiling
    if not options.like_source:
        return np.moveaxis(inverse, tiling.core, (-2, -1))
    batch = len(tiling.batch)
    core = (batch,) if options.packed else (batch, batch + 1)
    pair = None if options.complex_dim is None else batch + len(core)
    form = Form(tuple(range(batch)), core, tiling.n, options.packed, pair)
    return form.assemble(inverse, imaginary, options.assume_a)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Say in errors what could not be read."""
    try:
        yield
    except MissingChunkError as error:
        raise MissingChunkError(f"{what} is missing") from error
    except Exception as error:
        raise DamagedChunkError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def _read_source(task: VerifyTask, source: Source, number: int, info: Array) -> tuple[Array, Array | None, str | None]:
    """Return a tile of the source, what is known of it already, and which chunk is filled because it was not there."""

    tile = range(number, number + 1)

    def stack(missing: Missing, *, in_parts: bool = False) -> Stored:
        reader = Reader(task.run, source, missing, task.tiling)
        with ExitStack() as lent:
            stored = reader.read_in_parts(tile, lent) if in_parts else reader.read(tile, lent)
            return replace(stored, numbers=np.array(source.decode(stored.numbers)))

    found, missed = None, None
    try:
        found = stack("error")
    except Exception as error:
        if source.is_lazy:
            raise
        parts = stack("error", in_parts=True)
        assert parts.codes is not None
        # What cannot be read may be what the target says of it, or left out by a mask.
        unknown = (parts.codes.reshape(-1) == int(Info.UNREADABLE)) & (info != int(Info.UNREADABLE))
        if not unknown.any():
            found = parts
        elif isinstance(error, MissingChunkError):
            found, missed = stack("fill"), str(error)
        else:
            raise
    return np.moveaxis(found.numbers, task.tiling.core, (-2, -1)), found.codes, missed


def _compare_with_source(task: VerifyTask, stack: Array, found: Products, region: tuple[slice, ...]) -> Array:
    """Return how far good results are from those of the source, in units of `LARGEST_RATIO`'s.

    Raises
    ------
    ValueError
        Where matrices are not as the target says of them: good, failed, or below the minimum.
    """
    info, options = found["info"], task.options
    good = info == int(Info.GOOD)
    if found.keys() & {"diagonal", "logdet"}:
        ratios = _ratios_to_products(task, stack[good], {role: part[good] for role, part in found.items()})
    else:
        ratios = np.zeros(good.sum())
    wrong = np.zeros(len(info), bool)
    if "inverse" in found:
        matrices = read_part(stack[good], options.assume_a, lower=options.lower)
        ratios = np.maximum(ratios, residual_ratios(matrices, found["inverse"][good]))
        wrong[good] = _is_other_rcond(matrices, found["inverse"][good], found["rcond"][good])
    large = np.zeros(len(info), bool)
    large[good] = ~(ratios <= LARGEST_RATIO)
    _refuse(large, region, f"not the inverses: their residuals are over {LARGEST_RATIO:g} n eps |A| |X|")
    _refuse(wrong, region, "good, but have another rcond")
    least = options.min_rcond * (1 - np.finfo(found["rcond"].dtype).eps)  # it may have been rounded down
    _refuse(good & (found["rcond"] < least), region, f"good, but their rcond is below {options.min_rcond:g}")
    failed = ~good & (info != int(Info.UNREADABLE)) & (info != int(Info.MASKED))
    if not failed.any():
        return ratios
    _, again = _made_again(task, stack[failed])
    differs = np.zeros(len(info), bool)
    # Another device may have found a zero where rounding leaves next to nothing.
    nearly = (again["info"] == int(Info.GOOD)) & (again["rcond"] < np.finfo(again["rcond"].dtype).eps)
    kinds = (np.minimum(codes, 1) for codes in (again["info"], info[failed]))  # every zero pivot is one kind
    differs[failed] = np.not_equal(*kinds) & ~nearly
    _refuse(differs, region, "called failed, but are not, or for another reason")
    return ratios


def _is_other_rcond(a: Array, x: Array, rcond: Array) -> Array:
    """Tell where rcond is another number than the norms of matrices and their inverses say."""
    with np.errstate(all="ignore"):
        (_, norm_a, exponent_a), (_, norm_x, exponent_x) = (
            _normed(b.astype(np.result_type(b.dtype, np.float64))) for b in (a, x)
        )
        expected = np.ldexp(1 / norm_a / norm_x, -exponent_a - exponent_x).reshape(len(a))
        # Rounding of the norms, and of what is too small for the dtype.
        near = np.abs(rcond - expected) <= 1e-3 * expected + np.finfo(rcond.dtype).tiny
        other: Array = np.isfinite(expected) & ~near
    return other


def _made_again(task: VerifyTask, stack: Array) -> tuple[InverseEx, Products]:
    """Return the results for matrices of the source, and the outputs that they give."""
    options = task.options
    results = invert_block(
        stack, dtype=computed_dtype(stack.dtype, task.dtype, options.precision), assume_a=options.assume_a,
        lower=options.lower, device="cpu", min_rcond=options.min_rcond,
    )  # fmt: skip
    return results, products(results, stack, options, task.dtype)


def _ratios_to_products(task: VerifyTask, stack: Array, found: Products) -> Array:
    """Return how far outputs that are not inverses are from what they should be, in units of n eps and of what that
    error in the matrices makes of each: |X| |A| |X| in the inverse, and the trace of |X| |A| in the determinant.
    """
    results, again = _made_again(task, stack)
    n, eps = task.tiling.n, np.finfo(task.dtype).eps
    ratios = np.where(again["info"] == int(Info.GOOD), 0.0, np.inf)
    with np.errstate(all="ignore"):
        wide = np.result_type(results.inverse.dtype, np.float64)
        x = np.abs(results.inverse.astype(wide))
        a = np.abs(read_part(stack, task.options.assume_a, lower=task.options.lower).astype(wide))
        of_product = x @ a
        if "diagonal" in found:
            bound = n * eps * np.einsum("mij,mji->mi", of_product, x)
            ratios = np.maximum(ratios, (np.abs(found["diagonal"] - again["diagonal"]) / bound).max(axis=1))
        if "logdet" in found:
            bound = n * eps * np.einsum("mii->m", of_product)
            for role in ("logdet", "sign"):
                off = np.abs(found[role] - again[role]) / (bound + eps * np.abs(again[role]))
                ratios = np.maximum(ratios, off)
    return np.where(np.isnan(ratios), np.inf, ratios)


def _check_account(found: Products, region: tuple[slice, ...]) -> None:
    """Raise ValueError where the outputs of a tile contradict each other."""
    info, rcond = found["info"], found["rcond"]
    if (info == int(Info.PENDING)).any():
        raise ValueError("some matrices were never computed")
    good = info == int(Info.GOOD)
    for role in found.keys() - {"info", "rcond"}:
        numbers = found[role].reshape(len(info), math.prod(found[role].shape[1:]))
        _refuse(good & ~np.isfinite(numbers).all(axis=1), region, f"good by their info, but their {role} is not finite")
        if numbers.size:
            # Of singular matrices the determinant is known.
            known = good | (info > 0) if role in ("logdet", "sign") else good
            _refuse(~known & ~np.isnan(numbers).all(axis=1), region, f"failed, but their {role} is not NaN")
    for role, of_singular in {"logdet": -np.inf, "sign": 0}.items():
        if role in found:
            other = (found[role] != of_singular) & ~np.isnan(found[role])
            _refuse((info > 0) & other, region, f"singular, but their {role} is not {of_singular}")
    # A little over 1 by rounding; NaN is neither.
    _refuse(good & ~((rcond >= 0) & (rcond < 1.1)), region, "good, but their rcond is not between 0 and 1")
    _refuse((info > 0) & (rcond != 0), region, "singular, but their rcond is not 0")


def _refuse(wrong: Array, region: tuple[slice, ...], what: str) -> None:
    if wrong.any():
        shape = tuple(span.stop - span.start for span in region)
        inside = np.unravel_index(int(wrong.argmax()), shape) if shape else ()
        first = tuple(int(i) + span.start for i, span in zip(inside, region, strict=True))
        raise ValueError(f"matrices are {what} ({int(wrong.sum()):,} of them, first {first})")


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
