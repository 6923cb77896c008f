"""`inverse` and `inverse_ex` for arrays."""

import pickle
import subprocess
import sys
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import zarr

import dask_batchinv
from dask_batchinv import Info, InverseEx, SingularMatrixError, inverse, inverse_ex
from tests.support.stacks import DTYPES, assert_same_bits, conditioned, residual_ratio

# The two examples on the documentation page of torch.linalg.inv for batches, rounded there to four decimals.
TORCH_A = np.array(
    [
        [[-0.9808, -1.5437, 1.1773], [-0.8945, -1.2584, 1.6299], [0.8855, 0.3088, -1.4001]],
        [[0.4860, -0.8735, -1.1052], [-0.4737, -2.8350, 0.1861], [1.7559, -0.4935, 0.7353]],
    ]
)
TORCH_X = np.array(
    [
        [[-2.3209, 3.3154, 1.9079], [-0.3517, -0.6101, -1.0059], [-1.5453, 1.9621, 0.2705]],
        [[0.2723, -0.1623, 0.4503], [-0.0923, -0.3140, -0.0592], [-0.7122, 0.1768, 0.2448]],
    ]
)


def ways(a, tmp_path):
    """`inverse` of a NumPy array, by every way in."""
    lazy = da.from_array(a, chunks=(1, *a.shape[1:]))
    yield "numpy", inverse(a)
    yield "dask", inverse(lazy).compute()
    yield "numpy out", inverse(a, out=np.empty_like(a))
    yield "dask out", inverse(lazy, out=np.empty_like(a))
    out = zarr.create_array(tmp_path / "out", shape=a.shape, chunks=lazy.chunksize, dtype=a.dtype)
    assert inverse(lazy, out=out) is out
    yield "zarr out", out[...]
    yield "new store", inverse(lazy, out=tmp_path / "new")[...]
    yield "from zarr", inverse(out).compute()[:0]


def test_first_example_of_torch(tmp_path):
    # X is rounded to 5e-5, and A too, which moves X by up to ‖X‖∞² times three times 5e-5.
    tolerance = 5e-5 + 5e-5 * np.abs(TORCH_X).sum(axis=(1, 2), keepdims=True) ** 2
    for way, x in ways(TORCH_A, tmp_path):
        if len(x):
            assert (np.abs(x - TORCH_X) <= tolerance).all(), way
            assert np.abs(TORCH_A @ x - np.eye(3)).max() < 1e-14


def test_second_example_of_torch(tmp_path):
    a = conditioned(3, 2, 10).reshape(3, 2, 2) * np.ones((3, 1, 1))
    for way, x in ways(a, tmp_path):
        if len(x):
            assert np.abs(a @ x - np.eye(2)).max() < 1e-13, way


def test_numpy_dask_and_zarr_agree_in_every_bit(tmp_path):
    a = conditioned(12, 3, 1e3).reshape(3, 4, 3, 3)
    source = zarr.create_array(tmp_path / "s", shape=a.shape, chunks=(2, 3, 3, 3), dtype=a.dtype)
    source[...] = a
    expected = inverse(a)
    assert isinstance(expected, np.ndarray)
    lazy = inverse(source)
    assert isinstance(lazy, da.Array)
    assert lazy.chunks == ((2, 1), (3, 1), (3,), (3,))
    assert_same_bits(lazy.compute(), expected)
    assert_same_bits(inverse(da.from_array(a, chunks=(1, 4, 3, 3))).compute(), expected)
    assert_same_bits(inverse_ex(source).inverse.compute(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_kept(dtype):
    a = conditioned(4, 3, 10, dtype)
    for x in (inverse(a), inverse(da.from_array(a))):
        assert x.dtype == dtype
    ex = inverse_ex(da.from_array(a))
    assert ex.rcond.dtype == ex.rcond.compute().dtype == np.finfo(dtype).dtype
    assert ex.info.dtype == ex.info.compute().dtype == np.int32


@pytest.mark.parametrize(
    ("given", "result"), [("?", "f8"), ("i1", "f8"), ("u8", "f8"), ("f2", "f4"), (">f4", "f4"), (">c16", "c16")]
)
def test_dtypes_that_are_converted(given, result):
    a = np.array([[[1, 1], [0, 1]]]).astype(given)
    for x in (inverse(a), inverse(da.from_array(a)).compute()):
        assert x.dtype == np.dtype(result)
        assert x.dtype.isnative
        np.testing.assert_array_equal(x, [[[1, -1], [0, 1]]])


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", np.longdouble, [("a", "f8")]])
def test_other_dtypes_are_refused_when_the_graph_is_built(dtype):
    a = np.empty((2, 2, 2), dtype)
    for function in (inverse, inverse_ex):
        for wrap in (lambda a: a, lambda a: da.from_array(a, chunks=1)):
            with pytest.raises(TypeError, match=r"has no inverse here: expected float32"):
                function(wrap(a))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (5, 3, 2)])
def test_other_shapes_are_refused_when_the_graph_is_built(shape, no_compute):
    for function in (inverse, inverse_ex):
        for make in (np.empty, da.empty):
            with pytest.raises(np.linalg.LinAlgError, match=r"got shape \(" + ", ".join(map(str, shape))):
                function(make(shape))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 4, 4), (3, 0, 0), (0, 0), (1, 1), (5, 1, 1)])
def test_empty_and_smallest(shape):
    a = np.full(shape, 4.0)
    for x in (inverse(a), inverse(da.from_array(a)).compute()):
        assert x.shape == shape
        assert (x == 0.25).all()
    for ex in (inverse_ex(a), InverseEx(*dask.compute(*inverse_ex(da.from_array(a))))):
        assert ex.info.shape == ex.rcond.shape == shape[:-2]


def test_lists_are_taken():
    assert inverse([[2, 0], [0, 4]]).tolist() == [[0.5, 0], [0, 0.25]]


def test_nothing_is_computed_before_it_must(no_compute):
    a = da.from_array(conditioned(8, 3, 10), chunks=(2, 3, 3))
    inverse(a)
    inverse_ex(a, check_errors=True)
    inverse(a.rechunk((2, 1, 2)))


# --- errors ---------------------------------------------------------------------------------------------------


def singular_stack():
    a = conditioned(24, 3, 10).reshape(4, 6, 3, 3)
    a[1, 2] = 0
    a[3, 5, 2] = a[3, 5, 1] = [1, 2, 4]
    a[2, 0, 0, 0] = np.nan
    return a


def test_raise_names_matrices_by_their_indices_in_the_whole_stack():
    with pytest.raises(SingularMatrixError) as caught:
        inverse(singular_stack())
    error = caught.value
    assert isinstance(error, np.linalg.LinAlgError)
    assert error.indices == ((1, 2), (2, 0), (3, 5))
    assert error.info == (1, -1, 3)
    assert (error.count, error.total) == (3, 24)
    assert "3 of 24 matrices have no inverse: (1, 2): singular (pivot 1 is exactly zero); " in str(error)
    assert all(type(i) is int for index in error.indices for i in index)


def test_errors_know_the_structure():
    a = np.array([[[1.0, 2.0], [2.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]])
    with pytest.raises(SingularMatrixError) as caught:
        inverse(a, assume_a="positive definite")
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert str(error).startswith(
            "1 of 2 matrices has no inverse: (0,): not positive definite (leading minor of order 2). "
        )
    a[0] = 1
    with pytest.raises(SingularMatrixError, match=r"of this block has .*\(0,\): singular \(pivot 2 .* two equal rows"):
        inverse(da.from_array(a)).compute(scheduler="sync")


@pytest.mark.parametrize("scheduler", ["sync", "threads", "processes"])
def test_raise_from_a_block_gives_global_indices(scheduler, processes):
    a = singular_stack()
    a[2, 0] = np.eye(3)
    a[1, 2] = np.eye(3)
    lazy = inverse(da.from_array(a, chunks=(2, 4, 3, 3)))
    with pytest.raises(SingularMatrixError) as caught:
        lazy.compute(scheduler=processes.get if scheduler == "processes" else scheduler)
    assert caught.value.indices == ((3, 5),)
    assert caught.value.info == (3,)
    assert (caught.value.count, caught.value.total) == (1, 4)


def test_error_survives_pickling():
    with pytest.raises(SingularMatrixError) as caught:
        inverse(singular_stack())
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is SingularMatrixError
    assert vars(again) == vars(caught.value)
    assert str(again) == str(caught.value)


def test_many_failures_are_counted_and_the_first_ten_named():
    with pytest.raises(SingularMatrixError, match=r"50 of 50.*and 40 more") as caught:
        inverse(np.zeros((50, 2, 2)))
    assert len(caught.value.indices) == len(caught.value.info) == 10


def test_one_matrix():
    with pytest.raises(SingularMatrixError, match="1 of 1 matrix has no inverse") as caught:
        inverse(np.zeros((2, 2)))
    assert caught.value.indices == ((),)
    assert inverse_ex(np.eye(2)).info.shape == ()
    assert inverse_ex(da.eye(2, chunks=1)).info.compute() == 0


def test_nan_delivers_the_rest():
    a = singular_stack()
    for x in (inverse(a, on_error="nan"), inverse(da.from_array(a, chunks=(1, 6, 3, 3)), on_error="nan").compute()):
        failed = np.zeros((4, 6), bool)
        failed[[1, 2, 3], [2, 0, 5]] = True
        assert np.isnan(x[failed]).all()
        assert residual_ratio(a[~failed], x[~failed]).max() < 1


def test_inverse_ex_accounts_for_every_matrix():
    a = singular_stack()
    eager = inverse_ex(a)
    lazy = inverse_ex(da.from_array(a, chunks=(3, 2, 3, 3)))
    assert isinstance(lazy, InverseEx)
    assert lazy.info.chunks == lazy.rcond.chunks == ((3, 1), (2, 2, 2))
    for got, want in zip(dask.compute(*lazy), eager, strict=True):
        assert_same_bits(got, want)
    assert {tuple(int(i) for i in index): int(eager.info[tuple(index)]) for index in np.argwhere(eager.info)} == {
        (1, 2): 1,
        (2, 0): Info.NOT_FINITE,
        (3, 5): 3,
    }
    # Each of the three can be computed alone.
    assert_same_bits(lazy.rcond.compute(), eager.rcond)


def test_check_errors():
    lazy = inverse_ex(da.from_array(singular_stack(), chunks=(2, 6, 3, 3)), check_errors=True)
    for part in lazy:
        with pytest.raises(SingularMatrixError):
            part.compute()
    with pytest.raises(SingularMatrixError):
        inverse_ex(singular_stack(), check_errors=True)


def test_unknown_words_are_refused():
    for wrong in ({"assume_a": "positive"}, {"on_error": "ignore"}, {"device": "tpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
            inverse(np.eye(2), **wrong)


# --- chunks ---------------------------------------------------------------------------------------------------


def test_split_core_dimensions_are_merged_and_blocks_keep_their_size():
    a = conditioned(64, 8, 10)
    lazy = da.from_array(a, chunks=(32, 4, 2))
    x = inverse(lazy)
    assert x.chunks[1:] == ((8,), (8,))
    block = 32 * 4 * 2
    assert max(x.chunks[0]) * 64 <= block
    assert max(x.chunks[0]) * 64 >= block // 4
    assert_same_bits(x.compute(), inverse(a))


def test_unknown_batch_chunks():
    a = conditioned(20, 3, 10)
    lazy = da.from_array(a, chunks=(5, 3, 3))
    some = lazy[da.from_array(np.arange(20) % 3 > 0, chunks=5)]
    assert np.isnan(some.shape[0])
    assert_same_bits(inverse(some).compute(), inverse(a[np.arange(20) % 3 > 0]))
    assert_same_bits(inverse_ex(some).rcond.compute(), inverse_ex(a[np.arange(20) % 3 > 0]).rcond)
    split = some.rechunk({1: 1, 2: 2})
    assert_same_bits(inverse(split).compute(), inverse(a[np.arange(20) % 3 > 0]))


def test_unknown_batch_chunks_in_errors():
    a = conditioned(20, 3, 10)
    a[17] = 0
    lazy = inverse(da.from_array(a, chunks=(5, 3, 3))[da.from_array(np.arange(20) > 5, chunks=5)])
    with pytest.raises(SingularMatrixError, match=r"unknown along axis \[0\]: indices there count from") as caught:
        lazy.compute(scheduler="sync")
    assert caught.value.indices == ((2,),)


def test_from_zarr_to_zarr_is_one_task_per_chunk(tmp_path):
    source = zarr.create_array(tmp_path / "s", shape=(100, 3, 3), chunks=(10, 3, 3), dtype="f8")
    source[...] = conditioned(100, 3, 10)
    target = zarr.create_array(tmp_path / "t", shape=(100, 3, 3), chunks=(10, 3, 3), dtype="f8")
    stored = inverse(da.from_zarr(source)).to_zarr(target, compute=False)
    (optimized,) = dask.optimize(stored)
    graph = dict(optimized.__dask_graph__())
    blocks = [key for key in graph if "inverse_of_block" in str(key) or "from-zarr" in str(key)]
    # Ten blocks, the source array itself, the target array itself, and the task that awaits all.
    assert len(graph) <= 10 + 3
    assert len([key for key in blocks if isinstance(key, tuple)]) == 10
    optimized.compute()
    assert_same_bits(target[...], inverse(source[...]))


def test_with_array_query_planning_on(tmp_path):
    """Dask chooses between its two array implementations at import, so this needs a process of its own."""
    script = [sys.executable, "-m", "tests.array.query_planning", tmp_path / "out"]
    subprocess.run(script, check=True, timeout=120, cwd=Path(__file__).parents[2])


def test_device_follows_the_configuration():
    assert dask.config.get("batchinv.device") == "auto"
    with dask.config.set({"batchinv.device": "gpu"}):
        with pytest.raises(dask_batchinv.DeviceError):
            inverse(np.eye(2))
        inverse(np.eye(2), device="cpu")
    with dask.config.set({"batchinv.device": "cup"}), pytest.raises(ValueError, match=r"batchinv\.device"):
        inverse(np.eye(2))
