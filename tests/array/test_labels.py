"""Which dimensions are rows and columns, and where their labels are in the inverse."""

import itertools

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from dask_batchinv import inverse, inverse_ex
from dask_batchinv.labels import Exchange, candidates, exchange
from tests.support.stacks import assert_same_bits, conditioned

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate dimension names:UserWarning")


@pytest.fixture(params=["numpy", "dask"])
def lazy(request):
    """Make a DataArray lazy, or leave it."""
    return (lambda a: a.chunk()) if request.param == "dask" else (lambda a: a)


@pytest.fixture
def jacobian():
    return xr.DataArray(
        [[1.0, 2.0], [3.0, 5.0]], dims=("obs", "par"), name="J",
        coords={"obs": ["flux", "color"], "par": ["mass", "radius"], "weight": ("obs", [1.0, 2.0])},
    )  # fmt: skip


@pytest.fixture
def square():
    a = conditioned(4, 3, 10)
    return xr.DataArray(a, dims=("t", "i", "j"), coords={"i": list("abc"), "j": list("abc"), "t": range(4)}, name="S")


# --- different labels -----------------------------------------------------------------------------------------


def test_rows_of_the_inverse_are_what_the_columns_were(jacobian, lazy):
    J = lazy(jacobian)
    inv = J.linalg.inv()
    assert inv.dims == ("par", "obs")
    assert inv.sel(obs="flux", par="radius") == pytest.approx(3.0)
    assert inv.sel(obs="color", par="mass") == pytest.approx(2.0)
    assert list(inv["weight"].values) == [1.0, 2.0]
    product = xr.dot(inv, J.rename(par="par_2"), dim="obs")
    np.testing.assert_allclose(product, np.eye(2), atol=1e-14)
    product = xr.dot(J, inv.rename(obs="obs_2"), dim="par")
    np.testing.assert_allclose(product, np.eye(2), atol=1e-14)
    for other in (J.to_dataset().linalg.inv()["J"], J.linalg.inv_ex()["inverse"], inverse(J), inverse_ex(J).inverse):
        xr.testing.assert_identical(other.rename("J"), inv)


def test_the_case_that_was_read_wrong():
    J = xr.DataArray(
        [[1.0, 2.0], [3.0, 3.0]], dims=("obs", "par"), coords={"obs": ["flux", "color"], "par": ["mass", "radius"]}
    )
    inv = J.linalg.inv()
    want = np.linalg.inv(J.values)
    assert inv.sel(obs="flux", par="radius") == pytest.approx(want[1, 0])


def test_an_index_of_another_name_labels_a_dimension_too(jacobian):
    J = jacobian.to_dataset().rename_vars(obs="o", par="p").set_xindex("o").set_xindex("p")["J"]
    assert set(J.xindexes) == {"o", "p"}
    assert J.dims == ("obs", "par")
    inv = J.linalg.inv()
    assert inv.dims == ("par", "obs")
    assert inv.sel(o="flux", p="radius") == pytest.approx(3.0)


def test_other_dimensions_keep_their_places(jacobian):
    J = jacobian.expand_dims(t=3)
    assert J.transpose("obs", "t", "par").linalg.inv(("obs", "par")).dims == ("par", "t", "obs")
    assert J.linalg.inv(("par", "obs")).dims == ("t", "par", "obs")  # which of them is called the row changes nothing
    xr.testing.assert_allclose(J.linalg.inv(("par", "obs")), J.linalg.inv(("obs", "par")))
    with pytest.raises(ValueError, match=r"differ in length or labels: pass dims=\('obs', 'par'\)"):
        J.linalg.inv()


def test_labels_on_one_side_alone_are_different(square):
    half = square.drop_vars("j")
    with pytest.raises(ValueError, match="differ in length or labels"):
        half.linalg.inv()
    inv = half.linalg.inv(("i", "j"))
    assert inv.dims == ("t", "j", "i")
    assert_same_bits(inv.values, inverse(half.values))


# --- the same labels, in another order ------------------------------------------------------------------------


def assert_same_elements(inv, want):
    for row, col in itertools.product("abc", repeat=2):
        np.testing.assert_allclose(inv.sel(i=row, j=col), want.sel(i=row, j=col), rtol=1e-12)


def test_the_same_labels_in_another_order_change_places(square, lazy):
    want, turned = square.linalg.inv(), lazy(square.sel(j=list("cab")))
    inv = turned.linalg.inv()
    assert inv.dims == ("t", "i", "j")
    assert list(inv["i"].values) == list("cab")
    assert list(inv["j"].values) == list("abc")
    assert_same_elements(inv, want)
    ds = turned.to_dataset().linalg.inv()
    xr.testing.assert_identical(ds["S"], inv)
    assert_same_elements(turned.linalg.inv_ex()["inverse"], want)


def test_where_others_share_the_labels_these_stay(square, lazy):
    want, turned = square.linalg.inv(), lazy(square.sel(j=list("cab")))
    ds = turned.to_dataset().assign(mean=(("t", "i"), np.ones((4, 3))))
    inv = ds.linalg.inv()
    xr.testing.assert_identical(inv.drop_vars("S"), ds.drop_vars("S"))
    assert_same_elements(inv["S"], want)
    tree = xr.DataTree.from_dict(
        {"/": xr.Dataset(coords=turned.coords), "/a": turned.to_dataset().drop_vars(["i", "j"])}
    )
    assert_same_elements(tree.linalg.inv()["a/S"], want)
    mixed = turned.isel(i=slice(2), j=slice(2)).assign_coords(i=[False, True], j=[1, 0])
    with pytest.raises(ValueError, match="equal, but not of one kind"):
        mixed.to_dataset().assign(mean=("i", [1, 2])).linalg.inv()
    twice = turned.assign_coords(i=["a", "a", "b"], j=["a", "b", "a"]).to_dataset().assign(mean=("i", [1, 2, 3]))
    with pytest.raises(ValueError, match="not unique, and in different order"):
        twice.linalg.inv()


def test_labels_that_are_equal_or_absent_change_nothing(square):
    xr.testing.assert_identical(square.linalg.inv().drop_vars(["i", "j"]), square.drop_vars(["i", "j"]).linalg.inv())
    assert list(square.linalg.inv()["j"].values) == list("abc")


@pytest.mark.parametrize(
    ("row", "col", "want"),
    [
        ([1, 2], [1.0, 2.0], Exchange.NOTHING),
        ([np.nan, 1], [1, np.nan], Exchange.NAMES),
        ([1, 1, 2], [2, 1, 1], Exchange.LABELS),
        ([1, 1, 2], [2, 2, 1], Exchange.NAMES),
        (["a"], None, Exchange.NAMES),
    ],
)
def test_exchange(row, col, want):
    assert exchange(pd.Index(row), None if col is None else pd.Index(col)) is want


# --- which two ------------------------------------------------------------------------------------------------


def dims_of(shape, **labels):
    dims = tuple("abcd"[: len(shape)])
    return xr.DataArray(np.broadcast_to(np.eye(shape[-1]), shape), dims=dims, coords=labels, name="x")


def test_default_dims_where_nothing_else_could_be_meant():
    for a in (dims_of((4, 3, 3)), dims_of((3, 3, 3), a=[1, 2, 3]), dims_of((4, 5, 3, 3)), dims_of((3, 3))):
        assert_same_bits(a.linalg.inv().values, inverse(a.values))
        assert_same_bits(a.to_dataset().linalg.inv()["x"].values, inverse(a.values))


@pytest.mark.parametrize(
    ("a", "choices"),
    [
        (dims_of((2, 2, 5, 5)), ["('a', 'b')", "('c', 'd')"]),  # a square tile of images
        (dims_of((3, 3, 3)), ["('a', 'b')", "('a', 'c')", "('b', 'c')"]),  # as many times as rows
        (dims_of((5, 5, 3, 3), a=range(5), b=range(5)), ["('a', 'b')", "('c', 'd')"]),
    ],
)
def test_what_could_be_meant_is_listed(a, choices):
    for call in (a.linalg.inv, a.linalg.inv_ex, a.to_dataset().linalg.inv, lambda: inverse(a)):
        with pytest.raises(ValueError, match="pass") as caught:
            call()
        assert all(f"dims={choice}" in str(caught.value) for choice in choices)
    assert a.linalg.inv(a.dims[-2:]).shape == a.shape


def test_a_pair_that_is_not_last_must_be_named():
    a = dims_of((3, 4, 4)).transpose("b", "c", "a")
    for call in (a.linalg.inv, a.to_dataset().linalg.inv):
        with pytest.raises(ValueError, match=r"dims=\('b', 'c'\)"):
            call()
    assert_same_bits(a.linalg.inv(("b", "c")).transpose("a", ...).values, inverse(a.transpose("a", ...).values))


def test_stacked_pixels_and_rolling_windows_are_not_rows():
    cov = xr.DataArray(np.broadcast_to(np.eye(4), (2, 2, 4, 4)), dims=("y", "x", "i", "j"), name="cov")
    stacked = cov.to_dataset().stack(pixel=("y", "x"))
    assert stacked["cov"].dims[-1] == "pixel"
    with pytest.raises(ValueError, match=r"dims=\('i', 'j'\)"):
        stacked.linalg.inv()
    xr.testing.assert_identical(
        stacked.linalg.inv(("i", "j")).unstack()["cov"].transpose(*cov.dims),
        cov.linalg.inv(("i", "j")).assign_coords(y=[0, 1], x=[0, 1]),
    )
    window = xr.DataArray(np.ones((5, 3, 3)), dims=("t", "i", "j")).rolling(t=3).construct("w")
    with pytest.raises(ValueError, match=r"dims=\('i', 'j'\) or dims=\('i', 'w'\)"):
        window.linalg.inv()


def test_candidates():
    assert candidates("abc", {"a": 2, "b": 3, "c": 2}, {}) == [("a", "c")]


def test_plain_arrays_keep_numpys_rule():
    a = conditioned(9, 3, 10).reshape(3, 3, 3, 3)
    for source in (a, da.from_array(a)):
        assert_same_bits(np.asarray(inverse(source)), inverse(a))


# --- which variables ------------------------------------------------------------------------------------------


def test_only_floating_and_complex_variables_are_inverted(square):
    ds = square.to_dataset().assign(
        valid=xr.ones_like(square, bool),
        count=xr.ones_like(square, int),
        z=square + 1j,
        part=square.isel(i=0, drop=True),
    )
    inv = ds.linalg.inv(on_error="nan")
    for name in ("valid", "count", "part"):
        xr.testing.assert_identical(inv[name], ds[name])
    assert_same_bits(inv["z"].values, inverse(ds["z"].values))
    named = ds.linalg.inv(variables=["count"], on_error="nan")
    assert np.isnan(named["count"]).all()
    xr.testing.assert_identical(named["S"], ds["S"])
    with pytest.raises(ValueError, match="there is no variable 'missing'"):
        ds.linalg.inv(variables="missing")
    with pytest.raises(ValueError, match=r"the variable 'part' has not both dimensions"):
        ds.linalg.inv(("i", "j"), variables="part")


# --- one name twice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [None, ("p", "p"), ("p", "p_2")])
def test_a_name_given_twice_is_told_apart_as_by_a_job(dims, lazy):
    a = conditioned(4, 3, 10)
    twice = lazy(xr.DataArray(xr.Variable(("t", "p", "p"), a), {"p": list("abc"), "t": range(4)}, name="x"))
    for inv in (
        twice.linalg.inv(dims),
        twice.linalg.inv_ex(dims)["inverse"],
        xr.Dataset({"x": twice}).linalg.inv(dims)["x"],
    ):
        assert inv.dims == ("t", "p", "p_2")
        assert list(inv["p"].values) == list("abc")
        assert_same_bits(inv.values, inverse(a))
    ds = xr.Dataset({"x": twice, "mean": (("t", "p"), np.ones((4, 3)))})
    xr.testing.assert_identical(ds.linalg.inv(dims)["mean"], ds["mean"])
    assert_same_bits(ds.linalg.inv(dims)["x"].values, inverse(a))
    if dims != ("p", "p_2"):
        assert ds.assign(p_2=1).linalg.inv(dims)["x"].dims == ("t", "p", "p_2_2")
    thrice = xr.DataArray(xr.Variable(("p", "p", "p_2"), np.stack([np.eye(3)] * 4, -1)), {"p_2": range(4)})
    assert thrice.linalg.inv(("p", "p")).dims == ("p", "p_2_2", "p_2")
    with pytest.raises(ValueError, match="two different dimensions"):
        twice.linalg.inv(("t", "t"))


# --- trees ----------------------------------------------------------------------------------------------------


def test_each_node_of_a_tree_that_has_matrices(square, lazy):
    tree = xr.DataTree.from_dict(
        {
            "/": xr.Dataset(coords={"t": range(4), "crs": 0}, attrs={"title": "t"}),
            "/near": lazy(square.drop_vars("t")).to_dataset(),
            "/far/away": xr.Dataset({"z": (("t", "k", "l"), conditioned(4, 2, 10))}, {"lat": ("t", [5, 6, 7, 8])}),
            "/far": xr.Dataset({"mean": ("t", [1.0, 2, 3, 4])}),
        },
        name="all",
    )
    inv = tree.linalg.inv()
    assert inv.name == "all"
    assert [node.path for node in inv.subtree] == [node.path for node in tree.subtree]
    xr.testing.assert_identical(inv["near"].to_dataset(), tree["near"].to_dataset().linalg.inv())
    xr.testing.assert_identical(inv["far/away"].to_dataset(), tree["far/away"].to_dataset().linalg.inv())
    xr.testing.assert_identical(inv["far"].to_dataset(), tree["far"].to_dataset())
    xr.testing.assert_identical(inv.to_dataset(), tree.to_dataset())
    assert set(inv["near"].to_dataset(inherit=False).coords) == {"i", "j"}  # what is inherited stays that
    xr.testing.assert_identical(inverse(tree), inv)
    xr.testing.assert_identical(tree["far"].linalg.inv()["away"].to_dataset(), inv["far/away"].to_dataset())
    xr.testing.assert_identical(tree.linalg.inv(variables="z")["near"].to_dataset(), tree["near"].to_dataset())
    assert isinstance(inv["near/S"].data, type(tree["near/S"].data))


def test_trees_say_where_something_is_wrong(square):
    tree = xr.DataTree.from_dict({"/a": square.to_dataset(), "/b": dims_of((3, 3, 3)).to_dataset()})
    with pytest.raises(ValueError, match="several pairs") as caught:
        tree.linalg.inv()
    assert caught.value.__notes__ == ["in node '/b'"]
    for wrong in (["S", "Z"], "a/S"):
        with pytest.raises(ValueError, match=r"no node of the DataTree has a variable '(Z|a/S)': pass bare names"):
            tree.linalg.inv(variables=wrong)
    with pytest.raises(ValueError, match="no node of the DataTree"):
        xr.DataTree(xr.Dataset({"m": ("t", [1.0])})).linalg.inv()
    with pytest.raises(TypeError, match="inverse_ex takes DataArrays: pick a variable of the DataTree"):
        inverse_ex(tree)


# --- attributes -----------------------------------------------------------------------------------------------


def test_attributes_that_describe_values_go(square):
    attributes = {
        "valid_range": [-1, 1], "valid_min": 0, "valid_max": 1, "actual_range": [0, 1], "missing_value": np.nan,
        "flag_values": [0, 1], "flag_meanings": "good bad", "standard_name": "x", "cell_methods": "time: mean",
        "units": "m", "long_name": "covariance of place", "grid_mapping": "crs", "project": "p", "STATISTICS_MEAN": 1,
    }  # fmt: skip
    want = {"units": "1/(m)", "long_name": "inverse of covariance of place", "grid_mapping": "crs", "project": "p"}
    a = square.assign_attrs(attributes)
    for inv in (a.linalg.inv(), a.to_dataset().linalg.inv()["S"], a.linalg.inv_ex()["inverse"]):
        assert inv.attrs == want
    assert "units" not in a.assign_attrs(units="days since 2000-01-01").linalg.inv().attrs
    assert a.linalg.inv().linalg.inv().attrs["units"] == "m"
    assert square.assign_attrs(scale_factor=1.0, add_offset=0.0).linalg.inv().attrs == {}  # as GDAL's readers have it
    assert "units" not in square.assign_attrs(units=5).linalg.inv().attrs
    assert a.attrs == attributes


def test_what_places_the_data_stays(square, tmp_path):
    netCDF4 = pytest.importorskip("netCDF4", reason="netCDF4 is not installed")
    ds = square.to_dataset().assign_coords(crs=0, lat=("t", [1.0, 2, 3, 4]))
    ds["S"].attrs |= {"valid_range": [0.0, 1e-9], "grid_mapping": "crs"}
    ds.to_netcdf(tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc", decode_coords="all") as opened:
        inv = opened.linalg.inv()
        assert inv["S"].encoding == {name: opened["S"].encoding[name] for name in ("grid_mapping", "coordinates")}
        inv.to_netcdf(tmp_path / "inv.nc")
    with netCDF4.Dataset(tmp_path / "inv.nc") as file:
        assert file["S"].grid_mapping == "crs"
        assert not np.ma.is_masked(file["S"][:])
