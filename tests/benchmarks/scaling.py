"""How far a job scales: a model of its cost, fitted to what was measured here, and held against a simulation.

    python -m tests.benchmarks.scaling --out docs

The simulation drives the real driver, ledger and Dask scheduler; its workers are Dask's, but do nothing except sleep.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client, LocalCluster, Worker

from dask_batchinv.job.driver.cluster import meet_workers
from dask_batchinv.job.driver.dispatch import Dispatcher
from dask_batchinv.job.driver.run import Run
from dask_batchinv.job.events import Heartbeat
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.outputs import OUTPUTS
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.results import TileResult, TileRow

#: Workers, tiles, and seconds that a tile takes: what the model must predict.
SIMULATED = ((10, 20_000, 0.0), (100, 20_000, 0.0), (1000, 20_000, 0.0), (100, 20_000, 0.05), (1000, 50_000, 2.0))
LARGEST = (1000, 1_000_000, 1.0)


# --- the simulation -------------------------------------------------------------------------------------------


def sleep_tiles(seconds: float, numbers: range) -> list[TileResult[TileRow]]:
    """Do what a worker does, but for the work."""
    time.sleep(seconds * len(numbers))
    info, rcond = np.zeros(1, np.int32), np.ones(1)
    checksums = {output.name: 1 for output in OUTPUTS}
    return [TileResult(number, TileRow.of(info, rcond, checksums), milliseconds=1) for number in numbers]


@dataclass(frozen=True)
class Sleeping(Dispatcher):
    """Has workers sleep."""

    seconds: float = 0.0

    def run(
        self, work: Any, task: Any, spans: Iterable[range], **options: Any
    ) -> Iterator[TileResult[Any] | Heartbeat]:
        yield from super().run(sleep_tiles, self.seconds, spans, **options)


class Simulation(Run):
    """A run that does not miss what was never written."""

    def _look_for_losses(self, *_: Any) -> None:
        pass


async def be_workers(address: str, count: int) -> None:
    """Be many workers of one thread each."""
    workers = [
        Worker(address, nthreads=1, memory_limit=0, dashboard=False, silence_logs=50, name=str(number))
        for number in range(count)
    ]
    for start in range(0, count, 50):
        await asyncio.gather(*workers[start : start + 50])
    await asyncio.gather(*(worker.finished() for worker in workers))


def simulate(count: int, tiles: int, seconds: float) -> dict[str, float]:
    """Run a job of so many tiles on so many workers, and return how long it took."""
    silent = {f"distributed.{server}.http.routes": [] for server in ("scheduler", "worker")}
    import dask

    with (
        dask.config.set(silent),
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(
            n_workers=0, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address=None
        ) as local,
        Client(local) as client,
    ):
        command = [sys.executable, "-m", "tests.benchmarks.scaling", "--be", local.scheduler_address, str(count)]
        with subprocess.Popen(command) as others:
            client.wait_for_workers(count, timeout=600)
            source = Path(folder, "source")
            zarr.create_array(source, shape=(tiles, 2, 2), chunks=(tiles, 2, 2), dtype="f8")[...] = np.eye(2)
            job = prepare(source, Path(folder, "target"), JobOptions(tile_size=32))
            workers = Workers(count, 1, None)
            plan = replace(plan_for(job, workers), together=1, per_unit=1)
            introduction, _ = meet_workers(client, job.source, job.target)
            executor = Sleeping(client, introduction, is_own=False, seconds=seconds)
            processor, start = time.process_time(), time.perf_counter()
            report = Simulation(job, plan, workers, executor)()
            found = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
            assert report.complete
            assert report.tiles == tiles
            others.terminate()
        return found


def main() -> None:
    if sys.argv[1:2] == ["--be"]:
        asyncio.run(be_workers(sys.argv[2], int(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for scaling.md, scaling.json and scaling.png")
    parser.add_argument("--largest", action="store_true", help="also simulate a million tiles, for half an hour")
    options = parser.parse_args()
    path = options.out / "scaling.json"
    known = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    known["machine"] = {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))}
    for case in (*SIMULATED, *([LARGEST] if options.largest else [])):
        known["runs"]["{} {} {}".format(*case)] = simulate(*case)
        print(case, known["runs"]["{} {} {}".format(*case)], flush=True)
    path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
