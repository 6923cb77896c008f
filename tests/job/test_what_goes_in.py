"""Jobs give what the accessor gives: packed numbers, labels, coordinates, attributes. Targets can be written on."""

import tracemalloc

import dask
import numpy as np
import pytest
import xarray as xr
import zarr

from dask_batchinv import SourceError, TargetError, inverse, invert_store, verify_store
from dask_batchinv.job.plan.plan import IDLE_WORKER_NBYTES, Limits, StackLayout, project_memory
from dask_batchinv.job.source.decoding import decode
from dask_batchinv.job.source.source import open_source
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.web import silent_server

pytestmark = [
    pytest.mark.filterwarnings("ignore:The data type:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata:UserWarning"),
    pytest.mark.filterwarnings("ignore:Duplicate dimension names:UserWarning"),
]


@pytest.fixture
def as_accessor(tmp_path, client):
    """Run a job on a Dataset, see that it gives what the accessor does, and return what it gives."""

    def check(ds, zarr_format=3, variable="cov", dims=None, **encoding):
        source, target = tmp_path / "source", tmp_path / "target"
        ds.to_zarr(source, zarr_format=zarr_format, encoding={variable: encoding}, consolidated=False)
        with dask.config.set(scheduler="sync"):
            stored = xr.open_zarr(source, consolidated=False).load()
            want = stored.linalg.inv(dims, variables=variable, on_error="nan")[variable]
            invert_store(source, target, variable=variable, dims=dims, client=client, max_failed=None, tile_size=200)
            got = xr.open_zarr(target).load()
        assert_same_bits(got["inverse"].values, want.values)
        assert got["inverse"].dims == want.dims
        xr.testing.assert_equal(got["inverse"].coords.to_dataset(), want.coords.to_dataset())
        assert got["inverse"].attrs == {"long_name": "matrix inverse"} | want.attrs
        report = verify_store(target, source=source, client=client)
        assert report.ok, report
        assert report.residuals == int((got["info"] == 0).sum())
        again = invert_store(
            source, target, variable=variable, dims=dims, client=client, max_failed=None, tile_size=200
        )
        assert again.tiles_now == 0
        return got

    return check


@pytest.fixture
def ds():
    a = conditioned(12, 3, 10)
    a[5, 1, 2] = np.nan
    return xr.Dataset(
        {"cov": (("t", "i", "j"), a, {"units": "m2", "long_name": "covariance", "valid_range": [0.0, 1.0]})},
        coords={"t": np.arange(12.0), "i": list("abc"), "j": list("abc")},
    )


# --- packed numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "packing",
    [
        {"dtype": "i2", "scale_factor": 0.001, "_FillValue": -32768},
        {"dtype": "u1", "scale_factor": 0.02, "add_offset": -2.0, "_FillValue": 255},
        {"dtype": "i1", "scale_factor": 0.02, "add_offset": -2.0, "_FillValue": -1, "_Unsigned": "true"},
        {"dtype": ">f4", "_FillValue": -9999.0, "missing_value": -9999.0},
        {"add_offset": 1.0},
        {"_FillValue": np.nan},
    ],
    ids=str,
)
def test_packed_numbers_are_decoded_as_xarray_decodes_them(as_accessor, ds, packing, zarr_format):
    got = as_accessor(ds, zarr_format, **packing)
    assert np.flatnonzero(got["info"]).tolist() == [5]


@pytest.mark.parametrize("scale", [1, 2, 0.5])
def test_scales_of_floating_numbers(as_accessor, ds, tmp_path, scale):
    ds["cov"].encoding = {"scale_factor": scale}
    as_accessor(ds.astype("f4"), scale_factor=scale, _FillValue=np.nan)
    if type(scale) is int:  # Xarray makes integers of them
        del zarr.open_array(tmp_path / "source" / "cov").attrs["_FillValue"]
        with pytest.raises(SourceError, match="which loses digits"):
            open_source(tmp_path / "source")


@pytest.mark.parametrize("wrong", ["0.1", [0.1, 0.2]])
def test_scales_that_make_no_sense(tmp_path, wrong):
    zarr.create_array(tmp_path / "s", shape=(1, 2, 2), dtype="i2", attributes={"scale_factor": wrong})
    with pytest.raises(SourceError, match=r"cannot be decoded|loses digits"):
        open_source(tmp_path / "s")


def test_unsigned_bytes_in_a_bare_array(tmp_path, client):
    counts = np.array([[[200, 1], [1, 201]]], "u1")
    z = zarr.create_array(tmp_path / "s", shape=counts.shape, dtype="i1", attributes={"_Unsigned": "true"})
    z[...] = counts.view("i1")
    invert_store(tmp_path / "s", tmp_path / "t", client=client)
    assert_same_bits(zarr.open_group(tmp_path / "t")["inverse"][...], inverse(counts))


def test_a_fill_value_of_0_in_format_2_is_what_xarray_takes_it_for(tmp_path, client):
    a = np.stack([np.diag([4.0, 3.0]), np.full((2, 2), 1.0) + np.eye(2)])
    group = zarr.create_group(tmp_path / "s", zarr_format=2)
    group.create_array(
        "cov", shape=a.shape, dtype="f8", fill_value=0, attributes={"_ARRAY_DIMENSIONS": ["t", "i", "j"]}
    )
    group["cov"][...] = a
    invert_store(tmp_path / "s", tmp_path / "t", client=client, max_failed=None, dims=("i", "j"))
    with dask.config.set(scheduler="sync"):
        want = xr.open_zarr(tmp_path / "s", consolidated=False)["cov"].linalg.inv(("i", "j"), on_error="nan").values
        assert_same_bits(xr.open_zarr(tmp_path / "t")["inverse"].values, want)
    assert np.isnan(want[0]).all()
    # Without names of dimensions Xarray cannot read it, and 0 is a number.
    bare = zarr.create_array(tmp_path / "bare", shape=a.shape, dtype="f8", fill_value=0, zarr_format=2)
    bare[...] = a
    assert invert_store(tmp_path / "bare", tmp_path / "u", client=client).failed["not_finite"] == 0


PACKED = {"dtype": "i2", "scale_factor": 0.001, "_FillValue": -32768, "chunks": (4, 3, 3)}


def test_a_missing_chunk_of_packed_numbers_is_missing(tmp_path, ds, client):
    ds.to_zarr(tmp_path / "s", encoding={"cov": PACKED | {"fill_value": -32768}}, consolidated=False)
    (tmp_path / "s" / "cov" / "c" / "2" / "0" / "0").unlink()
    report = invert_store(tmp_path / "s", tmp_path / "t", client=client, missing="fill", max_failed=None)
    assert report.failed["not_finite"] == 1 + 4


@pytest.mark.parametrize(
    ("dtype", "packing"),
    [
        ("i2", {"scale_factor": 0.5, "add_offset": 1.0, "_FillValue": -1}),
        ("i1", {"scale_factor": 0.5, "_FillValue": -1, "_Unsigned": "true"}),
        ("f4", {"_FillValue": -9.0, "missing_value": -9.0}),
        ("c16", {"_FillValue": -9.0}),
    ],
)
def test_decoding_takes_the_memory_that_is_planned(dtype, packing):
    a = np.random.default_rng(0).integers(-9, 100, (1000, 10, 10)).astype(dtype)
    decoded = decode(a[:1], packing)
    tracemalloc.start()
    try:
        decode(a, packing)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    layout = StackLayout(
        a.shape, (1, 2), a.shape, a.itemsize, 8, 12, 12, needs_copy=False, itemsize_decoded=decoded.itemsize
    )
    limits = Limits(memory=None, threads=1, scratch=0, read_concurrency=None)
    assert a.nbytes + peak <= project_memory(layout, limits, a.shape) - IDLE_WORKER_NBYTES


def test_other_packing_is_another_source(tmp_path, ds):
    ds.to_zarr(tmp_path / "s", zarr_format=2, encoding={"cov": PACKED}, consolidated=False)
    before = open_source(tmp_path / "s")
    zarr.open_array(tmp_path / "s" / "cov").attrs["scale_factor"] = 0.002
    assert open_source(tmp_path / "s").facts["packing"] != before.facts["packing"]
    with pytest.raises(SourceError, match="have changed since the job began"):
        before.open()


def test_a_fill_value_that_makes_no_sense(tmp_path):
    zarr.create_array(tmp_path / "s", shape=(1, 2, 2), dtype="f8", attributes={"_FillValue": "?"})
    with pytest.raises(SourceError, match=r"the attribute _FillValue of .* is not one of float64"):
        open_source(tmp_path / "s")


# --- labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("t", "obs", "par"), ("obs", "t", "par"), ("par", "obs", "t")])
def test_different_labels_change_places_with_their_names(as_accessor, order):
    J = xr.Dataset(
        {"cov": (("t", "obs", "par"), conditioned(6, 2, 10))},
        coords={"obs": ["flux", "color"], "par": ["mass", "radius"], "weight": ("obs", [1.0, 2.0])},
    ).transpose(*order)
    got = as_accessor(J, dims=("obs", "par"))
    assert [got["inverse"].dims.index(dim) for dim in ("obs", "par")] == [order.index(dim) for dim in ("par", "obs")]
    product = xr.dot(got["inverse"], J["cov"].rename(par="par_2"), dim="obs").transpose("t", "par", "par_2")
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(2), (6, 2, 2)), atol=1e-12)


def test_the_same_labels_in_another_order_change_places(as_accessor, ds):
    turned = ds.sel(j=list("cab")).assign_coords(name=("i", ["x", "y", "z"]))
    got = as_accessor(turned)
    assert list(got["i"].values) == list("cab")
    assert list(got["j"].values) == list("abc")
    assert got["name"].dims == ("j",)


def test_other_labels_are_another_job(tmp_path, ds, client):
    ds.to_zarr(tmp_path / "s", consolidated=False)
    invert_store(tmp_path / "s", tmp_path / "t", client=client, max_failed=None)
    zarr.open_array(tmp_path / "s" / "i")[...] = np.array(list("cba"))
    with pytest.raises(
        TargetError, match="belongs to another job: exchanged was 'nothing', is 'labels'; the labels of its rows"
    ):
        invert_store(tmp_path / "s", tmp_path / "t", client=client)


def test_one_side_without_labels(as_accessor, ds):
    assert as_accessor(ds.drop_vars("j"), dims=("i", "j"))["inverse"].dims == ("t", "j", "i")


@pytest.mark.parametrize("dims", [None, ("p", "p"), ("p", "p_2")])
def test_a_name_given_twice(tmp_path, client, dims):
    a = conditioned(4, 3, 10)
    z = zarr.create_array(tmp_path / "s", shape=a.shape, dtype="f8", dimension_names=["t", "p", "p"])
    z[...] = a
    invert_store(tmp_path / "s", tmp_path / "t", client=client, dims=dims)
    assert zarr.open_group(tmp_path / "t")["inverse"].metadata.dimension_names == ("t", "p", "p_2")


def test_an_array_beside_it_that_has_a_made_up_name_is_no_coordinate(tmp_path, client):
    a = conditioned(4, 3, 10)
    group = zarr.create_group(tmp_path / "s")
    for name, names in {"cov": None, "twice": ["t", "p", "p"]}.items():
        group.create_array(name, shape=a.shape, dtype="f8", dimension_names=names)[...] = a
    for name in ("row", "col", "dim_0", "p_2"):
        group.create_array(name, shape=(7,), dtype="f8")
    for name, dims in {"cov": ("dim_0_2", "row_2", "col_2"), "twice": ("t", "p", "p_2_2")}.items():
        assert open_source(tmp_path / "s", name).dims == dims
        invert_store(tmp_path / "s", tmp_path / name, variable=name, client=client)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2, 5, 5), r"but others too could be .* Pass `dims=\('a', 'b'\)` or `dims=\('c', 'd'\)`"),
        ((3, 3, 3), r"Pass `dims=\('a', 'b'\)` or `dims=\('a', 'c'\)` or `dims=\('b', 'c'\)`"),
        ((3, 3, 4), r"do not look like rows and columns.* Pass `dims=\('a', 'b'\)`"),
    ],
)
def test_core_dimensions_are_not_guessed_where_others_could_be_meant(tmp_path, shape, message):
    names = list("abcd"[: len(shape)])
    zarr.create_array(tmp_path / "s", shape=shape, dtype="f8", dimension_names=names)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "s")
    open_source(tmp_path / "s", dims=("a", "b"))
    zarr.create_array(tmp_path / "bare", shape=(3, 3, 3), dtype="f8")
    assert open_source(tmp_path / "bare").core == (1, 2)  # NumPy's rule, where nothing has a name


def test_labels_decide_which_dimensions_are_meant(tmp_path):
    ds = xr.Dataset({"cov": (("t", "i", "j"), conditioned(3, 3, 10))})
    ds.to_zarr(tmp_path / "s", consolidated=False)
    with pytest.raises(SourceError, match="others too could be"):
        open_source(tmp_path / "s")
    ds.assign_coords(t=[1, 2, 3]).to_zarr(tmp_path / "s", mode="w", consolidated=False)
    assert open_source(tmp_path / "s").core == (1, 2)


def test_a_mask_beside_the_matrices_is_not_taken_for_them(tmp_path, ds):
    ds = ds.assign(valid=xr.ones_like(ds.cov, bool), count=xr.ones_like(ds.cov, int))
    ds.to_zarr(tmp_path / "s", consolidated=False)
    assert open_source(tmp_path / "s").variable == "cov"
    ds.assign(other=ds.cov).to_zarr(tmp_path / "s", mode="w", consolidated=False)
    with pytest.raises(SourceError, match="name the stack with `variable=`"):
        open_source(tmp_path / "s")


# --- coordinates and attributes -------------------------------------------------------------------------------


def test_units_grid_mapping_and_what_it_names_are_kept(as_accessor, ds):
    ds = ds.assign_coords(spatial_ref=((), 0, {"crs_wkt": "GEOGCS[...]"}), lat=("t", np.arange(12.0)))
    ds["cov"].attrs |= {"grid_mapping": "spatial_ref", "project": "p"}
    got = as_accessor(ds.assign_attrs(title="t", complete=7))
    assert got.attrs["title"] == "t"
    assert got.attrs["complete"] == 1
    assert got["inverse"].attrs["units"] == "1/(m2)"
    assert got["inverse"].attrs["long_name"] == "inverse of covariance"
    assert got["inverse"].attrs["project"] == "p"
    assert all(got[name].attrs["grid_mapping"] == "spatial_ref" for name in ("inverse", "info", "rcond"))
    assert got["spatial_ref"].attrs == {"crs_wkt": "GEOGCS[...]"}


def test_what_another_variable_names_is_a_coordinate_of_all(as_accessor, ds):
    ds = ds.assign_coords(spatial_ref=0, lat=("t", np.arange(12.0))).assign(mean=("t", np.ones(12)))
    ds["cov"].encoding["coordinates"] = None
    ds["mean"].attrs["grid_mapping"] = "spatial_ref"
    ds["mean"].encoding["coordinates"] = "spatial_ref lat"
    assert {"spatial_ref", "lat"} <= set(as_accessor(ds).coords)


def test_the_crs_of_rioxarray_is_kept(tmp_path, ds, client):
    pytest.importorskip("rioxarray", reason="rioxarray is not installed")
    ds.rename(t="x").rio.write_crs("EPSG:4326").to_zarr(tmp_path / "s", consolidated=False)
    invert_store(tmp_path / "s", tmp_path / "t", client=client, max_failed=None)
    with dask.config.set(scheduler="sync"):
        assert xr.open_zarr(tmp_path / "t").rio.crs.to_epsg() == 4326
        assert xr.open_zarr(tmp_path / "t", decode_coords="all").rio.crs.to_epsg() == 4326


def test_inherited_coordinates_of_a_tree(tmp_path, client):
    tree = xr.DataTree.from_dict(
        {
            "/": xr.Dataset(coords={"t": [1, 2, 3, 4], "i": ["a", "b"], "scalar": 5}),
            "/near": xr.Dataset(coords={"j": ["b", "a"]}),
            "/near/by": xr.Dataset({"cov": (("t", "i", "j"), conditioned(4, 2, 10))}, {"lat": ("t", [5, 6, 7, 8])}),
        }
    )
    tree.to_zarr(tmp_path / "s", consolidated=False)
    invert_store(tmp_path / "s", tmp_path / "t", variable="near/by/cov", client=client)
    with dask.config.set(scheduler="sync"):
        got = xr.open_zarr(tmp_path / "t").load()
    want = tree["near/by/cov"].linalg.inv()
    assert_same_bits(got["inverse"].values, want.values)
    assert set(got.coords) == {"t", "i", "j", "lat"}
    xr.testing.assert_equal(got.coords.to_dataset(), want.coords.to_dataset())


@pytest.mark.parametrize("engine", ["netcdf4", "h5netcdf", "scipy"])
def test_a_target_can_be_written_on(tmp_path, as_accessor, ds, engine):
    pytest.importorskip({"netcdf4": "netCDF4"}.get(engine, engine), reason=f"{engine} is not installed")
    if engine == "h5netcdf":
        pytest.importorskip("h5py", reason="h5py is not installed")
    got = as_accessor(ds)
    got.to_netcdf(tmp_path / "x.nc", engine=engine)
    with xr.open_dataset(tmp_path / "x.nc", engine=engine) as back:
        xr.testing.assert_equal(back, got)
        assert back.attrs["complete"] == 1
    got.to_zarr(tmp_path / "x.zarr", consolidated=False)
    got.drop_encoding().to_zarr(tmp_path / "x2.zarr", zarr_format=2, consolidated=False)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_server_that_lists_nothing_is_a_source(tmp_path):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    group = zarr.create_group(tmp_path / "s")
    group.create_array("cov", shape=(4, 2, 2), dtype="f8", dimension_names=["t", "i", "j"])
    group.create_array("twice", shape=(4, 2, 2), dtype="f8", dimension_names=["t", "p", "p"])

    with silent_server(tmp_path) as (root, _):
        assert open_source(f"{root}/s", "cov").dims == ("t", "i", "j")
        assert open_source(f"{root}/s", "twice").dims == ("t", "p", "p_2")
        with pytest.raises(SourceError, match="its server does not list it: name the stack with `variable=`"):
            open_source(f"{root}/s")
        zarr.consolidate_metadata(group.store)
        with pytest.raises(SourceError, match=r"name the stack with `variable=`; it has cov \(4, 2, 2\), twice"):
            open_source(f"{root}/s")


# --- structures -----------------------------------------------------------------------------------------------


def test_lower_triangles_and_short_words(tmp_path, make_source, client):
    a = conditioned(12, 3, 10, structure="positive definite")
    source = make_source(a + np.triu(np.full((3, 3), 7.0), 1))
    invert_store(source, tmp_path / "t", assume_a="pos", lower=True, client=client)
    assert_same_bits(zarr.open_group(tmp_path / "t")["inverse"][...], inverse(a, assume_a="pos", lower=True))
    assert verify_store(tmp_path / "t", source=source, client=client).ok
    assert invert_store(source, tmp_path / "t", assume_a="positive definite", lower=True, client=client).tiles_now == 0
