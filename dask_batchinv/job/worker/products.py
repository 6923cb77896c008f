"""What a target holds of a stack that was inverted."""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_batchinv.job.form import positions
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.results import Array
from dask_batchinv.kernels import InverseEx, log_determinants
from dask_batchinv.outcome import Info

#: By what they are, core dimensions last.
Products = dict[str, Array]


def products(results: InverseEx, stack: Array, options: JobOptions, dtype: np.dtype[Any]) -> Products:
    """Return the outputs of a job, by what they are, from the results for a stack, stored as `dtype`.

    An inverse that this has no room for, because it is too large or too small, gets ``info`` -2, and NaN.
    """
    kept = results.inverse if options.keep == "inverse" else _diagonal(results.inverse)
    info, rcond = results.info, results.rcond
    if kept.dtype != dtype:
        exact, numbers = kept, tuple(range(info.ndim, kept.ndim))
        with np.errstate(over="ignore", under="ignore"):
            kept, rcond = kept.astype(dtype), rcond.astype(np.finfo(dtype).dtype)
            lost = ~np.isfinite(kept).all(axis=numbers)
            if options.keep == "diagonal":  # each is a result of its own
                lost |= ((np.abs(kept) < np.finfo(dtype).tiny) & (exact != 0)).any(axis=numbers)
            elif kept.size:
                lost |= np.abs(kept).max(axis=numbers) < np.finfo(dtype).tiny
        lost &= info == int(Info.GOOD)
        info[lost], kept[lost] = int(Info.OVERFLOW), np.nan
    made: Products = {"info": info, "rcond": rcond}
    if options.like_source:
        made |= _like_source(kept, options)
    else:
        made[options.keep] = kept
    if options.logdet:
        sign, logdet = log_determinants(
            stack, info, dtype=results.inverse.dtype, assume_a=options.assume_a, lower=options.lower
        )
        made["sign"], made["logdet"] = sign.astype(dtype), logdet.astype(np.finfo(dtype).dtype)
    return made


def _diagonal(inverse: Array) -> Array:
    diagonal: Array = np.einsum("...ii->...i", inverse)
    return diagonal.copy()


def _like_source(inverse: Array, options: JobOptions) -> Products:
    """Return inverses in the form of the source."""
    if options.packed is not None:
        row, col = positions(options.packed, inverse.shape[-1])
        inverse = inverse[..., row, col]
    if options.complex_dim is not None:
        inverse = np.stack([inverse.real, inverse.imag], axis=-1)
    if options.imag is not None:
        return {"inverse": inverse.real.copy(), "imag": inverse.imag.copy()}
    return {"inverse": inverse}
