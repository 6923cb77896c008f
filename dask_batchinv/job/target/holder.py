"""Which run holds a target: it says so in a file there, and every worker looks for it before it writes."""

from __future__ import annotations

from typing import Any

from dask_batchinv.location import Location

#: Its name in the target, only while a run is at work there, or one was killed.
LOCK = ".dask_batchinv.lock"


def read_lock(target: Location) -> dict[str, Any] | None:
    """Return what the run that holds a target says of itself; None if none does."""
    try:
        return target.read_json(LOCK)
    except ValueError:  # half written, or not ours
        return {}


def holder_of(target: Location) -> str | None:
    """Return the identity of the run that holds a target, as it is seen from here."""
    run = (read_lock(target) or {}).get("run")
    return run if isinstance(run, str) else None
