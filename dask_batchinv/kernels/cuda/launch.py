"""Which kernel of `inverse.cu` takes which matrices, and how it is launched: pure functions, for any card or none.

The layout depends on size, dtype and kind of the matrices alone, never on the card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np
import numpy.typing as npt

from dask_batchinv.outcome import Info
from dask_batchinv.stack import AssumeA

Layout = Literal["per_thread", "per_warp", "per_block", "memory", "cublas"]

#: Threads along a side of a block of `per_block` and `memory`, and in a block of `per_thread`: as in inverse.cu.
SIDE = 16
THREADS = 64
#: The largest n for a matrix in the registers of a thread, and in those of a block, by bytes of a number and whether
#: it is complex: so that nothing is spilled.
_IN_THREAD = {(4, False): 8, (8, False): 6, (8, True): 5, (16, True): 4}
_IN_BLOCK = {(4, False): 128, (8, False): 128, (8, True): 128, (16, True): 96}
IN_WARP = 32
#: From here on matrices of all dtypes are too large for kernels in registers.
LARGE = 1 + max(_IN_BLOCK.values())
#: At most so many blocks work on matrices that lie in global memory: each needs a row beside.
BLOCKS_IN_MEMORY = 4096
#: Shared memory that every kernel may have without asking for more.
SHARED_NBYTES = 48 * 1024
#: Products and sums are joined only where inverse.cu says so, and subnormal numbers are not flushed to zero.
COMPILER_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false")
#: How the structures are called in inverse.cu.
CUDA_STRUCTURE: dict[AssumeA, int] = {
    "general": 0,
    "symmetric": 1,
    "hermitian": 2,
    "positive definite": 2,
    "upper triangular": 3,
    "lower triangular": 4,
    "diagonal": 5,
}
_NUMBERS = {"f": "float", "d": "double", "F": "Complex<float>", "D": "Complex<double>"}


@dataclass(frozen=True)
class Launch:
    """How the kernel for some matrices is compiled and launched."""

    layout: Layout
    """Its name in inverse.cu; cuBLAS works between two kernels of "memory"."""
    options: tuple[str, ...]
    """For the compiler."""
    threads: int
    """Of a block."""
    matrices: int
    """That a block works on at a time."""
    shared_nbytes: int
    """Shared memory of a block."""
    structure: int
    """Its last argument."""

    def blocks(self, m: int) -> int:
        """Return how many blocks m matrices take; of more than there may be, some take turns."""
        return min(-(-m // self.matrices), BLOCKS_IN_MEMORY if self.layout == "memory" else 2**31 - 1)


def source() -> str:
    """Return the text of inverse.cu."""
    return resources.files("dask_batchinv.kernels.cuda").joinpath("inverse.cu").read_text()


def choose_launch(n: int, dtype: npt.DTypeLike, assume_a: AssumeA) -> Launch:
    """Return how matrices of a size, dtype and structure are inverted.

    Examples
    --------
    >>> [choose_launch(n, "float64", "general").layout for n in (2, 6, 7, 32, 33, 128, 129)]
    ['per_thread', 'per_thread', 'per_warp', 'per_warp', 'per_block', 'per_block', 'cublas']
    >>> choose_launch(129, "float64", "positive definite").layout
    'memory'
    """
    dtype = np.dtype(dtype)
    size, is_complex = dtype.itemsize, dtype.kind == "c"
    definite = assume_a == "positive definite"
    compiled_for, warps = n, 1
    layout: Layout
    if n <= _IN_THREAD[size, is_complex]:
        layout, threads, matrices = "per_thread", THREADS, THREADS
        shared = THREADS * (n * n | 1) * size
    elif n <= IN_WARP:
        layout, together = "per_warp", 32 // _lanes(n)
        of_warp = together * (n * (n | 1) * size + (n + 2) * 4)
        warps = min(4, SHARED_NBYTES // of_warp)
        threads, matrices, shared = 32 * warps, warps * together, warps * of_warp
    elif n <= _IN_BLOCK[size, is_complex]:
        layout, threads, matrices = "per_block", SIDE * SIDE, 1
        compiled_for = -(-n // SIDE) * SIDE
        real = size // 2 if is_complex else size
        board = 4 * compiled_for * size + 2 * SIDE * (real + 4) + 2 * compiled_for * 4 + SIDE * real
        shared = -(-board // 16) * 16
    else:
        layout = "memory" if definite else "cublas"
        threads, matrices, compiled_for = SIDE * SIDE, 1, 1
        shared = SIDE * 8
    return Launch(
        layout,
        (
            f"-DNUMBER={_NUMBERS[dtype.char]}",
            f"-DN={compiled_for}",
            f"-DDEFINITE={int(definite)}",
            f"-DWARPS={warps}",
            f"-DINFO_NOT_FINITE={Info.NOT_FINITE:d}",
            f"-DINFO_OVERFLOW={Info.OVERFLOW:d}",
            f"-DLAYOUT_{'MEMORY' if layout == 'cublas' else layout.upper()}",
        ),
        threads,
        matrices,
        shared,
        CUDA_STRUCTURE[assume_a],
    )


def _lanes(n: int) -> int:
    """Return the lanes of a warp that a matrix takes."""
    return max(2, 1 << math.ceil(math.log2(n)))


def batch(m: int, of_one: int, free: int) -> int:
    """Return how many of m matrices are done at a time, where one takes `of_one` bytes of the `free` ones.

    Examples
    --------
    >>> batch(100, 10, 95), batch(100, 10, 5000), batch(100, 10, 3)
    (9, 100, 1)
    """
    # What counts matrices in cuBLAS has 32 bits.
    return max(1, min(m, free // of_one, 2**31 - 1))
