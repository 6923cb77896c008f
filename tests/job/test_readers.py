"""What others than Zarr and Xarray read of a target: tensorstore, zarrs, and zarr-python 2 in its own environment."""

import json
import os
import subprocess

import numpy as np
import pytest
import xarray as xr
import zarr

from dask_batchinv import inverse, invert_store
from tests.support.stacks import assert_same_bits, conditioned

A = conditioned(30, 3, 10, "complex64")
WAYS = {
    "plain": {},
    "zstd": {"compress": "zstd"},
    "blosc": {"compress": "blosc"},
    "shards": {"shards": {"t": 10}, "chunks": {"t": 5}},
    "compressed shards": {"shards": {"t": 10}, "chunks": {"t": 5}, "compress": "zstd"},
    "format 2": {"zarr_format": 2},
    "format 2, zstd": {"zarr_format": 2, "compress": "zstd"},
    "format 2, blosc": {"zarr_format": 2, "compress": "blosc"},
}
#: A Python with zarr-python 2, which cannot be in the environment of the tests: `ci/readers` makes one.
ZARR_2 = os.environ.get("PYTHON_WITH_ZARR_2")

pytestmark = pytest.mark.filterwarnings("ignore:Both zarr.json", "ignore:Object at", "ignore:Consolidated metadata")


@pytest.fixture(params=WAYS)
def target(request, tmp_path):
    xr.Dataset({"a": (("t", "i", "j"), A)}).chunk(t=10).to_zarr(tmp_path / "s")
    invert_store(tmp_path / "s", tmp_path / "t", tile_size=1000, **WAYS[request.param])
    return tmp_path / "t"


def test_xarray_and_zarr(target):
    assert_same_bits(xr.open_zarr(target).inverse, inverse(A))
    assert_same_bits(zarr.open_group(target, mode="r")["inverse"][...], inverse(A))


def test_tensorstore(target):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    formats = {"zarr3": "zarr.json", "zarr": ".zarray"}
    for driver, document in formats.items():
        if (target / "inverse" / document).exists():
            spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(target / "inverse")}}
            assert_same_bits(np.asarray(tensorstore.open(spec).result().read().result()), inverse(A))


def test_zarrs(target):
    pytest.importorskip("zarrs", reason="zarrs is not installed")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        assert_same_bits(zarr.open_group(target, mode="r")["inverse"][...], inverse(A))


@pytest.mark.skipif(ZARR_2 is None, reason="zarr-python 2 has an environment of its own: run ci/readers")
def test_zarr_python_2(target, tmp_path):
    if not (target / ".zgroup").exists():
        pytest.skip("it is of format 3")
    code = """if True:
        import json, sys, numpy as np, zarr
        assert zarr.__version__.startswith("2."), zarr.__version__
        for open_group in (zarr.open_group, zarr.open_consolidated):
            group = open_group(sys.argv[1], mode="r")
            assert group.attrs["complete"] == 1
            assert (group["info"][...] == 0).all()
            np.save(sys.argv[2], group["inverse"][...])
        print(json.dumps([dict(group["inverse"].attrs), sorted(group)]))
    """
    out = tmp_path / "x.npy"
    command = [ZARR_2, "-c", code, str(target), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    attributes, names = json.loads(done.stdout)
    assert attributes["_ARRAY_DIMENSIONS"] == ["t", "i", "j"]
    assert names == ["info", "inverse", "rcond"]
    assert_same_bits(np.load(out), inverse(A))
