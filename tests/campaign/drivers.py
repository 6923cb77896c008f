"""What a job touches beside chunks and processes: drivers that sleep, targets that go, other disks, links, names."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dask_batchinv.job.target.holder import LOCK
from tests.campaign.processes import Client, cluster
from tests.campaign.work import Row, Work, check

#: What may happen to a target while its driver sleeps, or works.
_OTHER = ["--min-rcond", "1e-300"]


def zombies(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """A driver is stopped at random; its target is removed and made anew by another run; then it goes on."""
    row = Row("a driver sleeps while its target is made anew (SIGSTOP, SIGCONT)")
    late = 0
    with cluster(folder) as running:
        for number in range(runs):
            with row.run(f"run {number}"):
                target = work.fresh()
                command = work.command(target, "--scheduler", running.address)
                sleeper = Client(work.folder, command, name="sleeper")
                time.sleep(chance.uniform(0.2, 3.0))
                sleeper.kill(signal.SIGSTOP)
                _gone(target, chance)
                # Of the same job, or of another one whose tiles have the same bits.
                other = Client(work.folder, command + chance.choice([[], _OTHER])).wait()
                check(other.code == 0, f"the second run: {other.code}: {other.out[-300:]} {other.err[-500:]}")
                if chance.random() < 0.5:
                    sleeper.kill(signal.SIGTERM)
                sleeper.kill(signal.SIGCONT)
                ended = sleeper.wait()
                late += ended.code == 0  # it had nothing more to write
                check(ended.code in (0, 1, 2, 130), f"the sleeper ended with {ended.code}: {ended.err[-500:]}")
                work.check(target)
    row.remarks["sleepers that had ended, or only had their report to make"] = late
    yield row


def _gone(target: Path, chance: random.Random) -> None:
    """Remove a target, what is in it, or have it moved away."""
    how = chance.randrange(3)
    while target.exists() and any(target.iterdir()):  # workers may be writing to it
        if how == 0:
            shutil.rmtree(target, ignore_errors=True)
        elif how == 1:
            for path in [*target.iterdir()]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        else:
            moved = target.with_name(f"moved-{time.monotonic_ns()}")
            target.rename(moved)
            shutil.rmtree(moved, ignore_errors=True)


def _lose_part(target: Path, chance: random.Random) -> None:
    """Remove a part of a target, or empty a file of it."""
    parts = [path for path in target.rglob("*") if LOCK not in path.name and "partial" not in path.name]
    if not parts:
        return
    path = chance.choice(parts)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif chance.random() < 0.5 and path.exists():
        path.write_bytes(b"")
    else:
        path.unlink(missing_ok=True)


def vanishing(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """While a job runs, its target is removed or moved, wholly or in part; the same command makes it whole."""
    row = Row("a target, or a part of it, is removed or emptied while a job writes to it")
    first: dict[int, int] = {}
    with cluster(folder) as running:
        for number in range(runs):
            with row.run(f"run {number}"):
                target = work.fresh()
                command = work.command(target, "--scheduler", running.address)
                client = Client(work.folder, command)
                time.sleep(chance.uniform(0.5, 2.5))
                (_gone if number % 2 else _lose_part)(target, chance)
                was_at_work = _says_incomplete(target)
                ended = client.wait()
                check(ended.code in (0, 1, 2), f"exit code {ended.code}: {ended.err[-500:]}")
                first[ended.code] = first.get(ended.code, 0) + 1
                if ended.code == 0 and was_at_work:
                    _whole_or_known(work, target)
                again = Client(work.folder, command).wait()
                if again.code == 2 and "dask_batchinv did not make it" in again.err:
                    # Nothing is left that says whose it is: then it is left alone, and that is said.
                    shutil.rmtree(target)
                    again = Client(work.folder, command).wait()
                check(again.code == 0, f"then it ended with {again.code}: {again.out[-300:]} {again.err[-500:]}")
                work.check(target)
    row.remarks["exit codes of the disturbed runs"] = str(dict(sorted(first.items())))
    yield row


def _says_incomplete(target: Path) -> bool:
    try:
        return bool(json.loads((target / "zarr.json").read_text())["attributes"]["complete"] == 0)
    except (OSError, ValueError):
        return False


def _whole_or_known(work: Work, target: Path) -> None:
    """A run that was disturbed at its work, and calls itself done, has made a target that is whole."""
    verified = Client(work.folder, ["verify", str(target), "--json", "--workers", "1"]).wait()
    check(verified.code == 0, f"it was called done, but: {verified.out[-500:]} {verified.err[-500:]}")


def other_disks(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """For one of two workers the path of the target leads elsewhere: to nothing, or to a copy of the target."""
    row = Row("a worker sees another disk, empty or with a copy of the target")
    if os.getuid() != 0:
        row.remarks["not run"] = "mounts need root"
        yield row
        return
    for number in range(runs):
        with row.run(f"run {number}"):
            target = work.fresh()
            elsewhere = work.folder / "elsewhere"
            shutil.rmtree(elsewhere, ignore_errors=True)
            if number % 2:
                begun = Client(work.folder, work.command(target, "--workers", "1"))
                while begun.process.is_alive() and not (target / "inverse" / "c.3.0.0").exists():
                    time.sleep(0.02)
                begun.kill(signal.SIGTERM)
                begun.wait()
                shutil.copytree(target, elsewhere)
            else:
                elsewhere.mkdir()
            _with_a_stranger(work, folder, target, elsewhere)
    yield row


def _with_a_stranger(work: Work, folder: Path, target: Path, elsewhere: Path) -> None:
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    with cluster(folder, workers=1) as running:
        target.mkdir(exist_ok=True)
        mounts = f'mount --bind "{elsewhere}" "{target}" && exec "$@"'
        arguments = [sys.executable, "-m", "distributed.cli.dask_worker", running.address, "--no-nanny"]
        with subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", mounts, "sh", *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as stranger:  # fmt: skip
            try:
                running.wait_for_workers(2)
                ended = Client(work.folder, work.command(target, "--scheduler", running.address)).wait()
            finally:
                stranger.kill()
    check(ended.code == 0, f"exit code {ended.code}: {ended.out[-500:]} {ended.err[-500:]}")
    check(any("was left out" in event for event in ended.report["worker_events"]), "the stranger is not named")
    after = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    check(before == after, "something was written elsewhere")
    work.check(target)


def names(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """What has a name of ours and is none of ours: links to files of others, other names of the source."""
    row = Row("links in the place of what is ours, and other names of the source")
    victim = work.folder / "victim"
    kinds: list[Callable[[Path, Path], Any]] = [
        lambda path, to: path.symlink_to(to),
        lambda path, to: path.hardlink_to(to),
    ]
    for number in range(runs):
        with row.run(f"run {number}"):
            target = work.fresh()
            victim.unlink(missing_ok=True)
            victim.write_text("years of work\n" * 100)
            begun = number % 2 == 1
            if begun:
                check(
                    Client(work.folder, work.command(target, "--workers", "1")).wait().code == 0, "it could not begin"
                )
            target.mkdir(exist_ok=True)
            name = chance.choice([LOCK, "zarr.json", "ledger/runs.json", "inverse/c.1.0.0"] if begun else [LOCK])
            (target / name).unlink(missing_ok=True)
            chance.choice(kinds)(target / name, victim)
            ended = Client(work.folder, work.command(target, "--workers", "1")).wait()
            check(ended.code in (0, 1, 2), f"exit code {ended.code}: {ended.err[-500:]}")
            check(victim.read_text() == "years of work\n" * 100, f"{name}: what it led to was changed")
            (target / name).unlink(missing_ok=True)
            _other_names(work, target)
            ended = Client(work.folder, work.command(target, "--workers", "1")).wait()
            check(ended.code == 0, f"exit code {ended.code}: {ended.out[-300:]} {ended.err[-500:]}")
            work.check(target)
    yield row


def _other_names(work: Work, target: Path) -> None:
    """Write into the source, or replace a target that the source lies in, under other names of it: refused."""
    link = work.folder / "other-name"
    link.unlink(missing_ok=True)
    link.symlink_to(work.source)
    for place in (
        f"simplecache::file://{work.source}",
        f"file://{link}",
        f"{link}/x.zarr",
        f"{work.source}/../source.zarr",
    ):
        ended = Client(work.folder, ["run", str(work.source), place, "--overwrite", "--variable", "cov"]).wait()
        check(ended.code == 2, f"{place} was not refused: {ended.code} {ended.out[-300:]}")
    work.check_source()
