"""What goes in decides what comes out: the table of containers, row by row."""

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import xarray as xr
import zarr

from dask_batchinv import Info, InverseEx, SingularMatrixError, inverse, inverse_ex
from tests.support.stacks import assert_same_bits, conditioned

A = np.array([[4.0, 1.0], [1.0, 3.0]])
STACK = np.stack([A, 2 * A])
INVERSE = inverse(STACK)


class WithUnits(np.ndarray):
    def __array_finalize__(self, other):
        self.units = getattr(other, "units", None)


def assert_plain(x, want=INVERSE):
    assert type(x) is np.ndarray
    assert_same_bits(x, want)


# --- masked arrays --------------------------------------------------------------------------------------------


@pytest.fixture
def masked():
    return np.ma.masked_equal([[[4, -9999.0], [1, 3]], A], -9999.0)


def test_a_matrix_with_a_masked_number_is_masked_whole(masked):
    x = inverse(masked)
    assert type(x) is np.ma.MaskedArray
    assert x.mask[0].all()
    assert not x.mask[1].any()
    assert_same_bits(x.data[1], INVERSE[0])
    ex = inverse_ex(masked)
    assert isinstance(ex, InverseEx)
    assert [part.mask.tolist() for part in ex[1:]] == [[True, False]] * 2
    assert ex.info[1] == 0
    assert_same_bits(masked.data[0], [[4, -9999.0], [1, 3]])  # the input is as it was


def test_masked_integers_and_nothing_masked():
    counts = np.ma.masked_equal(np.array([[[4, -1], [1, 3]], A]).astype("i4"), -1)
    x = inverse(counts)
    assert x.dtype == "f8"
    assert x.mask[:, 0, 0].tolist() == [True, False]
    for nothing in (np.ma.array(STACK), np.ma.array(STACK, mask=False)):
        x = inverse(nothing)
        assert type(x) is np.ma.MaskedArray
        assert not np.ma.getmaskarray(x).any()
        assert_same_bits(x.data, INVERSE)


def test_what_is_not_masked_is_judged_as_ever(masked):
    masked[1] = 0
    with pytest.raises(SingularMatrixError) as caught:
        inverse(masked)
    assert caught.value.indices == ((1,),)
    masked[1, 0, 0] = np.nan
    with pytest.raises(SingularMatrixError):
        inverse(masked)


def test_a_masked_number_that_is_not_read_does_not_count(masked):
    assert not inverse(masked, assume_a="lower triangular").mask.any()
    assert inverse(masked, assume_a="symmetric").mask[0].all()
    assert not inverse(masked, assume_a="symmetric", lower=True).mask.any()


@pytest.mark.parametrize("shape", [(2, 3), (3,), ()])
def test_masked_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(np.linalg.LinAlgError, match="expected a stack"):
        inverse(np.ma.zeros(shape))


def test_masked_dask_arrays_stay_masked_and_lazy(masked, no_compute):
    lazy = da.from_array(masked, chunks=(1, 2, 2))
    x, ex = inverse(lazy), inverse_ex(lazy)
    with dask.config.set(scheduler="sync"):
        for found in (x.compute(), ex.inverse.compute()):
            assert found.mask[0].all()
            assert not found.mask[1].any()
        assert ex.rcond.compute().mask.tolist() == [True, False]
    with pytest.raises(TypeError, match="out= takes no masked blocks"):
        inverse(lazy, out=np.empty((2, 2, 2)))


def behind_a_plain_meta(block):
    return da.from_delayed(dask.delayed(block), block.shape, dtype=block.dtype)


def test_masked_numbers_behind_a_plain_meta_are_missing(masked):
    lazy = behind_a_plain_meta(masked)
    for on_error in ("nan", "skipna"):
        assert_plain(inverse(lazy, on_error=on_error).compute()[1:], INVERSE[:1])
        assert np.isnan(inverse(lazy, on_error=on_error).compute()[0]).all()
    assert inverse_ex(lazy).info.compute().tolist() == [Info.NOT_FINITE, 0]
    with pytest.raises(SingularMatrixError):
        inverse(lazy).compute()
    out = np.empty((2, 2, 2))
    inverse(lazy, out=out, on_error="nan")
    assert np.isnan(out[0]).all()


def test_masked_items_of_lists_are_missing(masked):
    x = inverse([masked[0], masked[1], A.tolist()], on_error="nan")
    assert np.isnan(x[0]).all()
    assert_plain(x[1:], INVERSE[[0, 0]])
    assert inverse(np.ma.zeros((2, 0, 0))).shape == (2, 0, 0)
    assert np.isnan(inverse([[1.0, np.ma.masked], [0, 1]], on_error="nan")).all()


def test_masked_out_is_refused():
    for source in (STACK, da.from_array(STACK)):
        with pytest.raises(TypeError, match=r"out must be a NumPy array.*got MaskedArray"):
            inverse(source, out=np.ma.zeros((2, 2, 2)))


def test_netcdf_variables(tmp_path):
    netCDF4 = pytest.importorskip("netCDF4", reason="netCDF4 is not installed")
    with netCDF4.Dataset(tmp_path / "x.nc", "w") as file:
        for name, size in {"t": 2, "i": 2, "j": 2}.items():
            file.createDimension(name, size)
        variable = file.createVariable("cov", "i2", ("t", "i", "j"), fill_value=-99)
        variable.scale_factor = 0.5
        variable[:] = np.ma.array(STACK, mask=[[[1, 0], [0, 0]], [[0, 0], [0, 0]]])
        x = inverse(variable, on_error="nan")
        assert np.isnan(x[0]).all()
        assert_plain(x[1:], INVERSE[1:])
        assert inverse_ex(variable).info.tolist() == [Info.NOT_FINITE, 0]
        variable.set_auto_maskandscale(False)
        with pytest.raises(TypeError, match="is packed, its attributes have scale_factor, _FillValue"):
            inverse(variable)


# --- quantities -----------------------------------------------------------------------------------------------


def test_astropy_quantities_and_masks():
    units = pytest.importorskip("astropy.units", reason="astropy is not installed")
    from astropy.utils.masked import Masked

    x = inverse(STACK * units.m**2)
    assert x.unit == units.m**-2
    assert_same_bits(x.value, INVERSE)
    ex = inverse_ex(STACK * units.m)
    assert ex.inverse.unit == units.m**-1
    assert type(ex.info) is type(ex.rcond) is np.ndarray
    mask = np.zeros(STACK.shape, bool)
    mask[0, 0, 1] = True
    for values, kind in ((STACK, np.ndarray), (STACK * units.m, units.Quantity)):
        missing = Masked(values, mask=mask)
        x = inverse(missing, on_error="skipna")
        assert type(x) is kind
        assert np.isnan(x[0]).all()
        assert_same_bits(np.asarray(x[1]), INVERSE[1])
        with pytest.raises(SingularMatrixError):
            inverse(missing)
    from astropy.table import MaskedColumn

    for function in (inverse, inverse_ex):
        with pytest.raises(TypeError, match=r"MaskedColumn, which may hold more than numbers"):
            function(MaskedColumn(STACK, unit="m"))
    lazy = behind_a_plain_meta(Masked(STACK, mask=mask))
    assert np.isnan(inverse(lazy, on_error="nan").compute()[0]).all()
    for wrong in ([A * units.m], da.from_delayed(dask.delayed(STACK * units.m), STACK.shape, dtype="f8")):
        with pytest.raises(TypeError, match=r"astropy\.Quantity"):
            np.asarray(inverse(wrong))


def test_pint_quantities_around_anything(masked, no_compute):
    pint = pytest.importorskip("pint", reason="pint is not installed")
    units = pint.UnitRegistry()
    x = inverse(units.Quantity(STACK, "m ** 2"))
    assert x.units == units.Unit("1 / m ** 2")
    assert_plain(x.magnitude)
    assert inverse(units.Quantity(masked, "m")).magnitude.mask[0].all()
    lazy = inverse(units.Quantity(da.from_array(STACK), "m"))
    assert isinstance(lazy.magnitude, da.Array)
    ex = inverse_ex(units.Quantity(da.from_array(STACK), "m"))
    assert ex.inverse.units == units.Unit("1 / m")
    assert isinstance(ex.rcond, da.Array)
    for units_, quantity in ((units, "degC"), (pint.UnitRegistry(autoconvert_offset_to_baseunit=True), "degC")):
        with pytest.raises(TypeError, match=r"offset unit|whose zero is not 0"):
            inverse(units_.Quantity(STACK, quantity))
    with pytest.raises(TypeError, match="out= does not take what comes of Quantity"):
        inverse(units.Quantity(STACK, "m"), out=np.empty((2, 2, 2)))


def test_pint_in_xarray(no_compute):
    pytest.importorskip("pint_xarray", reason="pint-xarray is not installed")
    ds = xr.Dataset({"cov": (("t", "i", "j"), conditioned(4, 3, 10), {"units": "m^2"})}, {"t": [1, 2, 3, 5]})
    inv = ds.chunk(t=1).pint.quantify().linalg.inv()
    assert inv.cov.pint.units == (1 / inv.cov.pint.registry.Unit("m^2")).units
    assert isinstance(inv.cov.data.magnitude, da.Array)
    assert "units" not in inv.cov.attrs
    labelled = ds.assign_coords(t=("t", [1, 2, 3, 5], {"units": "s"})).chunk(t=1).pint.quantify()
    assert labelled.linalg.inv().cov.pint.units == labelled.cov.linalg.inv().pint.units == inv.cov.pint.units
    back = inv.pint.dequantify()
    with dask.config.set(scheduler="sync"):
        assert_same_bits(back.cov.values, inverse(ds.cov.values))


# --- JAX, pandas ----------------------------------------------------------------------------------------------


def test_jax_arrays():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    a = jax.numpy.asarray(STACK, "float32")
    x = inverse(a)
    assert isinstance(x, jax.Array)
    assert x.devices() == a.devices()
    assert_same_bits(np.asarray(x), inverse(STACK.astype("f4")))
    assert all(isinstance(part, jax.Array) for part in inverse_ex(a))
    assert inverse(a.astype("bfloat16")).dtype == inverse(a.astype("float16")).dtype == "float32"
    for transformed in (jax.jit(inverse), jax.vmap(inverse), jax.grad(lambda a: inverse(a).sum())):
        with pytest.raises(TypeError, match="not inside jit, grad or vmap: call it on the arrays"):
            transformed(a)


def test_data_frames_exchange_index_and_columns():
    J = pd.DataFrame(A, index=["flux", "color"], columns=["mass", "radius"])
    x = inverse(J)
    assert list(x.index) == ["mass", "radius"]
    assert list(x.columns) == ["flux", "color"]
    assert_same_bits(x.to_numpy(), INVERSE[0])
    np.testing.assert_allclose(J @ x, np.eye(2), atol=1e-15)
    assert inverse_ex(J).info == 0
    assert_same_bits(inverse(J.astype("Float64")).to_numpy(), INVERSE[0])
    assert inverse(J.astype("float32")).dtypes.unique() == ["float32"]
    missing = pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": [1, 2]})
    assert inverse(missing, on_error="skipna").isna().all(axis=None)
    twice = pd.DataFrame({"a": [1.1, 3.0], "b": [2, 5]}).set_axis(["a", "a"], axis=1)
    assert_same_bits(inverse(twice).to_numpy(), inverse([[1.1, 2], [3, 5]]))
    with pytest.raises(
        TypeError, match=r"the columns \['mass', 'radius'\] of the DataFrame are not numbers, or sparse"
    ):
        inverse(J.astype("Sparse[float]"))
    J.attrs = {"units": "m", "valid_min": 0}
    assert inverse(J).attrs == {"units": "1/(m)"}
    with pytest.raises(TypeError, match=r"the columns \['b'\] of the DataFrame are not numbers"):
        inverse(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
    with pytest.raises(np.linalg.LinAlgError, match=r"shape \(2, 1\)"):
        inverse(J[["mass"]])


# --- NumPy's own ----------------------------------------------------------------------------------------------


def test_subclasses_of_numpys_array(tmp_path):
    class Named(np.ndarray):
        pass

    for kind in (np.matrix, Named):
        x = inverse(A.view(kind))
        assert type(x) is kind
        assert_same_bits(np.asarray(x), INVERSE[0])
    mapped = np.memmap(tmp_path / "a", "f8", "w+", shape=STACK.shape)
    mapped[:] = STACK
    assert_plain(inverse(mapped))
    for wrong in (A.view(WithUnits), [A.view(WithUnits)]):
        with pytest.raises(TypeError, match=r"WithUnits.*pass numpy.asarray\(a\) if its numbers alone are meant"):
            inverse(wrong)


def test_lists():
    assert_plain(inverse([A.tolist(), (2 * A).tolist()]))
    assert_plain(inverse([A, 2 * A]))
    assert_plain(inverse(tuple(STACK)))
    for wrong in ([da.from_array(A)], [xr.DataArray(A)]):
        with pytest.raises(TypeError, match=r"a list holds .*: stack its items first"):
            inverse(wrong)
    with pytest.raises(TypeError, match="dtype object has no inverse here"):
        inverse([[1, None], [2, 3]])


# --- what is refused ------------------------------------------------------------------------------------------


def sparse_array():
    return pytest.importorskip("sparse", reason="sparse is not installed").COO.from_numpy(STACK)


def cubed_array():
    cubed = pytest.importorskip("cubed", reason="cubed is not installed")
    return cubed.from_array(STACK, chunks=(1, 2, 2))


@pytest.mark.parametrize(
    ("make", "way_out"),
    [
        (lambda tmp_path: "a.zarr", r"a path\. Open it, with zarr\.open_array"),
        (lambda tmp_path: tmp_path / "a.zarr", r"or run a job: dask_batchinv\.invert_store"),
        (lambda tmp_path: zarr.create_group({}), r"Pick an array of it, group\['name'\]"),
        (lambda tmp_path: scipy.sparse.eye_array(3), r"pass a\.toarray\(\)"),
        (lambda tmp_path: scipy.sparse.csr_matrix(A), r"pass a\.toarray\(\)"),
        (lambda tmp_path: sparse_array(), r"pass a\.todense\(\)"),
        (lambda tmp_path: da.from_array(sparse_array(), asarray=False), r"lambda block: block\.todense\(\)"),
        (lambda tmp_path: xr.DataArray(sparse_array()[0], dims=("i", "j")), r"pass a\.todense\(\)"),
        (lambda tmp_path: cubed_array(), r"pass a\.compute\(\)"),
        (lambda tmp_path: dask.delayed(A), r"dask\.array\.from_delayed"),
        (lambda tmp_path: xr.DataArray(A[0]).to_series(), r"pass the array or the DataFrame"),
        (lambda tmp_path: object(), r"numpy\.asarray\(a\)"),
        (lambda tmp_path: None, r"numpy\.asarray\(a\)"),
        (lambda tmp_path: {"a": A}, r"numpy\.asarray\(a\)"),
    ],
)
def test_what_is_not_in_the_table_is_refused_with_the_way_out(tmp_path, make, way_out):
    a = make(tmp_path)
    for function in (inverse, inverse_ex):
        with pytest.raises(TypeError, match=way_out):
            function(a)


# --- blocks that are not what was declared --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: block + 1j, r"block \(1, 0, 0\): dtype float64 was declared, but the block has complex128"),
        (lambda block: block.astype("f4"), r"block \(1, 0, 0\): dtype float64 was declared, but .* float32"),
        (lambda block: np.eye(3)[None], r"block \(1, 0, 0\): shape \(1, 2, 2\) was declared, but .* \(1, 3, 3\)"),
        (lambda block: block.view(WithUnits), r"block \(1, 0, 0\): .*WithUnits may hold more than numbers"),
    ],
)
def test_blocks_that_are_not_what_was_declared_are_named(tmp_path, change, message):
    def second(block, block_info=None):
        return change(block) if block_info[0]["chunk-location"][0] else block

    lazy = da.from_array(STACK, chunks=(1, 2, 2)).map_blocks(second, dtype="f8", meta=np.empty((0, 0, 0)))
    with pytest.raises(TypeError, match=message):
        inverse(lazy).compute(scheduler="sync")
    with pytest.raises(TypeError, match=message):
        inverse_ex(lazy).info.compute(scheduler="sync")
    for out in (np.empty(STACK.shape), tmp_path / "o.zarr"):
        with pytest.raises(TypeError, match=message):
            inverse(lazy, out=out)
    stored = zarr.open_array(tmp_path / "o.zarr", mode="r")
    assert (stored.attrs["complete"], stored.nchunks_initialized) <= (0, 1)


def test_blocks_of_dtypes_that_become_the_same_are_taken():
    lazy = da.from_array(STACK).map_blocks(lambda block: block.astype("i4"), dtype="i8", meta=np.empty((0, 0, 0), "i8"))
    assert_plain(inverse(lazy).compute())


# --- packed numbers -------------------------------------------------------------------------------------------


def test_packed_zarr_arrays_are_refused(tmp_path, no_compute):
    z = zarr.create_array(tmp_path / "z", shape=STACK.shape, dtype="i1", attributes={"_Unsigned": "true"})
    for attributes in ({}, {"scale_factor": 0.1}, {"add_offset": 1}, {"missing_value": -99}, {"_FillValue": -1}):
        z.attrs.put(attributes or {"_Unsigned": "true"})
        for function in (inverse, inverse_ex):
            with pytest.raises(TypeError, match=r"is packed, its attributes have .*open it with xarray\.open_zarr"):
                function(z)
    z.attrs.put({"_FillValue": "AAAAAAAA+H8=", "missing_value": float("nan")})  # NaN means nothing
    inverse(z)
    old = zarr.create_array(tmp_path / "old", shape=STACK.shape, dtype="f8", zarr_format=2, fill_value=0)
    inverse(old)
    old.attrs["_ARRAY_DIMENSIONS"] = ["t", "i", "j"]  # Xarray reads 0 as NaN
    with pytest.raises(TypeError, match="is packed"):
        inverse(old)


def test_packed_data_opened_raw_are_refused(tmp_path):
    ds = xr.Dataset({"cov": (("t", "i", "j"), STACK)}, {"t": [1, 2]})
    packing = {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -1}
    ds.to_zarr(tmp_path / "s", encoding={"cov": packing}, consolidated=False)
    raw = xr.open_zarr(tmp_path / "s", mask_and_scale=False, consolidated=False)
    for call in (raw.linalg.inv, raw.cov.linalg.inv, raw.cov.linalg.inv_ex):
        with pytest.raises(TypeError, match=r"cov is packed, its attributes have scale_factor, _FillValue"):
            call()
    for decoded in (xr.decode_cf(raw), xr.open_zarr(tmp_path / "s", consolidated=False)):
        inv = decoded.linalg.inv()
        assert not {"scale_factor", "add_offset", "_FillValue", "dtype"} & {*inv.cov.attrs, *inv.cov.encoding}
        inv.to_zarr(tmp_path / "t", mode="w", consolidated=False)
        assert_same_bits(xr.open_zarr(tmp_path / "t", consolidated=False).cov.values, INVERSE)
