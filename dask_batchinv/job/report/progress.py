"""How far a job is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    activity: Literal["checking", "inverting"]
    """What it does: read back what earlier runs have done, or the rest."""
    matrices: int
    """Matrices in the stack."""
    matrices_done: int
    """Matrices accounted for, by earlier runs too."""
    matrices_before: int
    """Of these, by earlier runs."""
    failed: int
    """Matrices without an inverse."""
    failed_tiles: int
    """Tiles given up."""
    seconds: float
    """Time since this run began."""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Discard progress."""
