"""What a worker returns for a tile, and the row of the ledger that is made of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from dask_batchinv.job.outputs import ROLES, checksum_column
from dask_batchinv.outcome import FAILURE_KINDS, Info, SourceError, failures_of
from dask_batchinv.storage import DamagedChunkError
from dask_batchinv.text import clean

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
T = TypeVar("T")

#: Errors of operating systems that have no more room.
_FULL = (errno.ENOSPC, errno.EDQUOT)
DEVICES = ("cpu", "gpu")
#: So many bytes are checked at a time, twice: they stay in the cache of a core.
_CHECKED_NBYTES = 2**19
#: LAPACK's own tests accept a residual of 30 n eps ‖A‖₁ ‖X‖₁.
LARGEST_RATIO = 30.0
#: The columns for what the stores of source and target say of a tile, as `dask_batchinv.job.seen` has it.
SEEN = ("source_seen", "target_seen")
#: What a row of the ledger says of its tile, in int64; only `TileRow` and `smallest_rconds` know how.
COLUMNS = (
    "generation", "matrices", *FAILURE_KINDS, "masked", "ill_conditioned", "smallest_rcond_bits", "milliseconds",
    "attempts", "device", "filled",
    *map(checksum_column, ROLES),
    "source_checksum", *SEEN,
)  # fmt: skip


class LostTargetError(RuntimeError):
    """A worker does not find the target that it was told of."""


class LostArrayError(RuntimeError):
    """An array of the target is not there any more."""


@dataclass(frozen=True)
class BadChunk:
    """A chunk of the source that cannot be read."""

    key: str
    """Its key, and where it is in a shard."""
    cause: str
    """Why, on one line and without credentials."""
    is_final: bool = False
    """Whether it would fail again, whoever tried."""

    def __str__(self) -> str:
        return f"{self.key}: {self.cause}"


def naming(bad: tuple[BadChunk, ...]) -> str:
    """Return what to say of a tile with chunks that cannot be read."""
    noun, first = ("chunk", "") if len(bad) == 1 else ("chunks", "first ")
    return f"{len(bad)} {noun} of the source cannot be read: {first}{bad[0]}"


def all_final(bad: tuple[BadChunk, ...]) -> bool:
    """Tell whether they would all fail again, whoever tried."""
    return all(chunk.is_final for chunk in bad)


@dataclass(frozen=True)
class TileResult(Generic[T]):
    """The result of one tile: a value, or an error, or both where a part of it could be done."""

    number: int
    """Which tile."""
    value: T | None
    """What was found out about it; None if it failed."""
    error: str | None = None
    """Why it failed, on one line and without credentials."""
    stops: bool = False
    """Whether the cause would fail all other tiles too."""
    is_final: bool = False
    """Whether it would fail again, whoever tried."""
    is_workers: bool = False
    """Whether the cause is the worker, not the tile."""
    milliseconds: int = 0
    """How long it took."""
    cpu_milliseconds: int = 0
    """For how long of that it has computed."""
    requests: int = 0
    """Requests of its process to stores since the last result: for chunks, or parts of them, read or written."""
    attempts: int = 1
    """How often it was tried."""
    bad_chunks: tuple[BadChunk, ...] = ()
    """What could not be read, where all else of it was done."""
    changes: Any = None
    """What its task has written, with other tiles, where that is to be merged before it lasts."""

    def __post_init__(self) -> None:
        if self.error is not None:
            object.__setattr__(self, "error", clean(self.error))


@dataclass
class WorkerFigures:
    """What a worker did."""

    tiles: int = 0
    """Tiles inverted."""
    failed: int = 0
    """Times that a tile failed."""
    seconds: float = 0.0
    """Time that its threads were at work on them."""
    cpu_seconds: float = 0.0
    """For how long of that they have computed."""
    requests: int = 0
    """Requests to stores: for chunks, or parts of them, read or written."""

    def add(self, results: Iterable[TileResult[Any]]) -> None:
        """Add the results of tiles."""
        for result in results:
            self.tiles += isinstance(result.value, TileRow)
            self.failed += result.error is not None
            self.seconds += result.milliseconds / 1000
            self.cpu_seconds += result.cpu_milliseconds / 1000
            self.requests += result.requests


@dataclass(frozen=True)
class TileRow:
    """The account of the matrices of a tile."""

    matrices: int
    """How many there are."""
    failed: dict[str, int]
    """How many of them have no inverse, by kind."""
    masked: int
    """How many are left out by a mask."""
    ill_conditioned: int
    """Good ones with rcond below the machine epsilon."""
    smallest_rcond: float
    """Of the good ones; NaN if there are none."""
    checksums: dict[str, int]
    """CRC-32C of the chunk of each output, by what it is; -1 or nothing if there is none, the tile being empty."""
    device: str = "cpu"
    """Where they were inverted."""
    filled: int = 0
    """Chunks of the source that were not there, and read as their fill value."""
    source_checksum: int = 0
    """Of what was read of the source: see `content_checksum`."""
    written: int = 0
    """What the disk says of its chunks, as `dask_batchinv.job.seen` has it, right after they were written."""

    @classmethod
    def of(
        cls,
        info: Array,
        rcond: Array,
        checksums: dict[str, int],
        device: str = "cpu",
        filled: int = 0,
        source_checksum: int = 0,
        written: int = 0,
    ) -> TileRow:
        """Return the account of matrices with these codes and condition numbers."""
        failed = dict.fromkeys(FAILURE_KINDS, 0)
        known, masked = rcond, 0
        if info.any():  # else there is nothing to look for
            masked = int(np.count_nonzero(info == int(Info.MASKED)))
            failed = {failure.kind: int(failure.includes(info).sum()) for failure in failures_of("general")}
            known = rcond[info == int(Info.GOOD)]
        smallest = float(known.min()) if known.size else np.nan
        eps = np.finfo(rcond.dtype).eps
        return cls(
            matrices=info.size,
            failed=failed,
            masked=masked,
            ill_conditioned=0 if smallest >= eps else int((known < eps).sum()),
            smallest_rcond=smallest,
            checksums=checksums,
            device=device,
            filled=filled,
            source_checksum=source_checksum,
            written=written,
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many matrices there are, and of each kind that is no inverse."""
        return {"matrices": self.matrices, **self.failed, "masked": self.masked}

    def encode(self, milliseconds: int, attempts: int) -> list[int]:
        """Return the row of the ledger, but for its first column and the last ones, `SEEN`."""
        smallest = int(np.float64(self.smallest_rcond).view(np.int64))
        return [
            self.matrices, *(self.failed[kind] for kind in FAILURE_KINDS), self.masked, self.ill_conditioned,
            smallest,
            milliseconds, attempts, DEVICES.index(self.device), self.filled,
            *(self.checksums.get(role, -1) for role in ROLES), self.source_checksum,
        ]  # fmt: skip

    @classmethod
    def decode(cls, row: Array) -> TileRow:
        """Return what a row of the ledger says."""
        values = dict(zip(COLUMNS, map(int, row), strict=True))
        return cls(
            matrices=values["matrices"],
            failed={kind: values[kind] for kind in FAILURE_KINDS},
            masked=values["masked"],
            ill_conditioned=values["ill_conditioned"],
            smallest_rcond=float(np.int64(values["smallest_rcond_bits"]).view(np.float64)),
            checksums={role: values[checksum_column(role)] for role in ROLES},
            device=DEVICES[values["device"]],
            filled=values["filled"],
            source_checksum=values["source_checksum"],
        )


def is_final(error: Exception) -> bool:
    """Tell whether what failed would fail again, whoever tried."""
    return isinstance(error, (DamagedChunkError, SourceError))


def content_checksum(block: Array) -> int:
    """Return a number for the content of an array, whatever its order in memory: a CRC-32C, and a sum of its words.

    Two contents have the same one by chance with a probability of 2⁻⁶³; of 2⁻³² if one is the other in another order.

    Examples
    --------
    >>> content_checksum(np.eye(2)) == content_checksum(np.asfortranarray(np.eye(2)))
    True
    """
    checksum, total = 0, 0
    word = f"u{min(8, block.itemsize)}"
    step = max(1, _CHECKED_NBYTES * len(block) // max(1, block.nbytes)) if block.ndim else 1
    for start in range(0, len(block), step) if block.size else ():
        part = block[start : start + step]
        content = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        total += int(np.add.reduce(content.view(word), dtype=np.uint64))
        checksum = crc32c(content.data, checksum)
    return checksum << 31 | total % (2**31 - 1)


def smallest_rconds(rows: Rows) -> npt.NDArray[np.float64]:
    """Return the smallest rcond of a good matrix in each row of the ledger; NaN where there is none."""
    return np.ascontiguousarray(rows[:, COLUMNS.index("smallest_rcond_bits")]).view(np.float64)


def smallest_of(rows: Rows) -> float | None:
    """Return the smallest rcond of a good matrix in rows of the ledger, or None if there is none."""
    values = smallest_rconds(rows)
    values = values[np.isfinite(values)]
    return float(values.min()) if len(values) else None


def as_results(number: int, work: Callable[[], list[TileResult[T]]]) -> list[TileResult[T]]:
    """Return the results of `work` for a tile; an exception becomes the error of the result."""
    try:
        return work()
    except Exception as error:  # a failure is data here: the driver decides what it means
        return [
            TileResult(
                number,
                None,
                clean(f"{type(error).__name__}: {error}"),
                stops=isinstance(error, LostArrayError) or getattr(error, "errno", None) in _FULL,
                is_final=is_final(error),
                is_workers=isinstance(error, LostTargetError),
            )
        ]
