"""The parameters of a job, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from dask.utils import parse_bytes

from dask_batchinv.job.allowed import Allowed, MaxFailed
from dask_batchinv.job.form import FormOptions, Packed
from dask_batchinv.job.outputs import Keep, Outputs, outputs_of
from dask_batchinv.job.settings import settings
from dask_batchinv.kernels.device import parse_device
from dask_batchinv.outcome import RefusedError
from dask_batchinv.stack import (
    KEPT,
    AssumeA,
    Device,
    Precision,
    parse_assume_a,
    parse_choice,
    parse_flag,
    parse_min_rcond,
    result_dtype,
    shown,
)

Missing = Literal["error", "fill"]
BadChunks = Literal["error", "nan"]


@dataclass(frozen=True)
class JobOptions:
    """The parameters of a job."""

    variable: str | None = None
    """Name of the stack in a group."""
    dims: Sequence[str] | None = None
    """Names of the core dimensions."""
    packed: Packed | None = None
    """Which triangle of the matrices is there, if it is but one."""
    complex_dim: str | None = None
    """The dimension of real and imaginary parts."""
    imag: str | None = None
    """The name of the array of imaginary parts."""
    select: Mapping[str, str] = field(default_factory=dict)
    """Which part of the stack, by dimension."""
    mask: str | None = None
    """Name of the array by which matrices are left out."""
    assume_a: AssumeA = "general"
    """Structure of the matrices."""
    lower: bool = False
    """Whether symmetric matrices are read from their lower triangles."""
    min_rcond: float = 0.0
    """Below it a matrix counts as failed."""
    max_failed: MaxFailed = 0
    """How many matrices may fail."""
    device: Device = "auto"
    """Where to invert."""
    precision: Precision = "same"
    """In what."""
    missing: Missing = "error"
    """What a missing chunk of the source means."""
    bad_chunks: BadChunks = "error"
    """Whether a target may be complete in which matrices are NaN because their chunks cannot be read."""
    tile_size: str | int | None = None
    """Bytes of a tile; by default the Dask configuration ``batchinv.job.tile-size``."""
    keep: Keep = "inverse"
    """What of the inverses goes to the target."""
    logdet: bool = False
    """Whether the logarithms of the determinants go there too."""
    dtype: str | None = None
    """As what the results are stored; by default as what is inverted."""
    compress: str | None = None
    """By what chunks of the target are compressed."""
    chunks: Mapping[str, int] = field(default_factory=dict)
    """How long they are, by dimension."""
    shards: Mapping[str, int] | None = None
    """How long shards are, in which they then stand; none by default."""
    zarr_format: Literal[2, 3] = 3
    """The lowest format of Zarr that can read the target."""
    like_source: bool = False
    """Whether inverses are stored in the form in which the matrices are."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The names of arrays in the target, by what they are."""
    overwrite: bool = False
    """Replace a target of ours that belongs to another job."""
    trust_ledger: bool = False
    """Do not read back what earlier runs have recorded."""
    durable: bool = False
    """Record a tile only when it is on the disk."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "assume_a", parse_assume_a(self.assume_a))
            object.__setattr__(self, "min_rcond", parse_min_rcond(self.min_rcond))
            for flag in ("lower", "logdet", "like_source", "overwrite", "trust_ledger", "durable"):
                object.__setattr__(self, flag, parse_flag(flag, getattr(self, flag)))
            self._check_kinds()
            parse_choice("missing", self.missing, Missing)
            parse_choice("bad_chunks", self.bad_chunks, BadChunks)
            parse_choice("keep", self.keep, Keep)
            if self.packed is not None:
                parse_choice("packed", self.packed, Packed)
            parse_device(self.device)
            parse_choice("precision", self.precision, Precision)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        Allowed.parse(self.max_failed)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        if self.like_source and (self.form.is_usual or self.keep != "inverse"):
            raise RefusedError("inverses like the source are for packed, complex_dim or imag, and for whole inverses")
        outputs_of(self.keep, logdet=self.logdet, names=self.names, like=self.form if self.like_source else None)
        settings()  # what it says is asked for later, too
        if self.tile_nbytes <= 0:
            raise RefusedError(f"`tile_size=` must be more than 0 bytes, got {self.tile_size!r}")

    @property
    def form(self) -> FormOptions:
        """How the numbers of matrices stand."""
        return FormOptions(self.packed, self.complex_dim, self.imag)

    @property
    def outputs(self) -> Outputs:
        """The arrays of the target."""
        return outputs_of(self.keep, logdet=self.logdet, names=self.names, like=self.form if self.like_source else None)

    def stored_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return as what the inverses of matrices of a dtype are stored.

        Raises
        ------
        RefusedError
            If that would lose their imaginary parts.
        """
        found = result_dtype(dtype)
        if self.dtype is None:
            return found
        if found.kind == "c" and np.dtype(self.dtype).kind == "f":
            raise RefusedError(f"the matrices are complex: store their inverses as complex64, not as {self.dtype}")
        return np.dtype(self.dtype)

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a tile."""
        if self.tile_size is None:
            return settings().tile_nbytes
        try:
            return int(parse_bytes(self.tile_size))
        except (ValueError, OverflowError, TypeError, AttributeError) as error:
            raise RefusedError(f"`tile_size=` {self.tile_size!r} is not a number of bytes such as 32MiB") from error

    def _check_kinds(self) -> None:
        """Raise ValueError where something is of another type than it should be."""
        for name, example in (
            ("select", "{'time': '2026-01-02'}"), ("names", "{'inverse': 'precision'}"), ("chunks", "{'time': 10}"),
            ("shards", "{'time': 100}"),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{name} takes a mapping such as {example}, got {shown(value)}")
        for role, name in self.names.items():
            if not isinstance(name, str):
                raise ValueError(f"names gives {role!r} the name {shown(name)}, which is not a text")
        if self.dims is not None and (isinstance(self.dims, str) or not isinstance(self.dims, Sequence)):
            raise ValueError(
                f"dims takes the names of rows and columns, such as ('row', 'col'), got {shown(self.dims)}"
            )
        for name, what in (
            ("mask", "an array in the group"), ("imag", "an array in the group"), ("complex_dim", "a dimension"),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} takes the name of {what}, got {shown(value)}")
        if type(self.zarr_format) is not int or self.zarr_format not in (2, 3):
            raise ValueError(f"zarr_format must be 2 or 3, got {shown(self.zarr_format)}")


def _dtype_name(dtype: Any) -> str:
    """Return the name of the dtype as which results are stored."""
    name = dtype
    if not isinstance(dtype, str):
        with suppress(TypeError):
            name = np.dtype(dtype).name
    if not isinstance(name, str) or name not in KEPT:
        raise RefusedError(f"results can be stored as {', '.join(KEPT)}, not as {shown(dtype)}")
    return name
