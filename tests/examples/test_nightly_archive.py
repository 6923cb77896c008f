"""What the nights of the example have done, and that the inverses are right."""

import json

import dask
import numpy as np
import xarray as xr

from tests.examples.scripts import run_example


def test_nightly_archive(tmp_path):
    run_example("nightly_archive", tmp_path)
    figures = json.loads((tmp_path / "nightly_archive.json").read_text())
    assert figures["verified"]
    assert figures["same"] == {"inverse": True, "info": True, "rcond": True}

    # What each night wrote is what had been added, or replaced, before it.
    first, *middle, killed, resumed, one, last = figures["written"]
    assert first == list(range(30))
    assert middle == [[30], [31], [], [32, 33], [34], [35], [20, 21, 22], [36], []]
    assert set(killed) < set(range(37, 117))
    assert set(killed) | set(resumed) == set(range(37, 117))
    assert (one, last) == ([117], [118])

    with dask.config.set(scheduler="sync"):
        cov = xr.open_zarr(tmp_path / "covariances.zarr")["cov"].load()
        target = xr.open_zarr(tmp_path / "inverses.zarr", consolidated=False).load()
    assert target.sizes["day"] == 119
    assert not target["info"].any()
    np.testing.assert_allclose(target["inverse"].values, np.linalg.inv(cov.values), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(target["rcond"].values, 1 / np.linalg.cond(cov.values, 1), rtol=1e-9)
