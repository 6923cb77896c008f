"""Times every case against every peer and against the floors, and writes a page and a plot about it.

    python -m tests.benchmarks.cpu --out docs/benchmarks

One thread, pinned to one core; medians of repetitions in which all take turns, so that whatever else the machine does
hits all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask_batchinv
from dask_batchinv.kernels.emit import compiler
from tests.benchmarks import peers
from tests.benchmarks.cases import CASES, SIZES, Case

Cells = dict[str, dict[str, float]]
#: Beyond the last-level cache for small matrices, as data on its way through is.
SMALL_NBYTES, LARGE_NBYTES = 3 * 2**24, 3 * 2**23


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for cpu.md, cpu.json, cpu.png and cpu.svg")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=list(SIZES))
    options = parser.parse_args()
    both = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, both[:1])
    result: dict[str, Any] = {
        "machine": {"processor": processor(), "compiler": compiler.description(), "system": platform.platform()},
        "versions": {"dask_batchinv": dask_batchinv.__version__} | {peer: peers.version(peer) for peer in peers.PEERS},
        "peak": {str(size): peers.peak_gflops(size) for size in (4, 8)},
        "cells": {},
    }
    for case in CASES:
        if case.n in options.sizes and case.kind == "general":
            cells = measure(case, options.repeat)
            cells["two threads"] = two_threads(case, peers.ours, both, options.repeat)
            cells["two threads, copy"] = two_threads(case, peers.copy, both, options.repeat)
            cells |= first_calls(case)
            result["cells"][str(case)] = cells
            print(case, {name: f"{1e9 * value:.3g}" for name, value in cells.items()}, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    from tests.benchmarks.pages import write

    write(options.out)


def processor() -> str:
    """Return the processor's name and how many of its cores are ours."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def stack_nbytes(case: Case) -> int:
    return SMALL_NBYTES if case.n <= 16 else LARGE_NBYTES


def measure(case: Case, repeat: int) -> dict[str, float]:
    """Return seconds per matrix: ours, ours for positive definite ones, each peer's, and a copy's."""
    a = case.make(stack_nbytes(case))
    definite = Case("positive definite", case.n, case.dtype).make(stack_nbytes(case))
    runs = {
        "ours": peers.ours(a),
        "positive definite": peers.ours(definite, "positive definite"),
        "copy": peers.copy(a),
    }
    runs |= {name: make(a) for name, make in peers.PEERS.items()}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            times[name].append(run())
    return {name: statistics.median(values) / len(a) for name, values in times.items()}


def two_threads(case: Case, make: Callable[[Any], peers.Timed], cores: list[int], repeat: int) -> float:
    """Return how much faster two threads on two cores are than one, each with a stack of its own."""
    a = [case.make(stack_nbytes(case)) for _ in range(2)]
    runs = [make(x) for x in a]
    for run in runs:
        run()
    if len(cores) < 2:
        return float("nan")

    def together() -> float:
        seconds = [0.0, 0.0]
        ready = threading.Barrier(2)

        def work(i: int) -> None:
            os.sched_setaffinity(0, {cores[i]})  # of this thread
            ready.wait()
            seconds[i] = runs[i]()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(seconds)

    pairs = [(runs[0](), together()) for _ in range(repeat)]
    return 2 * statistics.median(one for one, _ in pairs) / statistics.median(two for _, two in pairs)


FIRST = """
import sys, time
import numpy as np
from dask_batchinv.kernels import choose_kernel
n, dtype = int(sys.argv[1]), sys.argv[2]
a = np.broadcast_to(np.eye(n, dtype=dtype) * 2, (2, n, n)).copy()
out, info, rcond = np.empty_like(a), np.empty(2, np.int32), np.empty(2, a.real.dtype)
invert = choose_kernel("general", "cpu").invert
start = time.perf_counter()
invert(a, out, info, rcond)
print(time.perf_counter() - start)
"""


def first_calls(case: Case) -> dict[str, float]:
    """Return seconds of the first call in a new process, with an empty cache and with a filled one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST, str(case.n), case.dtype]
        environment = os.environ | {"XDG_CACHE_HOME": folder}
        cold, warm = (
            float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        )
    return {"first call": cold, "first call, cached": warm}


if __name__ == "__main__":
    main()
