"""Read a whole target back, and check that it says of every matrix what it should."""

from __future__ import annotations

import os
import uuid
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from distributed import Client

from dask_batchinv import storage
from dask_batchinv.job import target as targets
from dask_batchinv.job.cluster import ClusterOptions, check_reach, check_versions, connect
from dask_batchinv.job.ledger import CHECKSUMS, FAILED, Ledger
from dask_batchinv.job.plan import Tiling
from dask_batchinv.job.report import FailedTile, named_tiles
from dask_batchinv.job.source import Missing, Source, open_source
from dask_batchinv.job.tile import TileResult, count, guarded, read_stack
from dask_batchinv.job.window import run_on_cluster
from dask_batchinv.kernels import read_part
from dask_batchinv.outcome import Info, RefusedError, TargetError
from dask_batchinv.place import Place
from dask_batchinv.stack import AssumeA

Array = npt.NDArray[Any]

#: LAPACK's own tests accept a residual of 30 n eps ‖A‖₁ ‖X‖₁.
LARGEST_RATIO = 30.0
#: The multiples of the golden ratio, taken modulo 1, are spread evenly.
_GOLDEN = (5**0.5 - 1) / 2
#: Bytes of matrices multiplied at a time.
_GROUP_NBYTES = 2**20


@dataclass(frozen=True)
class VerifyTask:
    """All that a worker needs to know to check a tile."""

    run: str
    """Unique to one run."""
    target: Place
    """What to check."""
    tiling: Tiling
    """Its tiles."""
    source: Source | None
    """What it must be the inverse of."""
    assume_a: AssumeA
    """Structure of the matrices."""
    missing: Missing
    """What a missing chunk of the source means."""
    sample: float
    """The share of tiles whose residuals are computed."""


@dataclass(frozen=True)
class VerifyReport:
    """What a check of a target found."""

    target: str
    """What was checked."""
    complete: bool
    """Whether it says that it is complete."""
    tiles: int
    """Tiles of the plan."""
    tiles_read: int
    """Tiles whose every chunk was read and had the right checksum."""
    bad_tiles: tuple[FailedTile, ...]
    """Tiles that are missing, damaged, or not what the ledger says."""
    matrices: int
    """Matrices checked."""
    failed: dict[str, int]
    """Matrices without an inverse among them, by kind."""
    residuals: int
    """Matrices multiplied with their inverse."""
    largest_ratio: float
    """The largest ‖XA - I‖₁ or ‖AX - I‖₁ (the smaller of the two) over n eps ‖A‖₁ ‖X‖₁; LAPACK allows 30."""

    @property
    def ok(self) -> bool:
        """Whether the target is complete and right as far as was checked."""
        return self.complete and not self.bad_tiles and self.tiles_read == self.tiles

    def to_json(self) -> dict[str, Any]:
        """Return the report for machines."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        lines = [
            f"{'verified' if self.ok else 'NOT RIGHT'}: {self.target}",
            f"complete         {'yes' if self.complete else 'no: run the job again to finish it'}",
            f"tiles            {self.tiles_read:,} of {self.tiles:,} read, checksums right",
            f"matrices         {self.matrices:,}, {sum(self.failed.values()):,} without an inverse",
        ]
        if self.residuals:
            lines.append(
                f"residuals        {self.residuals:,} computed, largest {self.largest_ratio:.3g} n eps |A| |X|, "
                f"allowed {LARGEST_RATIO:g}"
            )
        return "\n".join(lines + named_tiles(self.bad_tiles))


def verify_store(
    target: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    sample: float = 1.0,
    client: Client | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    threads_per_worker: int | None = None,
    memory_limit: str | int | None = None,
    insecure: bool = False,
) -> VerifyReport:
    """Read a target back, every chunk of its three arrays, and check it.

    Each tile must be there with the checksums that the ledger has of it, its inverses NaN exactly where ``info`` is
    not 0, and its counts those of the ledger. With `source`, every good inverse is multiplied with its matrix.
    What it finds, `invert_store` repairs.

    Parameters
    ----------
    target : str or path
        What `invert_store` has written.
    source : str or path, optional
        What it was made from.
    sample : float
        Share of the tiles whose inverses are multiplied; every chunk is read all the same.
    client, scheduler, workers, threads_per_worker, memory_limit, insecure
        The cluster, as for `invert_store`.

    Returns
    -------
    VerifyReport
        Its ``ok`` says whether all is well.

    Raises
    ------
    RefusedError
        If there is no target of ours, or `source` is not what it was made from.
    """
    cluster = ClusterOptions(client, scheduler, workers, threads_per_worker, memory_limit, insecure=insecure)
    return verify(target, source, cluster, sample)


def verify(
    target: str | os.PathLike[str], source: str | os.PathLike[str] | None, cluster: ClusterOptions, sample: float = 1.0
) -> VerifyReport:
    """Do what `verify_store` promises."""
    if not 0 <= sample <= 1:
        raise RefusedError(f"sample must be between 0 and 1, got {sample}")
    place = targets.parse_place(target)
    begun = targets.look(place)
    if begun is None or not begun.ready:
        raise TargetError(f"there is no target of dask_batchinv at {place.name}")
    tiling = targets.tiling_of(place, begun)
    opened = None if source is None else _same_source(source, begun)
    task = VerifyTask(
        run=uuid.uuid4().hex,
        target=place,
        tiling=tiling,
        source=opened,
        assume_a=begun.fingerprint["assume_a"],
        missing="fill",  # a tile that is done was read, or filled as it was asked for
        sample=sample,
    )
    ledger = Ledger(place, read_only=True)
    rows: list[dict[str, int]] = []
    bad: list[TileResult] = []
    with connect(cluster) as (running, _):
        check_versions(running)
        check_reach(running, opened, place)
        spans = (range(number, number + 1) for number in range(tiling.n_tiles))
        for result, _ in run_on_cluster(running, verify_tiles, task, spans, attempts=1):
            if result is not None and result.row is not None:
                rows.append(result.row)
                if problem := _unlike_ledger(result.row, ledger, result.number):
                    result = TileResult(result.number, None, problem)
            if result is not None and result.error:
                bad.append(result)
    return VerifyReport(
        target=place.name,
        complete=begun.complete,
        tiles=tiling.n_tiles,
        tiles_read=len(rows),
        bad_tiles=tuple(FailedTile.of(result, tiling) for result in sorted(bad, key=lambda bad: bad.number)),
        matrices=sum(row["matrices"] for row in rows),
        failed={kind: sum(row[kind] for row in rows) for kind in FAILED},
        residuals=sum(row["residuals"] for row in rows),
        largest_ratio=max((_as_float(row["largest_ratio_bits"]) for row in rows), default=0.0),
    )


def _same_source(location: str | os.PathLike[str], begun: targets.Begun) -> Source:
    fingerprint = begun.fingerprint
    source = open_source(location, fingerprint["variable"], fingerprint["dims"])
    if source.digest != fingerprint["source metadata"]:
        raise TargetError(f"the target was made from {fingerprint['source']}, whose metadata are not those of "
                          f"{source.place.name}")  # fmt: skip
    return source


def _unlike_ledger(row: dict[str, int], ledger: Ledger, number: int) -> str | None:
    if not ledger.done[number]:
        return "not recorded in the ledger: run the job again"
    for name, column in CHECKSUMS.items():
        if int(ledger.column(column)[number]) != row[column]:
            return f"{name} is not what was written"
    for name in ("matrices", *FAILED):
        if (recorded := int(ledger.column(name)[number])) != row[name]:
            return f"{row[name]} {name}, but the ledger says {recorded}"
    return None


def verify_tiles(task: VerifyTask, numbers: range) -> list[TileResult]:
    """Check tiles."""
    return [result for number in numbers for result in guarded(number, partial(_verify_tile, task, number))]


@lru_cache(maxsize=12)
def _open_target(run: str, target: Place, name: str) -> zarr.Array[Any]:
    return storage.open_array(target / name, read_only=True)


def _verify_tile(task: VerifyTask, number: int) -> list[TileResult]:
    index, region = task.tiling.index(number), task.tiling.region(number)
    arrays = {name: _open_target(task.run, task.target, name) for name in CHECKSUMS}
    parts = {name: np.asarray(array[index if name == "inverse" else region]) for name, array in arrays.items()}
    info, rcond = parts["info"].reshape(-1), parts["rcond"].reshape(-1)
    n = task.tiling.shape[task.tiling.core[0]]
    inverse = np.moveaxis(parts["inverse"], task.tiling.core, (-2, -1)).reshape(info.size, n, n)
    if (info == Info.PENDING).any():
        raise ValueError("some matrices were never computed")
    good = info == Info.GOOD
    _refuse(good & ~np.isfinite(inverse).all(axis=(1, 2)), region, "not finite, but info says good")
    if n:
        _refuse(~good & ~np.isnan(inverse).all(axis=(1, 2)), region, "not NaN, but info says failed")
    # A little over 1 by rounding; NaN is neither.
    _refuse(good & ~((rcond >= 0) & (rcond < 1.1)), region, "good, but their rcond is not between 0 and 1")
    _refuse((info > 0) & (rcond != 0), region, "singular, but their rcond is not 0")
    row = count(info, rcond) | {"residuals": 0, "largest_ratio_bits": 0}
    for name, key in task.tiling.chunk_keys(number).items():
        row[CHECKSUMS[name]] = storage.checksum(arrays[name], key)
    if task.source is not None and n and _is_sampled(number, task.sample):
        stack = read_stack(task.run, task.source, task.missing, task.tiling, number).reshape(info.size, n, n)
        ratio = residual_ratios(read_part(stack[good], task.assume_a), inverse[good])
        large = np.zeros(len(info), bool)
        large[good] = ~(ratio <= LARGEST_RATIO)
        _refuse(large, region, f"not the inverse: its residual is over {LARGEST_RATIO:g} n eps |A| |X|")
        row["residuals"] = int(good.sum())
        row["largest_ratio_bits"] = int(np.float64(ratio.max(initial=0.0)).view(np.int64))
    return [TileResult(number, row)]


def _is_sampled(number: int, share: float) -> bool:
    """Choose about that share of all tiles, spread evenly over them, and always the same."""
    return number * _GOLDEN % 1.0 < share


def _refuse(wrong: Array, region: tuple[slice, ...], what: str) -> None:
    if wrong.any():
        shape = tuple(span.stop - span.start for span in region)
        inside = np.unravel_index(int(wrong.argmax()), shape) if shape else ()
        first = tuple(int(i) + span.start for i, span in zip(inside, region, strict=True))
        raise ValueError(f"{int(wrong.sum())} matrices are {what}; first {first}")


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
            # Norms first brought to 1: the product of large and small numbers must not overflow.
            ag, norm_a = _normed(a[start : start + step].astype(wide))
            xg, norm_x = _normed(x[start : start + step].astype(wide))
            unit = np.eye(n) / norm_a / norm_x
            left, right = (_norm1(product - unit) for product in (xg @ ag, ag @ xg))
            ratios[start : start + step] = np.minimum(left, right) / (n * eps)
    return ratios


def _normed(a: Array) -> tuple[Array, Array]:
    largest = np.abs(a).max(axis=(1, 2), keepdims=True)
    norm = np.abs(a / largest).sum(axis=1, keepdims=True).max(axis=2, keepdims=True)
    return a / largest / norm, largest * norm


def _norm1(a: Array) -> Array:
    norm: Array = np.abs(a).sum(axis=1).max(axis=1)
    return norm


def _as_float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
