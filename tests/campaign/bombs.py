"""Bombs in every place that is read: documents and chunks that never end, are no files, or become very large."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import xarray as xr

from tests.campaign.work import Row, check

#: No process may take more than this, and no command longer.
MEMORY, SECONDS = 1.5 * 2**30, 100
HOLE = 2**36
_GZIP = {"name": "gzip", "configuration": {"level": 1}}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HOLE)


def _deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def _bomb(path: Path) -> None:
    # Two gzip members of a GiB of zeros: a few MiB on the disk.
    part = gzip.compress(bytes(2**27), 1)
    with path.open("wb") as file:
        for _ in range(16):
            file.write(part)


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": _pipe, "/dev/zero": _zero, "a hole of 64 GiB": _hole, "brackets": _deep, "a gzip bomb": _bomb,
}  # fmt: skip
#: Where they are put: in the source, or in the target, of a job that is done again.
PLACES = (
    "s/zarr.json", "s/cov/zarr.json", "s/cov/c/0/0/0", "s/time/zarr.json", "s/time/c/0", "s/name/zarr.json",
    "s/name/c/0", "s/beside/zarr.json", "s/beside/c/0",
    "t/zarr.json", "t/inverse/zarr.json", "t/inverse/c.0.0.0", "t/info/c.0", "t/ledger/zarr.json",
    "t/ledger/tiles/zarr.json", "t/ledger/tiles/c/0/0", "t/ledger/runs.json", "t/time/zarr.json", "t/time/c/0",
    "t/.dask_batchinv.lock",
)  # fmt: skip


def bombs(folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """One of them in one place: plan, status, verify and run must end in little memory, whether they need it or not."""
    row = Row("a bomb in a place that is read: pipes, devices, holes, gzip bombs, endless JSON")
    whole = folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    _make(whole)
    check(_run(whole, "run")[0] == 0, "a run without bombs failed")
    cases = [(place, kind) for place in PLACES for kind in KINDS]
    chance.shuffle(cases)
    worst = 0
    for place, kind in cases[: max(runs, 1)]:
        with row.run(f"{kind} at {place}"):
            here = folder / "bombed"
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(whole, here)
            (here / place).unlink(missing_ok=True)
            KINDS[kind](here / place)
            for command in ("plan", "status", "verify", "run", "verify"):
                code, text, peak = _run(here, command)
                worst = max(worst, peak)
                check(code in (0, 1, 2), f"{command} ended with {code}: {text[-500:]}")
                check("Traceback" not in text, f"{command} ended in a traceback: {text[-800:]}")
                check(peak < MEMORY, f"{command} took {peak >> 20} MiB")
    row.remarks["MiB of the largest process"] = worst >> 20
    yield row


def _make(folder: Path) -> None:
    rng = np.random.default_rng(0)
    dataset = xr.Dataset(
        {"cov": (("time", "i", "j"), rng.normal(size=(40, 3, 3))), "beside": ("time", np.zeros(40))},
        coords={"time": np.arange(40), "name": ("time", [f"n{k}" for k in range(40)])},
    )
    dataset.to_zarr(folder / "s", consolidated=False, zarr_format=3, encoding={"cov": {"chunks": (10, 3, 3)}})
    for name in ("cov", "time", "name", "beside"):  # all of them compressed so that a bomb can go off
        path = folder / "s" / name / "zarr.json"
        meta: dict[str, Any] = json.loads(path.read_text())
        codecs = [codec for codec in meta["codecs"] if codec["name"] not in ("zstd", "gzip", "blosc")]
        path.write_text(json.dumps(meta | {"codecs": [*codecs, _GZIP]}))
        for chunk in (folder / "s" / name / "c").rglob("*"):
            if chunk.is_file():
                chunk.write_bytes(gzip.compress(_plain(chunk.read_bytes()), 1))


def _plain(content: bytes) -> bytes:
    return bytes(numcodecs.Zstd().decode(content))


def _run(folder: Path, command: str) -> tuple[int, str, int]:
    """Run a command; return its exit code, what it said, and the memory of its largest process."""
    source, target = str(folder / "s"), str(folder / "t")
    arguments = {
        "plan": [source, target, "--variable", "cov"],
        "run": [source, target, "--variable", "cov", "--tile-size", "720", "--workers", "1", "--max-failed", "any"],
        "status": [target],
        "verify": [target, "--workers", "1"],
    }[command]
    measured = (
        "import resource, subprocess, sys\n"
        f"code = subprocess.run(sys.argv[1:], timeout={SECONDS}).returncode\n"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", measured, sys.executable, "-m", "dask_batchinv.cli", command, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    check("TimeoutExpired" not in ended.stderr, f"{command} did not end within {SECONDS} s")
    peak = int(ended.stdout.rpartition("peak ")[2]) * 1024
    return ended.returncode, ended.stdout + ended.stderr, peak
