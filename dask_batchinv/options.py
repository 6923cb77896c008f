"""The options of `inverse` and of all that is like it, checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from dask_batchinv.kernels import (
    LARGEST_SMALL_NBYTES,
    MIRRORED,
    AnyInverseEx,
    InverseExLogdet,
    invert_block,
    invert_small,
    log_determinants,
    read_part,
)
from dask_batchinv.kernels.device import parse_device, why_unusable
from dask_batchinv.outcome import Info, Place, in_main_memory, raise_failed, warn_ill_conditioned
from dask_batchinv.stack import (
    AssumeA,
    AssumeAWord,
    Device,
    OnError,
    Precision,
    computed_dtype,
    parse_assume_a,
    parse_choice,
    parse_flag,
    parse_min_rcond,
    result_dtype,
)


@lru_cache
def _parsed(
    assume_a: AssumeAWord, lower: bool, on_error: OnError, check_errors: bool | None, min_rcond: float, device: Device,
    logdet: bool, precision: Precision,
) -> CallOptions:  # fmt: skip
    on_error = parse_choice("on_error", on_error, OnError)
    if check_errors is not None:
        on_error = "raise" if check_errors else "nan"
    return CallOptions(
        parse_assume_a(assume_a), parse_flag("lower", lower), on_error, parse_min_rcond(min_rcond), device,
        parse_choice("precision", precision, Precision), parse_flag("logdet", logdet),
    )  # fmt: skip


@dataclass(frozen=True)
class CallOptions:
    """The options of one call."""

    assume_a: AssumeA
    """What is known of the matrices."""
    lower: bool
    """Whether symmetric ones are read from their lower triangles."""
    on_error: OnError
    """What happens when matrices have no inverse."""
    min_rcond: float
    """Below it a matrix counts as failed."""
    device: Device
    """Where to compute."""
    precision: Precision = "same"
    """In what."""
    logdet: bool = False
    """Whether determinants are wanted too."""

    @classmethod
    def parse(
        cls,
        *,
        assume_a: AssumeAWord,
        lower: bool,
        on_error: OnError,
        check_errors: bool | None,
        min_rcond: float,
        device: Device,
        precision: Precision = "same",
        logdet: bool = False,
    ) -> CallOptions:
        """Return the options, or raise ValueError for a word that is not known."""
        given = assume_a, lower, on_error, check_errors, min_rcond, parse_device(device), logdet, precision
        try:
            return _parsed(*given)
        except TypeError:  # what cannot be hashed
            return _parsed.__wrapped__(*given)

    @cached_property
    def are_plain(self) -> bool:
        """Whether small stacks may take the short way."""
        mirrored = self.lower and self.assume_a in MIRRORED
        return not (mirrored or self.min_rcond or self.logdet or self.device == "gpu" or self.precision != "same")

    def invert_small(self, a: Any, *, account: bool) -> Any:
        """Invert a small array in which nothing needs to be said of any matrix; return None for all others."""
        if (
            type(a) is np.ndarray
            and a.nbytes <= LARGEST_SMALL_NBYTES
            and self.are_plain
            and (self.device == "cpu" or why_unusable() is not None)
        ):
            return invert_small(a, assume_a=self.assume_a, account=account)
        return None

    def invert(
        self, block: Any, place: Place, *, out: Any = None, masked: Any = None, threads: int = 1
    ) -> AnyInverseEx:
        """Invert a block of plain numbers, shape ``(*, n, n)``, in main memory or on a GPU.

        Parameters
        ----------
        block : array
            The matrices.
        place : Place
            Where they stand, for errors and warnings.
        out : array, optional
            Where to put the inverses: of their shape and dtype, in C order.
        masked : array of bool, shape ``(*,)``, optional
            Matrices that are known to be missing, which raises no error.
        threads : int
            How many threads may work on it.

        Raises
        ------
        SingularMatrixError
            As ``on_error`` says.
        """
        dtype = result_dtype(block.dtype)
        computed = computed_dtype(dtype, dtype, self.precision)
        results = invert_block(
            block, dtype=dtype, assume_a=self.assume_a, lower=self.lower, device=self.device,
            min_rcond=self.min_rcond, out=out, threads=threads, computed=computed,
        )  # fmt: skip
        if self.on_error == "skipna":
            masked = self.has_nan(block, results.info)
        if self.on_error != "nan":
            raise_failed(results.info, self.assume_a, place, masked)
        warn_ill_conditioned(results.info, results.rcond, place, float(np.finfo(computed).eps))
        if not self.logdet:
            return results
        sign, logdet = log_determinants(block, results.info, dtype=computed, assume_a=self.assume_a, lower=self.lower)
        return InverseExLogdet(*results, sign.astype(dtype), logdet.astype(results.rcond.dtype))

    def has_nan(self, block: Any, info: Any) -> Any:
        """Tell of which matrices the part that is read has a NaN, where ``info`` says that they are not finite."""
        not_finite = info.reshape(-1) == int(Info.NOT_FINITE)
        suspects = in_main_memory(block.reshape(info.size, *block.shape[-2:])[not_finite])
        found = in_main_memory(not_finite)
        found[found] = np.isnan(self.read(suspects)).any((-2, -1))
        return found.reshape(info.shape)

    def read(self, stack: Any) -> Any:
        """Return the matrices that a stack ``(m, n, n)`` in main memory stands for."""
        return read_part(stack, self.assume_a, lower=self.lower)
