"""The fault campaign: breaks real jobs in every way we know of, and counts how often nothing was lost.

    python -m tests.campaign                      # the full campaign, an hour and more
    python -m tests.campaign --only bits poison   # parts of it; the others keep their rows in the table
    python -m tests.campaign --share 0.02         # every part, but few runs of each

Writes every row to docs/reliability.json and the table to docs/reliability.md.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign import bits, bombs, drivers, kills, limits, objects, overhead, page, poison, stores, updates
from tests.campaign.points import POINTS
from tests.campaign.processes import Client
from tests.campaign.work import Row, Work, prepare_work

#: Tiles of the job that is broken: it takes seconds.
TILES = 60


def _parts(
    work: Callable[[int], Work], folder: Path, share: float
) -> dict[str, Callable[[random.Random], Iterator[Row]]]:
    """Every part, with the number of runs that the full campaign has of it."""

    def some(number: int, least: int = 1) -> int:
        return max(least, round(share * number))

    cluster = folder / "cluster"
    return {
        "workers": lambda chance: kills.workers(work(TILES), cluster, some(300, 5), chance),
        "stops": lambda chance: kills.stops(work(TILES), cluster, some(30), chance),
        "clients": lambda chance: kills.clients(
            work(TILES), cluster, len(POINTS) if share >= 0.1 else 4, some(10), some(100), chance
        ),
        "schedulers": lambda chance: kills.schedulers(work(TILES), cluster, some(50), chance),
        "groups": lambda chance: kills.groups(work(TILES), cluster, some(50), chance),
        "disks": lambda chance: limits.full_disks(work(TILES), cluster, some(3), chance),
        "stores": lambda chance: stores.schedules(work(4), some(1000, 10), chance),
        "objects": lambda chance: objects.objects(work(16), folder, some(40), chance),
        "bits": lambda chance: bits.bits(work(20), some(1000, 20), chance),
        "poison": lambda chance: poison.poison(work(20), cluster, some(10), chance),
        "memory": lambda chance: limits.memory(folder, some(2), chance),
        "overhead": lambda chance: overhead.overhead(folder, some(10), chance),
        "zombies": lambda chance: drivers.zombies(work(TILES), cluster, some(60), chance),
        "vanishing": lambda chance: drivers.vanishing(work(TILES), cluster, some(100), chance),
        "disks elsewhere": lambda chance: drivers.other_disks(work(20), cluster, some(20), chance),
        "names": lambda chance: drivers.names(work(20), cluster, some(50), chance),
        "updates": lambda chance: updates.updates(folder, cluster, some(200, 3), chance),
        "bombs": lambda chance: bombs.bombs(folder, some(50), chance),
        "zombies in S3": lambda chance: objects.zombies(work(TILES), folder, some(40), chance),
        "million": lambda chance: limits.a_million_tiles(folder, some(10**6), chance),
    }


def main() -> int:
    """Run what was asked for; return how many runs failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run")
    parser.add_argument("--share", type=float, default=1.0, help="share of the runs of the full campaign")
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--out", type=Path, help="docs folder whose reliability.json and .md are brought up to date")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)

        def work(tiles: int) -> Work:
            return prepare_work(folder / f"work-{tiles}", tiles, lambda command: _undisturbed(folder, command))

        parts = _parts(work, folder, arguments.share)
        if unknown := set(arguments.only or ()) - set(parts):
            parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        for name in arguments.only or parts:
            for row in parts[name](random.Random(f"{arguments.seed} {name}")):
                print(page.line(row), flush=True)
                for failure in row.failures:
                    print(f"    {failure}", file=sys.stderr, flush=True)
                failed += len(row.failures)
                if arguments.out is not None:
                    page.record(arguments.out, name, row, arguments.seed)
    return min(failed, 100)


def _undisturbed(folder: Path, command: list[str]) -> None:
    ended = Client(folder, command).wait()
    if ended.code != 0:
        raise RuntimeError(f"a run without any fault failed: {ended.err}")


if __name__ == "__main__":
    sys.exit(main())
