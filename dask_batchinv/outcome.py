"""What happened to a matrix: the ``info`` codes, the table of failures, and the errors made of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgWarning

from dask_batchinv.stack import AssumeA
from dask_batchinv.text import CleanError, public

Index = tuple[int, ...]

#: How many failed matrices an error or a report names one by one.
NAMED = 10


@public
class Info(IntEnum):
    """The values of ``info`` other than k > 0 ("the k-th pivot is zero"), as in LAPACK."""

    # Arrays are compared with `int(Info.GOOD)`: of an enum NumPy makes an int64, and that takes four times as long.

    GOOD = 0
    NOT_FINITE = -1
    OVERFLOW = -2
    BELOW_MIN_RCOND = -3
    #: Only in targets: a chunk of the source could not be read.
    UNREADABLE = -4
    #: Only in targets: left out by a mask, which is no failure.
    MASKED = -5
    #: Only in an unfinished target: nobody has come to this matrix yet.
    PENDING = -(2**31)


@dataclass(frozen=True)
class Failure:
    """One way in which a matrix has no usable inverse."""

    kind: str
    """Its name in ledgers and JSON."""
    code: Info | None
    """Its ``info``; None where every k > 0 is."""
    words: str
    """What several matrices are."""
    explanation: str
    """What one matrix is, where k is its ``info``."""
    advice: str = ""
    """Where it usually comes from, or what to do: a sentence for the error."""

    def includes(self, info: Any) -> Any:
        """Tell whether a code, or each of an array, is of this kind."""
        return info > 0 if self.code is None else info == int(self.code)


_SINGULAR = Failure(
    "singular",
    None,
    "singular",
    "singular (pivot {k} is exactly zero)",
    "Singular matrices often have two equal rows, or were filled with 0 where data are masked. ",
)
_NOT_DEFINITE = Failure(
    "singular",
    None,
    "not positive definite",
    "not positive definite (leading minor of order {k})",
    'They may have an inverse all the same: assume_a="symmetric" or "hermitian" needs no positive ones. ',
)
_OTHERS = (
    Failure(
        "not_finite",
        Info.NOT_FINITE,
        "with NaN or infinity",
        "the matrix has a NaN or an infinity",
        'on_error="skipna" lets matrices with NaN pass. ',
    ),
    Failure("overflow", Info.OVERFLOW, "whose inverse overflows", "the inverse overflows the dtype"),
    Failure("below_min_rcond", Info.BELOW_MIN_RCOND, "with rcond below the minimum", "rcond is below min_rcond"),
    Failure("unreadable", Info.UNREADABLE, "in chunks that cannot be read", "its chunk of the source cannot be read"),
)
#: The names of all kinds of failures.
FAILURE_KINDS = (_SINGULAR.kind, *(failure.kind for failure in _OTHERS))


def failures_of(assume_a: AssumeA) -> tuple[Failure, ...]:
    """Return the failures of matrices of a structure, in the order of `FAILURE_KINDS`."""
    return (_NOT_DEFINITE if assume_a == "positive definite" else _SINGULAR, *_OTHERS)


def describe_codes(assume_a: AssumeA) -> str:
    """Return all codes of ``info`` in a target in words.

    Examples
    --------
    >>> describe_codes("general")[:80]
    '0 inverted: no pivot was exactly zero; k > 0 singular (pivot k is exactly zero);'
    """
    codes = [(f"{f.code:d}" if f.code else "k > 0", f.explanation.format(k="k")) for f in failures_of(assume_a)]
    codes.append((f"{Info.MASKED:d}", "left out by the mask"))
    return "; ".join(["0 inverted: no pivot was exactly zero", *(f"{code} {words}" for code, words in codes)])


def explain(info: int, assume_a: AssumeA) -> str:
    """Return one ``info`` code of a failure in words.

    Examples
    --------
    >>> explain(2, "general"), explain(2, "positive definite")
    ('singular (pivot 2 is exactly zero)', 'not positive definite (leading minor of order 2)')
    >>> explain(-1, "general")
    'the matrix has a NaN or an infinity'
    """
    return _failure(info, assume_a).explanation.format(k=info)


def _failure(info: int, assume_a: AssumeA) -> Failure:
    return next(failure for failure in failures_of(assume_a) if failure.includes(info))


@public
class SingularMatrixError(np.linalg.LinAlgError):
    """Some matrices of a stack have no usable inverse.

    Attributes
    ----------
    count, total : int
        How many of how many matrices failed: of the whole stack for arrays in memory, of one block for
        Dask arrays.
    indices : tuple of tuple of int
        The first failed matrices (at most ten), by their indices in the whole stack.
    info : tuple of int
        Their ``info`` codes.
    """

    def __init__(
        self,
        count: int,
        total: int,
        indices: Iterable[Index],
        info: Iterable[int],
        assume_a: AssumeA = "general",
        where: str = "",
    ):
        self.count = count
        self.total = total
        self.indices = tuple(indices)
        self.info = tuple(info)
        self.assume_a = assume_a
        self.where = where
        super().__init__(self._message())

    def _message(self) -> str:
        named = "; ".join(f"{i}: {explain(k, self.assume_a)}" for i, k in zip(self.indices, self.info, strict=True))
        more = "" if self.count == len(self.indices) else f"; and {self.count - len(self.indices)} more"
        noun = "matrix" if self.total == 1 else "matrices"
        verb = "has" if self.count == 1 else "have"
        advice = dict.fromkeys(_failure(k, self.assume_a).advice for k in self.info)
        return (
            f"{self.count} of {self.total} {noun}{self.where} {verb} no inverse: {named}{more}. {''.join(advice)}"
            'Pass on_error="nan" to get NaN for these and inverses for the rest, or use inverse_ex.'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException pickles self.args, which is the message alone.
        return type(self), (self.count, self.total, self.indices, self.info, self.assume_a, self.where)


@public
class IllConditionedWarning(LinAlgWarning):  # type: ignore[misc]  # SciPy ships no types
    """The inverses of some matrices may have no right digit: their ``rcond`` is below eps, the rounding unit."""


@dataclass(frozen=True)
class Place:
    """Where the matrices stand that an error or a warning speaks of."""

    origin: tuple[int | None, ...] | None = None
    """Where their block begins in the whole stack, None for an axis along which that is unknown, because the chunk
    sizes are; or None if they are the whole stack."""

    def __str__(self) -> str:
        if self.origin is None:
            return ""
        unknown = [axis for axis, start in enumerate(self.origin) if start is None]
        note = f" (chunk sizes are unknown along axis {unknown}: indices there count from the block's start)"
        return " of this block" + (note if unknown else "")

    def first(self, chosen: npt.NDArray[np.bool_]) -> list[tuple[Index, Index]]:
        """Return the first of the chosen matrices, by their indices in the block and in the whole stack."""
        origin = self.origin or (0,) * chosen.ndim
        found = [tuple(map(int, row)) for row in np.argwhere(chosen)[:NAMED]]
        return [(row, tuple(i + (o or 0) for i, o in zip(row, origin, strict=True))) for row in found]


def raise_failed(
    info: npt.NDArray[np.int32], assume_a: AssumeA, place: Place, excused: npt.NDArray[np.bool_] | None = None
) -> None:
    """Raise `SingularMatrixError` if any code in `info`, shape ``(*,)``, is not 0, but for the matrices `excused`."""
    if not (info != int(Info.GOOD)).any():
        return
    info = in_main_memory(info)
    failed = np.asarray(info != int(Info.GOOD)) & (True if excused is None else ~excused)
    if not failed.any():
        return
    first = place.first(failed)
    codes = [int(info[row]) for row, _ in first]
    indices = [index for _, index in first]
    raise SingularMatrixError(int(np.count_nonzero(failed)), info.size, indices, codes, assume_a, str(place))


def warn_ill_conditioned(info: npt.NDArray[np.int32], rcond: npt.NDArray[Any], place: Place, eps: float) -> None:
    """Warn of matrices that have an inverse, though their ``rcond`` is below the eps of what they are computed in."""
    poor = rcond < eps
    if not poor.any():
        return
    poor, rcond = in_main_memory(poor & (info == int(Info.GOOD))), in_main_memory(rcond)
    if not poor.any():
        return
    named = "; ".join(f"{index}: rcond {rcond[row]:.2g}" for row, index in place.first(poor))
    count = int(np.count_nonzero(poor))
    more = f"; and {count - NAMED} more" if count > NAMED else ""
    noun, verb = ("matrix", "is") if count == 1 else ("matrices", "are")
    warnings.warn(
        f"{count} {noun} of {poor.size}{place} {verb} singular to working precision, and the inverse may have no right "
        f"digit: {named}{more}. Pass min_rcond={eps:.1g} to count such matrices as failed",
        IllConditionedWarning,
        stacklevel=_levels_to_the_caller(),
    )


def _levels_to_the_caller() -> int:
    """Return how many calls up the code is that called this package: a warning should point there."""
    package, level = __name__.partition(".")[0], 1
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (package, "functools"):
        frame, level = frame.f_back, level + 1
    return level


def in_main_memory(a: Any) -> npt.NDArray[Any]:
    """Return what NumPy or CuPy has computed as a NumPy array that may be changed."""
    return np.array(a.get() if hasattr(a, "get") else a)


@public
class RefusedError(CleanError, ValueError):
    """The job was refused before anything was written. The message says what to change."""


@public
class SourceError(RefusedError):
    """The source is missing, unsafe, or not a stack of matrices."""


@public
class TargetError(RefusedError):
    """The target is in the way, unsafe, or belongs to another job."""


@public
class TargetInUseError(TargetError):
    """Another run is at work on the target: later this one may run."""


@public
class PlanError(RefusedError, MemoryError):
    """No plan fits the memory of the workers."""


@public
class ClusterError(RefusedError, ConnectionError):
    """The Dask cluster cannot be reached, has no workers, or cannot see the stores."""
