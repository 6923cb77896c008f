"""A plugin for pytest that lets the tests of NumPy's and SciPy's own `inv` run with ours in its place.

python -m pytest -p tests.support.in_their_place --pyargs scipy.linalg.tests.test_basic -k TestInv
"""

from typing import Any

import numpy as np
import scipy.linalg

from dask_batchinv import inverse


def as_numpys(a: Any) -> Any:
    """`numpy.linalg.inv`."""
    return inverse(a)


def as_scipys(a: Any, overwrite_a: bool = False, check_finite: bool = True, **options: Any) -> Any:
    """`scipy.linalg.inv`: to overwrite is allowed, not asked for; and what is not finite is always looked for."""
    return inverse(a, **options)


def pytest_configure(config: Any) -> None:
    np.linalg.inv = as_numpys
    scipy.linalg.inv = as_scipys
