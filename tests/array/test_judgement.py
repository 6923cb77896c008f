"""What counts as an inverse: `on_error`, `min_rcond`, and warnings where a matrix is singular but for rounding."""

import warnings

import dask
import dask.array as da
import numpy as np
import pytest
import scipy.linalg
import xarray as xr

from dask_batchinv import IllConditionedWarning, Info, RefusedError, SingularMatrixError, inverse, inverse_ex
from dask_batchinv.job.options import JobOptions
from tests.support.stacks import DTYPES, assert_same_bits, conditioned

NEARLY_SINGULAR = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])


def functions(a):
    """Every way to the inverses of a stack, with the same options."""
    yield lambda **options: inverse(a, **options)
    yield lambda **options: inverse(da.from_array(a, chunks=(2, *a.shape[1:])), **options).compute(scheduler="sync")
    yield lambda **options: inverse_ex(a, **options).inverse
    yield lambda **options: xr.DataArray(a, dims=("t", "i", "j")).linalg.inv(("i", "j"), **options).values
    yield lambda **options: xr.Dataset({"a": (("t", "i", "j"), a)}).linalg.inv(("i", "j"), **options)["a"].values
    yield lambda **options: xr.DataArray(a, dims=("t", "i", "j")).linalg.inv_ex(("i", "j"), **options)["inverse"].values


# --- singular but for rounding --------------------------------------------------------------------------------


def test_a_matrix_that_is_singular_but_for_rounding_is_warned_of():
    with pytest.warns(
        IllConditionedWarning, match=r"1 matrix of 1 is singular to working precision.*\(\): rcond 2"
    ) as seen:
        inverse(NEARLY_SINGULAR)
    assert seen[0].filename == __file__
    assert issubclass(IllConditionedWarning, scipy.linalg.LinAlgWarning)
    with pytest.warns(IllConditionedWarning):
        assert inverse_ex(NEARLY_SINGULAR).info == 0


def test_once_per_call_or_block_with_count_and_indices_in_the_whole_stack():
    a = conditioned(24, 3, 10)
    a[[3, 17, 18, 19]] = NEARLY_SINGULAR
    for call in functions(a):
        with pytest.warns(IllConditionedWarning) as seen:
            call()
        text = " ".join(str(one.message) for one in seen)
        assert all(f"({i},): rcond " in text for i in (3, 17, 18, 19))
    with pytest.warns(IllConditionedWarning) as seen:
        inverse(da.from_array(a, chunks=(12, 3, 3))).compute(scheduler="sync")
    assert sorted(str(one.message).split(":")[0] for one in seen) == [
        "1 matrix of 12 of this block is singular to working precision, and the inverse may have no right digit",
        "3 matrices of 12 of this block are singular to working precision, and the inverse may have no right digit",
    ]
    with pytest.warns(IllConditionedWarning, match=r"50 matrices of 50 .*and 40 more"):
        inverse(np.broadcast_to(NEARLY_SINGULAR, (50, 3, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_is_eps_of_the_dtype(dtype):
    eps = float(np.finfo(dtype).eps)
    good = np.diag([1, 2 * eps]).astype(dtype)
    inverse(good)  # a warning is an error here
    poor = np.diag([1, eps / 2]).astype(dtype)
    with pytest.warns(IllConditionedWarning):
        inverse(poor)
    # What has failed is not warned of as well.
    inverse(np.zeros((2, 2), dtype), on_error="nan")


def test_min_rcond_counts_as_failed_everywhere():
    a = conditioned(6, 3, 10)
    a[4] = NEARLY_SINGULAR
    for call in functions(a):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = call(min_rcond=1e-15, on_error="nan")
        assert np.isnan(x[4]).all()
        assert np.isfinite(x[[0, 1, 2, 3, 5]]).all()
        with pytest.raises(SingularMatrixError, match=r"\(4,\): rcond is below min_rcond") as caught:
            call(min_rcond=1e-15, on_error="raise")
        assert caught.value.info == (Info.BELOW_MIN_RCOND,)
        with pytest.raises(ValueError, match="`min_rcond=` must be between 0 and 1"):
            call(min_rcond=2)
    assert inverse_ex(a, min_rcond=1e-15).info.tolist() == [0, 0, 0, 0, -3, 0]
    assert 0 < inverse_ex(a, min_rcond=1e-15).rcond[4] < 1e-15


# --- what is missing ------------------------------------------------------------------------------------------


def test_skipna_lets_missing_numbers_pass_and_raises_for_the_rest():
    a = conditioned(6, 3, 10)
    a[1, 2, 0] = np.nan
    for call in functions(a):
        x = call(on_error="skipna")
        assert np.isnan(x[1]).all()
        assert np.isfinite(np.delete(x, 1, axis=0)).all()
        with pytest.raises(SingularMatrixError, match=r'on_error="skipna" lets matrices with NaN pass'):
            call(on_error="raise")
    for wrong in (np.zeros((3, 3)), np.diag([np.inf, 1, 1])):
        a[4] = wrong
        for call in functions(a):
            with pytest.raises(SingularMatrixError) as caught:
                call(on_error="skipna")
            assert caught.value.indices == ((4,),)
            assert caught.value.count == 1


def test_skipna_looks_at_what_is_read():
    a = np.array([[[np.inf, 0.0], [np.nan, 1.0]], [[1.0, 0.0], [np.nan, 1.0]]])
    with pytest.raises(SingularMatrixError) as caught:  # the NaN is not read, and excuses nothing
        inverse(a, assume_a="upper triangular", on_error="skipna")
    assert caught.value.indices == ((0,),)
    assert np.isnan(inverse(a, on_error="skipna")).all()
    assert np.isnan(inverse(np.full((2, 2), np.nan), on_error="skipna")).all()


def test_check_errors_is_the_same_in_torchs_word():
    a = np.zeros((1, 2, 2))
    for function in (inverse, inverse_ex):
        with pytest.raises(SingularMatrixError):
            function(a, check_errors=True, on_error="nan")
        function(a, check_errors=False, on_error="raise")


# --- structures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("word", "short"), [("symmetric", "sym"), ("hermitian", "her"), ("positive definite", "pos")])
def test_lower_reads_the_lower_triangle(word, short, dtype):
    a = conditioned(40, 5, 10, dtype, word)
    want = inverse(a, assume_a=word)
    nan = np.full((5, 5), np.nan, dtype)
    upper, lower = np.triu(nan, 1), np.tril(nan, -1)
    for assume_a in (word, short):
        for call in functions(a + upper):
            x = call(assume_a=assume_a, lower=True)
            np.testing.assert_allclose(x, want, rtol=0, atol=1e3 * np.finfo(dtype).eps)
            np.testing.assert_array_equal(x, x.mT if word == "symmetric" else x.conj().mT)
        assert_same_bits(inverse(a + lower, assume_a=assume_a), want)
    out = np.empty_like(a)
    assert_same_bits(inverse(a + upper, assume_a=word, lower=True, out=out, on_error="nan"), x)


def test_lower_is_ignored_where_both_triangles_are_read_and_words_may_be_short():
    a = conditioned(4, 3, 10)
    for word in ("general", "gen", "upper triangular", "lower triangular", "diagonal"):
        assert_same_bits(inverse(a, assume_a=word, lower=True), inverse(a, assume_a=word))
    with dask.config.set(scheduler="sync"), pytest.raises(ValueError, match="assume_a must be one of 'general'"):
        inverse(a, assume_a="positive")


@pytest.mark.parametrize("lower", ["no", "False", "L"])
def test_a_text_says_nothing_of_which_triangle_is_read(lower):
    with pytest.raises(ValueError, match="lower must be True or False"):
        inverse(np.eye(2), assume_a="sym", lower=lower)
    with pytest.raises(RefusedError, match="lower must be True or False"):
        JobOptions(assume_a="sym", lower=lower)
