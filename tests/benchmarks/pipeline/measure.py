"""Measures: each function gives the figures of one part of the page."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import zarr
from crc32c import crc32c
from distributed import Client, LocalCluster

import dask_batchinv
from dask_batchinv.chunks.decompression import decompress_into
from dask_batchinv.disk import write_file
from dask_batchinv.job.driver.cutting import tasks_of
from dask_batchinv.job.driver.own_cluster import UNWATCHED
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.results import content_checksum
from dask_batchinv.kernels import choose_kernel
from tests.benchmarks.pipeline import slow_store
from tests.benchmarks.pipeline.passes import passes
from tests.benchmarks.pipeline.stores import CHUNK_NBYTES, CODECS, make, place

#: What a worker of the main table may take.
MEMORY_NBYTES = 2**31
SIZES = (3, 8, 16, 64)
#: What is wished makes tiles of up to four times as much: one matrix of 2 KiB.
TILE_NBYTES = 512
Figures = dict[str, Any]


def cluster(workers: int, threads: int = 1) -> Client:
    """Start worker processes for all passes that need some, set as those that a job starts itself."""
    with dask.config.set(UNWATCHED):
        local = LocalCluster(
            n_workers=workers, threads_per_worker=threads, memory_limit=MEMORY_NBYTES, dashboard_address=None
        )
        return Client(local)


def all_passes(folder: Path, nbytes: int, repeat: int) -> Figures:
    """Time everybody over stacks of several sizes, in turns, and see what the workers of our job take."""
    figures: Figures = {}
    with cluster(2) as client:
        everybody = passes(client)
        for codec in CODECS:
            for n in SIZES:
                source = make(folder, n, codec, nbytes)
                cell: dict[str, list[float]] = {name: [] for name in everybody}
                names = list(everybody)
                for turn in range(repeat):
                    for name in names[turn:] + names[:turn]:
                        with place(folder) as target:
                            start = time.perf_counter()
                            everybody[name](str(source), target, 2)
                            cell[name].append(time.perf_counter() - start)
                moved = 2 * zarr.open_array(source).nbytes
                figures[f"{n} {codec}"] = {
                    "seconds": {name: statistics.median(times) for name, times in cell.items()},
                    "moved": moved,
                    **memory_of_job(client, source, folder),
                }
                shutil.rmtree(source)
                print(n, codec, {k: round(moved / 2**20 / v) for k, v in figures[f"{n} {codec}"]["seconds"].items()})
    return figures


def memory_of_job(client: Client, source: Path, folder: Path) -> Figures:
    """Run the job once more, and return the peak of its workers and what was projected."""
    client.run(_forget_peak)
    with place(folder) as target:
        job = prepare(source, target, JobOptions(tile_size=CHUNK_NBYTES))
        dask_batchinv.invert_store(source, target, client=client, tile_size=CHUNK_NBYTES)
    peak = max(client.run(_peak).values())
    return {"peak": peak, "projected": plan_for(job, Workers(2, 1, MEMORY_NBYTES)).projected_nbytes}


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def waiting(folder: Path, nbytes: int) -> Figures:
    """Run a job of a worker with two threads between stores that make it wait."""
    source, figures = make(folder, 16, "none", nbytes), {}
    with Client(processes=False, n_workers=1, threads_per_worker=2, memory_limit="4GiB", dashboard_address=None) as c:
        for name, scheme in (("slow", "slow://"), ("files", "")):
            with place(folder) as target:
                slow_store.TRAFFIC.requests.clear()
                start = time.perf_counter()
                dask_batchinv.invert_store(f"{scheme}{source}", f"{scheme}{target}", client=c, tile_size=CHUNK_NBYTES)
                figures[name] = {"seconds": time.perf_counter() - start}
            requests = [(begin - start, end - start, size) for begin, end, size in slow_store.TRAFFIC.requests]
            if requests:
                first, last = (f(each[k] for each in requests if each[2] > 2**20) for f, k in ((min, 0), (max, 1)))
                busy = sum(min(end, last) - begin for begin, end, _ in requests if first <= begin < last)
                figures[name] |= {
                    "requests": len(requests), "before": first, "between": last - first,
                    "busy": busy / (last - first) / slow_store.CONNECTIONS,
                }  # fmt: skip
    return figures | {"moved": 2 * zarr.open_array(source).nbytes, "connections": slow_store.CONNECTIONS}


def small_jobs(repeat: int) -> Figures:
    """Time ten matrices from command to report, the same in Python, and imports."""
    imports = {
        "xarray, dask.array, zarr": "import xarray, dask.array, zarr",
        "and dask_batchinv": "import xarray, dask.array, zarr, dask_batchinv",
    }
    times: dict[str, list[float]] = {name: [] for name in ("command", "Python", *imports)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "ten")
        a = np.random.default_rng(0).standard_normal((10, 3, 3))
        zarr.create_array(source, data=a, chunks=(10, 3, 3))
        for turn in range(repeat + 1):
            found = {
                "command": _seconds([sys.executable, "-m", "dask_batchinv.cli", "run", str(source), f"{folder}/{turn}"])
            }
            start = time.perf_counter()
            dask_batchinv.invert_store(source, f"{folder}/python-{turn}")
            found["Python"] = time.perf_counter() - start
            found |= {name: _seconds([sys.executable, "-c", code]) for name, code in imports.items()}
            for name, seconds in found.items() if turn else ():  # the first compiles, and fills caches
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def small_tiles(folder: Path, counts: list[int]) -> Figures:
    """Run jobs of ever more tiles of 2 KiB, and plan them."""
    figures: Figures = {}
    with cluster(2) as client:
        for count in counts:
            source = folder / f"small-{count}"
            if not source.exists():
                array = zarr.create_array(source, shape=(count, 16, 16), chunks=(min(count, 2**14), 16, 16), dtype="f8")
                array[...] = np.broadcast_to(
                    np.random.default_rng(0).standard_normal((16, 16)) + 8 * np.eye(16), array.shape
                )
            with place(folder) as target:
                start = time.perf_counter()
                job = prepare(source, target, JobOptions(tile_size=TILE_NBYTES))
                plan = plan_for(job, Workers(2, 1, MEMORY_NBYTES))
                sum(map(len, tasks_of(np.arange(plan.tiling.n_tiles), plan, 2)))
                planned = time.perf_counter() - start
                start = time.perf_counter()
                report = dask_batchinv.invert_store(source, target, client=client, tile_size=TILE_NBYTES)
                seconds = time.perf_counter() - start
            figures[str(count)] = {"tiles": report.tiles, "seconds": seconds, "planned": planned}
            print(figures[str(count)], flush=True)
            shutil.rmtree(source)
    return figures


def more_workers(folder: Path, nbytes: int, repeat: int) -> Figures:
    """Time the job, and the bare loop, with 1, 2 and 4 workers: over one stack, and over one that grows with them."""
    figures: Figures = {}
    for workers in (1, 2, 4):
        with cluster(workers) as client:
            ours = passes(client)
            for kind, size in (("strong", nbytes), ("weak", nbytes * workers // 2)):
                source = make(folder, 16, "zstd", size)
                times: dict[str, list[float]] = {"job": [], "loop": []}
                for _ in range(repeat):
                    for name in times:
                        with place(folder) as target:
                            start = time.perf_counter()
                            ours[name](str(source), target, workers)
                            times[name].append(time.perf_counter() - start)
                figures[f"{kind} {workers}"] = {name: statistics.median(each) for name, each in times.items()}
                print(kind, workers, figures[f"{kind} {workers}"], flush=True)
    return figures


def steps(folder: Path, repeat: int) -> Figures:
    """Time what a tile goes through, one after the other on one core; in milliseconds."""
    return {codec: _steps(make(folder, 16, codec, CHUNK_NBYTES), folder / "written", repeat) for codec in CODECS}


def _steps(source: Path, written: Path, repeat: int) -> dict[str, float]:
    """Time the steps of the one tile of a source; what is written is removed each time."""
    opened, path = prepare(source, source.with_name("none"), JobOptions()).source, source / "c" / "0" / "0" / "0"
    array, region = opened.open(), (slice(0, opened.shape[0]),)
    block, invert = np.empty(opened.shape), choose_kernel("general").invert
    out, info, rcond = np.empty_like(block), np.empty(len(block), np.int32), np.empty(len(block))
    is_plain = path.stat().st_size == block.nbytes
    plain = block.reshape(-1).view(np.uint8)
    encoded = plain if is_plain else np.empty(path.stat().st_size, np.uint8)

    def read_bare() -> None:
        with path.open("rb", buffering=0) as file:
            file.readinto(encoded)

    work: dict[str, Callable[[], Any]] = {
        "read, by Zarr": lambda: array[region],
        "read, as the job does": lambda: opened.read_stored(array, region, block),
        "read, the bytes alone": read_bare,
        "decode": lambda: decompress_into("zstd", {}, encoded, plain),
        "kernel": lambda: invert(block, out, info, rcond),
        "checksum of the source": lambda: content_checksum(block),
        "checksum of the inverse": lambda: crc32c(out.reshape(-1).view(np.uint8).data),
        "write, new file": lambda: write_file(str(written), [out.data.cast("B")], synced=False),
    }
    if is_plain:
        del work["decode"]
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeat):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            times[name].append(1000 * (time.perf_counter() - start))
            written.unlink(missing_ok=True)
    return {name: statistics.median(each) for name, each in times.items()}
