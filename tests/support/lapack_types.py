"""The matrices of LAPACK's own tests: types 1 to 11 of xLATB4 for general ones, 1 to 9 or 10 for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.stacks import orthogonal

Array = npt.NDArray[Any]
SIZES = (1, 2, 3, 4, 5, 8, 10, 16, 32, 33, 50, 64, 100, 128, 256)
TYPES = {
    "general": (
        "diagonal",
        "upper triangular",
        "lower triangular",
        "cond 2",
        "first column zero",
        "last column zero",
        "last columns zero",
        "cond sqrt(0.1/eps)",
        "cond 0.1/eps",
        "near underflow",
        "near overflow",
    ),
    "positive definite": (
        "diagonal",
        "cond 2",
        "first row and column zero",
        "last row and column zero",
        "middle row and column zero",
        "cond sqrt(0.1/eps)",
        "cond 0.1/eps",
        "near underflow",
        "near overflow",
    ),
}
TYPES["diagonal"] = (
    "diagonal",
    "first pivot zero",
    "last pivot zero",
    "middle pivot zero",
    "near underflow",
    "near overflow",
)
TYPES["upper triangular"] = TYPES["lower triangular"] = (
    *TYPES["diagonal"],
    "cond 2",
    "cond sqrt(0.1/eps)",
    "cond 0.1/eps",
)
TYPES["symmetric"] = TYPES["hermitian"] = (*TYPES["positive definite"], "last rows and columns zero")


@dataclass(frozen=True)
class Sample:
    """A stack and what is expected of it."""

    a: Array
    info: int
    """The number of the zero pivot, or 0."""


def sample(rng: np.random.Generator, kind: str, type_: str, m: int, n: int, dtype: str) -> Sample:
    """Draw m matrices of a type."""
    eps = np.finfo(dtype).eps / 2  # LAPACK's: what one rounding can do
    cond = {"cond sqrt(0.1/eps)": (0.1 / eps) ** 0.5, "cond 0.1/eps": 0.1 / eps}.get(type_, 2.0)
    values = _singular_values(rng, m, n, cond)
    if kind in ("symmetric", "hermitian"):
        values *= rng.choice([-1, 1], values.shape)
    wide = np.result_type(dtype, np.float64)
    if "diagonal" in (type_, kind):
        a = values[:, :, None] * np.eye(n)
    else:
        q = orthogonal(rng, m, n, wide)
        p = orthogonal(rng, m, n, wide) if kind == "general" else q.conj() if kind == "symmetric" else q
        a = (q * values[:, None, :]) @ p.conj().swapaxes(1, 2)
    for shape in (type_, kind):
        if "triangular" in shape:
            # The singular values stay.
            r = np.linalg.qr(a)[1]
            a = r if shape.startswith("upper") else r.swapaxes(1, 2)
    first = {"first": 0, "last": n - 1, "middle": n // 2}.get(type_.split()[0])
    if first is not None and "zero" in type_:
        zero = slice(first := n // 2, n) if "columns" in type_ else first
        a[:, zero if "pivot" in type_ else slice(None), zero] = 0
        if "row" in type_:
            a[:, zero, :] = 0
    if type_.startswith("near"):
        limits = np.finfo(dtype)
        small = 0.25 * float(limits.tiny) / (2 * eps)
        a = a * (small if type_ == "near underflow" else 1 / small)
    return Sample(np.ascontiguousarray(a.astype(dtype)), 0 if first is None or "zero" not in type_ else first + 1)


def _singular_values(rng: np.random.Generator, m: int, n: int, cond: float) -> Array:
    """Singular values from 1 to 1 / cond: one large, one small, in ratio or evenly spaced, as xLATMS's modes 1 to 4.

    Its tests take the last two alone, and miss what blocked elimination does to the first.
    """
    one_large, one_small = np.full(n, 1 / cond), np.ones(n)
    one_large[0], one_small[-1] = 1, 1 / cond
    modes = np.array([one_large, one_small, np.geomspace(1, 1 / cond, n), np.linspace(1, 1 / cond, n)])
    return modes[rng.integers(4, size=m)]
