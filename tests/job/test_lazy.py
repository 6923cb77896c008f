"""A source that is stored nowhere: Dask arrays and what Xarray has, computed tile by tile."""

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from distributed import Client

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.job.api import JobFailedError
from dask_batchinv.job.report.freshness import status_of
from dask_batchinv.location import Location
from dask_batchinv.outcome import SourceError, TargetError
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target

A = conditioned(60, 3, 10).reshape(6, 10, 3, 3)


@pytest.fixture(scope="module")
def workers():
    with Client(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", set_as_default=False) as client:
        yield client


def lazy(chunks=(2, 5, 3, 3)):
    return da.from_array(A, chunks=chunks)


@pytest.mark.parametrize("chunks", [(2, 5, 3, 3), (6, 10, 3, 3), ((1, 3, 2), (7, 3), 3, 3), (1, 1, 3, 2)])
def test_tiles_are_its_blocks(tmp_path, chunks):
    report = invert_store(lazy(chunks), tmp_path / "t", tile_size=72 * 10)
    assert report.complete
    assert report.source.startswith("lazy://array-")
    assert_same_bits(read_target(tmp_path / "t")[0], inverse(A))
    assert invert_store(lazy(chunks), tmp_path / "t", tile_size=72 * 10).tiles_now == 0
    assert verify_store(tmp_path / "t", source=lazy(chunks)).ok


def test_on_workers(tmp_path, workers):
    made = lazy().map_blocks(lambda block: 2 * block)
    report = invert_store(made, tmp_path / "t", client=workers, tile_size=72 * 10, token="twice")
    assert (report.complete, report.workers) == (True, 2)
    assert_same_bits(read_target(tmp_path / "t")[0], inverse(2 * A))
    assert verify_store(tmp_path / "t", source=made, client=workers).ok


def test_only_what_a_tile_needs_is_computed_and_what_is_done_is_not_again(tmp_path):
    computed, broken = [], [(1, 1)]

    def make(block, block_info=None):
        place = block_info[0]["chunk-location"][:2]
        if place in broken:
            raise OSError("a disk fails")
        computed.append(place)
        return block

    def stack():
        return lazy().map_blocks(make, dtype="f8", meta=np.empty((0,) * 4))

    options = {"tile_size": 72 * 10, "token": "mine"}
    with dask.config.set({"batchinv.job.attempts": 1}), pytest.raises(JobFailedError, match="a disk fails"):
        invert_store(stack(), tmp_path / "t", **options)
    assert len({*computed}) == 5
    computed.clear()
    broken.clear()
    report = invert_store(stack(), tmp_path / "t", **options)
    assert (report.complete, report.tiles_now, computed) == (True, 1, [(1, 1)])
    assert_same_bits(read_target(tmp_path / "t")[0], inverse(A))
    with pytest.raises(TargetError, match="source was 'lazy://mine', is 'lazy://array"):
        invert_store(lazy(), tmp_path / "t", tile_size=72 * 10)


def test_what_xarray_has(tmp_path):
    ds = xr.Dataset(
        {
            "cov": (("t", "y", "par", "par2"), A, {"units": "m2", "n": np.int64(3)}),
            "count": (("t", "y"), np.ones((6, 10))),
        },
        {
            "t": pd.date_range("2026-01-01", periods=6, freq="6h"),
            "lat": ("y", np.arange(10.0), {"units": "degrees"}),
            "par": list("abc"),
            "par2": list("bca"),
        },
        {"title": "tests"},
    )
    for place, options in {
        "in memory": (ds, {}),
        "chunked": (ds.chunk(t=2), {"variable": "cov"}),
        "DataArray": (ds.cov.chunk(t=3, y=5), {}),
        "not in order": (ds.cov.transpose("par", "t", "y", "par2").chunk(t=2), {"dims": ("par", "par2")}),
    }.values():
        target = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
        invert_store(place, target, **options)
        found = xr.open_zarr(target, consolidated=False)
        expected = ds.linalg.inv().cov.transpose(*found.inverse.dims)
        xr.testing.assert_identical(found.inverse.load().drop_attrs(), expected.rename("inverse").drop_attrs())
        assert found.inverse.attrs["units"] == "1/(m2)"
        assert found.inverse.attrs["n"] == 3
        assert found.attrs.get("title") == ("tests" if isinstance(place, xr.Dataset) else None)
        assert verify_store(target, source=place).ok
        assert invert_store(place, target, **options).tiles_now == 0


def test_netcdf(tmp_path):
    ds = xr.Dataset({"cov": (("t", "row", "col"), A.reshape(60, 3, 3).astype("f4")), "t": np.arange(60)})
    ds.to_netcdf(tmp_path / "s.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "s.nc", engine="scipy", chunks={"t": 20}) as opened:
        invert_store(opened, tmp_path / "t")
        assert invert_store(opened, tmp_path / "t").tiles_now == 0
    assert_same_bits(xr.open_zarr(tmp_path / "t", consolidated=False).inverse, inverse(ds.cov.values))


def test_masked_blocks_have_nan(tmp_path):
    mask = np.zeros(A.shape, bool)
    mask[1, 2, 0, 1] = True
    masked = da.from_array(np.ma.MaskedArray(A, mask), chunks=(2, 5, 3, 3))
    report = invert_store(masked, tmp_path / "t", max_failed=None)
    assert report.failed["not_finite"] == 1
    assert report.first_failed["not_finite"] == [(1, 2)]


def test_with_all_that_a_target_can_have(tmp_path):
    options = {"keep": "diagonal", "logdet": True, "dtype": "float32", "compress": "zstd", "chunks": {"dim_0": 3}}
    invert_store(lazy(), tmp_path / "t", **options)
    assert verify_store(tmp_path / "t", source=lazy()).ok
    status = status_of(Location.parse(tmp_path / "t"))
    assert status.account.complete
    assert status.freshness.up_to_date is None  # what is not stored cannot be looked at


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (lambda: da.ones((4, 3, 2)), {}, "square"),
        (lambda: da.ones((4, 3, 3), dtype="M8[s]"), {}, "no inverse|dtype"),
        (lambda: lazy(), {"dims": ("a", "b")}, "no names for dims"),
        (lambda: lazy(), {"mask": "m"}, "leave matrices out with .where"),
        (lambda: lazy(), {"select": {"dim_0": 1}}, "select with .sel"),
        (lambda: lazy()[lazy()[:, 0, 0, 0] > 0], {}, "unknown sizes"),
        (lambda: xr.Dataset({"a": ("x", [1.0])}), {}, "name the stack with variable"),
        (lambda: xr.Dataset({"a": ("x", [1.0])}), {"variable": "b"}, "no variable 'b'"),
        (lambda: xr.DataArray(A[:3, :3], dims=list("abcd")), {}, "Pass dims"),
        (lambda: xr.DataArray(A, dims=list("abcd"), attrs={"scale_factor": 0.1}), {}, "is packed"),
        (lambda: xr.DataTree(), {}, "pass a DataArray, a Dataset or a Dask array"),
    ],
)
def test_refused(tmp_path, make, options, why):
    with pytest.raises(SourceError, match=why):
        invert_store(make(), tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_what_is_persisted_on_a_cluster_is_refused(tmp_path, workers):
    with pytest.raises(SourceError, match="persisted on a cluster"):
        invert_store(workers.persist(lazy()), tmp_path / "t", client=workers)


def test_blocks_that_are_not_what_was_declared(tmp_path):
    wrong = lazy().map_blocks(lambda block: block + 1j, dtype="f8", meta=np.empty((0,) * 4))
    with pytest.raises(JobFailedError, match="were declared"):
        invert_store(wrong, tmp_path / "t", token="wrong")


def test_a_large_graph_is_not_sent_whole(tmp_path, workers):
    """Of an array of ten thousand blocks each task gets its own."""
    many = da.ones((10_000, 2, 2), chunks=(1, 2, 2)).map_blocks(lambda block: block + np.eye(2), dtype="f8")
    report = invert_store(many, tmp_path / "t", client=workers, token="many")
    assert report.complete
    assert report.matrices == 10_000
