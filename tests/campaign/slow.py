"""Preloaded by the workers of the campaign: each tile takes its time, so that there is time to kill, and is noted."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from dask_batchinv.job.results import TileResult, TileRow
from dask_batchinv.job.worker import invert_tiles
from dask_batchinv.job.worker.read_source import Reader

#: Seconds that each tile takes longer.
SECONDS = 0.04
#: Tiles whose first number is one of these are poison. Between them and zero nothing else lies.
POISON = {-1001.0: "segfault", -1002.0: "exit", -1003.0: "hang", -1004.0: "hang with the lock", -1005.0: "memory"}

_do_span = invert_tiles.do_span


def dask_setup(worker: Any) -> None:
    """Slow this worker down, and write down its process."""
    folder = Path(os.environ["CAMPAIGN_FOLDER"])
    (folder / f"worker-{os.getpid()}").touch()
    invert_tiles.do_span = do_span
    Reader.read = read


def do_span(task: invert_tiles.TileTask, numbers: range, kept: Any = None) -> list[TileResult[TileRow]]:
    """Do tiles, slowly, and note that they were finished."""
    time.sleep(SECONDS)
    results = _do_span(task, numbers, kept)
    log = os.open(Path(task.target.url).parent / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(log, "".join(f"{number}\n" for number in numbers).encode())
    os.close(log)
    return results


_read = Reader.read


def read(self: Reader, *arguments: Any, **options: Any) -> Any:
    """Read tiles; poison does what it does."""
    stored = _read(self, *arguments, **options)
    kind = next((kind for number, kind in POISON.items() if (stored.numbers == number).any()), None)
    if kind == "segfault":
        ctypes.string_at(0)
    elif kind == "exit":
        os._exit(3)
    elif kind == "hang":
        time.sleep(10_000)
    elif kind == "hang with the lock":
        ctypes.PyDLL(None).sleep(10_000)  # does not let go of the interpreter
    elif kind == "memory":
        hoard = []
        while True:
            hoard.append(np.ones(2**21))
            time.sleep(0.005)
    return stored
