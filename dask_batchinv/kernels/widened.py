"""Matrices inverted in a wider dtype than they and their inverses have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dask_batchinv.outcome import Info


def invert_in(
    dtype: np.dtype[Any], invert: Callable[[Any, Any, Any, Any], None], a: Any, out: Any, info: Any, rcond: Any
) -> None:
    """Call a kernel for matrices as another dtype, in main memory or on a GPU; what overflows on its way back fails.

    The contract is that of the kernel, in `dask_batchinv.kernels`. It takes as much memory as the block has in `dtype`,
    twice.
    """
    wide, wide_rcond = np.empty_like(a, dtype), np.empty_like(rcond, np.finfo(dtype).dtype)
    invert(a.astype(dtype), wide, info, wide_rcond)
    with np.errstate(over="ignore", under="ignore"):
        out[...], rcond[...] = wide, wide_rcond
    overflow = (info == int(Info.GOOD)) & ~np.isfinite(out).all(axis=(1, 2))
    info[overflow] = int(Info.OVERFLOW)
    out[overflow] = complex(np.nan, np.nan) if out.dtype.kind == "c" else np.nan
