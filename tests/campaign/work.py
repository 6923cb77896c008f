"""What the campaign works on: a source, its undisturbed run, and the five things that must hold after any fault."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from zarr.codecs import Crc32cCodec, ZstdCodec

from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger
from tests.support.stacks import conditioned

#: Tiles of a little more than half a MiB, so that each is a task of its own.
MATRICES_PER_TILE, N = 1100, 8
OPTIONS = ["--variable", "cov", "--tile-size", "600KB", "--max-failed", "any", "--quiet", "--json"]


@dataclass
class Row:
    """One line of the table: a fault, how often it was tried, and how often all five things held."""

    fault: str
    runs: int = 0
    passes: int = 0
    faults: int = 0
    """Faults that were injected: a run may have several."""
    redone: int = 0
    """Of the worst run: tiles that were finished, and done again all the same."""
    slowest: float = 0.0
    """Seconds of the slowest run, until all was as it must be."""
    seconds: float = 0.0
    """Of all runs."""
    remarks: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def run(self, name: str, *, faults: int = 1) -> Iterator[None]:
        """Count one run: passed if nothing in it raises an error."""
        start = time.monotonic()
        self.runs += 1
        self.faults += faults
        try:
            yield
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
        else:
            self.passes += 1
        took = time.monotonic() - start
        self.slowest = max(self.slowest, took)
        self.seconds += took


@dataclass(frozen=True)
class Work:
    """A source with the result of an undisturbed run."""

    folder: Path
    tiles: int

    @property
    def source(self) -> Path:
        return self.folder / "source.zarr"

    @property
    def reference(self) -> Path:
        return self.folder / "reference.zarr"

    @property
    def log(self) -> Path:
        """Where workers note each tile that they have finished."""
        return self.folder / "log"

    def command(self, target: Path, *more: str) -> list[str]:
        """The arguments of the same command, each time."""
        return ["run", str(self.source), str(target), *OPTIONS, *more]

    def fresh(self) -> Path:
        """A target that is not there yet."""
        target = self.folder / "target.zarr"
        shutil.rmtree(target, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        return target

    def finished(self) -> list[int]:
        """The tiles that workers have finished, as often as they did."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def check(self, target: Path) -> None:
        """Raise AssertionError unless the target is what an undisturbed run gives, and the source what it was."""
        ours, theirs = chunks_of(target), chunks_of(self.reference)
        missing, extra = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
        check(not missing, f"chunks are missing: {missing[:5]}")
        check(not extra, f"chunks are extra: {extra[:5]}")
        different = [name for name in theirs if ours[name] != theirs[name]]
        check(not different, f"chunks differ: {different[:5]}")
        stray = [path.name for path in target.rglob("*") if path.name.endswith((".partial", ".lock"))]
        check(not stray, f"files were left: {stray[:5]}")
        attributes = json.loads((target / "zarr.json").read_text())["attributes"]
        check(attributes["complete"] == 1, "the target is not complete")
        self.check_source()

    def check_source(self) -> None:
        """Raise AssertionError unless the source is byte for byte what it was."""
        check(digest_of(self.source) == (self.folder / "source.sha256").read_text(), "the source has changed")


def check(holds: object, what: str) -> None:
    """Raise AssertionError, also where Python leaves assertions out."""
    if not holds:
        raise AssertionError(what)


def recorded(target: Path) -> int:
    """Tiles in the ledger of a target; 0 if there is none yet."""
    try:
        return int(Ledger(*existing(target)).done.sum())
    except Exception:  # whatever is half created
        return 0


def chunks_of(target: Path) -> dict[str, bytes]:
    """Every chunk of the three arrays, as it lies there."""
    names = ("inverse", "info", "rcond")
    return {
        str(path.relative_to(target)): path.read_bytes()
        for name in names
        for path in (target / name).rglob("*")
        if path.is_file() and path.name != "zarr.json"
    }


def digest_of(folder: Path) -> str:
    """SHA-256 of every file of a folder, with its name."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            whole.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def prepare_work(folder: Path, tiles: int, run: Callable[[list[str]], None]) -> Work:
    """Write a source, with coordinates and some matrices that have no inverse, and let `run` do it undisturbed."""
    work = Work(folder, tiles)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    a = conditioned(tiles * MATRICES_PER_TILE, N, 1e3)
    a[:: 3 * MATRICES_PER_TILE + 7] = 0
    a[2 * MATRICES_PER_TILE : 3 * MATRICES_PER_TILE] = 0  # a tile of nothing but NaN
    a[5 :: 5 * MATRICES_PER_TILE + 3, 2, 3] = np.nan
    stack = xr.DataArray(
        a,
        dims=("sample", "i", "j"),
        coords={"sample": np.arange(len(a)) * 0.5, "i": list("abcdefgh"), "j": list("abcdefgh")},
    )
    codecs = {"compressors": [ZstdCodec(), Crc32cCodec()], "chunks": (MATRICES_PER_TILE, N, N)}
    stack.to_dataset(name="cov").to_zarr(work.source, zarr_format=3, consolidated=False, encoding={"cov": codecs})
    (folder / "source.sha256").write_text(digest_of(work.source))
    run(work.command(work.reference))
    return work
