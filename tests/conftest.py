"""Fixtures: clusters, and stores with stacks in them."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile

import dask
import numcodecs
import pytest
import zarr
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits

from dask_batchinv import RefusedError, invert_store
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.prepare import prepare
from dask_batchinv.kernels.device import why_unusable
from tests.gpu import fake_cupy
from tests.support.running import run_cpu, run_gpu
from tests.support.targets import spoilt

settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile("ci")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # those have it from who starts them
        os.environ[fake_cupy.FOLDER] = tempfile.mkdtemp(prefix="emulated-")
    else:
        # Threads of BLAS that wait for work keep the processors from the tests beside.
        threadpool_limits(1, user_api="blas")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[fake_cupy.FOLDER])


def pytest_collection_modifyitems(config, items):
    reasons = {
        "slow": None if "slow" in config.getoption("-m") else "takes minutes: run with -m slow",
        "gpu": why_unusable(),
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def processes():
    """A client of two worker processes, shared by all tests."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit="2GiB", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def threads():
    """A client whose worker lives in this process."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


class CountingScheduler:
    """A Dask scheduler that counts how often something is computed, and may forbid it."""

    def __init__(self, limit=0):
        self.limit, self.count = limit, 0

    def __call__(self, dsk, keys, **kwargs):
        self.count += 1
        if self.count > self.limit:
            raise RuntimeError("something was computed that should have stayed lazy")
        return dask.get(dsk, keys, **kwargs)


@pytest.fixture
def no_compute():
    with dask.config.set(scheduler=CountingScheduler()):
        yield


@pytest.fixture
def make_source(tmp_path):
    """Write a stack to a Zarr array and return its path."""

    def make(a, name="source.zarr", chunks=None, **options):
        chunks = chunks or (max(1, len(a) // 4), *a.shape[1:])
        path = tmp_path / name
        options.setdefault("config", {"write_empty_chunks": True})
        options.setdefault("fill_value", 0)
        array = zarr.create_array(path, shape=a.shape, chunks=chunks, dtype=a.dtype, **options)
        array[...] = a
        return path

    return make


@pytest.fixture
def client(threads):
    return threads


@pytest.fixture
def done(tmp_path, make_source, client):
    a, _ = spoilt(60)
    source = make_source(a[:40], chunks=(10, 3, 3))
    invert_store(source, tmp_path / "t", client=client, tile_size=720, max_failed=None)
    return source, tmp_path / "t"


@pytest.fixture(params=[
    "cpu",
    pytest.param("emulated", marks=pytest.mark.skipif(not fake_cupy.COMPILER, reason="needs a C++ compiler")),
    pytest.param("gpu", marks=pytest.mark.gpu),
])  # fmt: skip
def backend(request):
    """Where kernels run. "emulated": those for GPUs, on the CPU, with what stands for CuPy."""
    if request.param == "emulated":
        with fake_cupy.installed():
            yield request.param
    else:
        yield request.param


@pytest.fixture
def run(backend):
    """Call a bare kernel for arrays in main memory."""
    return run_cpu if backend == "cpu" else run_gpu


# --- hostile sources ------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """Every chunk that anything reads through Zarr."""
    seen = []
    original = zarr.storage.LocalStore.get

    async def get(self, key, *args, **kwargs):
        seen.append(key)
        return await original(self, key, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", get)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(numcodecs.Pickle, "decode", None)
    return seen


@pytest.fixture
def refused(tmp_path, opened):
    """Expect an error that can be read, and see that nothing was written, read or run."""

    def tree():
        return sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))

    def check(source, **options):
        before = tree()
        with pytest.raises(RefusedError) as caught:
            prepare(source, tmp_path / "target", JobOptions(**options))
        text = str(caught.value)
        assert 20 < len(text) < 2000
        assert "\0" not in text
        assert tree() == before
        assert not [key for key in opened if not key.endswith((".json", ".zarray", ".zattrs", ".zgroup"))]
        assert not (tmp_path / "exploded").exists()
        return text

    return check
