"""The benchmark of GPUs runs, with what stands for CuPy: its times mean nothing."""

import json

import pytest

from tests.benchmarks import gpu, gpu_first
from tests.benchmarks.cases import Case
from tests.gpu import fake_cupy
from tests.support.running import ratios


@pytest.mark.skipif(not fake_cupy.COMPILER, reason="needs a C++ compiler")
def test_a_small_run(monkeypatch):
    monkeypatch.setattr(gpu, "SMALL_STACK_NBYTES", 2**14)
    monkeypatch.setattr(gpu, "STACK_NBYTES", 2**14)
    monkeypatch.setattr(gpu, "LEAST", 0)
    cells = {}
    with fake_cupy.installed() as cupy:
        for case in (Case("general", 3, "float32"), Case("positive definite", 3, "float32")):
            stack = gpu.make_on_gpu(case, 2**14)
            assert stack.nbytes <= 2**14
            assert ratios(stack.get(), cupy.linalg.inv(stack)).max() < 10
            cells[str(case)] = gpu.measure(case)
            assert gpu_first.look(case, 2**14)["right"]
    # What stands for CuPy has NumPy's functions; torch and JAX are not asked for.
    assert {"ours", "copy", "inverse", "CuPy"} <= set(cells["general 3 float32"])
    assert all(seconds > 0 for times in cells.values() for seconds in times.values())
    result = {
        "machine": {"card": "none", "memory": "0 GiB", "driver": "0", "CUDA": "0"},
        "versions": {"dask_batchinv": "0"},
        "tests": {"passed": 3, "failed": 1, "complete": True, "problems": ["one"]},
        "cells": cells, "left out": ["general 2 float32"], "errors": ["general 4 float32: no"],
        "local": {"general 3 float32": 8},
    }  # fmt: skip
    text = gpu.page(json.loads(json.dumps(result)))
    assert "| 3 | per_thread |" in text
    assert "3 passed, 1 failed." in text
    assert "No time was left for: general 2 float32." in text
    assert "Stopped by an error: general 4 float32: no." in text
    result["job"] = {"error": "no room"}
    assert "It failed: no room." in gpu.page(result)
    result["job"] = {"inverting": 2.0, "copying": 1.0, "share": 0.5, "what": "1 GiB"}
    assert "50% of its speed" in gpu.page(result)
