"""Chunking, scheduler and the order of the batch never change a bit."""

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_batchinv import inverse, inverse_ex
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned


@st.composite
def stacks(draw):
    """Stacks of every dtype and structure, some matrices spoilt."""
    batch = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    n = draw(st.integers(1, 6))
    dtype, structure = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(STRUCTURES))
    m = int(np.prod(batch, dtype=int))
    a = conditioned(m, n, draw(st.sampled_from([1, 1e3, 1e6])), dtype, structure, seed=draw(st.integers(0, 99)))
    for spoil in draw(st.lists(st.sampled_from([0, np.nan, np.inf, 1e-44]), max_size=m)):
        i = draw(st.integers(0, m - 1))
        if np.isfinite(spoil):
            a[i] = conditioned(1, n, 1, dtype, structure)[0] * a.dtype.type(spoil)
        else:
            a[i, 0, 0] = spoil
    return a.reshape(*batch, n, n), structure


@st.composite
def chunks_of(draw, shape):
    """Any chunks of a shape."""

    def cut(size):
        bounds = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else []
        return tuple(np.diff([0, *bounds, size]).tolist())

    return tuple(cut(size) for size in shape)


@given(st.data())
def test_chunks_do_not_show(data):
    a, structure = data.draw(stacks())
    want = inverse_ex(a, assume_a=structure)
    lazy = da.from_array(a, chunks=data.draw(chunks_of(a.shape)))
    for got, part in zip(dask.compute(*inverse_ex(lazy, assume_a=structure), scheduler="sync"), want, strict=True):
        assert_same_bits(got, part)
    assert_same_bits(inverse(lazy, assume_a=structure, on_error="nan").compute(scheduler="sync"), want.inverse)


@given(st.data())
def test_the_order_of_the_batch_does_not_show(data):
    a, structure = data.draw(stacks())
    a = a.reshape(-1, *a.shape[-2:])
    order = data.draw(st.permutations(range(len(a))))
    want = inverse_ex(a, assume_a=structure)
    for got, part in zip(inverse_ex(a[order], assume_a=structure), want, strict=True):
        assert_same_bits(got, part[order])


@given(st.data())
def test_every_matrix_is_accounted_for(data):
    a, structure = data.draw(stacks())
    before = a.copy()
    x, info, rcond = inverse_ex(a, assume_a=structure)
    assert np.isnan(x[info != 0]).all()
    assert np.isfinite(x[info == 0]).all()
    assert np.isnan(rcond[info == -1]).all()
    assert (rcond[info > 0] == 0).all()
    assert (rcond[info == 0] >= 0).all()
    assert (rcond[info == 0] <= 1 + 1e-5).all()
    assert_same_bits(a, before)


@pytest.mark.parametrize("scheduler", ["sync", "threads", "processes"])
@pytest.mark.parametrize("n", [3, 40])
def test_the_scheduler_does_not_show(scheduler, n, processes):
    a = conditioned(60, n, 1e5)
    a[[3, 50]] = 0
    lazy = inverse(da.from_array(a, chunks=(7, n, n)), on_error="nan")
    got = lazy.compute(scheduler=processes.get if scheduler == "processes" else scheduler)
    assert_same_bits(got, inverse(a, on_error="nan"))
