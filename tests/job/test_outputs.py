"""What a target holds: the inverses or their diagonals, determinants, in which dtype, under which names."""

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.outcome import RefusedError, TargetError
from tests.support.stacks import assert_same_bits, conditioned

STRUCTURES = ("general", "positive definite", "symmetric", "upper triangular", "diagonal")


def source(path, a, dims=("t", "row", "col"), chunks=None, **attributes):
    group = zarr.create_group(path, attributes={"title": "tests"})
    array = group.create_array(
        "cov", shape=a.shape, dtype=a.dtype, chunks=chunks or (10, *a.shape[1:]), dimension_names=dims,
        attributes=attributes,
    )  # fmt: skip
    array[...] = a
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_diagonal_and_determinant(tmp_path, structure, dtype):
    a = conditioned(40, 4, 10, dtype, structure)
    source(tmp_path / "s", a, units="m2", long_name="covariance")
    invert_store(tmp_path / "s", tmp_path / "t", assume_a=structure, keep="diagonal", logdet=True)
    found = xr.open_zarr(tmp_path / "t")
    assert sorted(map(str, found.data_vars)) == ["diagonal", "info", "logdet", "rcond", "sign"]
    assert found.diagonal.dims == ("t", "row")
    assert found.diagonal.attrs["units"] == "1/(m2)"
    assert found.diagonal.attrs["long_name"] == "diagonal of the inverse of covariance"
    assert_same_bits(found.diagonal, np.einsum("tii->ti", inverse(a, assume_a=structure)))
    sign, logdet = np.linalg.slogdet(a.astype(np.result_type(dtype, "float64")))
    eps = np.finfo(dtype).eps
    assert found.logdet.dtype == np.finfo(dtype).dtype
    assert np.allclose(found.logdet, logdet, rtol=0, atol=1000 * eps)
    assert np.allclose(found.sign, sign, rtol=0, atol=1000 * eps)
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok


def test_failures(tmp_path):
    a = conditioned(6, 3, 10)
    a[1], a[2, 0, 0], a[3] = 0, np.nan, np.diag([1, 1, 1e-320])
    source(tmp_path / "s", a)
    invert_store(tmp_path / "s", tmp_path / "t", keep="diagonal", logdet=True, max_failed=None)
    found = xr.open_zarr(tmp_path / "t").load()
    assert found["info"].values.tolist() == [0, 1, -1, -2, 0, 0]
    assert np.isnan(found.diagonal[1:4]).all()
    assert found.sign[1] == 0
    assert found.logdet[1] == -np.inf
    assert np.isnan(found.logdet[2:4]).all()
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok
    # With "positive definite" a pivot that is not positive does not say what the determinant is.
    a = np.array([[[1.0, 2.0], [2.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])
    source(tmp_path / "p", a)
    invert_store(tmp_path / "p", tmp_path / "u", assume_a="pos", logdet=True, max_failed=None)
    found = xr.open_zarr(tmp_path / "u").load()
    assert found["info"].values.tolist() == [2, 0, 0]
    assert np.isnan([found.sign[0], found.logdet[0]]).all()
    assert np.allclose(found.logdet[1], np.log(3))
    assert verify_store(tmp_path / "u", source=tmp_path / "p").ok


@pytest.mark.parametrize("dims", [("row", "t", "col"), ("col", "row", "t"), ("row", "col", "t")])
def test_core_dimensions_anywhere(tmp_path, dims):
    a = conditioned(20, 3, 10)
    stack = xr.DataArray(a, dims=("t", "row", "col")).transpose(*dims)
    source(tmp_path / "s", stack.values, dims, chunks=[{"t": 5}.get(dim, 3) for dim in dims])
    invert_store(tmp_path / "s", tmp_path / "t", dims=("row", "col"), keep="diagonal", logdet=True)
    found = xr.open_zarr(tmp_path / "t")
    assert found.diagonal.dims == tuple(dim for dim in dims if dim != "col")
    assert_same_bits(found.diagonal.transpose("t", "row"), np.einsum("tii->ti", inverse(a)))
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float64", "float32"), ("float32", "float64"), ("complex128", "complex64")]
)
def test_another_dtype(tmp_path, stored, wanted):
    a = conditioned(40, 4, 100, stored)
    source(tmp_path / "s", a)
    invert_store(tmp_path / "s", tmp_path / "t", dtype=wanted)
    found = xr.open_zarr(tmp_path / "t")
    wide = np.result_type(stored, wanted)
    assert_same_bits(found.inverse, inverse(a.astype(wide)).astype(wanted))  # computed in the wider of the two
    assert found.rcond.dtype == np.finfo(wanted).dtype
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok


def test_what_has_no_room_in_the_dtype_overflows(tmp_path):
    a = conditioned(4, 3, 10)
    a[1] *= 1e-60
    source(tmp_path / "s", a)
    report = invert_store(tmp_path / "s", tmp_path / "t", dtype="float32", max_failed=1)
    assert report.failed["overflow"] == 1
    found = xr.open_zarr(tmp_path / "t").load()
    assert found["info"].values.tolist() == [0, -2, 0, 0]
    assert np.isnan(found.inverse[1]).all()
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok


def test_names(tmp_path):
    a = conditioned(20, 3, 10)
    source(tmp_path / "s", a, dims=("t", "inverse", "rcond"))
    with pytest.raises(RefusedError, match="or give the arrays of the target other names"):
        invert_store(tmp_path / "s", tmp_path / "t")
    names = {"inverse": "precision", "rcond": "quality"}
    invert_store(tmp_path / "s", tmp_path / "t", names=names)
    found = xr.open_zarr(tmp_path / "t")
    assert sorted(map(str, found.data_vars)) == ["info", "precision", "quality"]
    assert_same_bits(found.precision, inverse(a))
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok
    (tmp_path / "t/precision/c.0.0.0").unlink()
    assert invert_store(tmp_path / "s", tmp_path / "t", names=names).tiles_now == 1
    invert_store(tmp_path / "s", tmp_path / "t", names=names, overwrite=True)
    with pytest.raises(TargetError, match="outputs was"):
        invert_store(tmp_path / "s", tmp_path / "t", names={"inverse": "weights", "rcond": "quality"})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"names": {"inverse": "info"}}, "two arrays cannot have one name"),
        ({"names": {"inverse": "ledger"}}, "two arrays cannot have one name"),
        ({"names": {"inverse": "a/b"}}, "cannot be the name of an array"),
        ({"names": {"diagonal": "d"}}, "can be given to inverse, rcond, info"),
        ({"dtype": "int8"}, "results can be stored as float32"),
        ({"keep": "trace"}, "keep must be one of"),
    ],
)
def test_refused(tmp_path, options, why):
    source(tmp_path / "s", conditioned(4, 2, 10))
    with pytest.raises(RefusedError, match=why):
        invert_store(tmp_path / "s", tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_complex_inverses_have_imaginary_parts(tmp_path):
    source(tmp_path / "s", conditioned(4, 2, 10, "complex64"))
    with pytest.raises(RefusedError, match="store their inverses as complex64"):
        invert_store(tmp_path / "s", tmp_path / "t", dtype="float32")


def test_on_the_command_line(tmp_path):
    source(tmp_path / "s", conditioned(20, 3, 10))
    options = ["--keep", "diagonal", "--logdet", "--dtype", "float32", "--names", "diagonal=variance,logdet=logdet_cov"]
    ran = CliRunner().invoke(main, ["run", str(tmp_path / "s"), str(tmp_path / "t"), "--quiet", *options])
    assert ran.exit_code == 0, ran.output
    found = xr.open_zarr(tmp_path / "t")
    assert sorted(map(str, found.data_vars)) == ["info", "logdet_cov", "rcond", "sign", "variance"]
    assert found.variance.dtype == "float32"
    ran = CliRunner().invoke(main, ["run", str(tmp_path / "s"), str(tmp_path / "u"), "--names", "diagonal"])
    assert ran.exit_code == 2
    assert "WHAT=NAME" in ran.output
