"""The bounds of the example are those of the textbook, and its failures are where there is nothing to be known."""

import dask
import numpy as np
import pytest
import xarray as xr

from tests.examples.scripts import assert_printed, run_example

FIELD, TOWN, WATER, SHADOW, BUILDING = range(5)
LOOKS = 50


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("insar_coherence")
    return folder, run_example("insar_coherence", folder, pictures=("insar_coherence", "insar_coherence_histories"))


@pytest.fixture(scope="module")
def folder(ran):
    return ran[0]


def test_the_page_shows_what_is_printed(ran):
    assert_printed("insar_coherence", ran[1])


def opened(path):
    with dask.config.set(scheduler="sync"):
        return xr.open_zarr(path, consolidated=False).load()


@pytest.fixture(params=[10, 30, 60])
def series(request, folder):
    """The scene, the account of |Γ| and the bounds of n passes."""
    n = request.param
    return n, opened(folder / "ground.zarr"), opened(folder / f"inverse_{n}.zarr"), opened(folder / f"bound_{n}.zarr")


def test_info_tells_what_failed(series):
    _, ground, account, bound = series
    kind, info = ground.kind.values, account["info"].values
    assert set(np.unique(kind)) == {FIELD, TOWN, WATER, SHADOW, BUILDING}
    np.testing.assert_array_equal(info, np.select([kind == SHADOW, kind == BUILDING], [1, 2], 0))
    known = np.isfinite(bound.bound.values)
    np.testing.assert_array_equal(known, np.isin(kind, [FIELD, TOWN])[..., None] & np.ones(known.shape[2], bool))


def test_inverses_are_those_of_the_closed_forms(series):
    n, ground, account, _ = series
    one = np.eye(n)
    beside = np.eye(n, k=1) + np.eye(n, k=-1)
    inner = np.diag([0.0] + [1.0] * (n - 2) + [0.0])
    for y, x in [(0, 20), (5, 25), (20, 20), (8, 10), (12, 14)]:
        rho = ground.rho.values[y, x]
        if ground.kind.values[y, x] == FIELD:
            expected = (one - rho * beside + rho**2 * inner) / (1 - rho**2)
        else:
            expected = (one - rho / (1 + (n - 1) * rho)) / (1 - rho)
        np.testing.assert_allclose(account["inverse"].values[y, x], expected, rtol=1e-9, atol=1e-12)


def test_bounds_are_those_of_the_closed_forms(series):
    n, ground, _, found = series
    kind, rho, bound = ground.kind.values, ground.rho.values, found.bound.values
    r = rho[kind == FIELD][:, None]
    # A chain of interferograms of neighbouring passes, each with the variance (1 - ρ²) / (2 L ρ²).
    np.testing.assert_allclose(bound[kind == FIELD] ** 2, np.arange(1, n) * (1 - r**2) / (2 * LOOKS * r**2), rtol=1e-9)
    r = rho[kind == TOWN][:, None]
    expected = (1 - r) * (1 + (n - 1) * r) / (LOOKS * n * r**2) * np.ones(n - 1)
    np.testing.assert_allclose(bound[kind == TOWN] ** 2, expected, rtol=1e-9)


@pytest.mark.parametrize(("y", "x"), [(5, 25), (8, 10)])
def test_the_fisher_information_is_that_of_complex_normal_data(folder, y, x):
    """The bound from R = Γ exp(i (φ_i - φ_j)) and its derivatives: L tr(R⁻¹ ∂R/∂φ_i R⁻¹ ∂R/∂φ_j) (Bangs, 1971)."""
    gamma = opened(folder / "coherence_10.zarr").coherence.values[y, x]
    phase = np.exp(1j * np.random.default_rng(1).uniform(-np.pi, np.pi, 10))
    R = gamma * np.outer(phase, phase.conj())
    solved = []
    for i in range(1, 10):
        of_i = (np.arange(10) == i).astype(float)
        solved.append(np.linalg.solve(R, 1j * (of_i[:, None] - of_i) * R))
    fisher = LOOKS * np.array([[np.trace(a @ b).real for a in solved] for b in solved])
    expected = np.sqrt(np.diag(np.linalg.inv(fisher)))
    np.testing.assert_allclose(opened(folder / "bound_10.zarr").bound.values[y, x], expected, rtol=1e-9)
