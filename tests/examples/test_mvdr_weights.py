"""The weights of the example are those of the textbook, and lose as much as theory says."""

import dask
import numpy as np
import pytest
import xarray as xr

from tests.examples.scripts import assert_printed, run_example

LOADING, INTERFERER = 3.0, 100.0


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mvdr_weights")
    return folder, run_example("mvdr_weights", folder)


@pytest.fixture(scope="module")
def found(ran):
    with dask.config.set(scheduler="sync"):
        return xr.open_zarr(ran[0] / "weights.zarr", consolidated=False).load()


def test_the_page_shows_what_is_printed(ran):
    assert_printed("mvdr_weights", ran[1])


def steering(found, angle):
    """exp(-2πi f τ), τ = m d sin θ / c: (frequency, mic), or (frequency, frame, mic) for an angle per frame."""
    delay = 0.04 / 343.0 * np.sin(np.deg2rad(angle))
    return np.exp(-2j * np.pi * np.multiply.outer(np.multiply.outer(found.frequency.values, delay), np.arange(8)))


def of(found, name):
    core = {"covariance": ("mic", "mic_2"), "loaded": ("mic",), "unloaded": ("mic",)}.get(name, ())
    return found[name].transpose("frequency", "frame", *core).values


def test_info_names_the_frames_that_are_lost_and_the_dead_microphone(found):
    expected = np.zeros(120, int)
    expected[30:34], expected[80:90] = 1, 6
    np.testing.assert_array_equal(of(found, "info"), np.broadcast_to(expected, of(found, "info").shape))


@pytest.mark.parametrize("name", ["loaded", "unloaded"])
def test_the_target_passes_unchanged(found, name):
    response = np.einsum("ftm,fm->ft", of(found, name).conj(), steering(found, 20.0))
    good = of(found, "info") == 0
    np.testing.assert_allclose(response[good | (name == "loaded")], 1, atol=1e-12)


@pytest.mark.parametrize(("name", "loading"), [("loaded", LOADING), ("unloaded", 0.0)])
def test_no_other_weights_let_less_pass(found, name, loading):
    """With Lagrange's multiplier, the optimum is where Rw is along a; that is the solution of one bordered system."""
    R, w, a = of(found, "covariance"), of(found, name), steering(found, 20.0)
    for f, t in [(0, 0), (12, 60), (28, 119)]:
        bordered = np.zeros((9, 9), complex)
        bordered[:8, :8] = R[f, t] + loading * np.eye(8)
        bordered[:8, 8], bordered[8, :8] = a[f], a[f].conj()
        np.testing.assert_allclose(w[f, t], np.linalg.solve(bordered, np.eye(9)[8])[:8], rtol=1e-8)


def test_the_signal_to_noise_ratio_is_what_theory_says(found):
    """Optimum by Sherman and Morrison; the share that is left of it has a beta distribution.

    Reed, Mallett and Brennan, IEEE Transactions on Aerospace and Electronic Systems 10, 1974.
    """
    a, v = steering(found, 20.0)[:, None], steering(found, np.linspace(-70, -10, 120))
    overlap = np.abs((a.conj() * v).sum(-1)) ** 2
    optimum = 8 - INTERFERER * overlap / (1 + INTERFERER * 8)
    np.testing.assert_allclose(of(found, "optimum"), optimum, rtol=1e-10)

    good = of(found, "info") == 0
    left = {}
    for name in ("loaded", "unloaded"):
        w = of(found, name)
        disturbance = (np.abs(w) ** 2).sum(-1) + INTERFERER * np.abs((w.conj() * v).sum(-1)) ** 2
        left[name] = (1 / disturbance / optimum)[good]
        np.testing.assert_allclose(of(found, f"sinr_{name}")[good], left[name], rtol=1e-10)
        assert left[name].max() <= 1 + 1e-12
    p, q = 16 + 2 - 8, 8 - 1
    deviation = np.sqrt(p * q / ((p + q) ** 2 * (p + q + 1)))
    assert abs(left["unloaded"].mean() - p / (p + q)) < 5 * deviation / np.sqrt(good.sum())
    assert abs(left["unloaded"].std() / deviation - 1) < 0.1
    assert left["loaded"].mean() > 0.9
