"""The table of cases: what is tested for correctness is what is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
DTYPES = ("float32", "float64", "complex64", "complex128")
KINDS = ("general", "positive definite")


@dataclass(frozen=True)
class Case:
    """Matrices of one kind, size and dtype."""

    kind: str
    n: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind} {self.n} {self.dtype}"

    @property
    def flops(self) -> int:
        """Operations on reals that one inverse takes: 2 n^3, half for positive definite, four times for complex."""
        return self.n**3 * (1 if self.kind == "positive definite" else 2) * (4 if "complex" in self.dtype else 1)

    def make(self, nbytes: int, seed: int = 0) -> Array:
        """Return a stack of about so many bytes of well-conditioned random matrices, two at least."""
        rng = np.random.default_rng(seed)
        dtype = np.dtype(self.dtype)
        m = max(2, nbytes // (self.n**2 * dtype.itemsize))
        # Some hundreds that differ, repeated: drawing as many as are timed would take longer than timing them.
        few = min(m, max(2, 2**21 // self.n**2))
        a = rng.normal(size=(few, self.n, self.n))
        if dtype.kind == "c":
            a = a + 1j * rng.normal(size=a.shape)
        if self.kind == "positive definite":
            a = a @ a.conj().swapaxes(1, 2) / self.n
        a = a + 2 * math.sqrt(self.n) * np.eye(self.n)
        stack = np.empty((m, self.n, self.n), dtype)
        for start in range(0, m, few):
            stack[start : start + few] = a[: m - start]
        return stack


CASES = tuple(Case(kind, n, dtype) for kind in KINDS for dtype in DTYPES for n in SIZES)
