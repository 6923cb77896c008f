"""The result of a check of a target, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dask_batchinv.job.report.tiles import FailedTile, named_tiles
from dask_batchinv.job.results import LARGEST_RATIO
from dask_batchinv.shown import Row, Shown
from dask_batchinv.text import public


@public
@dataclass(frozen=True)
class VerifyReport(Shown):
    """What a check of a target found."""

    target: str
    """What was checked."""
    complete: bool
    """Whether it says that it is complete."""
    tiles: int
    """Tiles of the plan."""
    tiles_read: int
    """Tiles whose every chunk was read and had the right checksum."""
    bad_tiles: tuple[FailedTile, ...]
    """Tiles that are missing, damaged, or not what the ledger says."""
    problems: tuple[str, ...]
    """What else is wrong with the target."""
    matrices: int
    """Matrices checked."""
    failed: dict[str, int]
    """Matrices without an inverse among them, by kind."""
    masked: int
    """Matrices among them that a mask leaves out."""
    residuals: int
    """Matrices multiplied with their inverse."""
    largest_ratio: float
    """The largest ‖XA - I‖₁ or ‖AX - I‖₁ (the smaller of the two) over n eps ‖A‖₁ ‖X‖₁; LAPACK allows 30."""

    @property
    def ok(self) -> bool:
        """Whether the target is complete and right as far as was checked."""
        return self.complete and not (self.bad_tiles or self.problems) and self.tiles_read == self.tiles

    @property
    def exit_code(self) -> int:
        """0 if all is right, else 1."""
        return 0 if self.ok else 1

    def to_json(self) -> dict[str, Any]:
        """Return the report for machines."""
        return asdict(self) | {"ok": self.ok, "exit_code": self.exit_code}

    def heading(self) -> str:
        """Return the result."""
        return f"{'verified' if self.ok else 'FAILED'}: {self.target}"

    def rows(self) -> list[Row]:
        """Return what was found."""
        rows = [
            ("complete", "yes" if self.complete else "no: run the job again to finish it"),
            ("tiles", f"{self.tiles_read:,} of {self.tiles:,} read, checksums right"),
            ("matrices", f"{self.matrices:,}, {sum(self.failed.values()):,} without an inverse"),
        ]
        if self.residuals:
            largest = f"largest {self.largest_ratio:.3g} n eps |A| |X|, allowed {LARGEST_RATIO:g}"
            rows.append(("residuals", f"{self.residuals:,} computed, {largest}, as by LAPACK's tests"))
        return rows + [("problem", problem) for problem in self.problems] + named_tiles(self.bad_tiles)
