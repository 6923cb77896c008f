"""`python -O`, which takes asserts away: none of ours does work."""

import subprocess
import sys

import pytest

ARRAYS = """
import numpy as np, zarr
from dask_batchinv import inverse, inverse_ex
assert False
a = np.stack([np.diag([1.0, 2.0])] * 6)
z = zarr.create_array("a", shape=a.shape, chunks=(2, 2, 2), dtype="f8")
z[...] = a
for x in (inverse(a), inverse(z, out="x")[...], inverse(z).compute(), inverse_ex(a, assume_a="pos").inverse):
    print(x[5, 1, 1])
"""
JOB = """
from dask_batchinv import invert_store, verify_store
if __name__ == "__main__":
    assert False
    print(invert_store("a", "t", workers=1, tile_size=32).complete)
    print(verify_store("t", source="a", workers=1).ok)
"""

NESTED = "import zarr; group = zarr.create_group({}); group.create_group('x'); list(group.groups())"


def optimized(folder, *arguments):
    command = [sys.executable, "-O", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def arrays(tmp_path):
    """Where arrays were inverted without asserts."""
    ended = optimized(tmp_path, "-c", ARRAYS)
    assert ended.stdout.split() == ["0.5"] * 4, ended.stderr
    return tmp_path


def test_jobs_work_where_zarr_does_and_are_refused_where_it_does_not(arrays):
    (arrays / "job.py").write_text(JOB)
    zarr_works = optimized(arrays, "-c", NESTED).returncode == 0
    ended = optimized(arrays, "job.py")
    command = optimized(arrays, "-m", "dask_batchinv.cli", "run", "a", "u", "--workers", "1")
    if zarr_works:
        assert ended.stdout.split() == ["True", "True"], ended.stderr
        assert command.returncode == 0, command.stderr
    else:
        assert "RefusedError: Python runs without asserts" in ended.stderr
        assert command.returncode == 2
        assert command.stderr.startswith("Error: Python runs without asserts")
        assert {path.name for path in arrays.iterdir()} == {"a", "x", "job.py"}
