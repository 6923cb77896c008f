"""Bits that flip, in the target and in the source."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster

from dask_batchinv import JobFailedError, invert_store, verify_store
from tests.campaign.work import Row, Work, check, chunks_of

#: Flips in a run, each in another tile.
FLIPS = 10
TILE: dict[str, Any] = {"variable": "cov", "tile_size": "600KB", "max_failed": None}


def bits(work: Work, flips: int, chance: random.Random) -> Iterator[Row]:
    """Flip bits of whole stores, a few at a time."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield from _target(work, client, flips, chance)
        yield from _source(work, client, flips, chance)


def _target(work: Work, client: Client, flips: int, chance: random.Random) -> Iterator[Row]:
    row = Row("a bit flips in a chunk of the target: verify finds it, run repairs it")
    target = work.fresh()
    invert_store(work.source, target, client=client, **TILE)
    for number in range(flips // FLIPS):
        with row.run(f"run {number}", faults=FLIPS):
            tiles = chance.sample(range(work.tiles), FLIPS)
            for tile in tiles:
                name = chance.choice([f"inverse/c.{tile}.0.0", f"info/c.{tile}", f"rcond/c.{tile}"])
                _flip(target / name, chance)
            found = verify_store(target, client=client)
            check([bad.number for bad in found.bad_tiles] == sorted(tiles), "verify did not find exactly those tiles")
            report = invert_store(work.source, target, client=client, **TILE)
            repaired = sorted(bad.number for bad in report.damaged_tiles)
            check(repaired == sorted(tiles), f"{sorted(tiles)} were damaged, {repaired} were repaired")
            work.check(target)
    yield row
    row = Row("a bit flips in the ledger: its tiles are done again")
    (ledger,) = (path for path in (target / "ledger/tiles/c").rglob("*") if path.is_file())
    for number in range(max(1, flips // 100)):
        with row.run(f"run {number}"):
            _flip(ledger, chance)
            check(not verify_store(target, client=client).ok, "verify did not find it")
            invert_store(work.source, target, client=client, **TILE)
            check(verify_store(target, client=client).ok, "it is not repaired")
            work.check(target)
    yield row


def _source(work: Work, client: Client, flips: int, chance: random.Random) -> Iterator[Row]:
    row = Row("a bit flips in a chunk of the source: its tile is named, the others are done")
    reference = chunks_of(work.reference)
    for number in range(flips // FLIPS):
        with row.run(f"run {number}", faults=FLIPS):
            target = work.fresh()
            tiles = sorted(chance.sample(range(work.tiles), FLIPS))
            paths = {tile: work.source / f"cov/c/{tile}/0/0" for tile in tiles}
            before = {path: path.read_bytes() for path in paths.values()}
            for path in paths.values():
                _flip(path, chance)
            try:
                invert_store(work.source, target, client=client, **TILE)
                named = []
            except JobFailedError as error:
                named = [bad.number for bad in error.report.failed_tiles]
            check(named == tiles, f"{tiles} were damaged, {named} were named")
            ours = chunks_of(target)
            check(len(reference) - len(ours) == 3 * FLIPS, "not exactly the damaged tiles are missing")
            check(all(reference[name] == content for name, content in ours.items()), "another tile has other bits")
            for path, content in before.items():
                path.write_bytes(content)
            invert_store(work.source, target, client=client, **TILE)
            work.check(target)
    yield row


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
