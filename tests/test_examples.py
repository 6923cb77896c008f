"""What README and the examples show is what happens."""

import doctest
import runpy
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr

from tests.examples.scripts import assert_printed, run_example, script
from tests.support.stacks import residual_ratio

ROOT = Path(__file__).parent.parent


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with dask.config.set(scheduler="sync"):
        found = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 10
    assert found.failed == 0


def test_diffusion_mri(tmp_path):
    pytest.importorskip("dipy", reason="the example's data come with dipy: pip install .[examples]")
    printed = run_example("diffusion_mri", tmp_path, pictures=("standard_errors",))
    assert "matrices         1,000, 0 without an inverse" in printed
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert_printed("diffusion_mri", printed)

    with dask.config.set(scheduler="sync"):
        matrices = xr.open_zarr(tmp_path / "normal_matrices.zarr")["normal_matrix"].load()
        account = xr.open_zarr(tmp_path / "covariances.zarr").load()
        errors = xr.open_zarr(tmp_path / "standard_errors.zarr")["standard_error"].load()
    inverse = account["inverse"].values.reshape(-1, 7, 7)
    assert residual_ratio(matrices.values.reshape(-1, 7, 7), inverse).max() <= 3
    np.testing.assert_allclose(inverse, np.linalg.inv(matrices.values).reshape(-1, 7, 7), rtol=1e-9, atol=1e-20)
    assert list(account["p"].values) == list(matrices["p"].values)

    # The textbook formula for one voxel, with nothing of the example's own.
    example = runpy.run_path(str(script("diffusion_mri")))
    signal, X = example["load"]()
    s = signal.values[3, 4, 5]
    root = s[:, None]
    _, rss, *_ = np.linalg.lstsq(root * X, s * np.log(s), rcond=None)
    cov = rss[0] / (65 - 7) * np.linalg.inv((root * X).T @ (root * X))
    np.testing.assert_allclose(errors.values[3, 4, 5], np.sqrt(np.diag(cov)), rtol=1e-8)
