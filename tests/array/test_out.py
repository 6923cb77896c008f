"""`out=`: where results may be written, and what happens there when something fails."""

import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from dask_batchinv import SingularMatrixError, inverse
from tests.support.stacks import assert_same_bits, conditioned


def test_out_must_fit(tmp_path):
    a = conditioned(4, 2, 10)
    for source in (a, da.from_array(a)):
        with pytest.raises(ValueError, match=r"out has shape \(4, 3, 3\)"):
            inverse(source, out=np.empty((4, 3, 3)))
        with pytest.raises(TypeError, match="out has dtype float32, but the result has float64"):
            inverse(source, out=np.empty((4, 2, 2), np.float32))
        with pytest.raises(
            TypeError, match=r"out must be a NumPy array, a torch tensor, a zarr.Array or a store location, got list"
        ):
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


def test_one_array_under_other_names(tmp_path):
    """A chain of file systems, a folder of one, links in the place of chunks: what is read would be overwritten."""
    a = conditioned(8, 3, 10)
    zarr.create_array(tmp_path / "z", data=a, chunks=(2, 3, 3))
    (tmp_path / "linked").mkdir()
    shutil.copy(tmp_path / "z" / "zarr.json", tmp_path / "linked")
    (tmp_path / "linked" / "c").symlink_to(tmp_path / "z" / "c")
    (tmp_path / "links").mkdir()
    shutil.copy(tmp_path / "z" / "zarr.json", tmp_path / "links")
    for number in range(4):
        (tmp_path / "links" / "c" / str(number) / "0").mkdir(parents=True)
        (tmp_path / "links" / "c" / str(number) / "0" / "0").symlink_to(tmp_path / "z" / "c" / str(number) / "0" / "0")
    folder = AsyncFileSystemWrapper(DirFileSystem(path=str(tmp_path), fs=LocalFileSystem()), asynchronous=True)
    names = [
        tmp_path / "z", f"file://{tmp_path}/z", f"simplecache::file://{tmp_path}/z",
        zarr.storage.FsspecStore(folder, path="z"), tmp_path / "linked",
    ]  # fmt: skip
    for name in [*names, tmp_path / "links"]:
        for other in names:
            source, out = zarr.open_array(name, mode="r"), zarr.open_array(other, mode="r+")
            with pytest.raises(ValueError, match="that the input is read from"):
                inverse(da.from_zarr(source).rechunk((8, 3, 3)), out=out)
    assert_same_bits(zarr.open_array(tmp_path / "z")[...], a)


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
    location = zarr.storage.MemoryStore() if store == "memory" else zarr.storage.FsspecStore.from_url("memory://filled")
    out = zarr.create_array(location, shape=a.shape, chunks=(5, 2, 2), dtype=a.dtype)
    with dask.config.set(scheduler=processes.get):
        inverse(da.from_array(a, chunks=(2, 2, 2)), out=out)
    assert_same_bits(out[...], inverse(a))


@pytest.mark.parametrize("what", ["files", "group of format 2", "array of format 2", "the input"])
def test_what_is_there_is_neither_written_to_nor_removed(tmp_path, what):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    source = da.zeros((2, 2, 2), chunks=(1, 2, 2))
    if what == "group of format 2":
        zarr.create_group(place, zarr_format=2)
    elif what == "array of format 2":
        zarr.create_array(place, shape=(1,), dtype="f8", zarr_format=2)
    elif what == "the input":
        source = zarr.create_array(place / "a.zarr", shape=(2, 2, 2), chunks=(1, 2, 2), dtype="f8")
    before = sorted(place.rglob("*"))
    with pytest.raises(FileExistsError, match="exists: pass the path of a new array"):
        inverse(source, out=place)
    assert sorted(place.rglob("*")) == before


def test_out_that_cannot_be_written_as_it_is(tmp_path):
    a = conditioned(4, 2, 10)
    fixed, z = np.empty_like(a), zarr.create_array(tmp_path / "z", shape=a.shape, dtype="f8")
    fixed.flags.writeable = False
    z.attrs["scale_factor"] = 0.1
    for source in (a, da.from_array(a)):
        with pytest.raises(ValueError, match="out is read-only"):
            inverse(source, out=fixed)
        with pytest.raises(ValueError, match="elements of out share their memory"):
            inverse(source, out=np.lib.stride_tricks.as_strided(np.empty((2, 2)), a.shape, (0, 16, 8)))
        with pytest.raises(TypeError, match=r"out, the array .* is packed"):
            inverse(source, out=z)
    for layout in (np.empty((2, 2, 4)).T, np.empty((2, 4, 2)).swapaxes(0, 1), np.empty((8, 4, 2))[::-2, ::2]):
        assert_same_bits(inverse(a, out=layout), inverse(a))


def test_tasks_that_run_on_after_a_failure_write_nothing():
    a = np.concatenate([np.zeros((1, 2, 2)), conditioned(7, 2, 10)])
    failed, done = threading.Event(), threading.Semaphore(0)

    def late(block, block_info=None):
        if block_info[0]["chunk-location"][0]:
            failed.wait(30)
            done.release()
        return block

    lazy, out = da.from_array(a, chunks=(1, 2, 2)).map_blocks(late, dtype=a.dtype, meta=a[:0]), np.zeros(a.shape)
    with ThreadPoolExecutor(8) as pool, dask.config.set(scheduler="threads", pool=pool):
        with pytest.raises(SingularMatrixError):
            inverse(lazy, out=out)
        failed.set()
    assert done.acquire(blocking=False)  # some task did run on
    assert not out.any()


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
    assert dict(out.attrs) == dict(zarr.open_array(tmp_path / "new.zarr", mode="r").attrs) == {}
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


def peak_of(call):
    """Return how many bytes a call allocates at its peak, beyond what is there already."""

    def once():
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    call()  # what is compiled and cached is not of the call
    return min(once() for _ in range(3))  # other threads' allocations, such as a cluster's, are counted too


@pytest.mark.parametrize("on_error", ["raise", "nan"])
@pytest.mark.parametrize("kind", ["array", "memmap"])
def test_lazy_input_is_written_block_by_block(tmp_path, kind, on_error):
    block = 2**20
    lazy = da.ones((16, 2048, 8, 8), chunks=(1, -1, -1, -1)) * 0.1 + da.eye(8, chunks=8)
    assert lazy.nbytes == 16 * block
    out = np.empty(lazy.shape) if kind == "array" else np.memmap(tmp_path / "x", "f8", "w+", shape=lazy.shape)
    with dask.config.set(scheduler="sync"):
        assert peak_of(lambda: inverse(lazy, out=out, on_error=on_error)) < 5 * block
        assert peak_of(lambda: inverse(lazy, on_error=on_error).compute()) > 16 * block
        assert_same_bits(np.asarray(out), inverse(lazy).compute())


def test_in_memory_it_is_written_straight_in_where_nothing_raises():
    a = conditioned(4096, 8, 10)
    out = np.empty_like(a)
    without = peak_of(lambda: inverse(a))
    assert without > a.nbytes
    assert peak_of(lambda: inverse(a, out=out, on_error="nan")) < a.nbytes / 4
    assert peak_of(lambda: inverse(a, out=out)) <= 1.1 * without
    for other in (np.empty((4096, 8, 16))[..., ::2], np.empty(a.shape, ">f8").view("f8").byteswap()):
        assert_same_bits(inverse(a, out=other, on_error="nan"), out)


@pytest.mark.parametrize("scheduler", ["threads", "sync", "processes", "cluster", "cluster by configuration"])
def test_every_scheduler_fills_an_array_of_this_process(scheduler, processes):
    a = conditioned(12, 3, 10).reshape(3, 4, 3, 3)
    lazy, out = da.from_array(a, chunks=(2, 3, 3, 3)), np.empty_like(a)
    setting = {"cluster": processes, "cluster by configuration": processes.get}.get(scheduler, scheduler)
    with dask.config.set(scheduler=setting):
        assert inverse(lazy, out=out) is out
    assert_same_bits(out, inverse(a))


def test_a_cluster_sends_no_more_than_it_must(processes):
    lazy = da.from_array(np.stack([np.eye(2)] * 3 + [np.zeros((2, 2))]), chunks=(1, 2, 2))
    out = np.zeros((4, 2, 2))
    with dask.config.set(scheduler=processes), pytest.raises(SingularMatrixError) as caught:
        inverse(lazy, out=out)
    assert caught.value.indices == ((3,),)
