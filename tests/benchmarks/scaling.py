"""How far a job scales: a model of what it takes, fitted to what is measured here, and held against a simulation.

    python -m tests.benchmarks.scaling --out docs

The simulation drives the real driver, dispatcher and ledger; its workers sleep, as many as there are, in one thread.
What Dask's scheduler adds is measured by itself, with workers of Dask that have nothing to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import zarr
from distributed import Client, LocalCluster

from dask_batchinv.job.driver.dispatch import Dispatcher
from dask_batchinv.job.driver.run import Run
from dask_batchinv.job.events import Heartbeat
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.outputs import ROLES
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.report.run_record import Progress
from dask_batchinv.job.results import TileResult, TileRow
from dask_batchinv.job.versions import versions
from dask_batchinv.job.worker.introduction import Introduction
from tests.benchmarks import scaling_page
from tests.benchmarks.cpu import processor

#: Bytes of a tile, as by default.
TILE_NBYTES = 2**25
#: Workers, tiles, and seconds that a tile takes. With none the driver is what limits: the model is fitted to those.
FITTED = ((10, 10**5, 0.0), (1000, 10**5, 0.0), (10, 20_000, 0.0))
PREDICTED = ((10, 2000, 0.1), (100, 20_000, 0.1), (1000, 10**5, 0.5), (1000, 10**5, 0.05), (1000, 10**6, 0.25))
#: Workers of Dask, and tiles.
DASK = ((2, 20_000), (20, 20_000))


def sleep_tiles(seconds: float, numbers: range) -> list[TileResult[TileRow]]:
    """Return what a worker returns; the sleep is the cluster's."""
    info, rcond = np.zeros(1, np.int32), np.ones(1)
    checksums = dict.fromkeys(ROLES, 1)
    return [TileResult(number, TileRow.of(info, rcond, checksums), milliseconds=1) for number in numbers]


class SleepingFuture:
    """A span on a worker that sleeps."""

    def __init__(self, key: str, span: range):
        self.key, self.span, self.status = key, span, "pending"
        self._future: Future[Any] = Future()

    def add_done_callback(self, function: Any) -> None:
        self._future.add_done_callback(lambda _: function(self))

    def finish(self, results: Any) -> None:
        self.status = "finished"
        self._future.set_result(results)

    def result(self, timeout: float | None = None) -> Any:
        return self._future.result(timeout)


class SleepingCluster:
    """What the dispatcher needs of a client, of a cluster of workers that sleep."""

    status, cluster = "running", None

    def __init__(self, count: int, seconds: float):
        self._seconds = seconds
        self._queues: dict[str, deque[tuple[SleepingFuture, Any, Any]]] = {
            f"sleeping://{number}": deque() for number in range(count)
        }
        self.loop = SimpleNamespace(asyncio_loop=asyncio.new_event_loop())
        self.scheduler = SimpleNamespace(identity=self._identity, processing=self._processing)
        threading.Thread(target=self.loop.asyncio_loop.run_forever, daemon=True).start()

    async def _identity(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {address: {"nthreads": 1, "status": "running"} for address in self._queues}}

    async def _processing(self, workers: Any) -> dict[str, Any]:
        return {}

    def sync(self, function: Any, *arguments: Any, callback_timeout: float | None = None, **options: Any) -> Any:
        found: Future[Any] = asyncio.run_coroutine_threadsafe(function(*arguments, **options), self.loop.asyncio_loop)
        return found.result(callback_timeout)

    async def run(self, function: Any, *arguments: Any, workers: list[str], on_error: str) -> dict[str, Any]:
        return {address: function(*arguments) for address in workers}

    async def gather(self, futures: list[SleepingFuture], asynchronous: bool) -> list[Any]:
        return [future.result() for future in futures]

    def cancel(self, futures: Any, force: bool) -> None:
        pass

    def submit(self, work: Any, task: Any, span: range, *, key: str, workers: list[str], **_: Any) -> SleepingFuture:
        future = SleepingFuture(key, span)
        self.loop.asyncio_loop.call_soon_threadsafe(self._add, workers[0], (future, work, task))
        return future

    def _add(self, address: str, item: Any) -> None:
        queue = self._queues[address]
        queue.append(item)
        if len(queue) == 1:
            self._begin(address)

    def _begin(self, address: str) -> None:
        nap = self._seconds * len(self._queues[address][0][0].span)
        self.loop.asyncio_loop.call_later(nap, self._end, address)

    def _end(self, address: str) -> None:
        future, work, task = self._queues[address].popleft()
        future.finish(work(task, future.span))
        if self._queues[address]:
            self._begin(address)


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


def simulate(client: Any, count: int, tiles: int) -> dict[str, float]:
    """Run a job of so many tiles on so many workers, and return how long it took, and its tasks."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        zarr.create_array(source, data=np.tile(np.eye(2), (tiles, 1, 1)), chunks=(tiles, 2, 2))
        job = prepare(source, Path(folder, "target"), JobOptions(tile_size=32))
        workers = Workers(count, 1, None)
        plan = plan_for(job, workers)
        # As if each were of the usual size.
        tiling = replace(plan.tiling, tile=(1, 2, 2))
        plan = replace(plan, tiling=tiling, together=1, per_unit=1, nbytes_out=tiles * TILE_NBYTES)
        executor = Sleeping(client, Introduction(versions(), None, job.target), is_own=False)
        marks: list[tuple[float, int]] = []

        def note(now: Progress) -> None:
            if now.matrices_done and (not marks or now.matrices_done > marks[-1][1]):
                marks.append((time.perf_counter(), now.matrices_done))

        start, busy = time.perf_counter(), time.thread_time()
        report = Simulation(job, plan, workers, executor, note)()
        assert report.complete
        assert report.tiles == tiles
        return {
            "seconds": marks[-1][0] - start,
            "before": marks[0][0] - start,
            "after": time.perf_counter() - marks[-1][0],
            "driver": time.thread_time() - busy,
            "tiles_per_task": max(1, min(plan.tiles_per_task, tiles // (4 * count))),
        }


def with_dask(count: int, tiles: int) -> dict[str, float]:
    """Run it on workers of Dask, in other processes, that have nothing to do."""
    with LocalCluster(
        n_workers=2, threads_per_worker=count // 2, memory_limit=0, dashboard_address=None
    ) as cluster, Client(cluster) as client:  # fmt: skip
        return simulate(client, 2, tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for scaling.md, scaling.json and scaling.png")
    options = parser.parse_args()
    path = options.out / "scaling.json"
    found: dict[str, Any] = {"machine": {"processor": processor(), "system": platform.platform()}}
    for kind, cases in (("fitted", FITTED), ("predicted", PREDICTED)):
        found[kind] = {}
        for count, tiles, seconds in cases:
            case = f"{count} {tiles} {seconds}"
            found[kind][case] = simulate(SleepingCluster(count, seconds), count, tiles)
            print(case, found[kind][case], flush=True)
    found["dask"] = {}
    for count, tiles in DASK:
        found["dask"][f"{count} {tiles}"] = with_dask(count, tiles)
        print(count, tiles, found["dask"][f"{count} {tiles}"], flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    scaling_page.write(options.out)


if __name__ == "__main__":
    main()
