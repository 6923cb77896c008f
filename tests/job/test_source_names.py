"""Dimensions and coordinates that have the name of something in our targets are refused before anything is written."""

import json

import numpy as np
import pytest

from tests.support.hostile import V2, V3, grid, write_array

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

NAMES = [
    *("inverse", "Info", "RCOND", "ledger", "Ledger"),
    *("zarr.json", "ZARR.json", ".zgroup", ".zattrs", ".zarray", ".Zmetadata"),
    *(".dask_batchinv", ".dask_batchinv.lock", ".Dask_BatchInv-x"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_dimensions(refused, tmp_path, name, axis, zarr_format):
    dims = ["t", "i", "j"]
    dims[axis] = name
    if zarr_format == 2:
        path = write_array(tmp_path / "s", V2, {"_ARRAY_DIMENSIONS": dims})
    else:
        path = write_array(tmp_path / "s", V3 | {"dimension_names": dims})
    text = refused(path)
    assert f"{name} of {path} are names that the target needs itself: rename those dimensions" in text


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not name.casefold().endswith((".json", "zgroup", "zattrs"))]
)
def test_coordinates(refused, tmp_path, name):
    (tmp_path / "g").mkdir()
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"coordinates": name}}
    (tmp_path / "g" / "zarr.json").write_text(json.dumps(group))
    write_array(tmp_path / "g" / "A", V3 | {"dimension_names": ["t", "i", "j"]})
    write_array(tmp_path / "g" / name, V3 | {"shape": [4], **grid(4), "dimension_names": ["t"]})
    assert f"{name} of {tmp_path}/g/A are names" in refused(tmp_path / "g", variable="A")


@pytest.mark.parametrize("name", ["dask_batchinv", "zarr", "json", "inverse_2", "ledgers"])
def test_names_that_are_free(make_source, tmp_path, name):
    from dask_batchinv.job.source.source import open_source

    make_source(np.ones((4, 2, 2)), dimension_names=[name, "i", "j"])
    assert open_source(tmp_path / "source.zarr").dims[0] == name
