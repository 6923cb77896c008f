"""Tests every GPU kernel on the card that is there, times them against every peer, and writes a page about it.

    python -m tests.benchmarks.gpu --out docs/benchmarks

Eight minutes at most: what there was no time for is named. Times are of the device, data resident, by its own events:
medians of repetitions in which all take turns. torch and JAX are timed where they are installed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dask_batchinv import __version__, invert_store
from dask_batchinv.kernels.cuda import kernels as cuda
from dask_batchinv.kernels.cuda import launch, staging
from dask_batchinv.kernels.device import why_unusable
from tests.benchmarks.cases import CASES, DTYPES, KINDS, Case

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
#: Bytes of each stack: many times what the card's caches hold, and enough matrices to fill it.
STACK_NBYTES = 2**28
REPEAT = 5
#: Shares of the time: for the tests, and until which cells are begun.
TESTS, CELLS = 0.45, 0.85
Run = Callable[[], Any]


def main() -> int:
    """Run everything; return how many tests failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=7.5)
    options = parser.parse_args()
    if reason := why_unusable():
        parser.exit(2, f"there is nothing to measure: {reason}\n")
    start, seconds = time.monotonic(), 60 * options.minutes
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    result: dict[str, Any] = {"machine": machine(), "versions": versions()}
    options.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "gpu.md").write_text(page(result))

    result["tests"] = run_tests(TESTS * seconds)
    save()
    result["cells"], result["left out"] = {}, []
    # In the order of interest, should time run out.
    for kind in KINDS:
        for dtype in ("float64", "float32", "complex128", "complex64"):
            for n in SIZES:
                case = Case(kind, n, dtype)
                if time.monotonic() - start > CELLS * seconds:
                    result["left out"].append(str(case))
                    continue
                result["cells"][str(case)] = measure(case)
                print(case, {name: f"{1e9 * s:.3g} ns" for name, s in result["cells"][str(case)].items()}, flush=True)
    save()
    result["spilled"] = spilled()
    result["job"] = job()
    save()
    print(page(result))
    return min(100, result["tests"]["failed"])


def machine() -> dict[str, str]:
    """Return what is measured on."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "card": properties["name"].decode(),
        "memory": f"{properties['totalGlobalMem'] / 2**30:.0f} GiB",
        "driver": str(cupy.cuda.runtime.driverGetVersion()),
        "CUDA": str(cupy.cuda.runtime.runtimeGetVersion()),
    }


def versions() -> dict[str, str]:
    """Return the versions of us and of the peers."""
    found = {"dask_batchinv": __version__}
    for name in ("cupy-cuda13x", "cupy-cuda12x", "torch", "jax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_tests(seconds: float) -> dict[str, Any]:
    """Run all tests that take a card, for so long at most; return how they went."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider",
               "-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal",
               "tests/gpu/test_on_gpu.py", "tests/kernels/test_kernels.py", "-rfs"]  # fmt: skip
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        out, complete = ended.stdout, True
    except subprocess.TimeoutExpired as error:
        out, complete = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or "", False
    print(out[-6000:], flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", out)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if not counts:  # cut off before the summary: every letter is a test
        dots = re.findall(r"^([.FEs]+)(?: +\[|$)", out, re.MULTILINE)
        counts = {"passed": sum(line.count(".") for line in dots)}
        failed = sum(line.count("F") + line.count("E") for line in dots)
    problems = re.findall(r"^(?:FAILED|ERROR) (.*)$", out, re.MULTILINE)
    return {"passed": counts.get("passed", 0), "failed": failed, "complete": complete, "problems": problems}


def spilled() -> dict[str, int]:
    """Return what the compiler moved from registers to memory, in bytes, for those kernels in which it did."""
    import cupy
    from cupy_backends.cuda.api import driver

    found = {}
    for case in CASES:
        plan = launch.choose_launch(case.n, case.dtype, case.kind)
        if case.n in SIZES and plan.layout in ("per_thread", "per_warp", "per_block"):
            kernel = cuda._function(plan.file, plan.options, plan.layout, cupy.cuda.Device().id)
            if nbytes := driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, kernel.ptr):
                found[str(case)] = nbytes
    return found


def measure(case: Case) -> dict[str, float]:
    """Return seconds per matrix of every contender; without those that fail."""
    import cupy

    a = cupy.asarray(case.make(STACK_NBYTES))
    out, info, rcond = cupy.empty_like(a), cupy.empty(len(a), np.int32), cupy.empty(len(a), a.real.dtype)
    runs: dict[str, Run] = {
        "ours": lambda: cuda.run(a, out, info, rcond, assume_a=case.kind),
        "copy": lambda: cupy.copyto(out, a),
    }
    if case.kind == "general":
        for name, make in PEERS.items():
            try:
                runs[name] = make(a, out, info)
                runs[name]()
                cupy.cuda.Device().synchronize()
            except Exception as error:  # not installed, too large, out of memory
                runs.pop(name, None)
                if not isinstance(error, ImportError):
                    print(f"{case}: {name} cannot: {type(error).__name__}: {error}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(REPEAT + 1):
        for name, run in runs.items():
            seconds = _device_seconds(run)
            if repetition:  # the first warms up
                times[name].append(seconds)
    cupy.get_default_memory_pool().free_all_blocks()
    return {name: statistics.median(values) / len(a) for name, values in times.items()}


def _device_seconds(run: Run) -> float:
    """Return the time that the device takes, from and to when it has nothing to do: streams of peers count too."""
    import cupy

    device = cupy.cuda.Device()
    device.synchronize()
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    kept = run()
    device.synchronize()
    end.record()
    end.synchronize()
    del kept
    return float(cupy.cuda.get_elapsed_time(begin, end)) / 1000


def _cupy(a: Any, out: Any, info: Any) -> Run:
    import cupy

    return lambda: cupy.linalg.inv(a)


def _torch(a: Any, out: Any, info: Any) -> Run:
    import torch

    tensor = torch.from_dlpack(a)
    return lambda: torch.linalg.inv_ex(tensor)


def _jax(a: Any, out: Any, info: Any) -> Run:
    import jax

    jax.config.update("jax_enable_x64", True)
    array, inverse = jax.dlpack.from_dlpack(a), jax.jit(jax.numpy.linalg.inv)
    return lambda: inverse(array).block_until_ready()


def _matinv(a: Any, out: Any, info: Any) -> Run:
    """cuBLAS' routine for n up to 32, which CuPy does not have."""
    import cupy

    m, n = a.shape[:2]
    if n > 32:
        raise ImportError("for n up to 32 alone")
    library = next(
        ctypes.CDLL(line.split()[-1])
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libcublas.so" in line
    )
    letter = {"f": "S", "d": "D", "F": "C", "D": "Z"}[a.dtype.char]
    function = getattr(library, f"cublas{letter}matinvBatched")
    addresses = [x.data.ptr + cupy.arange(m, dtype=np.uint64) * (n * n * x.itemsize) for x in (a, out)]
    pointers = [ctypes.c_void_p(x.data.ptr) for x in (*addresses, info)]
    handle = ctypes.c_void_p(cupy.cuda.Device().cublas_handle)

    def run() -> Any:
        code = function(handle, n, pointers[0], n, pointers[1], n, pointers[2], m)
        if code:
            raise RuntimeError(f"cublas{letter}matinvBatched returns {code}")
        return addresses

    return run


PEERS = {"CuPy": _cupy, "torch": _torch, "JAX": _jax, "cuBLAS matinv": _matinv}


def job() -> dict[str, Any]:
    """Time a job from and to a file system in memory, and the same with a kernel that only copies."""
    import zarr
    from distributed import Client, LocalCluster

    n, nbytes = 8, 2**32
    m = nbytes // (8 * n * n)
    chunk = 2**25 // (8 * n * n)
    ours = cuda.run

    def copies(a: Any, out: Any, info: Any, rcond: Any, *, assume_a: str) -> None:
        out[...] = a
        info[...] = 0
        rcond[...] = 1

    times: dict[str, list[float]] = {"inverting": [], "copying": []}
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with (
        tempfile.TemporaryDirectory(dir=where) as folder,
        LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        layout: dict[str, Any] = {"shape": (m, n, n), "chunks": (chunk, n, n), "dtype": "f8"}
        source = zarr.create_array(f"{folder}/source.zarr", **layout, compressors=None)
        some = Case("general", n, "float64").make(chunk * 8 * n * n)
        for start in range(0, m, chunk):
            source[start : start + chunk] = some
        for repetition in range(3):
            for name, kernel in (("inverting", ours), ("copying", copies)):
                staging.cuda.run = kernel
                target = f"{folder}/{name}.zarr"
                begin = time.perf_counter()
                invert_store(f"{folder}/source.zarr", target, client=client, device="gpu", overwrite=True)
                if repetition:
                    times[name].append(time.perf_counter() - begin)
                subprocess.run(["rm", "-rf", target], check=True)
        staging.cuda.run = ours
    seconds = {name: min(values) for name, values in times.items()}
    return seconds | {
        "what": f"{nbytes / 2**30:.0f} GiB of {n} x {n} float64",
        "share": seconds["copying"] / seconds["inverting"],
    }


HEAD = """# GPU benchmark

Made by `python -m tests.benchmarks.gpu`; do not edit. {card}, {memory}, driver {driver}, CUDA {CUDA}.
{versions}.

Tests on this card: {passed} passed, {failed} failed{cut}.

Stacks of 256 MiB of random well-conditioned matrices in GPU memory; device time, medians of {repeat}. Ours includes
`info` and `rcond`, which no peer gives. Peers: how many times longer they take. "of a copy": how fast ours reads and
writes, as part of a copy of the stack. "definite": how many times faster "positive definite" is.
"""


def page(result: dict[str, Any]) -> str:
    """Return what was found as Markdown."""
    tests = result["tests"]
    lines = [
        HEAD.format(
            **result["machine"],
            versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
            passed=tests["passed"],
            failed=tests["failed"],
            cut="" if tests["complete"] else ", the others had no time",
            repeat=REPEAT,
        )
    ]
    lines += [f"- {problem}" for problem in tests["problems"]]
    if result.get("spilled"):
        named = ", ".join(f"{case} {nbytes}" for case, nbytes in result["spilled"].items())
        lines.append(f"\nBytes that the compiler moved from registers to memory: {named}.")
    cells = result.get("cells", {})
    for dtype in DTYPES:
        rows = [n for n in SIZES if f"general {n} {dtype}" in cells]
        if rows:
            columns = ("n", "layout", "ours", "of a copy", *PEERS, "definite")
            lines += [f"\n## {dtype}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for n in rows:
            lines.append("| " + " | ".join(_row(n, dtype, cells)) + " |")
    if left := result.get("left out"):
        lines.append(f"\nNo time was left for: {', '.join(left)}.")
    if found := result.get("job"):
        lines.append(
            f"\n## A job\n\n{found['what']}, from and to a file system in memory, four threads: "
            f"{found['inverting']:.1f} s, with a kernel that only copies {found['copying']:.1f} s: "
            f"{found['share']:.0%} of its speed."
        )
    return "\n".join(lines) + "\n"


def _row(n: int, dtype: str, cells: dict[str, dict[str, float]]) -> list[str]:
    values = cells[f"general {n} {dtype}"]
    ours = values["ours"]
    definite = cells.get(f"positive definite {n} {dtype}", {}).get("ours")
    return [
        str(n),
        launch.choose_launch(n, dtype, "general").layout,
        f"{1e9 * ours:.3g} ns",
        f"{values['copy'] / ours:.0%}",
        *(f"{values[peer] / ours:.1f}" if peer in values else "" for peer in PEERS),
        f"{ours / definite:.1f}" if definite else "",
    ]


if __name__ == "__main__":
    sys.exit(main())
