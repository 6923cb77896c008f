"""`inverse` and `inverse_ex` for arrays."""

import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from stacks import DTYPES, assert_same_bits, conditioned, residual_ratio

import dask_batchinv
from dask_batchinv import Info, InverseEx, SingularMatrixError, inverse, inverse_ex

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
    assert "3 of 24 matrices have no inverse: (1, 2): pivot 1 is zero" in str(error)
    assert all(type(i) is int for index in error.indices for i in index)


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
    for wrong in ({"assume_a": "pos"}, {"on_error": "ignore"}, {"device": "tpu"}):
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
    script = Path(__file__).with_name("query_planning.py")
    subprocess.run([sys.executable, script, tmp_path / "out"], check=True, timeout=120)


# --- out= -----------------------------------------------------------------------------------------------------


def test_out_must_fit(tmp_path):
    a = conditioned(4, 2, 10)
    for source in (a, da.from_array(a)):
        with pytest.raises(ValueError, match=r"out has shape \(4, 3, 3\)"):
            inverse(source, out=np.empty((4, 3, 3)))
        with pytest.raises(TypeError, match="out has dtype float32, but the result has float64"):
            inverse(source, out=np.empty((4, 2, 2), np.float32))
        with pytest.raises(TypeError, match=r"out must be a NumPy array, a zarr.Array or a store location, got list"):
            inverse(source, out=[])
    small = zarr.create_array(tmp_path / "small", shape=(3, 2, 2), chunks=(1, 2, 2), dtype="f8")
    with pytest.raises(ValueError, match=r"out has shape \(3, 2, 2\)"):
        inverse(da.from_array(a), out=small)


def test_out_may_have_any_layout():
    a = conditioned(6, 2, 10)
    out = np.empty((12, 2, 2))[::2]
    assert inverse(a, out=out) is out
    assert_same_bits(out, inverse(a))


def test_failing_leaves_out_untouched():
    a = conditioned(6, 2, 10)
    a[2] = 0
    out = np.full(a.shape, 7.0)
    with pytest.raises(SingularMatrixError):
        inverse(a, out=out)
    assert (out == 7).all()
    inverse(a, out=out, on_error="nan")
    assert np.isnan(out[2]).all()


def test_overlapping_input_and_output_are_refused(tmp_path):
    a = conditioned(6, 2, 10)
    big = np.concatenate([a, a])
    with pytest.raises(ValueError, match="out overlaps the input"):
        inverse(a, out=a)
    with pytest.raises(ValueError, match="out overlaps the input"):
        inverse(big[:6], out=big[3:9])
    inverse(big[:6], out=big[6:])
    z = zarr.create_array(tmp_path / "z", shape=a.shape, chunks=(2, 2, 2), dtype=a.dtype)
    z[...] = a
    (tmp_path / "link").symlink_to(tmp_path / "z")
    for source in (z, da.from_zarr(z) + 0, da.from_zarr(str(tmp_path / "z"), inline_array=True)):
        for out in (z, zarr.open_array(tmp_path / "z"), zarr.open_array(tmp_path / "link")):
            with pytest.raises(ValueError, match="that the input is read from"):
                inverse(source, out=out)
    assert_same_bits(z[...], a)


def test_overlap_is_seen_through_dask_and_xarray(tmp_path):
    a = conditioned(12, 2, 10)
    before = a.copy()
    # from_array makes a copy; an array that comes in by delayed is the user's own.
    for source, out in ((a, a), (a[:6], a[3:9])):
        lazy = da.from_delayed(dask.delayed(source), source.shape, dtype=source.dtype)
        with pytest.raises(ValueError, match="out overlaps the input"):
            inverse(lazy * 1, out=out)
    assert_same_bits(a, before)
    xr.Dataset({"A": (("t", "r", "c"), a)}).chunk(t=5).to_zarr(tmp_path / "ds", consolidated=False)
    opened = xr.open_zarr(tmp_path / "ds", consolidated=False).A.data[::-1]
    with pytest.raises(ValueError, match="that the input is read from"):
        inverse(opened, out=zarr.open_array(tmp_path / "ds" / "A"))
    assert_same_bits(zarr.open_array(tmp_path / "ds" / "A")[...], before)


@pytest.mark.parametrize("store", ["memory", "fsspec"])
def test_an_array_in_memory_is_filled_from_worker_processes_too(store, processes):
    a = conditioned(12, 2, 10)
    place = zarr.storage.MemoryStore() if store == "memory" else zarr.storage.FsspecStore.from_url("memory://filled")
    out = zarr.create_array(place, shape=a.shape, chunks=(5, 2, 2), dtype=a.dtype)
    with dask.config.set(scheduler=processes.get):
        inverse(da.from_array(a, chunks=(2, 2, 2)), out=out)
    assert_same_bits(out[...], inverse(a))


def test_a_failed_new_store_leaves_nothing(tmp_path):
    a = conditioned(6, 2, 10)
    bad = a.copy()
    bad[5] = 0
    with pytest.raises(SingularMatrixError):
        inverse(da.from_array(bad, chunks=(2, 2, 2)), out=tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        zarr.open_array(tmp_path / "x", mode="r")
    assert_same_bits(inverse(da.from_array(a, chunks=(2, 2, 2)), out=tmp_path / "x")[...], inverse(a))


def test_tasks_that_run_on_after_a_failure_write_nothing(tmp_path):
    a = np.concatenate([np.zeros((1, 2, 2)), conditioned(7, 2, 10)])
    failed, done = threading.Event(), threading.Semaphore(0)

    def late(block, block_info=None):
        if block_info[0]["chunk-location"][0]:
            failed.wait(30)
            done.release()
        return block

    lazy = da.from_array(a, chunks=(1, 2, 2)).map_blocks(late, dtype=a.dtype, meta=a[:0])
    with ThreadPoolExecutor(8) as pool, dask.config.set(scheduler="threads", pool=pool):
        with pytest.raises(SingularMatrixError):
            inverse(lazy, out=tmp_path / "x")
        assert not (tmp_path / "x").exists()
        failed.set()
    assert done.acquire(blocking=False)  # some task did run on
    assert not (tmp_path / "x").exists()


def test_masked_arrays_are_refused():
    a = np.ma.masked_less(conditioned(4, 2, 10), 0)
    for masked in (a, da.from_array(a)):
        with pytest.raises(TypeError, match="masked arrays have no inverse here: fill them first"):
            inverse(masked)


@pytest.mark.parametrize("chunks", [(5, 3, 3), (7, 3, 3), (64, 3, 3), (1, 3, 3), (5, 1, 2)])
@pytest.mark.parametrize("shards", [None, (20, 3, 3)])
def test_misaligned_zarr_output_is_written_safely(tmp_path, chunks, shards, processes):
    a = conditioned(64, 3, 10)
    out = zarr.create_array(
        tmp_path / "out", shape=a.shape, dtype=a.dtype, shards=shards,
        chunks=(5, 3, 3) if shards else chunks, fill_value=0,
    )  # fmt: skip
    lazy = da.from_array(a, chunks=(8, 3, 3))
    with dask.config.set(scheduler=processes.get):
        inverse(lazy, out=out)
    assert_same_bits(out[...], inverse(a))


def test_new_store_at_a_location(tmp_path):
    a = conditioned(20, 3, 10)
    out = inverse(da.from_array(a, chunks=((7, 7, 6), 3, 3)), out=str(tmp_path / "new.zarr"))
    assert isinstance(out, zarr.Array)
    assert out.chunks == (7, 3, 3)
    assert_same_bits(zarr.open_array(tmp_path / "new.zarr", mode="r")[...], inverse(a))
    with pytest.raises(zarr.errors.ContainsArrayError):
        inverse(da.from_array(a), out=tmp_path / "new.zarr")
    lazy = da.from_array(a, chunks=5)
    unknown = lazy[lazy[:, 0, 0] > 0]
    with pytest.raises(ValueError, match="known shape"):
        inverse(unknown, out=tmp_path / "unknown.zarr")


def test_a_flipped_bit_in_a_new_store_is_noticed(tmp_path):
    inverse(conditioned(4, 3, 10), out=tmp_path / "x")
    chunk = next(path for path in (tmp_path / "x" / "c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[11] ^= 4
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?i)checksum"):
        zarr.open_array(tmp_path / "x", mode="r")[...]


def test_device_follows_the_configuration():
    assert dask.config.get("batchinv.device") == "auto"
    with dask.config.set({"batchinv.device": "gpu"}):
        with pytest.raises(dask_batchinv.DeviceError):
            inverse(np.eye(2))
        inverse(np.eye(2), device="cpu")
    with dask.config.set({"batchinv.device": "cup"}), pytest.raises(ValueError, match=r"batchinv\.device"):
        inverse(np.eye(2))
