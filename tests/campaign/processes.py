"""Real processes for the campaign: a scheduler, workers with nannies, clients; started fast, killed without mercy.

They are forked by a server that has imported everything already, so that a run costs tenths of seconds, not seconds.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import distributed
import psutil
from distributed import Nanny, Scheduler

from dask_batchinv import cli
from tests.campaign import points

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.campaign.processes", "dask_batchinv.job.driver.run", "tests.campaign.slow"])
#: A run that takes longer hangs.
DEADLINE = 120.0


@dataclass
class Ended:
    """What a client process left."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


class Client:
    """The command line, in a process of its own."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        *,
        point: str | None = None,
        settings: dict[str, Any] | None = None,
        name: str = "client",
    ):
        self._files = folder / f"{name}.out", folder / f"{name}.err"
        self.process = CONTEXT.Process(target=_client, args=(self._files, arguments, point, settings or {}))
        self.process.start()
        self.started = time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process, if it lives."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid or -1, number)

    def wait(self, seconds: float = DEADLINE) -> Ended:
        """Wait for its end; AssertionError if it hangs."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill()
            self.process.join()
            raise AssertionError(f"the client did not end within {seconds:.0f} s: {self._files[1].read_text()[-2000:]}")
        out, err = (path.read_text() for path in self._files)
        return Ended(self.process.exitcode or 0, out, err)


def _client(files: tuple[Path, Path], arguments: list[str], point: str | None, settings: dict[str, Any]) -> None:
    for number, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    dask.config.set(settings)
    if point is not None:
        points.arm(point)
    cli.main(arguments, prog_name="dask-batchinv")


@dataclass
class Cluster:
    """A scheduler and nannies with their workers, each a process."""

    folder: Path
    scheduler: Any
    nannies: list[Any]
    address: str

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live now."""
        found = []
        for path in self.folder.glob("worker-*"):
            with suppress(psutil.Error, ValueError, FileNotFoundError):
                process = psutil.Process(int(path.name.partition("-")[2]))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_for_workers(self, number: int) -> None:
        """Wait until the scheduler knows so many workers."""
        with distributed.Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(number, timeout=DEADLINE)

    def kill_a_worker(self, chance: random.Random, number: int = signal.SIGKILL) -> psutil.Process | None:
        """Send a signal to one worker; return it, or None if there is none at the moment."""
        workers = self.workers()
        if not workers:
            return None
        worker = chance.choice(workers)
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
        return worker


@contextmanager
def cluster(
    folder: Path, *, workers: int = 2, memory: str = "2GiB", settings: dict[str, Any] | None = None
) -> Iterator[Cluster]:
    """Yield a cluster of separate processes; all of them are dead afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    settings = {"distributed.worker.multiprocessing-method": "forkserver"} | (settings or {})
    where = folder / "address"
    scheduler = CONTEXT.Process(target=_scheduler, args=(where, settings))
    scheduler.start()
    deadline = time.monotonic() + DEADLINE
    while not where.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    address = where.read_text()
    nannies = [CONTEXT.Process(target=_nanny, args=(folder, address, memory, settings)) for _ in range(workers)]
    for nanny in nannies:
        nanny.start()
    running = Cluster(folder, scheduler, nannies, address)
    while len(running.workers()) < workers and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield running
    finally:
        for process in [*nannies, scheduler]:
            process.kill()
            process.join()
        for worker in running.workers():
            with suppress(psutil.NoSuchProcess):
                worker.kill()


def _quiet(folder: Path, name: str) -> None:
    handle = os.open(folder / f"{name}-{os.getpid()}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _scheduler(where: Path, settings: dict[str, Any]) -> None:
    _quiet(where.parent, "scheduler")

    async def main() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0") as scheduler:
            new = where.with_suffix(".new")
            new.write_text(scheduler.address)
            new.rename(where)
            await scheduler.finished()

    with dask.config.set(settings):
        asyncio.run(main())


def _nanny(folder: Path, address: str, memory: str, settings: dict[str, Any]) -> None:
    _quiet(folder, "nanny")
    os.environ["CAMPAIGN_FOLDER"] = str(folder)

    async def main() -> None:
        async with Nanny(
            address, nthreads=1, memory_limit=memory, host="127.0.0.1", preload=["tests.campaign.slow"]
        ) as nanny:
            await nanny.finished()

    with dask.config.set(settings):
        asyncio.run(main())
