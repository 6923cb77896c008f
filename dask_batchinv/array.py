"""`inverse` and `inverse_ex` for arrays: what goes in decides what comes out."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import zarr

from dask_batchinv import storage
from dask_batchinv.kernels import invert_block
from dask_batchinv.kernels.device import is_gpu_array, parse_device
from dask_batchinv.outcome import raise_failed
from dask_batchinv.place import Place, redact
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


class InverseEx(NamedTuple):
    """The inverses of a stack with an account of each matrix."""

    inverse: Any
    """Shape ``(*, n, n)``; all NaN where `info` is not 0."""
    info: Any
    """Shape ``(*,)``, int32: 0 good, k > 0 the k-th pivot is zero, -1 not finite, -2 overflow."""
    rcond: Any
    """Shape ``(*,)``, real: 1 / (‖A‖₁ ‖A⁻¹‖₁); 0 for a singular matrix, NaN for a non-finite one."""


@dataclass(frozen=True)
class Options:
    """The options of one call, checked."""

    assume_a: AssumeA
    device: Device
    raises: bool

    @classmethod
    def parse(cls, assume_a: AssumeA, device: Device, on_error: OnError) -> Options:
        """Return the options, or raise ValueError for a word that is not known."""
        return cls(
            parse_choice("assume_a", assume_a, AssumeA),
            parse_device(device),
            parse_choice("on_error", on_error, OnError) == "raise",
        )


def inverse(
    a: Any,
    *,
    out: Any = None,
    assume_a: AssumeA = "general",
    on_error: OnError = "raise",
    device: Device = "auto",
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
    return invert_any(a, Options.parse(assume_a, device, on_error), out)


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
    return invert_any_ex(a, Options.parse(assume_a, device, "raise" if check_errors else "nan"))


# --- arrays in memory -----------------------------------------------------------------------------------------


@singledispatch
def invert_any(a: Any, options: Options, out: Any) -> Any:
    """`inverse` for one kind of input; here whatever `numpy.asarray` takes."""
    a = _in_memory(a)
    if is_gpu_array(a) and out is not None and not is_gpu_array(out):
        raise TypeError(f"a is on the GPU, but out is {type(out).__name__}: pass a CuPy array, or cupy.asnumpy(a)")
    if is_gpu_array(out) and not is_gpu_array(a):
        raise TypeError("out is on the GPU, but a is not: pass cupy.asarray(a), or an out in main memory")
    if isinstance(out, np.ndarray) or is_gpu_array(out):
        _check_out(out, a)
        if storage.shares_memory(a, out):
            raise ValueError("out overlaps the input: pass an array of its own memory")
    elif out is not None:
        return invert_any(da.from_array(a), options, out)
    result, info, _ = invert_block(a, dtype=result_dtype(a.dtype), assume_a=options.assume_a, device=options.device)
    if options.raises:
        raise_failed(info)
    if out is None:
        return result
    out[...] = result
    return out


@singledispatch
def invert_any_ex(a: Any, options: Options) -> InverseEx:
    """`inverse_ex` for one kind of input; here whatever `numpy.asarray` takes."""
    a = _in_memory(a)
    result = InverseEx(*invert_block(a, dtype=result_dtype(a.dtype), assume_a=options.assume_a, device=options.device))
    if options.raises:
        raise_failed(result.info)
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
def _(a: da.Array, options: Options, out: Any) -> Any:
    a, dtype = _whole(a), result_dtype(a.dtype)
    result = a.map_blocks(_inverse_of_block, options, dtype=dtype, meta=a._meta.astype(dtype))
    return result if out is None else _fill(out, result)


@invert_any_ex.register
def _(a: da.Array, options: Options) -> InverseEx:
    a, dtype = _whole(a), result_dtype(a.dtype)
    core = [a.ndim - 2, a.ndim - 1]
    # An empty array of the same kind; for a single matrix a 0-d one, which must hold a number that can be cast.
    batch_like = np.zeros_like(a._meta, shape=(0,) * (a.ndim - 2), dtype=bool)
    # Each block of `account` is one InverseEx. da.apply_gufunc would do the same, but fails with array query
    # planning (dask 2026.8).
    nothing = np.empty(batch_like.shape, object)  # CuPy has no objects
    account = a.map_blocks(_account_of_block, options, dtype=object, drop_axis=core, meta=nothing)
    n = a.chunks[-1]
    return InverseEx(
        account.map_blocks(
            _part,
            "inverse",
            dtype=dtype,
            new_axis=core,
            chunks=(*account.chunks, n, n),
            meta=a._meta.astype(dtype),
        ),
        account.map_blocks(_part, "info", dtype=np.int32, meta=batch_like.astype(np.int32)),
        account.map_blocks(_part, "rcond", dtype=real_dtype(dtype), meta=batch_like.astype(real_dtype(dtype))),
    )


@invert_any.register(zarr.Array)
def _(a: zarr.Array[Any], options: Options, out: Any) -> Any:
    return invert_any(_lazy(a), options, out)


@invert_any_ex.register(zarr.Array)
def _(a: zarr.Array[Any], options: Options) -> InverseEx:
    return invert_any_ex(_lazy(a), options)


def _lazy(a: zarr.Array[Any]) -> da.Array:
    # Not da.from_zarr, which does not exist under array query planning (dask 2026.8).
    return da.from_array(a, chunks=storage.write_unit(a))


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


def _account_of_block(block: Any, options: Options, block_info: Any = None) -> InverseEx:
    account = InverseEx(
        *invert_block(block, dtype=result_dtype(block.dtype), assume_a=options.assume_a, device=options.device)
    )
    if options.raises:
        location = block_info[0]["array-location"] if block_info else [(0, 0)] * block.ndim
        raise_failed(account.info, tuple(None if math.isnan(start) else int(start) for start, _ in location[:-2]))
    return account


def _inverse_of_block(block: Any, options: Options, block_info: Any = None) -> Any:
    return _account_of_block(block, options, block_info).inverse


def _part(account: Any, name: str) -> Any:
    return getattr(account, name)


# --- out= -----------------------------------------------------------------------------------------------------


def _check_out(out: Any, like: Any) -> None:
    if tuple(out.shape) != tuple(like.shape):
        raise ValueError(f"out has shape {tuple(out.shape)}, but the result has {tuple(like.shape)}")
    dtype = result_dtype(like.dtype)
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}, but the result has {dtype}")


def _fill(out: Any, result: da.Array) -> Any:
    """Compute `result` into `out`."""
    if is_gpu_array(result._meta):
        raise TypeError("out takes no blocks from the GPU: append .map_blocks(cupy.asnumpy) to the input")
    if isinstance(out, np.ndarray):
        _check_out(out, result)
        storage.refuse_overlap(out, result)
        # Not da.store: on a cluster of processes it would fill copies of `out`.
        out[...] = result.compute()
        return out
    if isinstance(out, (str, os.PathLike)):
        if any(math.isnan(size) for size in result.shape):
            raise ValueError("a new Zarr array needs a known shape: call compute_chunk_sizes() on the input first")
        chunks = storage.regular_chunks(result.chunks)
        created = storage.create_array(out, result.shape, chunks, result.dtype)
        place = Place.parse(out)
        try:
            storage.refuse_overlap(created, result)
            _write(created, result, place)
        except BaseException as failure:
            # What is half filled must not be taken for a result, nor be in the way of the next try.
            try:
                storage.remove_array(place)
            except Exception as error:  # whatever a file system may raise
                failure.add_note(redact(f"{place.name} is half filled and could not be removed: {error}"))
            raise
        return created
    if not isinstance(out, zarr.Array):
        raise TypeError(f"out must be a NumPy array, a zarr.Array or a store location, got {type(out).__name__}")
    _check_out(out, result)
    storage.refuse_overlap(out, result)
    _write(out, result)
    return out


def _write(out: zarr.Array[Any], result: da.Array, place: Place | None = None) -> None:
    """Write `result` into a Zarr array, which is at `place` if a failure removes it."""
    if storage.is_in_memory(out):
        out[...] = result.compute()
        return
    result = result.rechunk(storage.safe_chunks(result.chunks, storage.write_unit(out)))
    written = result.map_blocks(
        _write_block, out, place, dtype=bool, chunks=tuple((1,) * len(sizes) for sizes in result.chunks),
        meta=np.empty((0,) * result.ndim, bool),
    )  # fmt: skip
    written.compute()


def _write_block(block: Any, out: zarr.Array[Any], place: Place | None, block_info: Any = None) -> Any:
    if block_info:
        # When one task fails, Dask lets those go on that run: they must not write where no array is any more.
        if place is not None and not storage.has_array(place):
            raise FileNotFoundError(f"the array at {place.name} was removed because another block failed")
        out[tuple(slice(*span) for span in block_info[0]["array-location"])] = block
    return np.ones((1,) * block.ndim, bool)
