"""Sources with matrices of every kind, and what lies in a target."""

import numpy as np
import zarr

from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger
from tests.support.stacks import conditioned


def recorded(path):
    """Return the numbers of the tiles that are recorded in the ledger of a target."""
    return np.flatnonzero(Ledger(*existing(path)).done)


def read_target(path):
    """Return the three arrays of a target."""
    group = zarr.open_group(path, mode="r")
    return tuple(np.asarray(group[name][...]) for name in ("inverse", "info", "rcond"))


def tree(path):
    """Every file with its content."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def spoilt(m=60, n=3):
    """A stack with some matrices of each kind of failure, and what info must say."""
    a = conditioned(m, n, 100)
    info = np.zeros(m, np.int32)
    for i, (value, code) in {5: (0, 1), 11: (0, 1), 20: (np.nan, -1), 33: (np.inf, -1), 41: (1e-320, -2)}.items():
        a[i] = value if not np.isfinite(value) else value * np.eye(n)
        info[i] = code
    return a, info
