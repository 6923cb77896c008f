"""What a kernel is written for, and what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dask_batchinv.stack import AssumeA


@dataclass(frozen=True)
class KernelSpec:
    """All that decides on a kernel's machine code, on one processor."""

    structure: AssumeA
    """What is known of the matrices."""
    n: int
    """Rows of a matrix; 0 if that is known only when the kernel runs."""
    dtype: np.dtype[Any]
    """float32, float64, complex64 or complex128, in native byte order."""
    lanes: int
    """Reals in a vector."""

    @property
    def parts(self) -> int:
        """Reals of a number: 2 if it is complex."""
        return 2 if self.dtype.kind == "c" else 1

    @property
    def itemsize(self) -> int:
        """Bytes of a real."""
        return self.dtype.itemsize // self.parts

    @property
    def size(self) -> int:
        """Reals of a matrix."""
        return self.n * self.n * self.parts

    @property
    def name(self) -> str:
        """The name of the function.

        Examples
        --------
        >>> KernelSpec("positive definite", 3, np.dtype("float64"), 8).name
        'positive_definite_3_d_8'
        """
        return f"{self.structure.replace(' ', '_')}_{self.n or 'any'}_{self.dtype.char}_{self.lanes}"


class Workspace(NamedTuple):
    """What a kernel works on at a time."""

    group: int
    """Matrices."""
    nbytes: int
    """Bytes of scratch memory for all of them."""
