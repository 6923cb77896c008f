"""Stacks built by construction: the condition number is chosen, never hoped for."""

from typing import Any

import numpy as np
import numpy.typing as npt

DTYPES = ("float32", "float64", "complex64", "complex128")
STRUCTURES = (
    "general",
    "symmetric",
    "hermitian",
    "positive definite",
    "upper triangular",
    "lower triangular",
    "diagonal",
)
Array = npt.NDArray[Any]


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal numbers, complex ones for complex dtypes."""
    numbers = rng.normal(size=shape)
    if np.dtype(dtype).kind == "c":
        return (numbers + 1j * rng.normal(size=shape)).astype(dtype)
    return numbers.astype(dtype)


def orthogonal(rng: np.random.Generator, m: int, n: int, dtype: Any) -> Array:
    """Random orthogonal (unitary) matrices."""
    return np.linalg.qr(normal(rng, (m, n, n), np.result_type(dtype, np.float64)))[0]


def conditioned(
    m: int,
    n: int,
    cond: float,
    dtype: Any = "float64",
    structure: str = "general",
    seed: int = 0,
    *,
    one_large: bool = False,
) -> Array:
    """Return m matrices whose 2-norm condition number is `cond` (for triangular ones: about).

    Their singular values fall evenly in ratio, or one is large and all others are small.
    """
    rng = np.random.default_rng(seed)
    values = np.geomspace(1, 1 / cond, n)
    if one_large:
        values[1:] = 1 / cond
    q = orthogonal(rng, m, n, dtype)
    qh = q.conj().swapaxes(1, 2)
    if structure == "general":
        a = (q * values) @ orthogonal(rng, m, n, dtype)
    elif structure == "diagonal":
        a = np.eye(n) * rng.permuted(np.broadcast_to(values, (m, n)), axis=1)[:, None, :]
    elif structure == "symmetric":  # complex symmetric, not Hermitian, where the dtype is complex
        a = (q * values * rng.choice([-1, 1], (m, 1, n))) @ q.swapaxes(1, 2)
    elif structure == "hermitian":
        a = (q * values * rng.choice([-1, 1], (m, 1, n))) @ qh
    elif structure == "positive definite":
        a = (q * values) @ qh
    else:
        r = np.linalg.qr((q * values) @ orthogonal(rng, m, n, dtype))[1]
        a = r if structure == "upper triangular" else r.swapaxes(1, 2)
    return np.ascontiguousarray(a.astype(dtype))


def residual_ratio(a: Array, x: Array, worse: bool = True) -> Array:
    """max(‖XA - I‖₁, ‖AX - I‖₁) / (n eps ‖A‖₁ ‖X‖₁) per matrix, in long double: LAPACK's dget03, but for both sides.

    Not `worse`: of the better side alone.
    """
    n, eps = a.shape[-1], np.finfo(a.dtype).eps
    wide = np.clongdouble if a.dtype.kind == "c" else np.longdouble
    aw, xw = a.astype(wide), x.astype(wide)

    def norm(b: Array) -> Array:
        return np.abs(b).sum(axis=-2).max(axis=-1)

    sides = [norm(np.einsum("mij,mjk->mik", p, q) - np.eye(n)) for p, q in ((xw, aw), (aw, xw))]
    return np.asarray((np.maximum if worse else np.minimum)(*sides) / (n * eps * norm(aw) * norm(xw)), float)


def assert_same_bits(a: Any, b: Any) -> None:
    """Equal in every bit, NaN and the sign of zero included."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()
