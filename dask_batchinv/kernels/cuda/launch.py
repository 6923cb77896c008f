"""Which CUDA kernel takes which matrices, and how it is compiled and launched: pure functions, for any card or none.

The layout depends on size, dtype and kind of the matrices alone, never on the card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np
import numpy.typing as npt

from dask_batchinv.outcome import Info
from dask_batchinv.stack import AssumeA

Layout = Literal["per_thread", "per_warp", "per_block", "memory", "cublas"]

#: The largest n for a matrix in the registers of a thread, and in those of a block, by bytes of a number and whether
#: it is complex: so that next to nothing is spilled.
_IN_THREAD = {(4, False): 12, (8, False): 8, (8, True): 8, (16, True): 6}
_IN_BLOCK = {(4, False): 128, (8, False): 128, (8, True): 128, (16, True): 96}
IN_WARP = 32
#: From here on matrices of all dtypes are too large for kernels in registers.
LARGE = 1 + max(_IN_BLOCK.values())
#: The lanes of a warp that share a matrix of up to so many rows: several rows in each, as many as registers hold.
_LANES = {
    (4, False): {16: 4, 32: 8},
    (8, False): {16: 4, 24: 8, 32: 16},
    (8, True): {12: 4, 24: 8, 32: 16},
    (16, True): {12: 4, 16: 8, 24: 16, 32: 32},
}
#: Rows and columns of the tile that a thread of `per_block` holds, and blocks that find room on a multiprocessor, up to
#: so large n: the fastest as estimated, one of them (float32 to 96) although it spills.
_TILES = {
    (4, False): {40: (8, 8, 8), 48: (6, 12, 8), 64: (8, 8, 6), 80: (8, 8, 4), 96: (12, 8, 4), 128: (16, 8, 2)},
    (8, False): {40: (8, 8, 8), 48: (12, 6, 4), 64: (8, 8, 4), 128: (8, 8, 1)},
    (8, True): {40: (8, 8, 4), 48: (6, 12, 1), 64: (8, 8, 1), 96: (8, 4, 1), 128: (8, 8, 1)},
    (16, True): {36: (4, 4, 4), 40: (8, 4, 4), 48: (6, 4, 2), 64: (8, 4, 1), 96: (4, 6, 1)},
}
#: Rows of a panel of `memory`, and threads along a side of its blocks; and numbers along a side of what they transpose.
PANEL, EDGE = 16, 32
#: At most so many blocks work on matrices that lie in global memory: each needs two panels beside.
BLOCKS_IN_MEMORY = 1024
#: Shared memory that every kernel may have without asking for more.
SHARED_NBYTES = 48 * 1024
#: Products and sums are joined only where the source says so, and subnormal numbers are not flushed to zero.
COMPILER_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false")
#: How the structures are called in structures.cuh.
CUDA_STRUCTURE: dict[AssumeA, str] = {
    "general": "GENERAL",
    "symmetric": "SYMMETRIC",
    "hermitian": "HERMITIAN",
    "positive definite": "HERMITIAN",
    "upper triangular": "UPPER",
    "lower triangular": "LOWER",
    "diagonal": "DIAGONAL",
}
_MORE_FILES = {"memory.cu": ("in_memory.cuh",), "cublas.cu": ("in_memory.cuh",)}
_NUMBERS = {"f": "float", "d": "double", "F": "Complex<float>", "D": "Complex<double>"}


@dataclass(frozen=True)
class Launch:
    """How the kernel for some matrices is compiled and launched."""

    layout: Layout
    """Its name, and that of its file."""
    options: tuple[str, ...]
    """For the compiler."""
    threads: int
    """Of a block."""
    matrices: int
    """That a block works on at a time."""
    shared_nbytes: int
    """Shared memory of a block."""

    @property
    def file(self) -> str:
        """The name of the file with the kernel."""
        return f"{self.layout}.cu"

    def blocks(self, m: int) -> int:
        """Return how many blocks m matrices take; of more than there may be, some take turns."""
        return min(-(-m // self.matrices), BLOCKS_IN_MEMORY if self.layout == "memory" else 2**31 - 1)


def source(file: str) -> str:
    """Return the text of a file of kernels after the files that it needs."""
    names = ("numbers.cuh", "structures.cuh", "account.cuh", *_MORE_FILES.get(file, ()), file)
    folder = resources.files("dask_batchinv.kernels.cuda")
    return "".join(f'#line 1 "{name}"\n{folder.joinpath(name).read_text()}' for name in names)


def choose_launch(n: int, dtype: npt.DTypeLike, assume_a: AssumeA) -> Launch:
    """Return how matrices of a size, dtype and structure are inverted.

    Examples
    --------
    >>> [choose_launch(n, "float64", "general").layout for n in (2, 8, 9, 32, 33, 128, 129)]
    ['per_thread', 'per_thread', 'per_warp', 'per_warp', 'per_block', 'per_block', 'cublas']
    >>> choose_launch(129, "float64", "positive definite").layout
    'memory'
    """
    dtype = np.dtype(dtype)
    size, is_complex = dtype.itemsize, dtype.kind == "c"
    if n <= _IN_THREAD[size, is_complex]:
        return _per_thread(n, dtype, assume_a)
    if n <= IN_WARP:
        return _per_warp(n, dtype, assume_a)
    if n <= _IN_BLOCK[size, is_complex]:
        return _per_block(n, dtype, assume_a)
    return _memory(dtype, assume_a)


def _per_thread(n: int, dtype: np.dtype[np.generic], assume_a: AssumeA) -> Launch:
    nbytes = n * n * dtype.itemsize
    piece = _largest_power(nbytes)
    of_warp = 32 * (nbytes // piece | 1) * piece
    warps = _warps(of_warp)
    return _launch("per_thread", dtype, assume_a, 32 * warps, 32 * warps, warps * of_warp, N=n, WARPS=warps)


def _per_warp(n: int, dtype: np.dtype[np.generic], assume_a: AssumeA) -> Launch:
    lanes = next(lanes for most, lanes in _LANES[dtype.itemsize, dtype.kind == "c"].items() if n <= most)
    together = 32 // lanes
    piece = max(dtype.itemsize, _largest_power(n * dtype.itemsize))
    pieces = n * dtype.itemsize // piece
    # As per_warp.cu has it: rows and matrices stand so far apart that neighbours are in different banks.
    turned = piece == 16 and pieces > 1 and pieces & (pieces - 1) == 0
    plain = piece == dtype.itemsize
    matrix = n * (pieces if plain or turned else pieces | 1) * piece
    if not (plain or turned) and lanes < 8 and matrix // 16 % 8 == 0:
        matrix += 64
    row = -(-n * dtype.itemsize // 16) * 16
    of_warp = -(-together * (matrix + 2 * row + 4 * n) // 16) * 16
    warps = _warps(of_warp)
    return _launch(
        "per_warp", dtype, assume_a, 32 * warps, warps * together, warps * of_warp, N=n, LANES=lanes, WARPS=warps
    )


def _per_block(n: int, dtype: np.dtype[np.generic], assume_a: AssumeA) -> Launch:
    size, is_complex = dtype.itemsize, dtype.kind == "c"
    rows, columns, blocks = next(tile for most, tile in _TILES[size, is_complex].items() if n <= most)
    step = math.lcm(rows, columns)
    padded = -(-n // step) * step
    across, down = padded // columns, padded // rows
    threads = -(-across * down // 32) * 32
    real = size // 2 if is_complex else size
    # The struct Board of per_block.cu.
    exchanged = max(max(across, down) * padded * real, down * padded * size)
    shared = -(-(4 * padded * size + exchanged + 8 * padded + 32 * (real + 8)) // 16) * 16
    return _launch(
        "per_block", dtype, assume_a, threads, 1, shared,
        N=padded, ROWS=rows, COLUMNS=columns, BLOCKS=blocks, EXACT=int(n == padded),
    )  # fmt: skip


def _memory(dtype: np.dtype[np.generic], assume_a: AssumeA) -> Launch:
    layout: Layout = "memory" if assume_a == "positive definite" else "cublas"
    scratch = PANEL * PANEL // 32 * 8
    if layout == "cublas":
        shared = scratch + EDGE * (EDGE + 1) * dtype.itemsize
    else:
        real = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        shared = scratch + (2 * PANEL * 4 * PANEL + 2 * PANEL * (PANEL + 1)) * dtype.itemsize + PANEL * real
    return _launch(layout, dtype, assume_a, PANEL * PANEL, 1, shared)


def _largest_power(nbytes: int) -> int:
    """Return the largest number of bytes that a thread can move at a time which divides so many."""
    return next(piece for piece in (16, 8, 4) if nbytes % piece == 0)


def _warps(nbytes: int) -> int:
    """Return the warps of a block, of which each takes so many bytes of shared memory."""
    return next(warps for warps in (4, 2, 1) if warps * nbytes <= SHARED_NBYTES or warps == 1)


def _launch(
    layout: Layout, dtype: np.dtype[np.generic], assume_a: AssumeA, threads: int, matrices: int, shared: int,
    **macros: int,
) -> Launch:  # fmt: skip
    macros |= {
        "DEFINITE": int(assume_a == "positive definite"),
        "SHARED": shared,
        "INFO_NOT_FINITE": int(Info.NOT_FINITE),
        "INFO_OVERFLOW": int(Info.OVERFLOW),
    }
    options = [f"-DNUMBER={_NUMBERS[dtype.char]}", f"-DSTRUCTURE={CUDA_STRUCTURE[assume_a]}"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    return Launch(layout, tuple(options), threads, matrices, shared)


def is_tried(dtype: np.dtype[np.generic], assume_a: AssumeA) -> bool:
    """Whether matrices are taken for positive definite ones first: as structures.cuh has it."""
    return assume_a == "hermitian" or (assume_a == "symmetric" and dtype.kind != "c")


def architecture(capability: int, known: Sequence[int]) -> str:
    """Return what to compile for, for a card of a compute capability and a compiler that knows some.

    Machine code runs on what has the same first digit and no lesser second; for others, the driver compiles once more.

    Examples
    --------
    >>> architecture(90, [80, 86, 90]), architecture(89, [80, 86, 90]), architecture(120, [80, 86, 90])
    ('sm_90', 'sm_86', 'compute_90')
    """
    found = max(number for number in known if number <= capability)
    return f"{'sm' if found // 10 == capability // 10 else 'compute'}_{found}"


def batch(m: int, of_one: int, free: int) -> int:
    """Return how many of m matrices are done at a time, where one takes `of_one` bytes of the `free` ones.

    Examples
    --------
    >>> batch(100, 10, 95), batch(100, 10, 5000), batch(100, 10, 3)
    (9, 100, 1)
    """
    # What counts matrices in cuBLAS has 32 bits.
    return max(1, min(m, free // of_one, 2**31 - 1))
