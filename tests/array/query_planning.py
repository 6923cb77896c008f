"""Run by test_array.py: what must also hold with Dask's array query planning on. Argument: a store to create.

Dask chooses between its two array implementations when it is imported, hence a process of its own.
"""

import sys

import dask

dask.config.set({"array.query-planning": True})

import dask.array as da  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from dask_batchinv import SingularMatrixError, inverse, inverse_ex  # noqa: E402
from tests.support.stacks import assert_same_bits, conditioned  # noqa: E402

assert da.array_expr_enabled()
a = conditioned(20, 3, 10).reshape(4, 5, 3, 3)

for chunks in ((2, 5, 3, 3), (4, 2, 1, 2)):
    lazy = da.from_array(a, chunks=chunks)
    assert_same_bits(inverse(lazy).compute(), inverse(a))
    for got, want in zip(inverse_ex(lazy), inverse_ex(a), strict=True):
        assert_same_bits(got.compute(), want)
    filled = np.empty_like(a)
    inverse(lazy, out=filled)
    assert_same_bits(filled, inverse(a))

out = inverse(da.from_array(a, chunks=(3, 5, 3, 3)), out=sys.argv[1])
assert_same_bits(out[...], inverse(a))
assert_same_bits(inverse(out).compute(), inverse(inverse(a)))
with pytest.raises(ValueError, match="that the input is read from"):
    inverse(out, out=out)

a[3, 1] = 0
with pytest.raises(SingularMatrixError) as caught:
    inverse(da.from_array(a, chunks=(2, 5, 3, 3))).compute()
assert caught.value.indices == ((3, 1),)
