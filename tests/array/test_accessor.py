"""`.linalg` on Xarray objects."""

import subprocess
import sys

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from dask_batchinv import InverseEx, SingularMatrixError, inverse, inverse_ex
from tests.support.stacks import assert_same_bits, conditioned


@pytest.fixture(params=["numpy", "dask"])
def ds(request):
    data = xr.Dataset(
        {
            "cov": (("y", "x", "row", "col"), conditioned(12, 3, 10).reshape(3, 4, 3, 3), {"units": "m2", "a": 1}),
            "mask": (("y", "x"), np.ones((3, 4), bool)),
        },
        coords={"row": list("abc"), "col": list("abc"), "x": [1.0, 2.0, 4.0, 8.0], "lat": ("y", [5, 6, 7])},
        attrs={"title": "t"},
    )
    return data.chunk({"y": 2, "x": -1}) if request.param == "dask" else data


def test_dataset(ds):
    inv = ds.linalg.inv()
    assert_same_bits(inv.cov.values, inverse(ds.cov.values))
    assert inv.cov.dims == ds.cov.dims
    xr.testing.assert_identical(inv.coords.to_dataset(), ds.coords.to_dataset())
    xr.testing.assert_identical(inv.mask, ds.mask)
    assert inv.attrs == ds.attrs
    assert inv.cov.attrs == {"units": "1/(m2)", "a": 1}
    assert isinstance(inv.cov.data, type(ds.cov.data))
    if isinstance(ds.cov.data, da.Array):
        assert inv.cov.chunks == ds.cov.chunks


def test_data_array(ds):
    inv = ds.cov.linalg.inv()
    assert inv.name == "cov"
    assert_same_bits(inv.values, inverse(ds.cov.values))
    xr.testing.assert_identical(inv, ds.linalg.inv().cov)


def test_named_dims_anywhere_and_dimension_order_stays(ds):
    moved = ds.cov.transpose("row", "y", "col", "x")
    inv = moved.linalg.inv(dims=("row", "col"))
    assert inv.dims == moved.dims
    xr.testing.assert_identical(inv.transpose(*ds.cov.dims), ds.cov.linalg.inv())
    xr.testing.assert_identical(moved.to_dataset().linalg.inv(dims=("row", "col")).cov, inv)


def test_inv_ex_is_a_dataset(ds):
    ds.cov[1, 2] = 0
    account = ds.cov.linalg.inv_ex()
    assert set(account) == {"inverse", "info", "rcond"}
    assert account["info"].dims == account["rcond"].dims == ("y", "x")
    assert account["inverse"].dims == ds.cov.dims
    assert account["inverse"].attrs["units"] == "1/(m2)"
    want = inverse_ex(ds.cov.values)
    for name in account:
        assert_same_bits(account[name].values, getattr(want, name))
    with pytest.raises(SingularMatrixError) as caught:
        ds.cov.linalg.inv_ex(check_errors=True).compute()
    assert caught.value.indices == ((1, 2),)


def test_options_are_passed_on(ds):
    ds.cov[0, 0] = 0
    assert np.isnan(ds.linalg.inv(on_error="nan").cov[0, 0]).all()
    diagonal = ds.cov.linalg.inv(assume_a="diagonal", on_error="nan")
    assert (diagonal.values[1, 1] == np.diag(1 / np.diag(ds.cov.values[1, 1]))).all()
    with pytest.raises(ValueError, match="assume_a must be one of"):
        ds.linalg.inv(assume_a="symm")


def test_functions_take_xarray_objects(ds):
    xr.testing.assert_identical(inverse(ds), ds.linalg.inv())
    xr.testing.assert_identical(inverse(ds.cov), ds.cov.linalg.inv())
    account = inverse_ex(ds.cov)
    assert isinstance(account, InverseEx)
    xr.testing.assert_identical(account.info, ds.cov.linalg.inv_ex()["info"])
    with pytest.raises(TypeError, match="DataArrays"):
        inverse_ex(ds)
    for thing in (ds, ds.cov):
        with pytest.raises(TypeError, match="out= is not for Xarray objects"):
            inverse(thing, out=np.empty((3, 4, 3, 3)))


def test_variables_that_disagree_are_an_error_that_lists_the_candidates(ds):
    ds["image"] = ("u", "v"), np.eye(5)
    with pytest.raises(ValueError, match=r"dims=\('row', 'col'\) \(of cov\); dims=\('u', 'v'\) \(of image\)"):
        ds.linalg.inv()
    inv = ds.linalg.inv(dims=("u", "v"))
    xr.testing.assert_identical(inv.cov, ds.cov)


def test_no_candidate_is_an_error(ds):
    with pytest.raises(ValueError, match="name them with dims="):
        ds[["mask"]].linalg.inv()
    with pytest.raises(ValueError, match="no floating or complex variable has both dimensions"):
        ds.linalg.inv(dims=("row", "time"))
    with pytest.raises(ValueError, match=r"\['time'\] are not among the dimensions"):
        ds.cov.linalg.inv(dims=("row", "time"))
    with pytest.raises(np.linalg.LinAlgError, match="expected a stack of matrices"):
        ds.lat.linalg.inv()


@pytest.mark.parametrize("dims", ["row", ("row",), ("row", "row"), ("row", "col", "x")])
def test_dims_must_be_two(ds, dims):
    for thing in (ds, ds.cov):
        with pytest.raises(ValueError, match="dims must name two different dimensions"):
            thing.linalg.inv(dims=dims)


def test_not_square_is_an_error(ds):
    with pytest.raises(np.linalg.LinAlgError, match=r"square matrices .* 'y' has length 3 and 'x' 4"):
        ds.cov.linalg.inv(dims=("y", "x"))


def test_text_is_no_candidate_but_an_error_when_named():
    ds = xr.Dataset({"t": (("i", "j"), np.full((2, 2), "a")), "m": (("x", "k", "l"), np.ones((1, 2, 2)) + np.eye(2))})
    assert ds.linalg.inv().m.shape == (1, 2, 2)
    with pytest.raises(TypeError, match="has no inverse here"):
        ds.linalg.inv(dims=("i", "j"), variables="t")


def test_attributes_of_coordinates_stay(ds):
    ds["lat"].attrs["units"] = "degrees_north"
    ds["x"].attrs["axis"] = "X"
    parts = ds.cov.linalg.inv_ex()
    for result in (ds.linalg.inv(), ds.cov.linalg.inv(), parts, parts["info"], inverse_ex(ds.cov).rcond):
        assert result["lat"].attrs == {"units": "degrees_north"}
        assert result["x"].attrs == {"axis": "X"}
    assert parts["info"].attrs == {}
    assert parts["rcond"].attrs == {"units": "1"}


def test_units_of_one_stay(ds):
    assert ds.cov.assign_attrs(units="1").linalg.inv().attrs["units"] == "1"


def test_names_that_are_taken(ds):
    account = inverse_ex(ds.cov.assign_coords(rcond=("y", [1, 2, 3])))
    assert account.inverse.name == "cov"
    assert list(account.inverse["rcond"].values) == [1, 2, 3]
    with pytest.raises(ValueError, match="rcond are names of coordinates or dimensions already"):
        account.inverse.linalg.inv_ex()


def test_labels_with_the_dimensions_of_the_matrices_pass_through(ds):
    ds["label"] = ("row", "col"), np.full((3, 3), "z")
    for result in (ds.linalg.inv(), ds.linalg.inv(dims=("row", "col"))):
        xr.testing.assert_identical(result["label"], ds["label"])
    with pytest.raises(TypeError) as caught:
        ds.linalg.inv(variables=["cov", "label"], dims=("row", "col"))
    assert caught.value.__notes__ == ["in variable 'label'"]


def test_nothing_is_computed(ds, no_compute):
    lazy = ds.chunk({"y": 1})
    lazy.linalg.inv()
    lazy.cov.linalg.inv_ex()


@pytest.mark.parametrize(
    "order", ["dask_batchinv, xarray_einstats.accessors", "xarray_einstats.accessors, dask_batchinv"]
)
def test_both_packages_work_together_in_either_order(order):
    code = f"""
import {order}
import numpy as np, xarray as xr
a = xr.DataArray(np.diag([2.0, 4.0]), dims=("i", "j"))
assert a.linalg.inv().values.tolist() == [[0.5, 0], [0, 0.25]]
assert a.linalg.inv(dims=("i", "j")).values.tolist() == [[0.5, 0], [0, 0.25]]
assert a.linalg.inv_ex()["info"] == 0
assert abs(a.linalg.det(dims=("i", "j")) - 8) < 1e-12
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_without_xarray_einstats():
    code = """
import sys
sys.modules["xarray_einstats"] = sys.modules["xarray_einstats.accessors"] = None
import dask_batchinv, numpy as np, xarray as xr
assert xr.DataArray(np.eye(2)).linalg.inv().values.tolist() == [[1, 0], [0, 1]]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "imports",
    [
        "import xarray as xr; from dask_batchinv import inverse, inverse_ex",
        "from dask_batchinv import inverse, inverse_ex; import xarray as xr",
        "import dask_batchinv; import xarray as xr; from dask_batchinv import inverse, inverse_ex",
        "import dask_batchinv.array; import xarray as xr; from dask_batchinv import inverse, inverse_ex",
        "from dask_batchinv import inverse, inverse_ex; import dask_batchinv.accessor; import xarray as xr",
    ],
)
def test_the_first_call_takes_xarrays_objects(imports):
    code = f"{imports}; a = xr.DataArray([[2.0]]); print(type(inverse(a)).__name__, type(inverse_ex(a)[1]).__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.split() == ["DataArray", "DataArray"], done.stderr
