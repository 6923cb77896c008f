"""What the Dask configuration says of jobs, ``batchinv.job``, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask.config
from dask.utils import parse_bytes, parse_timedelta

from dask_batchinv.outcome import RefusedError


@dataclass(frozen=True)
class Settings:
    """What the Dask configuration says of jobs."""

    tile_nbytes: int
    """Bytes of a tile, where a call does not say."""
    in_process_nbytes: int
    """A job that reads and writes no more runs in the process that asks for it."""
    attempts: int
    """How often a tile is tried."""
    patience: float
    """How many seconds to wait where nothing moves."""


def settings() -> Settings:
    """Return what the Dask configuration says now.

    Raises
    ------
    RefusedError
        If that makes no sense.
    """
    return Settings(
        tile_nbytes=_checked("tile-size", parse_bytes, 1, "a number of bytes from 1 on, such as 32MiB"),
        in_process_nbytes=_checked("in-process", parse_bytes, 0, "a number of bytes, such as 256MiB"),
        attempts=_checked("attempts", int, 1, "a whole number from 1 on"),
        patience=_checked("patience", parse_timedelta, 0, "a time, such as 15 minutes"),
    )


def _checked(name: str, parse: Any, least: int, expected: str) -> Any:
    given = dask.config.get(f"batchinv.job.{name}")
    try:
        found = parse(given)
        if not isinstance(given, bool) and found >= least:
            return found
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        pass
    raise RefusedError(f"batchinv.job.{name} in the Dask configuration must be {expected}, got {given!r}")
