"""Processes that are killed, or stopped for a while: workers, clients, schedulers, and all at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.campaign.points import POINTS
from tests.campaign.processes import DEADLINE, Client, Cluster, cluster
from tests.campaign.work import Row, Work, check, recorded

#: A stalled worker is noticed sooner than users would want it.
IMPATIENT = {"batchinv.job.patience": "10s"}
#: How long a worker is stopped: shorter and longer than the patience.
STOPS = (1.0, 3.0, 20.0)


def workers(work: Work, folder: Path, kills: int, chance: random.Random) -> Iterator[Row]:
    """Workers die at random, five times in a run."""
    row = Row("a worker is killed (SIGKILL), at random")
    with cluster(folder) as running:
        for number in range(kills // 5):
            with row.run(f"run {number}", faults=0):
                row.faults += _with_kills(work, running, row, 5, chance)
    yield row


def _with_kills(work: Work, running: Cluster, row: Row, kills: int, chance: random.Random) -> int:
    target, killed = work.fresh(), 0
    client = Client(work.folder, work.command(target, "--scheduler", running.address))
    while killed < kills and client.process.is_alive() and time.monotonic() - client.started < DEADLINE:
        time.sleep(chance.expovariate(1 / 0.35))
        # Only while it works: a death before or after the job proves nothing.
        if 0 < len(work.finished()) < work.tiles and running.kill_a_worker(chance):
            killed += 1
    ended = client.wait()
    check(ended.code == 0, f"exit code {ended.code}: {ended.out[-500:]} {ended.err[-500:]}")
    check(not ended.report["failed_tiles"], "tiles were failed")
    work.check(target)
    row.redone = max(row.redone, len(work.finished()) - work.tiles)
    return killed


def stops(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """A worker is stopped, and goes on after a while: a zombie, if it was given up meanwhile."""
    row = Row("a worker is stopped for 1, 3 or 20 s (SIGSTOP, SIGCONT)")
    with cluster(folder) as running:
        for number in range(runs):
            with row.run(f"run {number}"):
                target = work.fresh()
                client = Client(work.folder, work.command(target, "--scheduler", running.address), settings=IMPATIENT)
                while len(work.finished()) < chance.randrange(1, work.tiles // 2) and client.process.is_alive():
                    time.sleep(0.02)
                stopped = running.kill_a_worker(chance, signal.SIGSTOP)
                time.sleep(STOPS[number % len(STOPS)])
                if stopped is not None:
                    with suppress(Exception):
                        stopped.send_signal(signal.SIGCONT)
                ended = client.wait()
                check(ended.code == 0, f"exit code {ended.code}: {ended.out[-500:]} {ended.err[-500:]}")
                time.sleep(0.2)  # for the zombie to write what it was about to
                work.check(target)
                row.redone = max(row.redone, len(work.finished()) - work.tiles)
    yield row


def clients(work: Work, folder: Path, points: int, each: int, at_random: int, chance: random.Random) -> Iterator[Row]:
    """The client dies at named points of the job, and at random; the same command finishes."""
    with cluster(folder) as running:
        for point in sorted(chance.sample(POINTS, points), key=POINTS.index):
            row = Row(f"the client is killed: {point}")
            for number in range(each):
                with row.run(f"run {number}"):
                    target = work.fresh()
                    client = Client(work.folder, work.command(target, "--scheduler", running.address), point=point)
                    ended = client.wait()
                    check(ended.code == -signal.SIGKILL, f"it was not killed there: {ended.code} {ended.err[-500:]}")
                    _resume(work, row, target, "--scheduler", running.address)
            yield row
        row = Row("the client is killed (SIGKILL), at random")
        for number in range(at_random):
            with row.run(f"run {number}"):
                target = work.fresh()
                client = Client(work.folder, work.command(target, "--scheduler", running.address))
                time.sleep(chance.uniform(0.0, 2.5))
                client.kill()
                client.process.join()
                _resume(work, row, target, "--scheduler", running.address)
        yield row


def _is_complete(target: Path) -> bool:
    path = target / "zarr.json"
    return path.exists() and json.loads(path.read_text())["attributes"].get("complete") == 1


def _resume(work: Work, row: Row, target: Path, *more: str) -> None:
    """Run the same command again: it must do what was not recorded, and that alone."""
    before, was_finished, was_complete = recorded(target), len(work.finished()), _is_complete(target)
    ended = Client(work.folder, work.command(target, *more)).wait()
    check(ended.code == 0, f"exit code {ended.code}: {ended.out[-500:]} {ended.err[-500:]}")
    report = ended.report
    # A complete target is read back only as far as it was written to since.
    read = 0 if was_complete else before
    check(report["tiles_proven"] == read, f"{before} tiles were recorded, {report['tiles_proven']} were proven")
    check(report["tiles_now"] == work.tiles - before, "tiles that were recorded were done again")
    work.check(target)
    row.redone = max(row.redone, was_finished - before)


def schedulers(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """The scheduler dies: the client must end within 60 s with exit code 1, and the same command finishes elsewhere."""
    row = Row("the scheduler is killed (SIGKILL)")
    worst = 0.0
    for number in range(runs):
        with row.run(f"run {number}"):
            target = work.fresh()
            with cluster(folder) as running:
                client = Client(work.folder, work.command(target, "--scheduler", running.address))
                limit = chance.randrange(1, work.tiles - 5)
                while len(work.finished()) < limit and client.process.is_alive():
                    time.sleep(0.01)
                running.scheduler.kill()
                killed = time.monotonic()
                ended = client.wait()
                worst = max(worst, time.monotonic() - killed)
                check(ended.code == 1, f"exit code {ended.code}, expected 1: {ended.err[-500:]}")
                check(time.monotonic() - killed < 60, "it took more than 60 s to end")
                check(ended.report["stopped"], "the report does not say why")
            with cluster(folder) as running:
                _resume(work, row, target, "--scheduler", running.address)
    row.remarks["seconds until the client ended, at worst"] = round(worst, 1)
    yield row


def groups(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """Everything dies at once: the command line with its local cluster, started as users do."""
    row = Row("the whole process group is killed: client, scheduler, workers")
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__PRELOAD": "[]"}
    for number in range(runs):
        with row.run(f"run {number}"):
            target = work.fresh()
            arguments: list[Any] = [sys.executable, "-m", "dask_batchinv.cli", *work.command(target)]
            with subprocess.Popen(
                arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
            ) as process:
                deadline = time.monotonic() + DEADLINE
                while not (target / "ledger").exists() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.6))
                os.killpg(process.pid, signal.SIGKILL)
            before = recorded(target)
            ended = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE, env=environment)
            check(ended.returncode == 0, f"exit code {ended.returncode}: {ended.stderr[-500:]}")
            check(f'"tiles_proven": {before}' in ended.stdout, "tiles that were recorded were done again")
            work.check(target)
    yield row
