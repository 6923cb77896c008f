"""Fill values that are written in odd ways mean what they mean to Xarray."""

import json

import dask
import numpy as np
import pytest
import xarray as xr
import zarr

from dask_batchinv import invert_store
from tests.support.stacks import assert_same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:variable 'cov' has multiple fill values:xarray.SerializationWarning"),
]


@pytest.mark.parametrize("dtype", ["c8", "c16"])
@pytest.mark.parametrize("fill_value", [[0.0, 0.0], [4.0, 0.0], ["NaN", "NaN"], ["NaN", 0.0], None])
@pytest.mark.parametrize("attribute", [None, [0.0, 0.0], [1.0, 2.0], 3.0, "NaN", ["NaN", "NaN"]])
def test_complex_fill_values_of_format_2(tmp_path, client, dtype, fill_value, attribute):
    """Of null in the metadata the attribute counts, and there a list is several numbers."""
    a = np.array([[[4, 1j], [0, 3]], [[1 + 2j, 1], [2, 7]]], dtype)
    group = zarr.create_group(tmp_path / "s", zarr_format=2)
    group.create_array("cov", shape=a.shape, dtype=dtype, attributes={"_ARRAY_DIMENSIONS": ["t", "i", "j"]})[...] = a
    if attribute is not None:
        group["cov"].attrs["_FillValue"] = attribute
    path = tmp_path / "s" / "cov" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fill_value": fill_value}))
    invert_store(tmp_path / "s", tmp_path / "t", client=client, max_failed=None, dims=("i", "j"))
    with dask.config.set(scheduler="sync"):
        want = xr.open_zarr(tmp_path / "s", consolidated=False)["cov"].linalg.inv(("i", "j"), on_error="nan").values
        assert_same_bits(xr.open_zarr(tmp_path / "t")["inverse"].values, want)
