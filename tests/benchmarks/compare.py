"""Times the CPU kernels of two checkouts in turn, and prints the ratio for each of 24 cells.

    python -m tests.benchmarks.compare OTHER/CHECKOUT

Each checkout has processes of its own; the two take turns, A B A B, so that the machine's drift falls on
both. A ratio below 1 says that this checkout is faster than the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[2]
CELLS = [(kind, n, dtype) for kind in ("general", "positive definite")
         for dtype in ("float32", "float64", "complex128") for n in (2, 4, 12, 48)]  # fmt: skip
SERVE = """
import sys, time
import numpy as np
from dask_batchinv.kernels import choose_kernel
for line in sys.stdin:
    kind, n, dtype, nbytes = line.strip().split(",")
    n, rng = int(n), np.random.default_rng(0)
    m = max(2, int(nbytes) // (n * n * np.dtype(dtype).itemsize))
    a = (rng.normal(size=(m, n, n)) / n + 2 * np.eye(n)).astype(dtype)
    if kind != "general":
        a = np.ascontiguousarray(a @ a.conj().swapaxes(1, 2))
    x, info, rcond = np.empty_like(a), np.empty(m, np.int32), np.empty(m, a.real.dtype)
    invert = choose_kernel(kind, "cpu").invert
    invert(a, x, info, rcond)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        invert(a, x, info, rcond)
        print(time.perf_counter() - start, flush=True)
"""


class Server:
    """A process that times one checkout."""

    def __init__(self, checkout: Path):
        environment = os.environ | {"PYTHONPATH": str(checkout), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE], env=environment, cwd=checkout, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, line: str) -> str:
        """Send a line; return the answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def pairs(checkouts: tuple[Path, Path], cell: tuple[str, int, str], rounds: int, nbytes: int) -> list[list[float]]:
    """Return times of both checkouts, taken in turn, by new processes: where memory lies makes a difference."""
    servers = [Server(checkout) for checkout in checkouts]
    for server in servers:
        assert server.ask(",".join(map(str, (*cell, nbytes)))) == "ready"
    times = []
    for number in range(rounds):
        turn = 1 - 2 * (number % 2)  # neither is always the first
        times.append([float(server.ask("time")) for server in servers[::turn]][::turn])
    for server in servers:
        server.close()
    return times


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--processes", type=int, default=9, help="of each checkout, for each cell")
    parser.add_argument("--rounds", type=int, default=21, help="calls of each process")
    parser.add_argument("--nbytes", type=int, default=2**22, help="bytes of a stack")
    options = parser.parse_args()
    checkouts, ratios = (HERE, options.other.resolve()), []
    for cell in CELLS:
        # The fastest call of all: nothing has disturbed it, and its memory lay well.
        times = [
            pair for _ in range(options.processes) for pair in pairs(checkouts, cell, options.rounds, options.nbytes)
        ]
        ours, theirs = (min(column) for column in zip(*times, strict=True))
        ratios.append(ours / theirs)
        kind, n, dtype = cell
        print(f"{kind:17} {n:3} {dtype:10} {1e6 * ours:9.0f} us {1e6 * theirs:9.0f} us  {ratios[-1]:.3f}", flush=True)
    print(f"{len(ratios)} cells: {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
