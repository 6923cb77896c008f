"""What happened to a matrix: the ``info`` codes, the table of failures, and the errors made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_batchinv.stack import AssumeA

Index = tuple[int, ...]

#: How many failed matrices an error or a report names one by one.
NAMED = 10


class Info(IntEnum):
    """The values of ``info`` other than k > 0 ("the k-th pivot is zero"), as in LAPACK."""

    # Arrays are compared with `int(Info.GOOD)`: of an enum NumPy makes an int64, and that takes four times as long.

    GOOD = 0
    NOT_FINITE = -1
    OVERFLOW = -2
    BELOW_MIN_RCOND = -3
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
    cause: str = ""
    """Where it usually comes from."""

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
    "singular", None, "not positive definite", "not positive definite (leading minor of order {k})", _SINGULAR.cause
)
_OTHERS = (
    Failure("not_finite", Info.NOT_FINITE, "with NaN or infinity", "the matrix has a NaN or an infinity"),
    Failure("overflow", Info.OVERFLOW, "whose inverse overflows", "the inverse overflows the dtype"),
    Failure("below_min_rcond", Info.BELOW_MIN_RCOND, "with rcond below the minimum", "rcond is below min_rcond"),
)
#: The names of all kinds of failures.
FAILURE_KINDS = (_SINGULAR.kind, *(failure.kind for failure in _OTHERS))


def failures_of(assume_a: AssumeA) -> tuple[Failure, ...]:
    """Return the failures of matrices of a structure, in the order of `FAILURE_KINDS`."""
    return (_NOT_DEFINITE if assume_a == "positive definite" else _SINGULAR, *_OTHERS)


def describe_codes(assume_a: AssumeA) -> str:
    """Return all codes of ``info`` in words.

    Examples
    --------
    >>> describe_codes("general")[:80]
    '0 good; k > 0 singular (pivot k is exactly zero); -1 the matrix has a NaN or an '
    """
    codes = [(f"{f.code:d}" if f.code else "k > 0", f.explanation.format(k="k")) for f in failures_of(assume_a)]
    return "; ".join(["0 good", *(f"{code} {words}" for code, words in codes)])


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
        causes = dict.fromkeys(_failure(k, self.assume_a).cause for k in self.info)
        return (
            f"{self.count} of {self.total} {noun}{self.where} {verb} no inverse: {named}{more}. {''.join(causes)}"
            'Pass on_error="nan" to get NaN for these and inverses for the rest, or use inverse_ex.'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException pickles self.args, which is the message alone.
        return type(self), (self.count, self.total, self.indices, self.info, self.assume_a, self.where)


def raise_failed(info: npt.NDArray[np.int32], assume_a: AssumeA, origin: tuple[int | None, ...] | None = None) -> None:
    """Raise `SingularMatrixError` if any code in `info` is not 0.

    Parameters
    ----------
    info : array of shape ``(*,)``
        Codes of a stack, or of one block of it.
    assume_a : str
        Structure of the matrices.
    origin : tuple of int or None, optional
        Where the block begins in the whole stack; None for a dimension along which that is unknown, because the
        chunk sizes are.
    """
    if not (info != int(Info.GOOD)).any():
        return
    if not isinstance(info, np.ndarray):  # CuPy's
        info = info.get()
    failed = np.argwhere(info != int(Info.GOOD))
    where = "" if origin is None else " of this block"
    origin = origin or (0,) * info.ndim
    if None in origin:
        unknown = [axis for axis, start in enumerate(origin) if start is None]
        where += f" (chunk sizes are unknown along axis {unknown}: indices there count from the block's start)"
    first = failed[:NAMED]
    indices = [tuple(int(i) + (o or 0) for i, o in zip(row, origin, strict=True)) for row in first]
    codes = [int(info[tuple(row)]) for row in first]
    raise SingularMatrixError(len(failed), info.size, indices, codes, assume_a, where)


class RefusedError(ValueError):
    """The job was refused before anything was written. The message says what to change."""


class SourceError(RefusedError):
    """The source is missing, unsafe, or not a stack of matrices."""


class TargetError(RefusedError):
    """The target is in the way, unsafe, or belongs to another job."""


class PlanError(RefusedError, MemoryError):
    """No plan fits the memory of the workers."""


class ClusterError(RefusedError, ConnectionError):
    """The Dask cluster cannot be reached, has no workers, or cannot see the stores."""
