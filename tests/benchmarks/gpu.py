"""Tests every GPU kernel on the card that is there, times them against every peer, and writes a page about it.

    python -m tests.benchmarks.gpu --out docs/benchmarks

Eight minutes or so: what there was no time for is named, and what is known is written after every cell. Times are
those of many runs, data resident, between two events of the device when it has nothing else to do: medians of
repetitions in which all take turns. torch and JAX are timed where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import dask_batchinv
from dask_batchinv import __version__, invert_store
from dask_batchinv.kernels.cuda import kernels as cuda
from dask_batchinv.kernels.cuda import launch, staging
from dask_batchinv.kernels.device import why_unusable
from tests.benchmarks.cases import DTYPES, KINDS, Case
from tests.benchmarks.gpu_peers import PEERS, Run

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
#: Bytes of each stack: many times what the card's caches hold, and enough matrices to fill it; more for the smallest.
STACK_NBYTES, SMALL_STACK_NBYTES, SMALL = 2**28, 2**30, 8
REPEAT = 5
#: Seconds that the runs between two events take at least.
LEAST = 0.004
#: Shares of the time: for the tests, and until which cells are begun.
TESTS, CELLS = 0.4, 0.85
#: What `docs/gpu.md` expects of an H200: nanoseconds per matrix, by case.
ESTIMATES = Path(__file__).with_name("gpu_estimates.json")


def main() -> int:
    """Run everything; return how many tests failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=7.5, help="about so many (default: %(default)g)")
    parser.add_argument("--no-tests", action="store_true", help="time only")
    parser.add_argument("--no-job", action="store_true", help="no job from and to a file system in memory")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    by_interest = ("float64", "float32", "complex128", "complex64")
    parser.add_argument("--dtypes", nargs="+", default=by_interest, choices=DTYPES)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
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

    # In the order of interest, should time run out.
    cases = [Case(kind, n, dtype) for kind in options.kinds for dtype in options.dtypes for n in options.sizes]
    compile_all(cases)
    print(f"all compiled after {time.monotonic() - start:.0f} s", flush=True)
    if not options.no_tests:
        result["tests"] = run_tests(TESTS * seconds)
        save()
    result["cells"], result["left out"], result["errors"], result["local"] = {}, [], [], local_memory(cases)
    for case in cases:
        if time.monotonic() - start > CELLS * seconds:
            result["left out"].append(str(case))
            continue
        try:
            result["cells"][str(case)] = measure(case)
        except Exception as error:  # the next cell may still work
            result["errors"].append(f"{case}: {type(error).__name__}: {error}"[:200])
            continue
        print(case, {name: f"{1e9 * s:.3g} ns" for name, s in result["cells"][str(case)].items()}, flush=True)
        save()
    if not options.no_job:
        try:
            result["job"] = job()
        except Exception as error:  # what was measured before is worth more
            result["job"] = {"error": f"{type(error).__name__}: {error}"[:500]}
    save()
    print(page(result))
    return min(100, result.get("tests", {}).get("failed", 0) + len(result["errors"]))


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
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
        out, complete, broken = ended.stdout, True, ended.returncode not in (0, 1)
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        complete = broken = False
    print(out[-6000:], flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", out)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    if not counts:  # cut off before the summary: every letter is a test
        dots = re.findall(r"^([.FEs]+)(?: +\[|$)", out, re.MULTILINE)
        counts = {"passed": sum(line.count(".") for line in dots)}
        failed = sum(line.count("F") + line.count("E") for line in dots)
    problems = re.findall(r"^(?:FAILED|ERROR) (.*)$", out, re.MULTILINE)
    if broken and not failed:
        failed, problems = 1, [f"pytest ended with {ended.returncode}", *problems]
    return {"passed": counts.get("passed", 0), "failed": failed, "complete": complete, "problems": problems}


def compile_all(cases: list[Case]) -> None:
    """Compile what the cases take, in all processors, into the folder where it is looked for."""
    import cupy

    capability = int(cupy.cuda.Device().compute_capability)
    wanted = {(c.file, c.options) for c in (launch.choose_launch(case.n, case.dtype, case.kind) for case in cases)}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(cuda.code_for, [capability] * len(wanted), *zip(*wanted, strict=True)))


def local_memory(cases: list[Case]) -> dict[str, int]:
    """Return the bytes of local memory of a thread, for those kernels in which not all is in registers."""
    import cupy
    from cupy_backends.cuda.api import driver

    found = {}
    for case in cases:
        chosen = launch.choose_launch(case.n, case.dtype, case.kind)
        if chosen.layout in ("per_thread", "per_warp", "per_block"):
            kernel = cuda._function(chosen.file, chosen.options, chosen.layout, cupy.cuda.Device().id)
            if nbytes := driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, kernel.ptr):
                found[str(case)] = nbytes
    return found


def make_on_gpu(case: Case, nbytes: int) -> Any:
    """Return the stack of a case: a part of it, many times."""
    import cupy

    part = cupy.asarray(case.make(min(nbytes, 2**24)))
    m = max(2, nbytes // part[0].nbytes)
    a = cupy.empty((m, *part.shape[1:]), part.dtype)
    for start in range(0, m, len(part)):
        a[start : start + len(part)] = part[: m - start]
    return a


def measure(case: Case) -> dict[str, float]:
    """Return seconds per matrix of every contender; without those that fail."""
    import cupy

    a = make_on_gpu(case, SMALL_STACK_NBYTES if case.n <= SMALL else STACK_NBYTES)
    out, info, rcond = cupy.empty_like(a), cupy.empty(len(a), np.int32), cupy.empty(len(a), a.real.dtype)
    runs: dict[str, Run] = {
        "ours": lambda: cuda.run(a, out, info, rcond, assume_a=case.kind),
        "copy": lambda: cupy.copyto(out, a),
        "inverse": lambda: dask_batchinv.inverse(a, assume_a=case.kind),
    }
    if case.kind == "general":
        for name, make in PEERS.items():
            try:
                runs[name] = make(a, out, info)
            except Exception as error:  # not installed, too large, out of memory
                if not isinstance(error, ImportError):
                    print(f"{case}: {name} cannot: {type(error).__name__}: {error}", flush=True)
    times = time_in_turns(runs, necessary=("ours", "copy"))
    cupy.get_default_memory_pool().free_all_blocks()
    return {name: seconds / len(a) for name, seconds in times.items()}


def time_in_turns(runs: dict[str, Run], necessary: tuple[str, ...]) -> dict[str, float]:
    """Return the median seconds of a run of each contender; without those that fail and are not necessary."""
    import cupy

    times: dict[str, list[float]] = {name: [] for name in runs}
    counts = dict.fromkeys(runs, 1)
    for repetition in range(REPEAT + 1):
        for name in list(times):
            try:
                seconds = _device_seconds(runs[name], counts[name])
                if repetition == 0:  # warms up
                    seconds = _device_seconds(runs[name], 1)
                    counts[name] = min(100, max(1, math.ceil(LEAST / seconds)))
                else:
                    times[name].append(seconds)
            except Exception as error:  # out of memory, most likely
                if name in necessary:
                    raise
                print(f"{name} stopped: {type(error).__name__}: {error}", flush=True)
                del times[name]
                cupy.get_default_memory_pool().free_all_blocks()
    return {name: statistics.median(values) for name, values in times.items()}


def _device_seconds(run: Run, count: int) -> float:
    """Return the time of one of so many runs, from and to when the device has nothing to do: all streams count."""
    import cupy

    device = cupy.cuda.Device()
    device.synchronize()
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    for _ in range(count):
        run()
    device.synchronize()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) / 1000 / count


def job() -> dict[str, Any]:
    """Time a job from and to a file system in memory, and the same with a kernel that only copies."""
    import zarr
    from distributed import Client, LocalCluster

    n, nbytes = 8, 2**32
    chunk = 2**25 // (8 * n * n)
    ours = cuda.run  # which is put back at the end, whatever happens

    def copies(a: Any, out: Any, info: Any, rcond: Any, **options: Any) -> None:
        out[...] = a
        info[...] = 0
        rcond[...] = 1

    times: dict[str, list[float]] = {"inverting": [], "copying": []}
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None
    free = shutil.disk_usage(where or tempfile.gettempdir()).free
    while 3 * nbytes > free:
        nbytes //= 2
    m = nbytes // (8 * n * n)
    try:
        with (
            tempfile.TemporaryDirectory(dir=where) as folder,
            LocalCluster(
                n_workers=1, threads_per_worker=4, processes=False, dashboard_address="127.0.0.1:0"
            ) as cluster,
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
    finally:
        staging.cuda.run = ours
    seconds = {name: min(values) for name, values in times.items()}
    return seconds | {
        "what": f"{nbytes / 2**30:.1f} GiB of {n} x {n} float64",
        "share": seconds["copying"] / seconds["inverting"],
    }


HEAD = """# GPU benchmark

Made by `python -m tests.benchmarks.gpu`; do not edit. {card}, {memory}, driver {driver}, CUDA {CUDA}.
{versions}.

{tests}

Stacks of 256 MiB, to n = 8 of 1 GiB, of random well-conditioned matrices in GPU memory; device time of many runs,
medians of {repeat}. Ours includes `info` and `rcond`, which no peer gives. "of a copy": how fast ours reads and writes,
as part of a copy of the stack; "expected": the same as estimated for an H200 without a card (docs/gpu.md). "inverse":
how many times as long `dask_batchinv.inverse` takes as the kernel alone: it takes memory for results, and looks whether
all are good. Peers: how many times longer they take, their memory included, and of JAX what it takes to begin.
"definite": how many times faster "positive definite" is.
"""


def page(result: dict[str, Any]) -> str:
    """Return what was found as Markdown."""
    lines = [
        HEAD.format(
            **result["machine"],
            versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
            tests=_tests_in_words(result.get("tests")),
            repeat=REPEAT,
        )
    ]
    if result.get("local"):
        named = ", ".join(f"{case} {nbytes}" for case, nbytes in result["local"].items())
        lines.append(f"\nBytes of local memory of a thread, where not all is in registers: {named}.")
    cells = result.get("cells", {})
    for dtype in DTYPES:
        rows = sorted({int(name.split()[-2]) for name in cells if name.endswith(f" {dtype}")})
        if rows:
            columns = ("n", "layout", "ours", "of a copy", "expected", "inverse", *PEERS, "definite")
            lines += [f"\n## {dtype}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for n in rows:
            lines.append("| " + " | ".join(_row(n, dtype, cells)) + " |")
    if left := result.get("left out"):
        lines.append(f"\nNo time was left for: {', '.join(left)}.")
    lines += [f"\nStopped by an error: {error}." for error in result.get("errors", [])]
    if found := result.get("job"):
        lines.append("\n## A job\n")
        lines.append(
            f"It failed: {found['error']}." if "error" in found else
            f"{found['what']}, from and to a file system in memory, four threads: "
            f"{found['inverting']:.1f} s, with a kernel that only copies {found['copying']:.1f} s: "
            f"{found['share']:.0%} of its speed."
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _tests_in_words(tests: dict[str, Any] | None) -> str:
    if tests is None:
        return "Tests were not run."
    cut = "" if tests["complete"] else ", the others had no time"
    return "\n".join(
        [f"Tests on this card: {tests['passed']} passed, {tests['failed']} failed{cut}."]
        + [f"- {problem}" for problem in tests["problems"]]
    )


def _row(n: int, dtype: str, cells: dict[str, dict[str, float]]) -> list[str]:
    definite = cells.get(f"positive definite {n} {dtype}", {}).get("ours")
    values = cells.get(f"general {n} {dtype}", {})
    ours, copy = values.get("ours", math.nan), values.get("copy", math.nan)
    expected = json.loads(ESTIMATES.read_text()).get(f"general {n} {dtype}")
    return [
        str(n),
        launch.choose_launch(n, dtype, "general").layout,
        f"{1e9 * ours:.3g} ns",
        f"{copy / ours:.0%}",
        f"{expected['share']:.0%}" if expected else "",
        f"{values['inverse'] / ours:.2f}" if "inverse" in values else "",
        *(f"{values[peer] / ours:.1f}" if peer in values else "" for peer in PEERS),
        f"{ours / definite:.1f}" if definite else "",
    ]


if __name__ == "__main__":
    sys.exit(main())
