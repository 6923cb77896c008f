"""The named points of a job at which the campaign kills the client: what is done there is wrapped, not changed."""

from __future__ import annotations

import os
import signal
from typing import Any

from dask_batchinv.job.driver.run import Run
from dask_batchinv.job.target import target
from dask_batchinv.job.target.ledger import Ledger
from dask_batchinv.job.target.writer import Writer

#: Name, object, attribute, which call, and whether before or after it.
_CALLS: dict[str, tuple[Any, str, int, str]] = {
    "the target is not there yet": (target, "create", 1, "before"),
    "the group is there": (Writer, "create", 1, "after"),
    "one array is there": (Writer, "create", 2, "after"),
    "all documents but one": (Writer, "create", 8, "after"),
    "it is not called ready yet": (Writer, "change", 1, "before"),
    "the target is ready": (target, "create", 1, "after"),
    "a tile is done, not recorded": (Ledger, "record", 7, "before"),
    "a tile is recorded in memory": (Ledger, "record", 13, "after"),
    "before the ledger is written": (Ledger, "flush", 2, "before"),
    "the ledger is half written": (os, "replace", 2, "ledger"),
    "the ledger was written": (Ledger, "flush", 2, "after"),
    "all is done, not finished": (Run, "_finish", 1, "before"),
    "before it is called complete": (target, "set_complete", 1, "before"),
    "it is complete": (target, "set_complete", 1, "after"),
    "the report is made": (Run, "report", 1, "after"),
}
POINTS = tuple(_CALLS)


def arm(point: str) -> None:
    """Kill this process at a point."""
    owner, name, number, when = _CALLS[point]
    original, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += when != "ledger" or "/ledger/tiles/c/" in str(args[-1])
        now = calls == number
        if now and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)
