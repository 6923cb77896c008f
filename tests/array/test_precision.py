"""`precision="double"`: stored in single precision, computed in double."""

import warnings

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from dask_batchinv import IllConditionedWarning, inverse, inverse_ex
from dask_batchinv.kernels.cpu import blocked, dispatch
from tests.support.stacks import STRUCTURES, assert_same_bits, conditioned


def rounded(a, **options):
    """The inverses of the matrices in double precision, rounded."""
    return inverse(a.astype(np.result_type(a, np.float64)), **options).astype(np.result_type(a, np.float32))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("n", [2, 5, 16, 40])
def test_it_is_the_double_inverse_rounded(n, dtype, structure):
    a = conditioned(300, n, 1e5, dtype, structure)
    assert_same_bits(inverse(a, assume_a=structure, precision="double"), rounded(a, assume_a=structure))
    single = inverse(a, assume_a=structure)
    assert single.dtype == a.dtype
    if structure == "general":
        assert not np.array_equal(single, rounded(a))


def test_large_matrices_and_threads(monkeypatch):
    a = conditioned(2, 520, 1e5, "float32")
    expected = rounded(a)
    double = np.dtype("float64")
    for threads in (1, 2):
        results = np.empty_like(a), np.empty(2, np.int32), np.empty(2, np.float32)
        dispatch.invert_in(double, a, *results, structure="general", threads=threads)
        assert_same_bits(results[0], expected)
    many = conditioned(5000, 6, 1e5, "float32")
    results = np.empty_like(many), np.empty(5000, np.int32), np.empty(5000, np.float32)
    dispatch.invert_in(double, many, *results, structure="general", threads=3)
    assert_same_bits(results[0], rounded(many))


@pytest.mark.parametrize(("m", "n"), [(2, 460), (1, 330)])
def test_threads_share_what_they_share_of_double_precision(monkeypatch, m, n):
    inverse(conditioned(1, 600, 10))  # compiles the kernel
    seen, run = [], blocked.BlockedKernel.run
    monkeypatch.setattr(blocked.BlockedKernel, "run", lambda *a, threads=1, **k: seen.append(threads) or run(*a, **k))
    monkeypatch.setattr(dispatch, "_load_grouped", None)  # nothing is compiled for this n
    a = conditioned(m, n, 10, "float32")
    results = np.empty_like(a), np.empty(m, np.int32), np.empty(m, np.float32)
    dispatch.invert_in(np.dtype("float64"), a, *results, structure="general", threads=3)
    assert set(seen) == {3}


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64", "int8", "complex64", "complex128"])
def test_dtypes(dtype):
    a = np.array([[[2, 1], [1, 3]], [[5, 2], [3, 4]]]).astype(dtype)
    found = inverse(a, precision="double")
    assert found.dtype == inverse(a).dtype
    assert_same_bits(found, inverse(a.astype(np.result_type(a, np.float64))).astype(found.dtype))


def test_containers_out_and_accessors():
    a = conditioned(12, 4, 1e5, "float32")
    expected = rounded(a)
    lazy = da.from_array(a, chunks=(5, 4, 4))
    assert_same_bits(inverse(lazy, precision="double").compute(), expected)
    assert_same_bits(inverse_ex(lazy, precision="double").inverse.compute(), expected)
    masked = np.ma.masked_array(a, np.broadcast_to(np.arange(12)[:, None, None] == 3, a.shape))
    assert_same_bits(inverse(masked, precision="double", on_error="nan").data[:3], expected[:3])
    out = np.empty_like(a)
    assert_same_bits(inverse(a, out=out, precision="double"), expected)
    labelled = xr.DataArray(a, dims=("x", "i", "j"), name="a")
    assert_same_bits(labelled.linalg.inv(precision="double").values, expected)
    assert_same_bits(labelled.linalg.inv_ex(precision="double")["inverse"].values, expected)
    assert_same_bits(labelled.to_dataset().linalg.inv(precision="double")["a"].values, expected)


def test_the_account_is_that_of_double_precision():
    a = np.tile(np.eye(2, dtype="float32"), (5, 1, 1))
    a[1] = [[1, 1], [1, np.nextafter(np.float32(1), np.float32(2))]]  # condition 3e7
    a[2] = 0
    a[3, 0, 0] = np.nan
    a[4] *= 1e-40  # its inverse is no float32
    with warnings.catch_warnings():
        warnings.simplefilter("error", IllConditionedWarning)
        found = inverse_ex(a, precision="double", logdet=True)
        with pytest.raises(IllConditionedWarning):
            inverse_ex(a)
    assert list(found.info) == [0, 0, 1, -1, -2]
    assert np.isnan(found.inverse[2:]).all()
    wide = inverse_ex(a.astype(float), logdet=True)
    assert_same_bits(found.rcond[:4], wide.rcond[:4].astype("float32"))
    assert_same_bits(found.logdet[:4], wide.logdet[:4].astype("float32"))
    assert found.sign.dtype == found.logdet.dtype == np.float32
    assert list(inverse_ex(a, precision="double", min_rcond=1e-6).info) == [0, -3, 1, -1, -2]


def test_the_lower_triangle_and_skipna():
    a = conditioned(3, 5, 1e5, "float32", "positive definite")
    a[1, 4, 2] = np.nan
    options = {"assume_a": "pos", "lower": True, "on_error": "skipna"}
    assert_same_bits(inverse(a, precision="double", **options), rounded(a, **options))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="precision must be one of 'same', 'double'; got 'quad'"):
        inverse(np.eye(2), precision="quad")
