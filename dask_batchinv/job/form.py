"""How numbers of matrices stand in arrays where it is not as ``(*, n, n)``: triangles, real and imaginary parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dask_batchinv.stack import AssumeA, result_dtype

Array = npt.NDArray[Any]
#: Which triangle is there, and in which order.
Packed = Literal["lower by rows", "lower by columns", "upper by rows", "upper by columns"]
#: The structures of which half of a matrix is 0.
_TRIANGULAR = ("lower triangular", "upper triangular")


@dataclass(frozen=True)
class FormOptions:
    """What the user says of how numbers stand."""

    packed: Packed | None = None
    """Which triangle is there."""
    complex_dim: str | None = None
    """The dimension of real and imaginary parts."""
    imag: str | None = None
    """The name of the array of imaginary parts."""

    @property
    def is_usual(self) -> bool:
        """Whether the matrices stand as ``(*, n, n)``."""
        return self == FormOptions()


def rows_of(length: int) -> int | None:
    """Return n for a triangle of ``n (n + 1) / 2`` numbers; None if there is none of that length.

    Examples
    --------
    >>> [rows_of(length) for length in (1, 3, 6, 7)]
    [1, 2, 3, None]
    """
    n = (math.isqrt(8 * length + 1) - 1) // 2
    return n if length and n * (n + 1) // 2 == length else None


def positions(packed: Packed, n: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the row and the column of each number of a triangle.

    Examples
    --------
    >>> positions("lower by columns", 2)
    (array([0, 1, 1]), array([0, 0, 1]))
    """
    triangle, _, order = packed.partition(" by ")
    first, second = np.tril_indices(n) if (triangle == "lower") == (order == "rows") else np.triu_indices(n)
    return (first, second) if order == "rows" else (second, first)


def _complex(real: Array, imaginary: Array) -> Array:
    # A product with the imaginary unit would make a NaN of an infinity.
    found = np.empty(real.shape, np.result_type(result_dtype(real.dtype), result_dtype(imaginary.dtype), np.complex64))
    found.real, found.imag = real, imaginary
    return found


@dataclass(frozen=True)
class Form:
    """How the numbers of a stack stand in an array."""

    batch: tuple[int, ...]
    """The axes of its batch dimensions."""
    core: tuple[int, ...]
    """Those of rows and columns, or the one of packed triangles."""
    n: int
    """Rows of a matrix."""
    packed: Packed | None = None
    """Which triangle is there."""
    pair: int | None = None
    """The axis of real and imaginary parts."""

    def region(self, region: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return where a region of the stack, core dimensions last, is in the array."""
        found = [slice(None)] * (len(self.batch) + len(self.core) + (self.pair is not None))
        for axis, span in zip(self.batch, region, strict=False):
            found[axis] = span
        return tuple(found)

    def assemble(self, block: Array, imaginary: Array | None, assume_a: AssumeA) -> Array:
        """Return the matrices ``(*, n, n)`` that decoded numbers stand for."""
        order = (*self.batch, *self.core, *(() if self.pair is None else (self.pair,)))
        numbers = block.transpose(order)
        if self.pair is not None:
            numbers = _complex(numbers[..., 0], numbers[..., 1])
        if imaginary is not None:
            numbers = _complex(numbers, imaginary.transpose(order))
        if self.packed is None:
            return numbers
        row, col = positions(self.packed, self.n)
        found = np.zeros((*numbers.shape[:-1], self.n, self.n), numbers.dtype)
        if assume_a not in _TRIANGULAR:
            found[..., col, row] = numbers if assume_a in ("general", "symmetric") else numbers.conj()
        found[..., row, col] = numbers
        return found
