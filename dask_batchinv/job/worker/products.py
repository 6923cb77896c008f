"""What a target holds of a stack that was inverted."""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.results import Array
from dask_batchinv.kernels import InverseEx, log_determinants
from dask_batchinv.outcome import Info

#: By what they are, core dimensions last.
Products = dict[str, Array]


def products(results: InverseEx, stack: Array, options: JobOptions, dtype: np.dtype[Any]) -> Products:
    """Return the outputs of a job, by what they are, from the results for a stack, stored as `dtype`.

    An inverse that this has no room for overflows: its matrix gets ``info`` -2, and NaN.
    """
    kept = results.inverse if options.keep == "inverse" else _diagonal(results.inverse)
    made: Products = {"info": results.info, "rcond": results.rcond, options.keep: kept}
    if kept.dtype != dtype:
        with np.errstate(over="ignore"):
            made[options.keep], made["rcond"] = kept.astype(dtype), made["rcond"].astype(np.finfo(dtype).dtype)
        batch = tuple(range(results.info.ndim, kept.ndim))
        lost = (made["info"] == int(Info.GOOD)) & ~np.isfinite(made[options.keep]).all(axis=batch)
        made["info"][lost], made[options.keep][lost] = int(Info.OVERFLOW), np.nan
    if options.logdet:
        sign, logdet = log_determinants(
            stack, made["info"], dtype=results.inverse.dtype, assume_a=options.assume_a, lower=options.lower
        )
        made["sign"], made["logdet"] = sign.astype(dtype), logdet.astype(np.finfo(dtype).dtype)
    return made


def _diagonal(inverse: Array) -> Array:
    diagonal: Array = np.einsum("...ii->...i", inverse)
    return diagonal.copy()
