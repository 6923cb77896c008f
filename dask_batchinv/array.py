"""`inverse` and `inverse_ex` for arrays: what goes in decides what comes out."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import dask.array as da
import numpy as np
import zarr

from dask_batchinv.kernels import InverseEx, invert_block
from dask_batchinv.kernels.device import is_gpu_array, parse_device
from dask_batchinv.out import check_out, fill, shares_memory
from dask_batchinv.outcome import raise_failed
from dask_batchinv.stack import (
    AssumeA,
    Device,
    OnError,
    check_shape,
    parse_choice,
    real_dtype,
    result_dtype,
    whole_matrices,
)
from dask_batchinv.storage import write_unit


@dataclass(frozen=True)
class CallOptions:
    """The options of one call, checked."""

    assume_a: AssumeA
    device: Device
    raises: bool

    @classmethod
    def parse(cls, assume_a: AssumeA, device: Device, on_error: OnError) -> CallOptions:
        """Return the options, or raise ValueError for a word that is not known."""
        return cls(
            parse_choice("assume_a", assume_a, AssumeA),
            parse_device(device),
            parse_choice("on_error", on_error, OnError) == "raise",
        )


def inverse(
    a: Any, *, out: Any = None, assume_a: AssumeA = "general", on_error: OnError = "raise", device: Device = "auto"
) -> Any:
    """Return the inverse of every matrix in a stack.

    Parameters
    ----------
    a : array of shape ``(*, n, n)``
        A Dask array or `zarr.Array` (the result is a lazy Dask array), an Xarray object (see
        `Dataset.linalg.inv`), a CuPy array (the result is one), or anything that `numpy.asarray` takes (the result is
        a NumPy array). A Dask array of CuPy blocks gives one of CuPy blocks. float32,
        float64, complex64 and complex128 are kept; bool and integers become float64, float16 float32. `a` is
        never modified.
    out : numpy.ndarray, zarr.Array, str or path, optional
        Where to put the result. The work then runs at once, and `out` is filled and returned; at a str or path
        a new Zarr array is created. Not for Xarray objects.
    assume_a : str
        What is known of the matrices, in SciPy's words: "general", "symmetric", "hermitian", "positive
        definite", "upper triangular", "lower triangular", "diagonal". Only the part that the word names is
        read: the upper triangle for the symmetric, Hermitian and positive definite ones, whose inverses are
        exactly symmetric or Hermitian.
    on_error : {"raise", "nan"}
        What happens when matrices have no inverse: an error that names them, or NaN in their place.
    device : {"auto", "cpu", "gpu"}
        Where to compute; "auto" follows the Dask configuration ``batchinv.device``, and without one takes the GPU for
        CuPy arrays and in processes that have one, else the CPU. Lazy input: in the process that computes a block.

    Returns
    -------
    array of shape ``(*, n, n)``

    Raises
    ------
    numpy.linalg.LinAlgError
        If `a` is not a stack of square matrices. Lazy input: at the call, not when it is computed.
    TypeError
        If the dtype has no inverse here. Likewise at the call.
    SingularMatrixError
        With ``on_error="raise"``, if a matrix is singular, not finite, or its inverse overflows. Lazy input:
        when it is computed.
    DeviceError
        If `device` cannot be used. Lazy input: when it is computed.

    See Also
    --------
    inverse_ex : never raises for data, and tells what happened to each matrix.

    Examples
    --------
    >>> import numpy as np
    >>> inverse(np.array([[[2.0, 0.0], [0.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]))
    array([[[0.5 , 0.  ],
            [0.  , 0.25]],
    <BLANKLINE>
           [[0.  , 1.  ],
            [1.  , 0.  ]]])
    """
    return invert_any(a, CallOptions.parse(assume_a, device, on_error), out)


def inverse_ex(
    a: Any, *, check_errors: bool = False, assume_a: AssumeA = "general", device: Device = "auto"
) -> InverseEx:
    """Return the inverses of a stack, and for each matrix what happened and how well conditioned it is.

    Parameters
    ----------
    a, assume_a, device
        As in `inverse`. Of Xarray objects only DataArrays.
    check_errors : bool
        Raise `SingularMatrixError` as `inverse` does, instead of reporting in ``info`` alone.

    Returns
    -------
    InverseEx
        ``(inverse, info, rcond)``, of the same kind as `a`. A matrix with ``info`` ≠ 0 has an all-NaN inverse.

    Raises
    ------
    numpy.linalg.LinAlgError, TypeError, DeviceError
        As in `inverse`.

    Examples
    --------
    >>> import numpy as np
    >>> inverse_ex(np.array([[[1.0, 2.0], [2.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]])).info
    array([2, 0], dtype=int32)
    """
    return invert_any_ex(a, CallOptions.parse(assume_a, device, "raise" if check_errors else "nan"))


# --- arrays in memory -----------------------------------------------------------------------------------------


@singledispatch
def invert_any(a: Any, options: CallOptions, out: Any) -> Any:
    """`inverse` for one kind of input; here whatever `numpy.asarray` takes."""
    a = _in_memory(a)
    if is_gpu_array(a) and out is not None and not is_gpu_array(out):
        raise TypeError(f"a is on the GPU, but out is {type(out).__name__}: pass a CuPy array, or cupy.asnumpy(a)")
    if is_gpu_array(out) and not is_gpu_array(a):
        raise TypeError("out is on the GPU, but a is not: pass cupy.asarray(a), or an out in main memory")
    if isinstance(out, np.ndarray) or is_gpu_array(out):
        check_out(out, a)
        if shares_memory(a, out):
            raise ValueError("out overlaps the input: pass an array of its own memory")
    elif out is not None:
        return invert_any(da.from_array(a), options, out)
    result, info, _ = invert_block(a, dtype=result_dtype(a.dtype), assume_a=options.assume_a, device=options.device)
    if options.raises:
        raise_failed(info, options.assume_a)
    if out is None:
        return result
    out[...] = result
    return out


@singledispatch
def invert_any_ex(a: Any, options: CallOptions) -> InverseEx:
    """`inverse_ex` for one kind of input; here whatever `numpy.asarray` takes."""
    a = _in_memory(a)
    result = invert_block(a, dtype=result_dtype(a.dtype), assume_a=options.assume_a, device=options.device)
    if options.raises:
        raise_failed(result.info, options.assume_a)
    return result


def _in_memory(a: Any) -> Any:
    _refuse_masked(a)
    if not is_gpu_array(a):
        a = np.asarray(a)
    check_shape(a.shape)
    result_dtype(a.dtype)
    return a


def _refuse_masked(a: Any) -> None:
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError("masked arrays have no inverse here: fill them first, with .filled(numpy.nan) for example")


# --- lazy arrays ----------------------------------------------------------------------------------------------


@invert_any.register
def _(a: da.Array, options: CallOptions, out: Any) -> Any:
    a, dtype = _whole(a), result_dtype(a.dtype)
    result = a.map_blocks(_inverse_of_block, options, dtype=dtype, meta=a._meta.astype(dtype))
    return result if out is None else fill(out, result)


@invert_any_ex.register
def _(a: da.Array, options: CallOptions) -> InverseEx:
    a, dtype = _whole(a), result_dtype(a.dtype)
    core = [a.ndim - 2, a.ndim - 1]
    # An empty array of the same kind; for a single matrix a 0-d one, which must hold a number that can be cast.
    batch_like = np.zeros_like(a._meta, shape=(0,) * (a.ndim - 2), dtype=bool)
    # Each block of `results` is one InverseEx. da.apply_gufunc would do the same, but fails with array query
    # planning (dask 2026.8).
    nothing = np.empty(batch_like.shape, object)  # CuPy has no objects
    results = a.map_blocks(_results_of_block, options, dtype=object, drop_axis=core, meta=nothing)
    n = a.chunks[-1]
    return InverseEx(
        results.map_blocks(
            getattr, "inverse", dtype=dtype, new_axis=core, chunks=(*results.chunks, n, n), meta=a._meta.astype(dtype)
        ),
        results.map_blocks(getattr, "info", dtype=np.int32, meta=batch_like.astype(np.int32)),
        results.map_blocks(getattr, "rcond", dtype=real_dtype(dtype), meta=batch_like.astype(real_dtype(dtype))),
    )


@invert_any.register(zarr.Array)
def _(a: zarr.Array[Any], options: CallOptions, out: Any) -> Any:
    return invert_any(_lazy(a), options, out)


@invert_any_ex.register(zarr.Array)
def _(a: zarr.Array[Any], options: CallOptions) -> InverseEx:
    return invert_any_ex(_lazy(a), options)


def _lazy(a: zarr.Array[Any]) -> da.Array:
    # Not da.from_zarr, which does not exist under array query planning (dask 2026.8).
    return da.from_array(a, chunks=write_unit(a))


def _whole(a: da.Array) -> da.Array:
    """Return a stack checked, and with no matrix split over chunks."""
    _refuse_masked(a._meta)
    check_shape(a.shape)
    result_dtype(a.dtype)
    wanted = whole_matrices(a.chunks, a.dtype.itemsize)
    if wanted is None:
        return a
    chunks, limit = wanted
    # In one step: intermediate ones save little here, and fail with array query planning (dask 2026.8).
    return a.rechunk(chunks, block_size_limit=limit or None, threshold=sys.maxsize)


def _results_of_block(block: Any, options: CallOptions, block_info: Any = None) -> InverseEx:
    results = invert_block(block, dtype=result_dtype(block.dtype), assume_a=options.assume_a, device=options.device)
    if options.raises:
        spans = block_info[0]["array-location"] if block_info else [(0, 0)] * block.ndim
        origin = tuple(None if math.isnan(start) else int(start) for start, _ in spans[:-2])
        raise_failed(results.info, options.assume_a, origin)
    return results


def _inverse_of_block(block: Any, options: CallOptions, block_info: Any = None) -> Any:
    return _results_of_block(block, options, block_info).inverse
