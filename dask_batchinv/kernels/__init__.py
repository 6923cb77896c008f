"""Kernels invert the matrices of one block; this module chooses among them.

A kernel's `invert(a, out, info, rcond)` takes blocks of shapes ``(m, n, n), (m, n, n), (m,), (m,)``, reads
`a`, and fills the other three. It never raises for data, never changes `a`, lets no matrix touch a bit of
another, and needs `scratch_nbytes(n, dtype)` bytes on top for each thread, however large m is. A matrix whose
``info`` is not 0 gets an all-NaN inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_batchinv.kernels import lapack
from dask_batchinv.kernels.blas_threads import one_blas_thread
from dask_batchinv.kernels.cpu import dispatch as cpu
from dask_batchinv.kernels.cpu import small_calls
from dask_batchinv.kernels.cuda import kernels as cuda
from dask_batchinv.kernels.cuda import staging
from dask_batchinv.kernels.device import device_for, is_gpu_array, parse_device
from dask_batchinv.kernels.emit.environment import COMPILE_NBYTES, standard_environment
from dask_batchinv.kernels.widened import invert_in
from dask_batchinv.outcome import Info, failures_of
from dask_batchinv.shown import Row, as_html
from dask_batchinv.stack import AssumeA, Device, parse_choice
from dask_batchinv.text import public

Array = npt.NDArray[Any]
#: Bytes of a stack up to which `invert_small` takes it.
LARGEST_SMALL_NBYTES = small_calls.LARGEST_NBYTES

#: Rises when one of our own kernels gives other bits than before for any matrix. A target goes on with the kernels that
#: began it, or not at all.
GENERATION = 3

#: The structures of which one triangle is read, and says what is in the other.
MIRRORED = ("symmetric", "hermitian", "positive definite")


@public
class InverseEx(NamedTuple):
    """The inverses of a stack with an account of each matrix."""

    inverse: Any
    """Shape ``(*, n, n)``; all NaN where `info` is not 0."""
    info: Any
    """Shape ``(*,)``, int32: codes as `Info` has them; 0 no pivot is exactly zero, k > 0 the k-th is.

    Of symmetric and Hermitian matrices k is the row of a pivot, whichever comes first.
    """
    rcond: Any
    """Shape ``(*,)``, real: 1 / (‖A‖₁ ‖A⁻¹‖₁); 0 for a singular matrix, NaN for a non-finite one."""

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, _rows_of(self))


@public
class InverseExLogdet(NamedTuple):
    """What `InverseEx` has, and the determinants."""

    inverse: Any
    """As in `InverseEx`."""
    info: Any
    """As in `InverseEx`."""
    rcond: Any
    """As in `InverseEx`."""
    sign: Any
    """Shape ``(*,)``: the sign of each determinant, of complex ones the phase; 0 if singular, NaN if not known."""
    logdet: Any
    """Shape ``(*,)``, real: the logarithm of its absolute value; -inf if singular, NaN if not known."""

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, _rows_of(self))


AnyInverseEx = InverseEx | InverseExLogdet


def _rows_of(found: AnyInverseEx) -> list[Row]:
    """Return what there is, and what happened to the matrices where that is known already."""
    rows = [(name, f"{_kind_of(array)} {tuple(array.shape)}, {array.dtype}") for name, array in found._asdict().items()]
    if isinstance(found.info, np.ndarray):
        counts = [(failure.words, int(failure.includes(found.info).sum())) for failure in failures_of("general")]
        failed = ", ".join(f"{count:,} {words}" for words, count in counts if count)
        rows.append(("matrices", f"{found.info.size:,}; without an inverse: {failed or 'none'}"))
    return rows


def _kind_of(array: Any) -> str:
    return f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}"


@dataclass(frozen=True)
class Kernel:
    """One way to invert a block."""

    name: str
    """What reports call it."""
    device: str
    """Where it runs: "cpu" or "gpu"."""
    invert: Callable[[Array, Array, Array, Array], None]
    """The kernel itself: ``invert(a, out, info, rcond)``."""
    scratch_nbytes: Callable[[int, npt.DTypeLike], int]
    """``scratch_nbytes(n, dtype)``: its working memory in bytes."""
    compile_nbytes: Callable[[int, npt.DTypeLike], int] = lambda n, dtype: COMPILE_NBYTES
    """``compile_nbytes(n, dtype)``: what it takes in bytes before its first use in a process."""


def choose_kernel(assume_a: AssumeA, device: Device = "cpu") -> Kernel:
    """Return the kernel for matrices in main memory, of a structure, on a device; for "auto" that of the CPU.

    Examples
    --------
    >>> choose_kernel("positive definite").name
    'compiled: positive definite'
    """
    parse_choice("assume_a", assume_a, AssumeA)
    if parse_device(device) == "gpu":
        return Kernel(
            name=f"cuda: {assume_a}",
            device="gpu",
            invert=partial(staging.invert, assume_a=assume_a),
            scratch_nbytes=partial(staging.scratch_nbytes, assume_a=assume_a),
        )
    return Kernel(
        name=f"compiled: {assume_a}",
        device="cpu",
        invert=partial(cpu.invert, structure=assume_a),
        scratch_nbytes=partial(cpu.scratch_nbytes, structure=assume_a),
        compile_nbytes=partial(cpu.compile_nbytes, structure=assume_a),
    )


def invert_small(a: Array, *, assume_a: AssumeA, account: bool) -> Any:
    """Invert a small stack in main memory on the CPU, if nothing needs to be said of any of its matrices.

    Parameters
    ----------
    a : array
        The stack, of at most `LARGEST_SMALL_NBYTES`.
    assume_a : str
        As for `invert_block`.
    account : bool
        Whether to return an `InverseEx`, or the inverses alone.

    Returns
    -------
    InverseEx or array, or None
        None if `invert_block` must say what is the matter, or there is no short way for such stacks.
    """
    found = cpu.invert_small(a, structure=assume_a, account=account)
    return InverseEx(*found) if account and found is not None else found


def read_part(a: Array, assume_a: AssumeA, *, lower: bool = False) -> Array:
    """Return the matrices that a stack ``(m, n, n)`` stands for: the part that `assume_a` names, filled up."""
    mirrored = lower and assume_a in MIRRORED
    part = lapack.METHODS[assume_a].read(np.ascontiguousarray(a.swapaxes(1, 2) if mirrored else a))
    return part.swapaxes(1, 2) if mirrored else part


def log_determinants(
    a: Any, info: Any, *, dtype: npt.DTypeLike, assume_a: AssumeA = "general", lower: bool = False
) -> tuple[Any, Any]:
    """Return signs and logarithms of the absolute values of determinants, from the pivots of LAPACK's factorizations.

    Parameters
    ----------
    a : array
        A block of shape ``(*, n, n)``; one on a GPU is copied to main memory.
    info : array
        What became of its matrices: shape ``(*,)``. Of singular ones the sign is 0 and the logarithm -inf, of others
        that have no inverse both are NaN.
    dtype : dtype
        What to compute in.
    assume_a, lower
        As for `invert_block`.

    Returns
    -------
    sign, logdet : arrays of shape ``(*,)``
        The sign of `dtype`, the logarithm real.
    """
    if is_gpu_array(a):
        import cupy

        found = log_determinants(a.get(), info.get(), dtype=dtype, assume_a=assume_a, lower=lower)
        return cupy.asarray(found[0]), cupy.asarray(found[1])
    n, dtype, codes = a.shape[-1], np.dtype(dtype), info.reshape(-1)
    sign, logdet = np.ones(codes.shape, dtype), np.zeros(codes.shape, np.finfo(dtype).dtype)
    if n:
        matrices = a.reshape(-1, n, n)
        step = max(1, lapack.GROUP_NBYTES // (n * n * dtype.itemsize))
        for start in range(0, len(matrices), step):
            part = slice(start, start + step)
            group = read_part(matrices[part].astype(dtype), assume_a, lower=lower)
            group[codes[part] != int(Info.GOOD)] = np.eye(n, dtype=dtype)
            with one_blas_thread(), np.errstate(all="ignore"):
                sign[part], logdet[part] = np.linalg.slogdet(group)
    singular, failed = codes > 0, codes != int(Info.GOOD)
    sign[failed] = logdet[failed] = np.nan
    if assume_a != "positive definite":  # there a pivot that is not positive says nothing of the determinant
        sign[singular], logdet[singular] = 0, -np.inf
    return sign.reshape(info.shape), logdet.reshape(info.shape)


def invert_block(
    a: Any,
    *,
    dtype: npt.DTypeLike,
    assume_a: AssumeA = "general",
    lower: bool = False,
    device: Device = "auto",
    min_rcond: float = 0.0,
    out: Array | None = None,
    threads: int = 1,
    computed: npt.DTypeLike | None = None,
) -> InverseEx:
    """Invert one block of shape ``(*, n, n)`` that is in main memory or on a GPU, where the results then are too.

    Parameters
    ----------
    a : array
        The block; any numeric dtype, strides and byte order.
    dtype : dtype
        What to return, from `dask_batchinv.stack.result_dtype`.
    assume_a, device
        As in `dask_batchinv.inverse`.
    lower : bool
        Read the lower triangles where one is read, not the upper ones.
    min_rcond : float
        Good matrices with a smaller ``rcond`` get ``info`` -3 and NaN.
    out : array, optional
        Where to put the inverse: of its shape and dtype, in C order.
    threads : int
        How many threads may work on it, where that is done by the CPU.
    computed : dtype, optional
        What to compute in, from `dask_batchinv.stack.computed_dtype`; by default `dtype`.

    Returns
    -------
    InverseEx
    """
    where = device_for(a, device)
    mirrored = lower and assume_a in MIRRORED
    # On the GPU that it is on, if it is on one.
    with standard_environment(), a.device if is_gpu_array(a) else nullcontext():
        results = _invert_block(
            a.swapaxes(-2, -1) if mirrored else a, np.dtype(dtype), assume_a, where, min_rcond, out, threads,
            np.dtype(dtype if computed is None else computed),
        )  # fmt: skip
        if mirrored and assume_a != "symmetric" and results.inverse.dtype.kind == "c":
            # A Hermitian matrix is its transpose conjugated, and so is its inverse.
            results.inverse.imag *= -1
    return results


def _invert_block(
    a: Any,
    dtype: np.dtype[Any],
    assume_a: AssumeA,
    where: Literal["cpu", "gpu"],
    min_rcond: float,
    out: Array | None,
    threads: int,
    computed: np.dtype[Any],
) -> InverseEx:
    batch, n = a.shape[:-2], a.shape[-1]
    m = int(np.prod(batch, dtype=np.intp))
    empty: Any = np.empty
    if on_gpu := is_gpu_array(a):
        import cupy

        empty = cupy.empty
    out = empty((m, n, n), dtype) if out is None else out.reshape(m, n, n)
    info, rcond = empty(m, np.int32), empty(m, np.finfo(dtype).dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        native = (a if on_gpu else np.asarray(a)).astype(dtype, order="C" if on_gpu else "K", copy=False)
    invert: Callable[[Array, Array, Array, Array], None]
    if on_gpu:
        invert = partial(cuda.invert, assume_a=assume_a)
    elif where == "cpu":
        invert = partial(cpu.invert, structure=assume_a, threads=threads)
        if computed != dtype:
            invert = partial(cpu.invert_in, computed, structure=assume_a, threads=threads)
    else:
        invert = choose_kernel(assume_a, where).invert
    if computed != dtype and where == "gpu":
        invert = partial(invert_in, computed, invert)
    invert(native.reshape(m, n, n), out, info, rcond)
    if min_rcond > 0:
        poor = (info == int(Info.GOOD)) & (rcond < min_rcond)
        info[poor] = Info.BELOW_MIN_RCOND
        out[poor] = np.nan
    return InverseEx(out.reshape(a.shape), info.reshape(batch), rcond.reshape(batch))
