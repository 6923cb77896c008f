"""`inverse` and `inverse_ex` for arrays: what goes in decides what comes out."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial, singledispatch
from typing import Any, Literal, overload

import dask.array as da
import numpy as np
import zarr
from dask.base import tokenize

from dask_batchinv import torch_tensors
from dask_batchinv._version import __version__
from dask_batchinv.attributes import refuse_packed
from dask_batchinv.buffers import BUFFERS
from dask_batchinv.chunks.plain_array import plain_array, read_directly
from dask_batchinv.containers import check_meta, open_container, open_masked, plain_block
from dask_batchinv.kernels import AnyInverseEx, InverseEx, InverseExLogdet
from dask_batchinv.kernels.device import is_gpu_array
from dask_batchinv.kernels.threads import threads_for_call
from dask_batchinv.options import CallOptions
from dask_batchinv.out import check_out, fill, is_plain, shares_memory
from dask_batchinv.outcome import Place
from dask_batchinv.placed import Standing, map_placed
from dask_batchinv.stack import (
    AssumeAWord,
    Device,
    OnError,
    Precision,
    check_shape,
    real_dtype,
    result_dtype,
    whole_matrices,
)
from dask_batchinv.storage import fill_means_missing, write_unit
from dask_batchinv.unfinished import Call


def inverse(
    a: Any,
    *,
    out: Any = None,
    assume_a: AssumeAWord = "general",
    lower: bool = False,
    on_error: OnError = "raise",
    check_errors: bool | None = None,
    min_rcond: float = 0.0,
    device: Device = "auto",
    precision: Precision = "same",
) -> Any:
    """Return the inverse of every matrix in a stack.

    Parameters
    ----------
    a : array of shape ``(*, n, n)``
        What goes in decides what comes out. A Dask array or `zarr.Array` gives a lazy Dask array; NumPy and CuPy
        arrays, torch tensors (differentiable), masked arrays, quantities of pint and astropy, JAX arrays, DataFrames
        and Xarray objects (see `Dataset.linalg.inv`) give their like; nested lists give NumPy arrays. float32, float64,
        complex64 and complex128 are kept; bool and integers become float64, float16 and bfloat16 float32. `a` is
        never modified.
    out : numpy.ndarray, torch.Tensor, zarr.Array, str or path, optional
        Where to put the result. The work then runs at once, and `out` is filled and returned; at a str or path
        a new Zarr array is created: what is there already is an error. If matrices fail and that raises, an `out` that
        is filled from a lazy array is filled in part. Of a new Zarr array what is done stays, with an attribute
        ``complete`` of 0, and the same call goes on with the rest, also after it was interrupted; it is the same if its
        input has the same name (for data in memory: the same values) and its options are equal. After
        ``on_error="raise"`` it may go on with "skipna" or "nan".
    assume_a : str
        What is known of the matrices, in SciPy's words: "general" ("gen"), "symmetric" ("sym"), "hermitian" ("her"),
        "positive definite" ("pos"), "upper triangular", "lower triangular", "diagonal". Only the part that the word
        names is read: the upper triangle for the symmetric, Hermitian and positive definite ones, whose inverses are
        exactly symmetric or Hermitian.
    lower : bool
        Of symmetric, Hermitian and positive definite matrices read the lower triangle; ignored for others.
    on_error : {"raise", "skipna", "nan"}
        What happens when matrices have no inverse: an error that names them, or NaN in their place. "skipna" gives NaN
        for matrices that have a NaN, as missing numbers do, and an error for all else.
    check_errors : bool, optional
        The same in torch's word: True for "raise", False for "nan".
    min_rcond : float
        A matrix whose ``rcond`` is smaller counts as one that has no inverse.
    device : {"auto", "cpu", "gpu"}
        Where to compute; "auto" follows the Dask configuration ``batchinv.device``, and without one takes the GPU for
        CuPy arrays and in processes that have one, else the CPU. Lazy input: in the process that computes a block.
    precision : {"same", "double"}
        The precision to compute in: that of the result, or double precision, as NumPy always does. The result has the
        same dtype either way.

    Returns
    -------
    array of shape ``(*, n, n)``

    Raises
    ------
    ValueError
        If a word is not known, `min_rcond` is no number from 0 to 1, or `out` does not fit.
    numpy.linalg.LinAlgError
        If `a` is not a stack of square matrices. Lazy input: at the call, not when it is computed.
    TypeError
        If the dtype has no inverse here, or `a` is of a kind that would lose its mask, units or labels. Likewise at the
        call; when it is computed, if a block of a Dask array is not what was declared.
    SingularMatrixError
        Unless ``on_error="nan"``, if a matrix is singular, not finite, its inverse overflows, or its ``rcond`` is below
        `min_rcond`. Lazy input: when it is computed.
    DeviceError
        If `device` cannot be used. Lazy input: when it is computed.
    FileExistsError
        If something is at the path `out` that this very call has not begun. Nothing there is touched.

    Warns
    -----
    IllConditionedWarning
        Once per call, or per block, if matrices are singular to working precision: ``rcond`` is below eps.

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
    options = CallOptions.parse(
        assume_a=assume_a, lower=lower, on_error=on_error, check_errors=check_errors, min_rcond=min_rcond,
        device=device, precision=precision,
    )  # fmt: skip
    if out is None and (found := options.invert_small(a, account=False)) is not None:
        return found
    if not torch_tensors.is_tensor(out):
        return invert_any(a, options, out)
    if torch_tensors.is_tensor(a):
        a = torch_tensors.numbers_for_out(a)
    try:
        invert_any(a, options, torch_tensors.memory_of_out(out))
    finally:
        torch_tensors.mark_changed(out)
    return out


@overload
def inverse_ex(
    a: Any,
    *,
    check_errors: bool | None = ...,
    on_error: OnError = ...,
    assume_a: AssumeAWord = ...,
    lower: bool = ...,
    min_rcond: float = ...,
    device: Device = ...,
    precision: Precision = ...,
    logdet: Literal[False] = ...,
) -> InverseEx: ...


@overload
def inverse_ex(
    a: Any,
    *,
    check_errors: bool | None = ...,
    on_error: OnError = ...,
    assume_a: AssumeAWord = ...,
    lower: bool = ...,
    min_rcond: float = ...,
    device: Device = ...,
    precision: Precision = ...,
    logdet: Literal[True],
) -> InverseExLogdet: ...


def inverse_ex(
    a: Any,
    *,
    check_errors: bool | None = None,
    on_error: OnError = "nan",
    assume_a: AssumeAWord = "general",
    lower: bool = False,
    min_rcond: float = 0.0,
    device: Device = "auto",
    precision: Precision = "same",
    logdet: bool = False,
) -> AnyInverseEx:
    """Return the inverses of a stack, and for each matrix what happened and how well conditioned it is.

    Parameters
    ----------
    a, assume_a, lower, on_error, check_errors, min_rcond, device, precision
        As in `inverse`, but errors are reported in ``info`` alone unless asked for. Of Xarray objects only DataArrays.
    logdet : bool
        Whether to return the determinants as well, which are computed by LAPACK, on the CPU. Not for quantities with
        units, nor for tensors that require a gradient.

    Returns
    -------
    InverseEx, or with `logdet` InverseExLogdet
        ``(inverse, info, rcond)``, or ``(inverse, info, rcond, sign, logdet)``, of the same kind as `a`. A matrix with
        ``info`` ≠ 0 has an all-NaN inverse. The determinant is ``sign * exp(logdet)``.

    Raises
    ------
    numpy.linalg.LinAlgError, TypeError, DeviceError
        As in `inverse`.

    Warns
    -----
    IllConditionedWarning
        As in `inverse`.

    Examples
    --------
    >>> import numpy as np
    >>> inverse_ex(np.array([[[1.0, 2.0], [2.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]])).info
    array([2, 0], dtype=int32)
    """
    options = CallOptions.parse(
        assume_a=assume_a, lower=lower, on_error=on_error, check_errors=check_errors, min_rcond=min_rcond,
        device=device, precision=precision, logdet=logdet,
    )  # fmt: skip
    found: InverseEx | None = options.invert_small(a, account=True)
    return invert_any_ex(a, options) if found is None else found


# --- arrays in memory, and what holds arrays -------------------------------------------------------------------


@singledispatch
def invert_any(a: Any, options: CallOptions, out: Any) -> Any:
    """`inverse` for one kind of input; here for those of the table of containers."""
    if type(a) is np.ndarray or is_gpu_array(a):
        return _invert_in_memory(a, options, out)
    if (found := open_container(a, options)) is None:
        return _invert_in_memory(np.asarray(a), options, out)
    container, opened = found
    if out is not None and not container.takes_out:
        raise TypeError(f"out= does not take what comes of {type(a).__name__}: leave it out, and use what is returned")
    if opened.missing is not None:
        return opened.closed(_account(opened.stack, options, opened.missing)).inverse
    result = invert_any(opened.stack, options, out)
    return result if out is not None else opened.close("inverse", result)


@singledispatch
def invert_any_ex(a: Any, options: CallOptions) -> AnyInverseEx:
    """`inverse_ex` for one kind of input; here for those of the table of containers."""
    if type(a) is np.ndarray or is_gpu_array(a):
        return _account(a, options)
    if (found := open_container(a, options)) is None:
        return _account(np.asarray(a), options)
    _, opened = found
    if opened.missing is not None:
        return opened.closed(_account(opened.stack, options, opened.missing))
    return opened.closed(invert_any_ex(opened.stack, options))


def _invert_in_memory(a: Any, options: CallOptions, out: Any) -> Any:
    _check(a)
    if out is None:
        return _account(a, options).inverse
    if is_gpu_array(a) and not is_gpu_array(out):
        raise TypeError(f"a is on the GPU, but out is {type(out).__name__}: pass a CuPy array, or cupy.asnumpy(a)")
    if is_gpu_array(out) and not is_gpu_array(a):
        raise TypeError("out is on the GPU, but a is not: pass cupy.asarray(a), or an out in main memory")
    if not is_plain(out) and not is_gpu_array(out):
        return invert_any(da.from_array(a), options, out)
    check_out(out, a)
    if shares_memory(a, out):
        raise ValueError("out overlaps the input: pass an array of its own memory")
    # An error leaves `out` as it was.
    straight = options.on_error == "nan" and out.flags.c_contiguous and (is_gpu_array(out) or out.flags.carray)
    result = _account(a, options, out=out if straight else None).inverse
    if not straight:
        out[...] = result
    return out


def _account(a: Any, options: CallOptions, missing: Any = None, out: Any = None) -> AnyInverseEx:
    _check(a)
    return options.invert(a, Place(), masked=missing, out=out, threads=threads_for_call())


def _check(a: Any) -> None:
    check_shape(a.shape)
    result_dtype(a.dtype)


# --- lazy arrays ----------------------------------------------------------------------------------------------


@invert_any.register
def _(a: da.Array, options: CallOptions, out: Any) -> Any:
    a, dtype = _whole(a), result_dtype(a.dtype)
    if out is not None and isinstance(a._meta, np.ma.MaskedArray):
        raise TypeError("out= takes no masked blocks: leave it out, or fill them first")
    invert = partial(_inverse_of_block, options=options, declared=a._meta, is_written=out is not None)
    result = map_placed(invert, read_directly(a), token="inverse_of_block", dtype=dtype, meta=a._meta.astype(dtype))
    if out is None:
        return result
    # What a stricter call has done is what a laxer one does.
    token = tokenize(__version__, a.name, dtype, replace(options, on_error="nan"))
    return fill(out, result, Call(token, options.on_error))


@invert_any_ex.register
def _(a: da.Array, options: CallOptions) -> AnyInverseEx:
    a, dtype = _whole(a), result_dtype(a.dtype)
    core = [a.ndim - 2, a.ndim - 1]
    # An empty array of the same kind; for a single matrix a 0-d one, which must hold a number that can be cast.
    batch_like = np.zeros_like(a._meta, shape=(0,) * (a.ndim - 2), dtype=bool)
    # Blocks are checked first, and by themselves: to drop axes Dask joins blocks, and that may strip what they carry.
    check = partial(_checked_block, declared=a._meta)
    checked = map_placed(check, a, token="checked_block", dtype=a.dtype, meta=a._meta)
    # Each block of `results` is one InverseEx. da.apply_gufunc would do the same, but fails with array query
    # planning (dask 2026.8).
    nothing = np.empty(batch_like.shape, object)  # CuPy has no objects
    account = partial(_results_of_block, options=options)
    results = map_placed(account, checked, token="results_of_block", dtype=object, drop_axis=core, meta=nothing)
    n = a.chunks[-1]
    inverse = results.map_blocks(
        getattr, "inverse", dtype=dtype, new_axis=core, chunks=(*results.chunks, n, n), meta=a._meta.astype(dtype)
    )
    dtypes = {"info": np.dtype(np.int32), "rcond": real_dtype(dtype)}
    if options.logdet:
        dtypes |= {"sign": dtype, "logdet": real_dtype(dtype)}
    parts = [results.map_blocks(getattr, part, dtype=own, meta=batch_like.astype(own)) for part, own in dtypes.items()]
    return InverseExLogdet(inverse, *parts) if options.logdet else InverseEx(inverse, *parts)


@invert_any.register(zarr.Array)
def _(a: zarr.Array[Any], options: CallOptions, out: Any) -> Any:
    return invert_any(_lazy(a), options, out)


@invert_any_ex.register(zarr.Array)
def _(a: zarr.Array[Any], options: CallOptions) -> AnyInverseEx:
    return invert_any_ex(_lazy(a), options)


def _lazy(a: zarr.Array[Any]) -> da.Array:
    attributes = dict(a.attrs)
    refuse_packed(
        attributes | ({"_FillValue": a.fill_value} if fill_means_missing(a, attributes) else {}),
        f"the array {a.path or a.store_path}",
        "open it with xarray.open_zarr, which decodes it, and use .linalg.inv(); or run a job, which decodes it too",
    )
    # Not da.from_zarr, which does not exist under array query planning (dask 2026.8).
    return da.from_array(plain_array(a), chunks=write_unit(a))


def _whole(a: da.Array) -> da.Array:
    """Return a stack checked, and with no matrix split over chunks."""
    check_meta(a._meta)
    _check(a)
    wanted = whole_matrices(a.chunks, a.dtype.itemsize)
    if wanted is None:
        return a
    chunks, limit = wanted
    # In one step: intermediate ones save little here, and fail with array query planning (dask 2026.8).
    return a.rechunk(chunks, block_size_limit=limit or None, threshold=sys.maxsize)


def _inverse_of_block(
    block: Any, standing: Standing | None, options: CallOptions, declared: Any, is_written: bool
) -> Any:
    block = _checked_block(block, standing, declared)
    # What is written and let go may stand in memory that is used again.
    out = BUFFERS.array(block.shape, result_dtype(block.dtype)) if is_written and type(block) is np.ndarray else None
    return _results_of_block(block, standing, options, out).inverse


def _results_of_block(block: Any, standing: Standing | None, options: CallOptions, out: Any = None) -> AnyInverseEx:
    found: InverseEx | None = options.invert_small(block, account=True) if out is None else None
    if found is not None:
        return found
    spans = standing.spans if standing else ((math.nan, math.nan),) * block.ndim
    place = Place(tuple(None if math.isnan(start) else int(start) for start, _ in spans[: block.ndim - 2]))
    if isinstance(block, np.ma.MaskedArray):
        opened = open_masked(block, options)
        return opened.closed(options.invert(opened.stack, place, masked=opened.missing))
    return options.invert(block, place, out=out)


def _checked_block(block: Any, standing: Standing | None, declared: Any) -> Any:
    """Return a block of plain numbers, or a masked one where that was declared.

    Raises
    ------
    TypeError
        If it is not what was declared.
    """
    shape = tuple(stop - start for start, stop in standing.spans) if standing else (math.nan,) * block.ndim
    try:
        if not (isinstance(declared, np.ma.MaskedArray) and isinstance(block, np.ma.MaskedArray)):
            block = plain_block(block)
        _check_declared(block, declared, shape)
    except TypeError as error:
        where = f"block {standing.number}" if standing else "a block"
        raise TypeError(f"{where}: {error}") from error
    return block


def _check_declared(block: Any, declared: Any, shape: tuple[float, ...]) -> None:
    if result_dtype(block.dtype) != result_dtype(declared.dtype):
        raise TypeError(
            f"dtype {declared.dtype} was declared, but the block has {block.dtype}: correct dtype= or meta= where the "
            "Dask array is made, or convert the blocks there"
        )
    known = len(shape) == block.ndim
    if not known or any(size != own for size, own in zip(shape, block.shape, strict=True) if not math.isnan(size)):
        raise TypeError(f"shape {shape} was declared, but the block has {block.shape}: correct chunks= there")
