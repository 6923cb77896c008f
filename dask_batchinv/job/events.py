"""What an executor tells beside results: that it lives, and what happens to workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dask_batchinv.shown import counted


class Heartbeat:
    """A sign of life from an executor that waits."""


HEARTBEAT = Heartbeat()


@dataclass(frozen=True)
class WorkerEvent(Heartbeat):
    """What happened to a worker, for the report."""

    kind: Literal["died", "restarted", "given up", "left out", "silent", "doubted"]
    """What: ``"given up"`` if it gave no result and is not ours to restart, ``"left out"`` if it is of no use."""
    address: str
    """Which worker."""
    cause: str = ""
    """Why."""
    tiles: int = 0
    """How many tiles are done again because of it."""

    def __str__(self) -> str:
        words = {"silent": "did not answer", "doubted": "did not find the target"}.get(self.kind, f"was {self.kind}")
        words = "died" if self.kind == "died" else words
        again = f", {counted(self.tiles, 'tile')} to be done again" if self.tiles else ""
        return f"worker {self.address} {words}{f': {self.cause}' if self.cause else ''}{again}"
