"""The arrays of a target: names, extents, dtypes, fill values, attributes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dask_batchinv.job.form import FormOptions
from dask_batchinv.job.tiling import Extent
from dask_batchinv.outcome import Info, RefusedError, describe_codes
from dask_batchinv.stack import AssumeA, real_dtype
from dask_batchinv.storage import METADATA_KEYS

DType = np.dtype[Any]
Keep = Literal["inverse", "diagonal"]


@dataclass(frozen=True)
class Output:
    """One array of a target."""

    role: str
    """What it is."""
    extent: Extent
    """Which dimensions of the stack it has."""
    dtype: Callable[[DType], DType]
    """Its dtype, from that of the inverse."""
    fill: Any
    """What stands where nothing was written yet."""
    long_name: str | Callable[[AssumeA], str]
    """Its description, which may depend on the structure of the matrices."""
    units: str | None = None
    """Its units, if they do not depend on the source."""
    is_of_inverse: bool = False
    """Whether it has numbers of the inverse, and so the units and the other attributes of that."""
    name: str = ""
    """Its name in the target; by default what it is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.role)

    def attributes(self, assume_a: AssumeA) -> dict[str, Any]:
        """Return its attributes for matrices of a structure."""
        long_name = self.long_name if isinstance(self.long_name, str) else self.long_name(assume_a)
        return {"long_name": long_name} | ({} if self.units is None else {"units": self.units})


def _same(dtype: DType) -> DType:
    return dtype


#: All that there can be.
OUTPUTS = (
    Output("inverse", "matrix", _same, np.nan, "matrix inverse", is_of_inverse=True),
    Output("imag", "matrix", real_dtype, np.nan, "imaginary part of the matrix inverse", is_of_inverse=True),
    Output("diagonal", "row", _same, np.nan, "diagonal of the matrix inverse", is_of_inverse=True),
    Output("logdet", "number", real_dtype, np.nan, "logarithm of the absolute value of the determinant", "1"),
    Output("sign", "number", _same, np.nan, "sign of the determinant, or its phase where it is complex", "1"),
    Output("rcond", "number", real_dtype, np.nan, "reciprocal condition number in the 1-norm", "1"),
    Output("info", "number", lambda dtype: np.dtype(np.int32), int(Info.PENDING), describe_codes),
)
ROLES = tuple(output.role for output in OUTPUTS)
_BY_ROLE = {output.role: output for output in OUTPUTS}
#: The group beside them in which the job keeps its account.
LEDGER = "ledger"
#: What a name must be like, for every reader.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,99}")

Outputs = tuple[Output, ...]


def outputs_of(keep: Keep, *, logdet: bool, names: Mapping[str, str], like: FormOptions | None = None) -> Outputs:
    """Return the outputs of a job, under the names that they get, the inverses in the form that they are to be `like`.

    Raises
    ------
    RefusedError
        If a name is none, or that of nothing or of two.
    """
    like = like or FormOptions()
    roles = [keep, *(["imag"] if like.imag else []), *(["logdet", "sign"] if logdet else []), "rcond", "info"]
    if unknown := sorted({*names} - {*roles}):
        raise RefusedError(f"names can be given to {', '.join(roles)}, but not to {', '.join(unknown)}")
    if bad := [name for name in names.values() if not _NAME.fullmatch(name) or name.casefold() in METADATA_KEYS]:
        raise RefusedError(f"{bad[0]!r} cannot be the name of an array: take letters, digits and _")
    outputs = _in_form(named((role, names.get(role, role)) for role in roles), like)
    given = [name.casefold() for name in (*(output.name for output in outputs), LEDGER)]
    if len(set(given)) < len(given):
        raise RefusedError(f"two arrays cannot have one name: {', '.join(given)}")
    return outputs


def _in_form(outputs: Outputs, form: FormOptions) -> Outputs:
    """Return outputs as they are in a form."""
    extent: Extent = "triangle" if form.packed else "matrix"
    if form.complex_dim is not None:
        extent = "triangle, parts" if form.packed else "matrix, parts"
    dtype = _same if form.complex_dim is None and form.imag is None else real_dtype
    return tuple(
        replace(output, extent=extent, dtype=dtype) if output.role in ("inverse", "imag") else output
        for output in outputs
    )


def named(names: Iterable[tuple[str, str]]) -> Outputs:
    """Return outputs by what they are and the names that they have."""
    return tuple(replace(_BY_ROLE[role], name=name) for role, name in names)


def name_of(role: str, outputs: Outputs) -> str:
    """Return the name of one of some outputs, by what it is.

    Examples
    --------
    >>> name_of("info", named([("rcond", "rcond"), ("info", "flag")]))
    'flag'
    """
    return next(output.name for output in outputs if output.role == role)


def checksum_column(role: str) -> str:
    """Return the column of the ledger for the checksums of the chunks of an output."""
    return f"{role}_crc32c"


def nbytes_per_matrix(outputs: Outputs, n: int, dtype: DType) -> int:
    """Return the bytes that a matrix takes in some outputs."""
    length = {"matrix": n * n, "row": n, "number": 1, "triangle": n * (n + 1) // 2}
    return sum(
        length[output.extent.partition(",")[0]]
        * (2 if output.extent.endswith("parts") else 1)
        * output.dtype(dtype).itemsize
        for output in outputs
    )
