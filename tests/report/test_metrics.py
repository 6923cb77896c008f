"""What Prometheus reads of a worker."""

import re
import urllib.request

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

from dask_batchinv import invert_store
from dask_batchinv.job.worker import metrics
from tests.support.stacks import conditioned


def test_workers_count_matrices(tmp_path):
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    a = conditioned(200, 3, 10)
    a[7], a[8, 0, 0] = 0, np.nan
    zarr.create_array(tmp_path / "s", shape=a.shape, dtype=a.dtype, chunks=(10, 3, 3))[...] = a
    with LocalCluster(
        n_workers=1, threads_per_worker=2, host="127.0.0.1", dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
    ) as cluster, Client(cluster, set_as_default=False) as client:  # fmt: skip
        (port,) = client.run(lambda dask_worker: dask_worker.http_server.port).values()

        def read():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
                return dict(re.findall(r"(?m)^(dask_batchinv_\S+) (\S+)$", page.read().decode()))

        read()  # with that Dask has imported what makes the page
        invert_store(tmp_path / "s", tmp_path / "t", client=client, tile_size=720, max_failed=2)
        found = {name: float(value) for name, value in read().items()}
    assert found['dask_batchinv_tiles_total{outcome="done"}'] == 20
    assert found['dask_batchinv_matrices_total{outcome="inverted"}'] == 198
    assert found['dask_batchinv_matrices_total{outcome="singular"}'] == 1
    assert found['dask_batchinv_matrices_total{outcome="not_finite"}'] == 1
    assert found["dask_batchinv_tile_seconds_total"] > 0


def test_nothing_is_imported_where_there_is_no_page(monkeypatch):
    monkeypatch.delitem(metrics.sys.modules, "prometheus_client", raising=False)
    metrics.count([])
    assert "prometheus_client" not in metrics.sys.modules
