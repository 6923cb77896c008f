"""The arrays of a target: what they are called, how they are stored, what they mean."""

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
    attributes: Callable[[AssumeA], dict[str, str]]
    """Its attributes, from the structure of the matrices."""

    @property
    def checksum(self) -> str:
        """The column of the ledger for the checksums of its chunks."""
        return f"{self.name}_crc32c"


OUTPUTS = (
    Output(
        "inverse",
        core=True,
        dtype=lambda dtype: dtype,
        fill=np.nan,
        attributes=lambda assume_a: {"long_name": "matrix inverse"},
    ),
    Output(
        "rcond",
        core=False,
        dtype=real_dtype,
        fill=np.nan,
        attributes=lambda assume_a: {"long_name": "reciprocal condition number in the 1-norm", "units": "1"},
    ),
    Output(
        "info",
        core=False,
        dtype=lambda dtype: np.dtype(np.int32),
        fill=int(Info.PENDING),
        attributes=lambda assume_a: {"long_name": describe_codes(assume_a)},
    ),
)
#: The group beside them in which the job keeps its account.
LEDGER = "ledger"
#: What a target holds; dimensions and coordinates cannot have these names.
MEMBERS = (*(output.name for output in OUTPUTS), LEDGER)


def nbytes_per_matrix(dtype: DType) -> int:
    """Return the bytes that a matrix takes in the outputs without core dimensions."""
    return sum(output.dtype(dtype).itemsize for output in OUTPUTS if not output.core)
