"""Tiles that kill whoever touches them: they must be left out, by name, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr

from tests.campaign.processes import Client, cluster
from tests.campaign.slow import POISON
from tests.campaign.work import MATRICES_PER_TILE, Row, Work, check, chunks_of

#: Hanging tiles are given up sooner than users would want it, but not before a worker can start again.
IMPATIENT = {"batchinv.job.patience": "10s"}
#: Enough for a tile, and soon too little for one that hoards.
MEMORY = "600MiB"


def poison(work: Work, folder: Path, each: int, chance: random.Random) -> Iterator[Row]:
    """One tile of the source is poison; then it is put right."""
    for value, kind in POISON.items():
        settings = IMPATIENT if "hang" in kind else {}
        row = Row(f"a tile is poison: {kind}")
        with cluster(folder, memory=MEMORY, settings={"distributed.scheduler.worker-ttl": "60s"}) as running:
            for number in range(each):
                with row.run(f"run {number}"):
                    _one(work, row, running.address, value, chance.randrange(work.tiles), settings)
        yield row


def _one(work: Work, row: Row, address: str, value: float, bad: int, settings: dict[str, Any]) -> None:
    target = work.fresh()
    # The cluster is the campaign's own, though not the job's: a tile that hangs would hold its threads for good.
    command = work.command(target, "--scheduler", address, "--restart-stalled")
    with _poisoned(work, bad, value):
        ended = Client(work.folder, command, settings=settings).wait()
        check(ended.code == 1, f"exit code {ended.code}, expected 1: {ended.out[-300:]} {ended.err[-500:]}")
        failed = [(tile["number"], tile["cause"]) for tile in ended.report["failed_tiles"]]
        check(
            [number for number, _ in failed] == [bad],
            f"tile {bad} is poison, these failed: {failed}; stopped: {ended.report['stopped']}",
        )
        check("with this tile alone on it" in failed[0][1], f"the cause is not named: {failed[0][1]}")
        reference = chunks_of(work.reference)
        ours = chunks_of(target)
        check(len(reference) - len(ours) == 3, "something is missing beside the poison tile")
        check(all(reference[name] == content for name, content in ours.items()), "another tile has other bits")
        row.redone = max(row.redone, len(work.finished()) - (work.tiles - 1))
    ended = Client(work.folder, command).wait()
    check(ended.code == 0, f"exit code {ended.code} without the poison: {ended.out[-300:]} {ended.err[-500:]}")
    check(ended.report["tiles_now"] == 1, "more than the poison tile was done")
    work.check(target)


@contextmanager
def _poisoned(work: Work, number: int, value: float) -> Iterator[None]:
    """Change the first number of a tile, and put the chunk back as it was."""
    path = work.source / f"cov/c/{number}/0/0"
    before = path.read_bytes()
    zarr.open_array(work.source / "cov", mode="r+")[number * MATRICES_PER_TILE, 0, 0] = value
    try:
        yield
    finally:
        path.write_bytes(before)
