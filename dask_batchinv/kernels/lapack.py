"""LAPACK through NumPy and SciPy, made to account for every matrix.

NumPy's own `inv` raises for the whole stack when one matrix is singular, lets NaN pass, and turns an infinity
into a finite "inverse". Here each matrix is looked at before and after: what LAPACK must not see is replaced by
the identity, and the outcome of each goes to ``info``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack as sl

from dask_batchinv.kernels.blas_threads import one_blas_thread
from dask_batchinv.outcome import Info
from dask_batchinv.stack import AssumeA

Array = npt.NDArray[Any]

#: What the routines for a dtype begin with.
LETTERS = {"f": "s", "d": "d", "F": "c", "D": "z"}
#: Bytes of matrices worked on at a time: they stay in the cache, and bound the scratch memory.
GROUP_NBYTES = 2**18
#: Copies of a group that are alive at once: the part read, its absolute values, the inverse, temporaries.
_GROUP_COPIES = 8


@dataclass(frozen=True)
class Method:
    """What LAPACK does with matrices of a structure."""

    read: Callable[[Array], Array]
    """A private copy of a stack, made only of the part that the word names, filled up to whole matrices."""
    solve: Callable[[Array, Array], Array]
    """``solve(a, out)`` writes the inverses and returns 0 or k per matrix; never raises for finite `a`."""


def scratch_nbytes(n: int, dtype: npt.DTypeLike) -> int:
    """Return the working memory of `invert` in bytes, whatever the number of matrices."""
    # NumPy computes float32 in float64: twice the bytes.
    one = n * n * np.dtype(dtype).itemsize
    return 2 * _GROUP_COPIES * max(GROUP_NBYTES, one)


def invert(a: Array, out: Array, info: Array, rcond: Array, *, structure: AssumeA) -> None:
    """Invert a block; the contract is in `dask_batchinv.kernels`."""
    m, n = a.shape[:2]
    step = max(1, GROUP_NBYTES // (n * n * a.itemsize))
    with one_blas_thread(), np.errstate(all="ignore"):
        for start in range(0, m, step):
            part = slice(start, start + step)
            _invert_group(a[part], out[part], info[part], rcond[part], METHODS[structure])


def _invert_group(a: Array, out: Array, info: Array, rcond: Array, method: Method) -> None:
    s = method.read(np.ascontiguousarray(a))
    not_finite = ~np.isfinite(s).all(axis=(1, 2))
    s[not_finite] = np.eye(s.shape[-1], dtype=s.dtype)
    shift = _scale(s)
    x = np.empty_like(s)
    info[:] = method.solve(s, x)
    # As `scaling.rcond_of` has it.
    eps, norms = np.finfo(s.dtype).eps, (_norm1(s), _norm1(x))
    rcond[:] = eps / (eps * norms[0] * norms[1])
    unknown = (info == int(Info.GOOD)) & ~(np.isfinite(norms[0]) & np.isfinite(norms[1]))
    if unknown.any():
        rcond[unknown] = rcond_at_any_scale(s[unknown], x[unknown])
    rcond[(info > 0) | np.isnan(rcond)] = 0
    _shift_exponents(x, shift)
    out[:] = x
    overflow = ~np.isfinite(out).all(axis=(1, 2))
    info[(info == int(Info.GOOD)) & overflow] = Info.OVERFLOW
    info[not_finite] = Info.NOT_FINITE
    rcond[not_finite] = np.nan
    out[info != int(Info.GOOD)] = complex(np.nan, np.nan) if np.iscomplexobj(out) else np.nan


def _norm1(a: Array) -> Array:
    norm: Array = np.abs(a).sum(axis=-2).max(axis=-1)
    return norm


def rcond_at_any_scale(a: Array, x: Array) -> Array:
    """Return ``rcond`` of matrices with inverses whose 1-norms themselves may be out of range."""
    (norm, exponent), (norm_of_inverse, exponent_of_inverse) = (_norm1_and_exponent(b) for b in (a, x))
    with np.errstate(all="ignore"):
        rcond: Array = np.ldexp(1 / (norm * norm_of_inverse), -(exponent + exponent_of_inverse))
    return rcond


def _norm1_and_exponent(a: Array) -> tuple[Array, Array]:
    """Return the 1-norms of matrices whose largest number is brought into [1/2, 1), and the exponents they had."""
    parts = a.view(a.real.dtype)
    exponent = np.frexp(np.abs(parts).max(axis=(1, 2)))[1]
    return _norm1(np.ldexp(parts, -exponent[:, None, None]).view(a.dtype)), exponent


def _scale(s: Array) -> Array:
    """Bring the largest number of each matrix into [1/2, 1) by a power of two, in place; return the exponents added.

    The sums and products inside LAPACK then neither overflow nor underflow unless the inverse does, and matrices that
    differ by a power of two alone have inverses that do. Numbers too small for both stay as they are: the smallest
    must not become subnormal.
    """
    size = np.abs(s.view(s.real.dtype))
    largest = size.max(axis=(1, 2))
    smallest = np.where(size == 0, np.inf, size).min(axis=(1, 2))
    lowest = np.finfo(s.dtype).minexp + 1
    shift: Array = np.maximum(-np.frexp(largest)[1], np.minimum(lowest - np.frexp(smallest)[1], 0))
    shift[largest == 0] = 0
    _shift_exponents(s, shift)
    return shift


def _shift_exponents(a: Array, shift: Array) -> None:
    parts = a.view(a.real.dtype)
    power = np.ldexp(parts.dtype.type(1), shift)
    if (np.isfinite(power) & (power >= np.finfo(power.dtype).tiny)).all():
        parts *= power[:, None, None]
    else:
        # Several times slower, but for any exponent.
        np.ldexp(parts, shift[:, None, None], out=parts)


# --- what each word reads -------------------------------------------------------------------------------------


def _read_general(a: Array) -> Array:
    # NumPy inverts in double precision: let the result stay there until it has its own scale again.
    return np.array(a, dtype=np.result_type(a, np.float64), order="C")


def _read_symmetric(a: Array) -> Array:
    upper = np.triu(a)
    return upper + np.triu(upper, 1).swapaxes(1, 2)


def _read_hermitian(a: Array) -> Array:
    upper = np.triu(a)
    if np.iscomplexobj(a):
        # The diagonal of a Hermitian matrix is real; like LAPACK, do not read the rest of it.
        diagonal = np.einsum("mii->mi", upper)
        diagonal.imag = 0
    return upper + np.triu(upper, 1).conj().swapaxes(1, 2)


def _read_diagonal(a: Array) -> Array:
    s = np.zeros_like(a, order="C")
    np.einsum("mii->mi", s)[:] = np.einsum("mii->mi", a)
    return s


# --- how each word is solved ----------------------------------------------------------------------------------


def _solve_general(s: Array, out: Array) -> Array:
    """gesv against the identity, through NumPy, which loops over the stack in C."""
    pivot = np.zeros(len(s), np.int32)
    try:
        out[:] = np.linalg.inv(s)
        _mark_overflow(s, out)
        return pivot
    except np.linalg.LinAlgError:
        pass
    singular = np.flatnonzero(np.linalg.slogdet(s)[0] == 0)
    if len(singular):
        # Others must be solved in the same way, with the same bits, as if these had not been there.
        for i in singular:
            pivot[i] = _first_zero_pivot(s[i])
        clean = s.copy()
        clean[singular] = np.eye(s.shape[-1], dtype=s.dtype)
        _solve_general(clean, out)
    elif len(s) == 1:
        pivot[0] = _first_zero_pivot(s[0])
    else:
        # slogdet found nothing where inv did: a BLAS whose two paths round differently.
        half = len(s) // 2
        pivot[:half] = _solve_general(s[:half], out[:half])
        pivot[half:] = _solve_general(s[half:], out[half:])
    return pivot


def _mark_overflow(s: Array, out: Array) -> None:
    """Make inverses infinite whose factors were, for an infinite pivot leaves numbers that are finite and wrong.

    Where `_scale` brought a matrix near 1 no pivot can be.
    """
    for i in np.flatnonzero((np.abs(s.view(s.real.dtype)) >= 1).any(axis=(1, 2))):
        lu = (sl.zgetrf if np.iscomplexobj(s) else sl.dgetrf)(s[i])[0]
        if not _are_finite(lu):
            out[i] = np.inf


def _are_finite(factors: Array) -> bool:
    """Tell whether numbers are finite, and the sums of the sizes of their parts, by which LAPACK compares them."""
    return bool(np.isfinite(np.abs(factors.real) + np.abs(factors.imag)).all())


def _first_zero_pivot(a: Array) -> int:
    """Return the 1-based number of the first zero pivot of a matrix that NumPy calls singular."""
    # In double precision, as NumPy works; LAPACKs may differ in rounding, then the last pivot is the zero one.
    info = int((sl.zgetrf if np.iscomplexobj(a) else sl.dgetrf)(a)[2])
    return info or len(a)


def _each(factor: str, finish: str | None, s: Array, out: Array, **upper: int) -> Array:
    """Loop over a stack with two LAPACK routines, the second of which takes what the first returns."""
    letter = LETTERS[s.dtype.char]
    first = getattr(sl, letter + factor)
    second = getattr(sl, letter + finish) if finish else None
    pivot = np.zeros(len(s), np.int32)
    for i, a in enumerate(s):
        *parts, k = first(a, **upper)
        is_usable = second is None or _are_finite(parts[0])  # see `_mark_overflow`
        if k == 0 and second is not None:
            *parts, k = second(*parts, **upper)
        pivot[i] = k
        if k == 0:
            out[i] = parts[0] if is_usable else np.inf
    return pivot


def _solve_symmetric(s: Array, out: Array) -> Array:
    # The lower triangle, so that pivots are counted from the first; `s` has both.
    pivot = _each("sytrf", "sytri", s, out, lower=1)
    out[:] = _read_symmetric(out.swapaxes(1, 2))
    return pivot


def _solve_hermitian(s: Array, out: Array) -> Array:
    if not np.iscomplexobj(s):
        return _solve_symmetric(s, out)
    pivot = _each("hetrf", "hetri", s, out, lower=1)
    out[:] = _read_hermitian(out.conj().swapaxes(1, 2))
    return pivot


def _solve_positive_definite(s: Array, out: Array) -> Array:
    pivot = _each("potrf", "potri", s, out, lower=0)
    out[:] = _read_hermitian(out)
    return pivot


def _solve_upper(s: Array, out: Array) -> Array:
    pivot = _each("trtri", None, s, out, lower=0)
    out[:] = np.triu(out)
    return pivot


def _solve_lower(s: Array, out: Array) -> Array:
    pivot = _each("trtri", None, s, out, lower=1)
    out[:] = np.tril(out)
    return pivot


def _solve_diagonal(s: Array, out: Array) -> Array:
    diagonal = np.einsum("mii->mi", s)
    zero = diagonal == 0
    out[:] = 0
    np.einsum("mii->mi", out)[:] = 1 / diagonal
    return np.where(zero.any(axis=1), zero.argmax(axis=1) + 1, 0).astype(np.int32)


METHODS: dict[AssumeA, Method] = {
    "general": Method(_read_general, _solve_general),
    "symmetric": Method(_read_symmetric, _solve_symmetric),
    "hermitian": Method(_read_hermitian, _solve_hermitian),
    "positive definite": Method(_read_hermitian, _solve_positive_definite),
    "upper triangular": Method(np.triu, _solve_upper),
    "lower triangular": Method(np.tril, _solve_lower),
    "diagonal": Method(_read_diagonal, _solve_diagonal),
}
