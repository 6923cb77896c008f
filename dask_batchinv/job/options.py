"""The parameters of a job, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import dask.config
import numpy as np
from dask.utils import parse_bytes

from dask_batchinv.job.allowed import Allowed, MaxFailed
from dask_batchinv.job.form import FormOptions, Packed
from dask_batchinv.job.outputs import Keep, Outputs, outputs_of
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
            object.__setattr__(self, "lower", parse_flag("lower", self.lower))
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
        if self.dtype is not None and self.dtype not in KEPT:
            raise RefusedError(f"results can be stored as {', '.join(KEPT)}, not as {self.dtype}")
        if self.like_source and (self.form.is_usual or self.keep != "inverse"):
            raise RefusedError("inverses like the source are for packed, complex_dim or imag, and for whole inverses")
        outputs_of(self.keep, logdet=self.logdet, names=self.names, like=self.form if self.like_source else None)
        if self.tile_nbytes <= 0:
            raise RefusedError(f"tile_size must be more than 0 bytes, got {self.tile_size}")

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
        size = self.tile_size or dask.config.get("batchinv.job.tile-size")
        try:
            return int(parse_bytes(size))
        except (ValueError, OverflowError) as error:
            raise RefusedError(f"tile_size {size!r} is not a number of bytes such as 32MiB") from error
