"""What happened to a matrix: the ``info`` codes, their words, and the errors made of them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Index = tuple[int, ...]

#: How many failed matrices an error or a report names one by one.
NAMED = 10


class Info(IntEnum):
    """The values of ``info`` other than k > 0 ("the k-th pivot is zero"), as in LAPACK."""

    GOOD = 0
    NOT_FINITE = -1
    OVERFLOW = -2
    BELOW_MIN_RCOND = -3
    #: Only in an unfinished target: nobody has come to this matrix yet.
    PENDING = -(2**31)


_WORDS = {
    Info.GOOD: "the inverse is good",
    Info.NOT_FINITE: "the matrix has a NaN or an infinity",
    Info.OVERFLOW: "the inverse overflows the dtype",
    Info.BELOW_MIN_RCOND: "rcond is below min_rcond",
    Info.PENDING: "not computed yet",
}


def explain(info: int) -> str:
    """Return one ``info`` code in words.

    Examples
    --------
    >>> explain(2)
    'pivot 2 is zero (singular), or the leading minor of order 2 is not positive'
    >>> explain(-1)
    'the matrix has a NaN or an infinity'
    """
    if info > 0:
        return f"pivot {info} is zero (singular), or the leading minor of order {info} is not positive"
    return _WORDS[Info(info)]


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

    def __init__(self, count: int, total: int, indices: Iterable[Index], info: Iterable[int], where: str = ""):
        self.count = count
        self.total = total
        self.indices = tuple(indices)
        self.info = tuple(info)
        self.where = where
        super().__init__(self._message())

    def _message(self) -> str:
        named = "; ".join(f"{i}: {explain(k)}" for i, k in zip(self.indices, self.info, strict=True))
        more = "" if self.count == len(self.indices) else f"; and {self.count - len(self.indices)} more"
        noun = "matrix has" if self.total == 1 else "matrices have"
        return (
            f"{self.count} of {self.total} {noun} no inverse{self.where}: {named}{more}. "
            'Pass on_error="nan" to have them as NaN and the rest delivered, or use inverse_ex.'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException pickles self.args, which is the message alone.
        return type(self), (self.count, self.total, self.indices, self.info, self.where)


def raise_failed(info: npt.NDArray[np.int32], origin: tuple[int | None, ...] | None = None) -> None:
    """Raise `SingularMatrixError` if any code in `info` is not 0.

    Parameters
    ----------
    info : array of shape ``(*,)``
        Codes of one block.
    origin : tuple of int or None, optional
        Where the block begins in the whole stack; None for a dimension in which nobody knows, because the
        chunk sizes are unknown.
    """
    if not (info != Info.GOOD).any():
        return
    if not isinstance(info, np.ndarray):  # CuPy's
        info = info.get()
    failed = np.argwhere(info != Info.GOOD)
    origin = origin or (0,) * info.ndim
    where = ""
    if None in origin:
        unknown = [axis for axis, start in enumerate(origin) if start is None]
        where = f" (chunk sizes are unknown along axis {unknown}: indices there count from the block's start)"
    first = failed[:NAMED]
    indices = [tuple(int(i) + (o or 0) for i, o in zip(row, origin, strict=True)) for row in first]
    raise SingularMatrixError(len(failed), info.size, indices, [int(info[tuple(row)]) for row in first], where)


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
