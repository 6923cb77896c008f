"""Times whole calls on all cores, from one small matrix to one large one, and writes a page about it.

    python -m tests.benchmarks.calls --out docs/benchmarks

Medians of repetitions in which all take turns. Before longer calls the machine rests, because the threads of BLAS and
OpenMP go on spinning for a while after their work, on cores that the next would need; then comes a call that is not
timed, since a processor that has rested is slow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import dask
import numpy as np
import numpy.typing as npt
import scipy.linalg

import dask_batchinv
from dask_batchinv import inverse, inverse_ex
from dask_batchinv.kernels import choose_kernel
from dask_batchinv.kernels.cpu import dispatch
from dask_batchinv.kernels.emit import compiler
from dask_batchinv.kernels.threads import threads_for_call
from tests.benchmarks import peers
from tests.benchmarks.cases import Case
from tests.benchmarks.cpu import processor

Array = npt.NDArray[Any]
Calls = dict[str, Callable[[], Any]]
PEERS = ("NumPy", "SciPy", "torch")
#: Matrices in the stack (0: none, a single matrix) and n.
SMALL = ((0, 2), (0, 3), (0, 4), (10, 4), (0, 8), (0, 16), (0, 32), (0, 64))
STACKS = ((400_000, 3), (50_000, 8), (3000, 32), (400, 64), (100, 128), (25, 256), (7, 512))
LARGE = (
    (0, 128),
    (0, 256),
    (0, 400),
    (0, 512),
    (0, 513),
    (0, 600),
    (2, 600),
    (3, 600),
    (0, 1000),
    (3, 1000),
    (0, 1500),
)
LARGEST = ((0, 2000), (0, 3000), (0, 4096))
STRUCTURES = ("symmetric", "positive definite", "upper triangular", "lower triangular", "diagonal")
#: What SciPy calls them.
SCIPYS = {kind: kind for kind in STRUCTURES} | {"symmetric": "sym", "hermitian": "her", "positive definite": "pos"}
STRUCTURED = (2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512)
WIDE = (3, 6, 12, 32, 64, 256, 600)
DOUBLE = (2, 3, 4, 6, 8, 16, 32, 64, 128)

HEAD = """# Calls

Made by `ci/bench-calls`; do not edit. {processor}; {compiler}; {threads} threads.
{versions}.

Medians of repetitions in which all take turns, with rests between them and a call before that does not count. The first
column is the time of a call, or of one of our kernels; the others say how many times longer others take. Less than 1
means that they are faster.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for calls.md and calls.json")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for title, dtypes, shapes in (
        ("One small matrix, or ten", ("float64",), SMALL),
        ("Stacks", ("float64", "float32"), STACKS),
        ("Large matrices", ("float64", "float32", "complex128"), LARGE),
        ("The largest", ("float64",), LARGEST),
    ):
        for dtype in dtypes:
            table = found.setdefault(f"{title}, {dtype}", {})
            for m, n in shapes:
                a = stack("general", m, n, dtype)
                called = calls(a) if shapes is SMALL else calls(a) | {"ours, one thread": partial(by_one_thread, a)}
                table[" × ".join(map(str, a.shape))] = turns(called, 3 if n >= 2000 else options.repeat)
                print(dtype, a.shape, *table.values(), flush=True)
    for dtype in ("float64", "complex64"):
        table = found.setdefault(f"Large matrices of a structure, {dtype}", {})
        for n in (600, 1000, 2000):
            for kind in structures_of(dtype):
                table[f"{kind}, {n} × {n}"] = turns(structured_calls(kind, n, dtype), options.repeat)
    for dtype in ("float64", "complex128"):
        found[f"Structures, one thread, stacks of 32 MiB, {dtype}"] = {
            str(n): structures(n, dtype, options.repeat) for n in STRUCTURED
        }
    for dtype in ("float64", "float32"):
        found[f"Width of vectors, one thread, general {dtype}"] = {
            str(n): widths(n, dtype, options.repeat) for n in WIDE
        }
    found['precision="double", float32'] = {str(n): double(n, options.repeat) for n in DOUBLE}
    facts = {"processor": processor(), "compiler": compiler.description(), "threads": threads_for_call()}
    versions = {"dask_batchinv": dask_batchinv.__version__} | {peer: peers.version(peer) for peer in PEERS}
    (options.out / "calls.json").write_text(json.dumps(facts | {"versions": versions, "found": found}, indent=1) + "\n")
    (options.out / "calls.md").write_text(page(facts, versions, found))


def stack(kind: str, m: int, n: int, dtype: str) -> Array:
    """Return a stack, or a single matrix for m = 0."""
    a = Case(kind, n, dtype).make(max(2, m) * n * n * np.dtype(dtype).itemsize)
    return a[:m] if m else a[0]


def structures_of(dtype: str) -> list[str]:
    """Return the structures that are timed for a dtype."""
    return ["hermitian" if kind == "symmetric" and np.dtype(dtype).kind == "c" else kind for kind in STRUCTURES]


def indefinite(shape: tuple[int, ...], dtype: str) -> Array:
    """Return symmetric matrices, Hermitian ones if they are complex, as many of whose eigenvalues have either sign."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=shape)
    if np.dtype(dtype).kind == "c":
        a = a + 1j * rng.normal(size=shape)
    return (a + a.conj().swapaxes(-2, -1)).astype(dtype)


def calls(a: Array) -> Calls:
    """Return what is timed for general matrices."""
    import torch

    tensor = torch.from_numpy(a)
    return {
        "ours": lambda: inverse(a),
        "inverse_ex": lambda: inverse_ex(a),
        "NumPy": lambda: np.linalg.inv(a),
        "SciPy": lambda: scipy.linalg.inv(a, check_finite=False),
        "torch": lambda: torch.linalg.inv(tensor),
    }


def by_one_thread(a: Array) -> Array:
    with dask.config.set({"batchinv.threads": 1}):
        return inverse(a)


def structured_calls(kind: str, n: int, dtype: str) -> Calls:
    """Return what is timed for one matrix of a structure."""
    import torch

    # Well conditioned, and good for all structures but those that are there for indefinite matrices.
    a = indefinite((n, n), dtype) if kind in ("symmetric", "hermitian") else stack("positive definite", 0, n, dtype)
    tensor, one, lower = torch.from_numpy(a), torch.eye(n, dtype=torch.from_numpy(a).dtype), kind == "lower triangular"
    assume_a: Any = kind
    called: Calls = {
        "ours": lambda: inverse(a, assume_a=assume_a),
        "ours, general": lambda: inverse(a),
        "NumPy, general": lambda: np.linalg.inv(a),
        "SciPy": lambda: scipy.linalg.inv(a, assume_a=SCIPYS[kind], check_finite=False),
    }
    if "triangular" in kind:
        called["torch"] = lambda: torch.linalg.solve_triangular(tensor, one, upper=not lower)
    elif kind == "positive definite":
        called["torch"] = lambda: torch.cholesky_inverse(torch.linalg.cholesky(tensor))
    else:
        called["torch"] = lambda: torch.linalg.inv(tensor)
    return called


def turns(called: Calls, repeat: int) -> dict[str, float]:
    """Return the median times in seconds of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in called}
    for call in called.values():
        call()
    for _ in range(repeat):
        for name, call in called.items():
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
            count = max(1, int(2e-3 / once))
            if once > 5e-4:
                time.sleep(0.2)
                call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def structures(n: int, dtype: str, repeat: int) -> dict[str, float]:
    """Return the times of our kernels by structure, and of a copy, by one thread."""
    a = stack("positive definite", max(2, 2**25 // (np.dtype(dtype).itemsize * n * n)), n, dtype)
    results = np.empty_like(a), np.empty(len(a), np.int32), np.empty(len(a))
    called: Calls = {}
    for name in ("general", *structures_of(dtype)):
        invert: Any = choose_kernel(cast(Any, name)).invert
        called[name] = lambda invert=invert: invert(a, *results)
        if name in ("symmetric", "hermitian"):
            b = indefinite(a.shape, dtype)
            called[f"{name}, indefinite"] = lambda invert=invert, b=b: invert(b, *results)
    return turns(called | {"copy": lambda: np.copyto(results[0], a)}, repeat)


def widths(n: int, dtype: str, repeat: int) -> dict[str, float]:
    """Return the times of our kernels for vectors of each width that this machine has."""
    a = stack("general", max(2, 2**24 // (n * n * np.dtype(dtype).itemsize)), n, dtype)
    results = np.empty_like(a), np.empty(len(a), np.int32), np.empty(len(a), dtype)
    called: Calls = {}
    for nbytes in (64, 32, 16):
        if nbytes <= compiler.vector_nbytes():
            kernel: Any = dispatch._load(dispatch.spec_of(n, dtype, "general", nbytes))
            called[f"{8 * nbytes} bits"] = lambda kernel=kernel: kernel.run(a, *results)
    called["NumPy"] = lambda: np.linalg.inv(a)
    return turns(called, repeat)


def double(n: int, repeat: int) -> dict[str, float]:
    """Return the times for float32 in double precision."""
    a = stack("general", max(2, 2**23 // (4 * n * n)), n, "float32")
    called: Calls = {
        "ours": lambda: inverse(a, precision="double"),
        "single precision": lambda: inverse(a),
        "NumPy": lambda: np.linalg.inv(a),
    }
    return turns(called, repeat)


def page(facts: dict[str, Any], versions: dict[str, str], found: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [HEAD.format(**facts, versions=", ".join(f"{name} {version}" for name, version in versions.items()))]
    for title, table in found.items():
        first, *others = next(iter(table.values()))
        lines += [
            f"\n## {title}\n",
            f"| shape | {first} | " + " | ".join(others) + " |",
            "|---" * (len(others) + 2) + "|",
        ]
        for shape, times in table.items():
            ratios = " | ".join(f"{times[name] / times[first]:.2f}" for name in others)
            lines.append(f"| {shape} | {duration(times[first])} | {ratios} |")
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """Return a time in words."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


if __name__ == "__main__":
    main()
