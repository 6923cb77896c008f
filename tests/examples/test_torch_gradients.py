"""The gradient and the fit of the example, against the likelihood in NumPy and SciPy."""

import subprocess
import sys

import numpy as np
import pytest

from tests.examples.scripts import run_example, script


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    folder = tmp_path_factory.mktemp("torch_gradients")
    printed = run_example("torch_gradients", folder)
    with np.load(folder / "torch_gradients.npz") as numbers:
        return printed, dict(numbers)


def covariances(parameters, strength):
    L = np.zeros((4, 4))
    L[np.tril_indices(4)] = parameters[:10]
    return L, strength[:, None, None] * (L @ L.T) + np.diag(np.exp(parameters[10:]))


def loss(parameters, strength, r):
    """Return minus the mean log likelihood: by Cholesky factors, and no inverse."""
    factor = np.linalg.cholesky(covariances(parameters, strength)[1])
    whitened = np.linalg.solve(factor, r[..., None])[..., 0]
    logdet = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
    return ((whitened**2).sum(axis=1) + logdet).mean() / 2


def slope(parameters, strength, r):
    """Return its gradient as one derives it on paper, from dS = strength · (dL Lᵀ + L dLᵀ) + diag(exp(d) dd)."""
    L, S = covariances(parameters, strength)
    X = np.linalg.inv(S)
    u = np.einsum("pij,pj->pi", X, r)
    G = X - u[:, :, None] * u[:, None, :]
    by_noise = np.exp(parameters[10:]) * np.diagonal(G.mean(axis=0)) / 2
    return np.concatenate([((strength[:, None, None] * G).mean(axis=0) @ L)[np.tril_indices(4)], by_noise])


def differences(function, at, h):
    """Return the derivatives of a function by central differences, along the first axis."""
    return np.array([(function(at + d) - function(at - d)) / (2 * h) for d in h * np.eye(len(at))])


def test_the_gradient_is_right(ran):
    _, n = ran
    expected = differences(lambda p: loss(p, n["strength"], n["r"]), n["start"], 1e-5)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(n["gradient"], expected, atol=1e-8)
    np.testing.assert_allclose(n["gradient"], slope(n["start"], n["strength"], n["r"]), atol=1e-13)


def test_the_fit_is_a_maximum_near_the_truth(ran):
    _, n = ran
    at = n["strength"], n["r"]
    # In standard errors, by how much a parameter is off when it alone has not come to its end.
    assert np.abs(slope(n["found"], *at) * len(n["r"]) * n["error"]).max() < 0.05
    assert loss(n["found"], *at) < loss(n["true"], *at) < loss(n["start"], *at)
    assert np.abs((n["found"] - n["true"]) / n["error"]).max() < 4


def test_the_standard_errors_are_those_of_the_curvature(ran):
    _, n = ran
    hessian = differences(lambda p: slope(p, n["strength"], n["r"]), n["found"], 1e-4)
    np.testing.assert_allclose(n["error"], np.sqrt(np.diag(np.linalg.inv(len(n["r"]) * hessian))), rtol=1e-6)


def test_without_torch_it_says_what_to_install(tmp_path):
    path = str(script("torch_gradients"))
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({path!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "This example needs torch: pip install torch\n")
