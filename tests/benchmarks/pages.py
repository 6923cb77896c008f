"""Turns the figures of `cpu` into a page and a plot."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import DTYPES, Case
from tests.benchmarks.peers import PEERS

HEAD = """# CPU benchmark

Made by `ci/bench-cpu`; do not edit. {processor}; {system}; {compiler}.
{versions}.

One thread pinned to one core. Random well-conditioned matrices, in stacks of 48 MiB up to n = 16 (more than the
last-level cache) and of 24 MiB beyond. Each figure is the median of repetitions in which all take turns. Ours includes
`info` and `rcond`, which no peer gives; MKL is called through ctypes, its time is without the copy of the input that
it overwrites.

- **ours**: time for one matrix
- **NumPy … MKL batch**: how many times longer they take. Less than 1 would mean that they are faster
- **floor**: the larger of a copy of the stack in the same run and of 2n³ operations (8n³ for complex) at the
  measured peak ({peak4:.0f} GFLOP/s in single precision, {peak8:.0f} in double), as part of our time
- **definite**: how many times faster "positive definite" is than "general"
- **threads**: speed-up of two threads on two cores, each with its own stack; beside it the same of a copy, which shows
  what the memory that both share leaves
- **first call**: in a new process, with nothing cached and with the kernel in the cache

![Speed-up over each peer](cpu.png)
"""
COLUMNS = ("n", "ours", *PEERS, "floor", "definite", "threads", "first call")
STYLE = {"NumPy": "o-", "SciPy": "s-", "torch": "^-", "JAX": "v-", "MKL batch": "D--"}


def write(folder: Path) -> None:
    """Write cpu.md, cpu.png and cpu.svg beside cpu.json."""
    result = json.loads((folder / "cpu.json").read_text())
    cells = {tuple(name.rsplit(" ", 2)[1:]): values for name, values in result["cells"].items()}
    page = [
        HEAD.format(
            **result["machine"],
            versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
            peak4=result["peak"]["4"],
            peak8=result["peak"]["8"],
        )
    ]
    for dtype in DTYPES:
        page += [f"\n## {dtype}\n", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for (n, other), values in cells.items():
            if other == dtype:
                page.append("| " + " | ".join(row(int(n), dtype, values, result["peak"])) + " |")
        page.append("\n" + summary(dtype, cells))
    (folder / "cpu.md").write_text("\n".join(page) + "\n")
    plot(folder, cells)


def floor(n: int, dtype: str, values: dict[str, float], peak: dict[str, float]) -> float:
    """Return the floor as part of our time."""
    real = 4 if dtype in ("float32", "complex64") else 8
    return max(values["copy"], Case("general", n, dtype).flops / peak[str(real)] / 1e9) / values["ours"]


def row(n: int, dtype: str, values: dict[str, float], peak: dict[str, float]) -> list[str]:
    ours = values["ours"]
    return [
        str(n),
        duration(ours),
        *(f"{values[peer] / ours:.2f}" for peer in PEERS),
        f"{floor(n, dtype, values, peak):.2f}",
        f"{ours / values['positive definite']:.2f}",
        f"{values['two threads']:.2f} ({values['two threads, copy']:.2f})",
        f"{values['first call']:.2f} s, {1000 * values['first call, cached']:.0f} ms",
    ]


def summary(dtype: str, cells: dict[Any, dict[str, float]]) -> str:
    """Return the geometric mean over the small sizes, against the fastest peer of each cell."""
    fastest = [
        min(values[peer] for peer in PEERS if peer != "MKL batch") / values["ours"]
        for (n, other), values in cells.items()
        if other == dtype and int(n) <= 32
    ]
    if not fastest:
        return ""
    return (
        f"Against the fastest of NumPy, SciPy, torch and JAX in each row, n up to 32: geometric mean "
        f"{math.exp(statistics.fmean(map(math.log, fastest))):.1f}, least {min(fastest):.1f}."
    )


def duration(seconds: float) -> str:
    for unit, size in (("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def plot(folder: Path, cells: dict[Any, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, sharey=True, layout="constrained")
    for axis, dtype in zip(axes.flat, DTYPES, strict=True):
        mine = {int(n): values for (n, other), values in cells.items() if other == dtype}
        for peer in PEERS:
            ratios = [values[peer] / values["ours"] for values in mine.values()]
            axis.plot(list(mine), ratios, STYLE[peer], label=peer, markersize=4, linewidth=1)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=dtype)
        axis.set_xticks(list(mine), [str(n) for n in mine], fontsize=7)
        axis.minorticks_off()
        axis.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("n")
    figure.supylabel("times as long as dask_batchinv")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"cpu.{suffix}", dpi=120, metadata={"Date": None} if suffix == "svg" else None)
