"""Turns the figures of the pipeline benchmark into a page and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.pipeline.files import FILES
from tests.benchmarks.pipeline.passes import NAIVE
from tests.benchmarks.pipeline.slow_store import BANDWIDTH, LATENCY

MIB = 2**20
#: What a 32 MiB tile cost in version 0.1, in milliseconds, and the least that was measured for it then.
BEFORE: dict[str, dict[str, tuple[str, str]]] = {
    "zstd": {
        "read and decode": ("56, within bounds 78 to 137", "23.7"),
        "kernel, with info and rcond": ("4.6", "4.6"),
        "checksum of the inverse": ("1.7", "1.7"),
        "write, new file": ("16", "15.7"),
    },
    "none": {"read and decode": ("22", "3.2")},
}
HEAD = """# Pipeline benchmark

Made by `ci/bench-pipeline`; do not edit. {processor}; {cores} cores; {system}; {versions}.

From store to store: read, decode, invert, write. Source and target are Zarr stores in memory (a tmpfs), float64, in
chunks of 32 MiB, so that what is measured is the pipeline and not a disk. Medians of {repeat} turns in which all take
part, in one run. Rates count what is read, decoded, and what is written.
"""


def write(folder: Path) -> None:
    """Write pipeline.md and its plots beside pipeline.json."""
    result = json.loads((folder / "pipeline.json").read_text())
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    page = [HEAD.format(**machine | {"versions": versions}, repeat=result["repeat"])]
    for part in (_passes, _steps, _files, _waiting, _small_jobs, _small_tiles, _workers):
        if (name := part.__name__.removeprefix("_")) in result:
            page.append(part(result[name]))
    (folder / "pipeline.md").write_text("\n".join(page))
    if "passes" in result:
        _plot(folder, result["passes"])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _passes(cells: dict[str, Any]) -> str:
    head = [
        "n, codec",
        "job",
        "job ÷ loop",
        "job on threads ÷ loop",
        "inverse(out=) ÷ loop",
        "copy of the files ÷ loop",
        "tensorstore, copy ÷ loop",
        "zarrs, copy ÷ loop",
    ]
    rows, naive, memory = [], [], []
    for name, cell in cells.items():
        rate = {who: cell["moved"] / MIB / seconds for who, seconds in cell["seconds"].items()}
        loop, best = rate["loop"], max(rate[who] for who in NAIVE)
        rows.append([
            name, f"{rate['job']:,.0f} MiB/s", f"{rate['job'] / loop:.2f}", f"{rate['job on threads'] / loop:.2f}",
            f"{rate['inverse(out=)'] / loop:.2f}",
            f"{rate['copy of the files'] / loop:.2f}", f"{rate['tensorstore, copy'] / loop:.2f}",
            f"{rate['zarrs, copy'] / loop:.2f}",
        ])  # fmt: skip
        naive.append([
            name, f"**{rate['job'] / best:.2f}**", f"{loop / best:.2f}",
            *(f"{rate['job'] / rate[who]:.2f}" for who in NAIVE),
        ])  # fmt: skip
        memory.append([
            name, f"{cell['peak'] / MIB:,.0f} MiB", f"{cell['projected'] / MIB:,.0f} MiB",
            f"{cell['projected'] / cell['peak']:.2f}",
        ])  # fmt: skip
    return "\n".join([
        "## Against the loop\n",
        "The loop (`tests/benchmarks/pipeline/loop.py`) reads a file into a buffer, decodes it into a block, inverts,"
        " seals and writes, on two threads, and does nothing else: no record, no check, no plan. The job runs from plan"
        " to report on two worker processes that are there, with Dask's scheduler on the same two cores; the job on"
        " threads runs in the calling process, as small ones do (`batchinv.job.in-process`), and so does"
        " `inverse(da.from_zarr(s), out=t)`.\n",
        _table(head, rows),
        "![Rates](pipeline.png)\n",
        "## Against what one would write otherwise\n",
        "How many times as much the job moves. None of these accounts for a matrix, and a singular one ends them."
        " All write without compression. `map_blocks` is `da.from_zarr(s).map_blocks(np.linalg.inv)` and `da.store`.\n",
        _table(["n, codec", "fastest of them", "loop ÷ fastest", *NAIVE], naive),
        "## Memory of a worker\n",
        "The peak of the larger of two worker processes, and what the plan had projected.\n",
        _table(["n, codec", "measured", "projected", "projected ÷ measured"], memory),
    ])  # fmt: skip


def _steps(codecs: dict[str, Any]) -> str:
    rows = []
    for codec, now in codecs.items():
        read = now["read, as the job does"]
        alone = now["read, the bytes alone"] + now.get("decode", 0.0)
        values = {
            "read and decode": (f"{read:.1f} (by Zarr {now['read, by Zarr']:.1f})", f"{alone:.1f}"),
            "kernel, with info and rcond": (f"{now['kernel']:.1f}", ""),
            "checksum of the inverse": (f"{now['checksum of the inverse']:.1f}", ""),
            "checksum of the source": (f"{now['checksum of the source']:.1f}", ""),
            "write, new file": (f"{now['write, new file']:.1f}", ""),
        }
        for step, (found, least) in values.items():
            before, floor = BEFORE[codec].get(step, ("", ""))
            rows.append([codec, step, before, floor, found, least])
    return "\n".join([
        "## What one tile of 32 MiB costs\n",
        "n = 16, one core, in milliseconds. Times of different runs may be compared no closer than by a fifth.\n",
        _table(["codec", "step", "in 0.1", "floor then", "now", "floor now"], rows),
    ])  # fmt: skip


def _files(found: dict[str, Any]) -> str:
    names = list(next(iter(found.values())))
    rows = [
        [name, *(f"{1000 * each[name] / FILES:.1f}" if each[name] else "refused" for each in found.values())]
        for name in names
    ]
    return "\n".join([
        "## Ways to touch files\n",
        f"New files of 32 MiB, {FILES} in a turn, milliseconds for each. Before files on a disk are read the system"
        " forgets them, as far as it does.\n",
        _table(["", *found], rows),
        "The job writes without allocating first: where that is faster, by some milliseconds, the disk itself is what"
        " takes long; and on a file system that cannot do it, glibc writes to each block of the file instead.\n",
    ])  # fmt: skip


def _waiting(found: dict[str, Any]) -> str:
    slow, connections = found["slow"], found["connections"]
    matrices = 2**25 // (8 * 16 * 16)
    stored = (2**25, 2**25, 4 * matrices, 8 * matrices)
    carry = connections * 2**26 / sum(LATENCY + nbytes / BANDWIDTH for nbytes in stored) / 1e6
    files = found["moved"] / found["files"]["seconds"] / 1e6
    return "\n".join([
        "## Stores that make us wait\n",
        f"Each request waits 50 ms, each of {connections} connections carries 100 MB/s (`slow_store.py`); one worker,"
        " two threads, n = 16, not compressed.\n",
        _table(["", ""], [
            ["what the connections carry of tiles: one read, and its `inverse`, `info` and `rcond` written",
             f"{carry:,.0f} MB/s"],
            ["what the worker can do, of files", f"{files:,.0f} MB/s"],
            ["whole job", f"{found['moved'] / slow['seconds'] / 1e6:,.0f} MB/s"],
            ["from the first tile that is read to the last that is written",
             f"{found['moved'] / slow['between'] / 1e6:,.0f} MB/s, the connections **{slow['busy']:.0%}** busy"],
            ["before that: plan, lock, creation, one request after the other", f"{slow['before']:.1f} s"],
            ["requests", f"{slow['requests']}"],
        ]),
    ])  # fmt: skip


def _small_jobs(times: dict[str, float]) -> str:
    ratio = times["and dask_batchinv"] / times["xarray, dask.array, zarr"]
    return "\n".join([
        "## Small jobs\n",
        _table(["", "seconds"], [
            ["`dask-batchinv run` of ten matrices, from command to report", f"{times['command']:.2f}"],
            ["`invert_store` of ten matrices in Python", f"{times['Python']:.2f}"],
            ["`import xarray, dask.array, zarr`", f"{times['xarray, dask.array, zarr']:.2f}"],
            ["the same with `dask_batchinv`", f"{times['and dask_batchinv']:.2f}, {ratio:.2f} times as long"],
        ]),
    ])  # fmt: skip


def _small_tiles(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{each['tiles']:,}", f"{each['tiles'] / each['seconds']:,.0f}", f"{each['seconds']:.1f} s",
            f"{each['planned']:.2f} s",
        ]
        for each in found.values()
    ]  # fmt: skip
    return "\n".join([
        "## Small tiles\n",
        "Tiles of 2 KiB (n = 16), of chunks of 32 MiB, on two workers: each is three files in memory and a row.\n",
        _table(["tiles", "tiles per second, plan to report", "whole job", "planned in"], rows),
    ])  # fmt: skip


def _workers(found: dict[str, Any]) -> str:
    rows = []
    for name, times in found.items():
        kind, count = name.split()
        one = found[f"{kind} 1"]
        work = 1 if kind == "strong" else int(count)
        rows.append([
            kind, count, f"{times['job']:.2f} s", f"{work * one['job'] / times['job']:.2f}",
            f"{work * one['loop'] / times['loop']:.2f}",
        ])  # fmt: skip
    return "\n".join([
        "## Workers\n",
        "On two cores: four share them. Speed-up over one worker; beside it that of the loop, which shows what the"
        " memory that all share leaves.\n",
        _table(["scaling", "workers", "job", "speed-up", "speed-up of the loop"], sorted(rows)),
    ])  # fmt: skip


def _plot(folder: Path, cells: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    who = ["job", "inverse(out=)", "loop", *NAIVE]
    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    for place, name in enumerate(who):
        rates = [cell["moved"] / MIB / cell["seconds"][name] for cell in cells.values()]
        bars = [number + (place - len(who) / 2) * 0.09 for number in range(len(cells))]
        axes.bar(bars, rates, 0.09, label=name, color=pyplot.colormaps["tab10"](place))
    axes.set_xticks(range(len(cells)), [f"n = {name}" for name in cells])
    axes.set_ylabel("MiB/s, read and written")
    axes.legend(ncols=3, fontsize=8)
    figure.savefig(folder / "pipeline.png", dpi=110)
    pyplot.close(figure)
