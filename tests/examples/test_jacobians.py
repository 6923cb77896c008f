"""The Jacobians and gradients of the example, against shape functions and NumPy."""

import json
import re
import runpy

import numpy as np
import pytest

from tests.examples.scripts import run_example, script


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jacobians")
    printed = run_example("jacobians", folder, "20000", pictures=("jacobians", "jacobians_times"))
    return folder, printed, json.loads((folder / "jacobians.json").read_text())


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(script("jacobians")))


def trilinear(corners, point):
    """Return where the usual trilinear shape functions take a point of the unit cube."""
    weights = [np.prod([p if c else 1 - p for c, p in zip(corner, point, strict=True)])
               for corner in np.ndindex(2, 2, 2)]  # fmt: skip
    return np.tensordot(weights, corners.reshape(8, -1), 1)


def test_it_says_what_was_timed(ran):
    _, out, figures = ran
    assert re.search(r"^21,952 Jacobians", out)
    assert {"dask_batchinv.inverse", "numpy.linalg.inv"} <= set(figures["seconds"])


def test_jacobians_are_the_differences_of_the_map(example):
    nodes = example["mesh"](4)
    found = example["derivatives"](nodes)
    h = 1e-6
    for element in ((0, 0, 0), (1, 3, 2)):
        corners = nodes[tuple(slice(i, i + 2) for i in element)]
        for which in np.ndindex(2, 2, 2):
            point = np.array([example["GAUSS"][i] for i in which])
            steps = [(trilinear(corners, point + d) - trilinear(corners, point - d)) / (2 * h) for d in h * np.eye(3)]
            np.testing.assert_allclose(
                found[tuple(2 * np.array(element) + which)], np.stack(steps, axis=-1), rtol=1e-8, atol=1e-10
            )


def test_the_gradients_are_right(ran, example):
    _, _, figures = ran
    assert figures["patch"] < 1e-12
    assert 1.7 < figures["coarse_error"] / figures["error"] < 2.4  # 14 elements along an edge, and 7

    # By NumPy's inverses, and solving instead of inverting.
    nodes = example["mesh"](6)
    J, along = example["derivatives"](nodes), example["derivatives"](example["wave"](nodes)[0])
    solved = np.linalg.solve(J.swapaxes(-2, -1), along[..., None])[..., 0]
    np.testing.assert_allclose(
        example["physical"](example["dask_batchinv"].inverse(J), along), solved, rtol=1e-11, atol=1e-12
    )
    np.testing.assert_allclose(example["adjugate"](J), np.linalg.inv(J), rtol=1e-10, atol=1e-12)


def test_what_is_damaged_is_counted(ran, example):
    _, out, figures = ran
    assert "numpy.linalg.inv raises LinAlgError: Singular matrix" in out
    J = example["derivatives"](example["damaged"](example["mesh"](14))).reshape(-1, 3, 3)
    missing = np.isnan(J).any(axis=(1, 2))
    singular = ~missing & (J[..., 2] == 0).all(axis=1)
    rest = J[~missing & ~singular]
    poor = 1 / np.linalg.cond(rest, 1) < example["POOR"]
    assert figures["kinds"]["not finite"] == missing.sum() == 64  # eight elements have the node
    assert figures["kinds"]["flat"] == singular.sum() == 8
    assert figures["kinds"]["poor"] == poor.sum() == 8
    assert figures["kinds"]["inverted"] == len(rest)
    assert figures["kinds"]["inside out"] >= 4  # four Gauss points of the element are in the layer
