"""Targets that follow their source: it grows and changes, and clients are killed at it, in any order."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from dask_batchinv import inverse_ex
from tests.campaign.processes import Client, Cluster, cluster
from tests.campaign.work import Row, check
from tests.support.stacks import conditioned

#: Two batch dimensions, chunks smaller than tiles along one of them, and not a whole number of them in either.
CHUNK, SHAPE, N = (4, 3), (10, 7), 8
TILE_SIZE = str(4 * 6 * N * N * 8)
OPTIONS = ["--tile-size", TILE_SIZE, "--max-failed", "any", "--quiet", "--json"]

_steps = st.one_of(
    st.tuples(st.just("grow"), st.integers(0, 1), st.integers(1, 9)),
    st.tuples(st.just("write"), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("touch"), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("run"), st.just(0), st.just(0)),
    st.tuples(st.just("kill"), st.integers(0, 250), st.just(0)),
)


class _Model:
    """A source of which all is known, and a target."""

    def __init__(self, folder: Path, running: Cluster, name: str):
        self.folder, self.running = folder, running
        self.source, self.target = folder / f"{name}-source.zarr", folder / f"{name}-target.zarr"
        self.chance = np.random.default_rng(len(name))
        self.array = zarr.create_array(self.source, shape=(*SHAPE, N, N), chunks=(*CHUNK, N, N), dtype=float)
        self.array[...] = self.some(SHAPE)

    def some(self, shape: tuple[int, ...]) -> Any:
        count = int(np.prod(shape))
        return (conditioned(count, N, 10) * self.chance.uniform(1, 2, (count, 1, 1))).reshape(*shape, N, N)

    def client(self) -> Client:
        return Client(self.folder, ["run", str(self.source), str(self.target), *OPTIONS, "--scheduler",
                                    self.running.address])  # fmt: skip

    def do(self, kind: str, first: int, second: int) -> int:
        """Do a step; return how many faults it was."""
        y, x = (at * size // 100 for at, size in zip((first, second), self.array.shape[:2], strict=True))
        places = [at // step * step for at, step in zip((y, x), CHUNK, strict=True)]
        chunk = tuple(slice(at, at + step) for at, step in zip(places, CHUNK, strict=True))
        if kind == "grow":
            old = self.array.shape
            new = [*old]
            new[first] += second
            self.array.resize(tuple(new))
            where = (slice(None),) * first + (slice(old[first], None),)
            self.array[where] = self.some(self.array[where].shape[:2])
        elif kind == "write":
            self.array[chunk] = self.some(self.array[chunk].shape[:2])
        elif kind == "touch":
            self.array[chunk] = self.array[chunk]
        elif kind == "run":
            self.finish()
        else:
            client = self.client()
            time.sleep(0.3 + first / 100)
            client.kill()
            client.process.join()
        return kind == "kill"

    def finish(self) -> dict[str, Any]:
        """Run the same command, and compare all that it gives with what it must be."""
        ended = self.client().wait()
        check(ended.code == 0, f"exit code {ended.code}: {ended.out[-500:]} {ended.err[-500:]}")
        want = inverse_ex(self.array[...])
        found = zarr.open_group(self.target, mode="r")
        for name in ("inverse", "info", "rcond"):
            same = np.asarray(found[name][...]).tobytes() == np.asarray(getattr(want, name)).tobytes()
            check(same, f"{name} is not that of the source")
        check(found.attrs["complete"] == 1, "the target is not complete")
        return ended.report


def updates(folder: Path, where: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """Each run is a history of up to ten steps, drawn by Hypothesis, and at its end all must be right."""
    row = Row("a target follows its source: appended, rewritten, and killed in updates, in any order")

    with cluster(where) as running:

        @seeded(chance.randrange(2**32))
        @settings(max_examples=runs, phases=[Phase.generate], database=None, deadline=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.lists(_steps, min_size=3, max_size=10))
        def history(steps: list[tuple[str, int, int]]) -> None:
            with row.run(f"{steps}", faults=0):
                model = _Model(folder, running, f"updates-{row.runs}")
                try:
                    for step in steps:
                        row.faults += model.do(*step)
                    model.finish()
                    stamps = _stamps(model.target)
                    report = model.finish()
                    check(report["tiles_now"] == 0, "something was done again where nothing had changed")
                    check(_stamps(model.target) == stamps, "something was written where nothing had changed")
                finally:
                    shutil.rmtree(model.source, ignore_errors=True)
                    shutil.rmtree(model.target, ignore_errors=True)

        history()
    yield row


def _stamps(target: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
