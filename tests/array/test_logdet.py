"""`inverse_ex(..., logdet=True)`: the determinants too, of arrays of every kind."""

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr

from dask_batchinv import InverseExLogdet, inverse_ex
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned


@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_as_numpy(structure, dtype, n):
    a = conditioned(7, n, 100, dtype, structure)
    found = inverse_ex(a, assume_a=structure, logdet=True)
    assert_same_bits(found.inverse, inverse_ex(a, assume_a=structure).inverse)
    sign, logdet = np.linalg.slogdet(a.astype(np.result_type(dtype, "f8")))
    close = 100 * n * 100 * np.finfo(dtype).eps  # by its condition number
    assert (found.sign.dtype, found.logdet.dtype) == (np.dtype(dtype), np.finfo(dtype).dtype)
    assert np.allclose(found.logdet, logdet, rtol=close, atol=close)
    assert np.allclose(found.sign, sign, atol=close)


@pytest.mark.parametrize("structure", ["general", "positive definite", "symmetric"])
def test_only_what_the_word_names_is_read(structure):
    a = conditioned(3, 4, 10, structure=structure)
    spoilt = a.copy()
    if structure != "general":
        spoilt[:, np.tril_indices(4, -1)[0], np.tril_indices(4, -1)[1]] = np.nan
    for part, other in zip(
        inverse_ex(a, assume_a=structure, logdet=True), inverse_ex(spoilt, assume_a=structure, logdet=True), strict=True
    ):
        assert_same_bits(part, other)


def test_neighbours_that_fail_change_nothing():
    a = conditioned(50, 4, 10)
    good = inverse_ex(a, logdet=True)
    a[3], a[7, 1, 1], a[11] = 0, np.nan, np.diag([1, 1, 1, 1e-320])
    found = inverse_ex(a, logdet=True)
    assert found.info[[3, 7, 11]].tolist() == [1, -1, -2]
    assert found.logdet[3] == -np.inf
    assert found.sign[3] == 0
    assert np.isnan(found.logdet[[7, 11]]).all()
    others = np.delete(np.arange(50), [3, 7, 11])
    assert_same_bits(found.logdet[others], good.logdet[others])


def test_out_of_range_as_a_number():
    a = 1e-30 * conditioned(3, 20, 10)
    assert np.linalg.det(a).tolist() == [0, 0, 0]
    assert np.allclose(inverse_ex(a, logdet=True).logdet, np.linalg.slogdet(a)[1])


@pytest.mark.parametrize("shape", [(0, 3, 3), (3, 3), (2, 0, 0), (2, 3, 4, 4)])
def test_shapes(shape):
    a = np.broadcast_to(2 * np.eye(shape[-1]), shape)
    found = inverse_ex(a, logdet=True)
    assert found.logdet.shape == found.sign.shape == shape[:-2]
    assert np.allclose(found.logdet, shape[-1] * np.log(2))


def test_lazy_and_labelled(tmp_path):
    a = conditioned(20, 3, 10)
    expected = inverse_ex(a, logdet=True)
    lazy = inverse_ex(da.from_array(a, chunks=(5, 3, 2)), logdet=True)
    stored = inverse_ex(zarr.array(a, chunks=(5, 3, 3)), logdet=True)
    labelled = inverse_ex(xr.DataArray(a, dims=("t", "i", "j")), logdet=True)
    for found in (lazy, stored, labelled):
        assert type(found) is InverseExLogdet
        for part, own in zip(found, expected, strict=True):
            assert_same_bits(np.asarray(part), own)
    ds = xr.DataArray(a, dims=("t", "i", "j"), coords={"t": np.arange(20)}).linalg.inv_ex(logdet=True)
    assert [*ds.data_vars] == ["inverse", "info", "rcond", "sign", "logdet"]
    assert_same_bits(ds.logdet, expected.logdet)
    assert "t" in ds.logdet.coords


def test_masked():
    a = np.ma.MaskedArray(conditioned(4, 2, 10), False)
    a[2, 0, 1] = np.ma.masked
    found = inverse_ex(a, logdet=True)
    assert found.logdet.mask.tolist() == [False, False, True, False]


def test_units_and_derivatives_are_not_lost_in_silence():
    pint = pytest.importorskip("pint", reason="pint is not installed")
    with pytest.raises(TypeError, match="cannot have units"):
        inverse_ex(pint.UnitRegistry().Quantity(np.eye(2), "m"), logdet=True)


def test_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    a = torch.from_numpy(conditioned(4, 3, 10))
    found = inverse_ex(a, logdet=True)
    assert torch.allclose(found.logdet, torch.linalg.slogdet(a).logabsdet)
    with pytest.raises(TypeError, match="no derivative"):
        inverse_ex(a.requires_grad_(), logdet=True)
