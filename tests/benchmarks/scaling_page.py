"""The model of what a job takes, and the page about it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dask_batchinv.job.plan.plan import TASK_NBYTES
from dask_batchinv.job.results import COLUMNS
from dask_batchinv.job.tiling import LARGEST_COUNT

#: What is assumed of a worker: one core and its share of a network, in bytes a second each way.
NETWORK = 150e6
#: Milliseconds of a core for a tile of 32 MiB with zstd, all steps of docs/benchmarks/pipeline.md together.
TILE_SECONDS = 0.06
#: Prices that are assumed, in dollars: a worker for an hour, a thousand reads, a thousand writes and listings.
HOUR, READS, WRITES = 0.05, 0.0004, 0.005
#: Bytes of a tile by default.
TILE = 2**25
#: Requests of a tile: its source chunk, the look at the lock; its three outputs.
READS_PER_TILE, WRITES_PER_TILE = 2, 3
#: Requests a second that an object store takes for one prefix before it asks to slow down, as Amazon says of S3.
STORE_READS, STORE_WRITES = 5500, 3500
SIZES = {"1 TB": 10**12, "1 PB": 10**15}
COUNTS = (10, 100, 1000, 10_000)
ROW_NBYTES = 8 * len(COLUMNS)

HEAD = """# Scaling

Made by `python -m tests.benchmarks.scaling --out docs`; do not edit. {processor}; {system}.

What a job of very many workers takes, by a model whose few constants are measured here, on two cores. No cluster of a
thousand machines was at hand: how well the driver holds is shown by a simulation, what the workers do is taken from
[the pipeline benchmark](benchmarks/pipeline.md), and what is assumed of networks and stores is said.

## The model

A job of *T* tiles on *W* workers of one thread takes the longest of

| term | what it is |
|---|---|
| workers | *T* (time of a tile) / *W*, and of what is left at the end one task |
| driver | *T* × {tile_us:.0f} µs: rows of the ledger, progress, which worker gets which task |
| Dask | *K* × {dask_ms:.1f} ms: client, scheduler, workers, all on two cores; a task is {per_task} tiles of 32 MiB |
| store | requests over what the store takes in a second |

and before that {fixed_ms:.0f} ms + *W* × {worker_ms:.1f} ms for the workers to show that they see what we see, and
*T* × {look_us:.0f} µs to look at the source and the target.

## Held against a simulation

The real driver, dispatcher and ledger; the workers sleep. Fitted to the runs in which they do not sleep.

| workers | tiles | seconds of a tile | simulated | by the model | model ÷ simulated | the driver was busy |
|---|---|---|---|---|---|---|
{simulated}

## What limits when

float64 with zstd, an object store. Assumed: a tile takes a core {tile_ms:.0f} ms, or longer where the network of a
worker carries {network:.0f} MB/s each way; a store takes {reads:,} reads and {writes:,} writes a second of one prefix;
a worker costs ${hour:.2f} an hour, a thousand reads ${read_price}, a thousand writes ${write_price}.

| stack | tile | tiles | workers | time | limited by | driver busy | ledger | workers cost | requests cost |
|---|---|---|---|---|---|---|---|---|---|
{predicted}

![Time by workers](scaling.png)

- **The driver** holds a row of {row} bytes for each tile in memory, and writes what has changed of the ledger once a
  second, in chunks of 2.3 MB: it limits nothing here. A job may have {most:,} tiles.
- **Dask** limits where thousands of workers do short tasks; a larger `--tile-size` moves that. With cores of its
  own a scheduler does better than here, where it shares two with all others.
- **The store** limits where it takes no more requests: S3 begins with what is assumed here, and takes more for each
  prefix once it has split them.
"""


def write(folder: Path) -> None:
    """Write scaling.md and scaling.png beside scaling.json."""
    found = json.loads((folder / "scaling.json").read_text())
    model = fit(found)
    simulated = []
    for kind in ("fitted", "predicted"):
        for case, measured in found[kind].items():
            count, tiles, seconds = int(case.split()[0]), int(case.split()[1]), float(case.split()[2])
            guess = model.seconds(count, tiles, seconds, measured["tiles_per_task"])
            simulated.append(
                f"| {count:,} | {tiles:,} | {seconds or 'none'} | {measured['seconds']:.1f} s | {guess:.1f} s "
                f"| {guess / measured['seconds']:.2f}{' (fitted)' if kind == 'fitted' else ''} "
                f"| {measured['driver'] / measured['seconds']:.0%} |"
            )
    rows, lines = [], {}
    for name, nbytes in SIZES.items():
        for count in COUNTS:
            row, seconds = model.row(name, nbytes, count)
            rows.append(row)
            lines.setdefault(name, []).append(seconds)
    text = HEAD.format(
        **found["machine"], tile_us=1e6 * model.tile, dask_ms=1e3 * model.dask, per_task=TASK_NBYTES // TILE,
        fixed_ms=1e3 * model.fixed, worker_ms=1e3 * model.worker, look_us=1e6 * model.look,
        simulated="\n".join(simulated), predicted="\n".join(rows), tile_ms=1e3 * TILE_SECONDS, network=NETWORK / 1e6,
        reads=STORE_READS, writes=STORE_WRITES, hour=HOUR, read_price=READS, write_price=WRITES, row=ROW_NBYTES,
        most=LARGEST_COUNT,
    )  # fmt: skip
    (folder / "scaling.md").write_text(text)
    _plot(folder, lines)


class Model:
    """The constants, in seconds."""

    def __init__(self, fixed: float, worker: float, look: float, tile: float, dask: float):
        self.fixed, self.worker, self.look, self.tile, self.dask = fixed, worker, look, tile, dask

    def before(self, count: int, tiles: int) -> float:
        """Return what passes before the first tile is begun."""
        return self.fixed + count * self.worker + tiles * self.look

    def seconds(self, count: int, tiles: int, nap: float, per_task: float) -> float:
        """Return what a simulated run takes, which has no scheduler and no store."""
        rounds = math.ceil(tiles / per_task / count)
        return self.before(count, tiles) + max(rounds * per_task * nap, tiles * self.tile)

    def row(self, name: str, nbytes: int, count: int) -> tuple[str, float]:
        """Return a row of the table of a stack, and the time it takes."""
        tile = TILE
        while nbytes / tile > LARGEST_COUNT / 4:
            tile *= 2
        tiles = math.ceil(nbytes / tile)
        tasks = tiles / max(1, TASK_NBYTES // tile)
        each = max(TILE_SECONDS * tile / TILE, tile / NETWORK)
        place = "workers, their cores" if TILE_SECONDS / TILE > 1 / NETWORK else "workers, their network"
        terms = {
            place: tiles * each / count,
            "driver": tiles * self.tile,
            "Dask": tasks * self.dask,
            "store": max(READS_PER_TILE * tiles / STORE_READS, WRITES_PER_TILE * tiles / STORE_WRITES),
        }
        limit = max(terms, key=lambda term: terms[term])
        seconds = self.before(count, tiles) + terms[limit]
        requests = tiles * (READS_PER_TILE * READS + WRITES_PER_TILE * WRITES) / 1000
        busy = (terms["driver"] + terms["Dask"]) / seconds
        return (
            f"| {name} | {tile >> 20} MiB | {tiles:,} | {count:,} | {_duration(seconds)} | {limit} | {busy:.0%} "
            f"| {tiles * ROW_NBYTES / 2**20:,.0f} MiB | ${count * seconds / 3600 * HOUR:,.2f} | ${requests:,.2f} |"
        ), seconds


def fit(found: dict[str, Any]) -> Model:
    """Return the constants by the runs in which nobody sleeps."""
    fitted = {tuple(map(float, case.split())): run for case, run in found["fitted"].items()}
    few, many, small = (fitted[key] for key in ((10, 1e5, 0), (1000, 1e5, 0), (10, 2e4, 0)))
    worker = (many["before"] - few["before"]) / 990
    look = (few["before"] - small["before"]) / 8e4
    fixed = small["before"] - 10 * worker - 2e4 * look
    tile = (few["seconds"] - few["before"] - (small["seconds"] - small["before"])) / 8e4
    # With few threads the round trip limits, not what all can do.
    dask = min((run["seconds"] - run["before"]) / (20_000 / run["tiles_per_task"]) for run in found["dask"].values())
    return Model(fixed, worker, look, tile, dask)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _plot(folder: Path, lines: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, seconds in lines.items():
        axes.loglog(COUNTS, [each / 60 for each in seconds], "o-", label=name)
    axes.set_xlabel("workers of one thread")
    axes.set_ylabel("minutes, by the model")
    axes.legend()
    figure.savefig(folder / "scaling.png", dpi=110)
    pyplot.close(figure)
