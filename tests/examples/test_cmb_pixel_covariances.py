"""The covariances of the example are the adjugates over the determinants, and its map has the noise that they say."""

import dask
import numpy as np
import pytest
import xarray as xr

from tests.examples.scripts import assert_printed, run_example

NOISE = 300.0


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cmb_pixel_covariances")
    return folder, run_example("cmb_pixel_covariances", folder)


@pytest.fixture(scope="module")
def folder(ran):
    return ran[0]


def test_the_page_shows_what_is_printed(ran):
    assert_printed("cmb_pixel_covariances", ran[1])


@pytest.fixture(scope="module")
def sky(folder):
    with dask.config.set(scheduler="sync"):
        return xr.open_zarr(folder / "normal_matrices.zarr").load()


@pytest.fixture(scope="module")
def found(folder):
    with dask.config.set(scheduler="sync"):
        return xr.open_zarr(folder / "covariances.zarr", consolidated=False).load()


def by_cofactors(packed):
    """Return the inverses of packed symmetric 3 x 3 matrices, packed alike."""
    a, b, c, d, e, f = np.moveaxis(packed, -1, 0)
    adjugate = [d * f - e * e, c * e - b * f, b * e - c * d, a * f - c * c, b * c - a * e, a * d - b * b]
    determinant = a * adjugate[0] + b * adjugate[1] + c * adjugate[2]
    return np.stack(adjugate, axis=-1) / determinant[..., None]


def norm_1(packed):
    a, b, c, d, e, f = np.abs(np.moveaxis(packed, -1, 0))
    return np.max([a + b + c, b + d + e, c + e + f], axis=0)


def test_the_covariances_stand_as_the_matrices_do(sky, found):
    assert found["inverse"].dims == sky.normal_matrix.dims == ("y", "x", "pair")
    assert list(found.pair.values) == list(sky.pair.values) == ["II", "IQ", "IU", "QQ", "QU", "UU"]


def test_the_covariances_are_those_by_cofactors(sky, found):
    good = found["info"].values == 0
    assert good.mean() > 0.6
    expected = by_cofactors(sky.normal_matrix.values[good])
    # In units of the errors themselves: a correlation that is zero but for rounding has no digits of its own.
    error = np.sqrt(expected[:, [0, 3, 5]])
    scale = np.stack([error[:, i] * error[:, j] for i, j in zip(*np.triu_indices(3), strict=True)], axis=-1)
    np.testing.assert_allclose(found["inverse"].values[good] / scale, expected / scale, atol=1e-11)


def test_what_is_cut(sky, found):
    seen, info = sky.hits.values > 0, found["info"].values
    assert 0.3 < (~seen).mean() < 0.37
    # One sample of each detector is one angle: two equations for three unknowns, whatever rounding makes of them.
    one_angle = sky.hits.values == 2
    assert one_angle.any()
    assert ((info[one_angle] > 0) | (info[one_angle] == -3)).all()

    more = sky.hits.values > 2
    packed = sky.normal_matrix.values[more]
    rcond = 1 / (norm_1(packed) * norm_1(by_cofactors(packed)))
    np.testing.assert_allclose(found["rcond"].values[more], rcond, rtol=1e-6, atol=1e-12)
    assert (rcond < 1e-3).sum() > 100
    np.testing.assert_array_equal(info[more], np.where(rcond < 1e-3, -3, 0))
    np.testing.assert_array_equal(info[~seen], 1)
    np.testing.assert_array_equal(np.isnan(found["inverse"].values).all(axis=-1), info != 0)


def test_the_matrices_are_those_of_detectors_at_right_angles(sky, found):
    """cos² + sin² = 1, and what two crossed detectors see of the polarisation cancels: the error of I is σ / √hits."""
    II, IQ, IU, QQ, _, UU = np.moveaxis(sky.normal_matrix.values, -1, 0)
    np.testing.assert_allclose(II, sky.hits.values / NOISE**2, rtol=1e-12)
    np.testing.assert_allclose(QQ + UU, II, rtol=1e-12)
    np.testing.assert_allclose([IQ, IU], 0, atol=1e-12 * II.max())
    good = found["info"].values == 0
    error = np.sqrt(found["inverse"].sel(pair="II").values[good])
    np.testing.assert_allclose(error, NOISE / np.sqrt(sky.hits.values[good]), rtol=1e-12)


def test_the_noise_map_has_the_noise_that_the_covariances_say(folder, found):
    with dask.config.set(scheduler="sync"):
        stokes = xr.open_zarr(folder / "noise_map.zarr").noise_map.load()
    good = found["info"].values == 0
    for name, pair in [("I", "II"), ("Q", "QQ"), ("U", "UU")]:
        reduced = stokes.sel(stokes=name).values[good] / np.sqrt(found["inverse"].sel(pair=pair).values[good])
        # A mean of squares of n standard normal numbers is 1, give or take the square root of 2 / n.
        assert abs((reduced**2).mean() - 1) < 5 * np.sqrt(2 / reduced.size)
