"""One line for each of some 250 kernels of all layouts, dtypes and widths, with a digest of its results.

Two states of the kernels give the same bits if ``diff`` finds nothing between what they print.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from dask_batchinv.kernels import choose_kernel
from dask_batchinv.kernels.emit import compiler

SIZES = (*range(1, 10), 12, 13, 14, 15, 16, 17, 20, 21, 24, 25, 32, 33, 36, 37, 40, 41, 48, 64, 65)
#: Narrower vectors than the machine has, for some sizes of each layout.
NARROW = (3, 8, 17, 33)
MATRICES = 67


def cells() -> Iterator[tuple[str, int, str, int]]:
    """Yield structure, n, letter of the dtype, and bytes of a vector."""
    for structure in ("general", "positive definite"):
        for dtype in "fdFD":
            yield from ((structure, n, dtype, compiler.vector_nbytes()) for n in SIZES)
            yield from ((structure, n, dtype, width) for width in (32, 16) for n in NARROW)
    for structure in ("symmetric", "hermitian", "upper triangular", "lower triangular", "diagonal"):
        yield from ((structure, 7, dtype, compiler.vector_nbytes()) for dtype in "fdFD")


def stack(structure: str, n: int, dtype: str) -> Any:
    """Return matrices of every condition, some of them singular, not finite, huge and tiny."""
    rng = np.random.default_rng(n)
    a = rng.standard_normal((MATRICES, n, n))
    if dtype in "FD":
        a = a + 1j * rng.standard_normal(a.shape)
    if structure == "positive definite":
        a = a @ a.conj().swapaxes(1, 2) + 0.1 * np.eye(n)
    a = a * 10.0 ** rng.integers(-12, 12, (MATRICES, 1, 1))
    a[3], a[5, -1, -1], a[7, 0, 0], a[9], a[11] = 0, np.nan, np.inf, a[9] * 1e25, a[11] * 1e-30
    a[13, :, -1] = a[13, :, 0]
    return a.astype(dtype)


def digest(structure: str, n: int, dtype: str) -> str:
    """Return a digest of inverse and info, and one of rcond."""
    a = stack(structure, n, dtype)
    out, info = np.empty_like(a), np.empty(MATRICES, np.int32)
    rcond = np.empty(MATRICES, a.real.dtype)
    choose_kernel(structure, "cpu").invert(a, out, info, rcond)
    parts = out.tobytes() + info.tobytes(), rcond.tobytes()
    return " ".join(hashlib.sha256(part).hexdigest()[:16] for part in parts)


def main() -> None:
    """Print the digests."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for structure, n, dtype, width in cells():
        with mock.patch.object(compiler, "vector_nbytes", lambda width=width: width):
            print(f"{structure:17} {n:3} {dtype} {width:2}  {digest(structure, n, dtype)}", flush=True)


if __name__ == "__main__":
    main()
