"""The arrays of a target: names, dtypes, fill values, attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_batchinv.outcome import Info, describe_codes
from dask_batchinv.stack import AssumeA, real_dtype

DType = np.dtype[Any]


@dataclass(frozen=True)
class Output:
    """One array of a target."""

    name: str
    """Its name there."""
    core: bool
    """Whether it has the core dimensions; else it has one number for each matrix."""
    dtype: Callable[[DType], DType]
    """Its dtype, from that of the inverse."""
    fill: Any
    """What stands where nothing was written yet."""
    long_name: str | Callable[[AssumeA], str]
    """Its description, which may depend on the structure of the matrices."""
    units: str | None = None
    """Its units, if they do not depend on the source."""

    def attributes(self, assume_a: AssumeA) -> dict[str, Any]:
        """Return its attributes for matrices of a structure."""
        long_name = self.long_name if isinstance(self.long_name, str) else self.long_name(assume_a)
        return {"long_name": long_name} | ({} if self.units is None else {"units": self.units})

    @property
    def checksum(self) -> str:
        """The column of the ledger for the checksums of its chunks."""
        return f"{self.name}_crc32c"


OUTPUTS = (
    Output("inverse", True, lambda dtype: dtype, np.nan, "matrix inverse"),
    Output("rcond", False, real_dtype, np.nan, "reciprocal condition number in the 1-norm", "1"),
    Output("info", False, lambda dtype: np.dtype(np.int32), int(Info.PENDING), describe_codes),
)
#: The group beside them in which the job keeps its account.
LEDGER = "ledger"
#: What a target holds; dimensions and coordinates cannot have these names.
MEMBERS = (*(output.name for output in OUTPUTS), LEDGER)


def nbytes_per_matrix(dtype: DType) -> int:
    """Return the bytes that a matrix takes in the outputs without core dimensions."""
    return sum(output.dtype(dtype).itemsize for output in OUTPUTS if not output.core)
