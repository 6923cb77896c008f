"""The CPU kernels of our own: which one takes which matrices, and calling it.

Three layouts share the work. Which one a matrix gets depends on its size and dtype alone, never on the machine, and
each gives the same bits for vectors of any width:

    `registers`, `interleaved`   one matrix per lane: the smallest matrices, and small ones
    `panels`, `sweeps`           vectors within a matrix, for general and for positive definite ones

Beyond `LARGEST` LAPACK's blocked routines take over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dask_batchinv.kernels import lapack
from dask_batchinv.kernels.code_cache import digest_of_sources
from dask_batchinv.kernels.cpu import interleaved, registers
from dask_batchinv.kernels.cpu import interleaved_group as groups
from dask_batchinv.kernels.cpu import within_gauss_jordan as panels
from dask_batchinv.kernels.cpu import within_sweep as sweeps
from dask_batchinv.kernels.cpu.within_workspace import Shape
from dask_batchinv.kernels.emit import compiler as machine

Array = npt.NDArray[Any]
Kind = Literal["general", "positive definite"]

#: The largest n with kernels of our own; measured.
LARGEST = 512
#: The largest n for one matrix per lane, by bytes of a real and reals of a number; measured.
_REGISTERS = {"general": {1: 6, 2: 4}, "positive definite": {1: 7, 2: 4}}
_INTERLEAVED = {
    "general": {(4, 1): 24, (8, 1): 20, (4, 2): 16, (8, 2): 14},
    "positive definite": {(4, 1): 40, (8, 1): 36, (4, 2): 40, (8, 2): 40},
}
_ALIGNMENT = 64
#: Bytes of inverses from which on they are written past the caches.
PAST_CACHES = 2**23


class KernelError(RuntimeError):
    """A kernel was compiled wrongly."""


@dataclass(frozen=True)
class Program:
    """A kernel for one size, dtype and kind of matrix, before it is compiled."""

    name: str
    write: Callable[[], str]
    """Writes the text that LLVM compiles."""
    group: int
    """Matrices that it inverts at a time."""
    nbytes: int
    """Its scratch memory."""


def program(n: int, dtype: npt.DTypeLike, kind: Kind, vector_nbytes: int) -> Program:
    """Return the kernel for matrices of a size, for vectors of a width.

    Examples
    --------
    >>> program(3, "float64", "general", 64).name
    'registers_general_3_d_8'
    """
    dtype = np.dtype(dtype)
    parts = 2 if dtype.kind == "c" else 1
    itemsize = dtype.itemsize // parts
    lanes = vector_nbytes // itemsize
    definite = kind == "positive definite"
    module: Any
    # Where rows of matrices are a high power of two apart, a group of them competes for the same places in the cache.
    if n <= _INTERLEAVED[kind][itemsize, parts] and n % 32:
        module = registers if n <= _REGISTERS[kind][parts] else interleaved
        group, nbytes = lanes, groups.scratch_nbytes(n, itemsize, parts, lanes)
    else:
        module = sweeps if definite else panels
        shape = Shape(n, itemsize, parts, lanes, together=1 if definite else _together(n, itemsize, parts))
        group, nbytes = shape.together, shape.together * shape.nbytes
    layout = module.__name__.rpartition(".")[2]
    name = f"{layout}_{kind.replace(' ', '_')}_{n}_{dtype.char}_{lanes}"
    if module in (registers, interleaved):
        write = partial(module.write, name, n, itemsize, parts, lanes, definite=definite)
    else:
        write = partial(module.write, name, shape)
    return Program(name, write, group, nbytes)


def _together(n: int, itemsize: int, parts: int) -> int:
    """Matrices in work at a time, to wait less for each pivot; the larger, the less there is to wait; measured."""
    lines = -(-n * itemsize // _ALIGNMENT) * parts
    if lines <= (4 if parts == 2 else 3):
        return 3
    return 2 if lines <= (6 if parts == 2 else 8) else 1


@cache
def _sources() -> bytes:
    return digest_of_sources(Path(__file__).parent)


@dataclass
class _Loaded:
    """A compiled kernel."""

    function: machine.Function
    keep_alive: Any
    group: int
    nbytes: int


_loaded: dict[tuple[int, str, Kind, int], _Loaded] = {}
_lock = threading.Lock()


def scratch_nbytes(n: int, dtype: npt.DTypeLike, *, kind: Kind) -> int:
    """Return the working memory of `invert` in bytes, whatever the number of matrices."""
    dtype = np.dtype(dtype)
    others = lapack.scratch_nbytes(n, dtype)
    if not 0 < n <= LARGEST:
        return others
    needed = program(n, dtype, kind, machine.vector_nbytes())
    copies = 2 * max(lapack.GROUP_NBYTES, needed.group * n * n * dtype.itemsize)
    return others + needed.nbytes + _ALIGNMENT + copies


def compile_nbytes(n: int, dtype: npt.DTypeLike, *, kind: Kind) -> int:
    """Return the memory that compiling and testing a kernel takes, once for a process.

    Measured: compiling takes 40 to 55 MiB.
    """
    if not 0 < n <= LARGEST:
        return 0
    tested = _tested(program(n, dtype, kind, machine.vector_nbytes()).group)
    return 64 * 2**20 + 5 * tested * n * n * np.dtype(np.complex128).itemsize


def _tested(group: int) -> int:
    """Return how many matrices a kernel is tested with."""
    return max(3, group + 1)


def invert(a: Array, out: Array, info: Array, rcond: Array, *, kind: Kind) -> None:
    """Invert a block; the contract is in `dask_batchinv.kernels`."""
    m, n = a.shape[:2]
    reference = partial(lapack.invert, structure=lapack.STRUCTURES[kind])
    if not 0 < n <= LARGEST:
        reference(a, out, info, rcond)
        return
    kernel = _load(n, a.dtype, kind, machine.vector_nbytes())
    # As many as are copied at a time, where they must be.
    step = max(kernel.group, lapack.GROUP_NBYTES // (n * n * a.itemsize))
    if all(x.flags.c_contiguous and x.flags.aligned for x in (a, out, info, rcond)):
        _run(kernel, a, out, info, rcond)
    else:
        for start in range(0, m, step):
            _on_copies(partial(_run, kernel), slice(start, start + step), a, out, info, rcond)
    # What overflowed on the way, in single precision, need not in double.
    overflowed = np.flatnonzero(info == -2)
    for start in range(0, len(overflowed), step):
        _on_copies(reference, overflowed[start : start + step], a, out, info, rcond)


def _on_copies(invert_part: Callable[..., None], part: slice | Array, a: Array, *results: Array) -> None:
    """Invert some matrices of a block by way of contiguous copies."""
    copies = [np.array(x[part], order="C") for x in results]
    invert_part(np.array(a[part], order="C"), *copies)
    for x, copy in zip(results, copies, strict=True):
        x[part] = copy


def _run(kernel: _Loaded, a: Array, out: Array, info: Array, rcond: Array) -> None:
    memory = np.empty(kernel.nbytes + _ALIGNMENT, np.uint8)
    scratch = -(-memory.ctypes.data // _ALIGNMENT) * _ALIGNMENT

    def call(start: int, count: int, *arrays: Array) -> None:
        at, *others = (x[start:].ctypes.data for x in arrays)
        kernel.function(at, others[0], others[1], others[2], count, scratch, out.nbytes >= PAST_CACHES)

    m, group = len(a), kernel.group
    call(0, m // group, a, out, info, rcond)
    if m % group == 0:
        return
    if m > group:
        # The last whole group, part of which gets the same bits a second time.
        call(m - group, 1, a, out, info, rcond)
        return
    padded = [np.zeros((group, *x.shape[1:]), x.dtype) for x in (a, out, info, rcond)]
    padded[0][:m] = a
    call(0, 1, *padded)
    for x, whole in zip((out, info, rcond), padded[1:], strict=True):
        x[:] = whole[:m]


def _load(n: int, dtype: Any, kind: Kind, vector_nbytes: int) -> _Loaded:
    """Return a kernel, compiled and tested."""
    key = (n, dtype.char, kind, vector_nbytes)
    with _lock:
        if key not in _loaded:
            source = program(n, dtype, kind, vector_nbytes)
            function, keep_alive = machine.load(source.name, source.write, _sources())
            kernel = _Loaded(function, keep_alive, source.group, source.nbytes)
            _test(kernel, source.name, n, dtype, kind)
            _loaded[key] = kernel
        return _loaded[key]


def _test(kernel: _Loaded, name: str, n: int, dtype: Any, kind: Kind) -> None:
    """Try a kernel on matrices whose outcome is known: compilers have been wrong about wide vectors."""
    m = _tested(kernel.group)
    i, j = np.indices((n, n))
    a = np.empty((m, n, n), dtype)
    for at in range(m):
        # Symmetric and diagonally dominant; for general matrices with the rows in another order.
        x = np.cos((i + 1) * (j + 1) * (at + 1)) + 2 * n * (i == j)
        if dtype.kind == "c":
            x = x + 1j * np.sin((i - j) * (at + 1))
        a[at] = x if kind == "positive definite" else np.roll(x, at, axis=0)
    a[1] = 0
    a[2, -1, -1] = np.nan
    x, info, rcond = np.zeros_like(a), np.full(m, 9, np.int32), np.zeros(m, a.real.dtype)
    _run(kernel, a, x, info, rcond)
    good = np.setdiff1d(np.arange(m), [1, 2])
    wide = np.result_type(a, np.float64)
    b, y = a[good].astype(wide), x[good].astype(wide)
    # X (A v) = v for a few vectors: enough to notice one wrong entry, and quick for large n too.
    v = 1 + np.arange(n)[:, None] % [2, 3, 5]
    limit = 10 * n * np.finfo(dtype).eps * np.abs(b).sum(axis=2).max(axis=1) * np.abs(y).sum(axis=2).max(axis=1) * 5
    residual = np.abs(y @ (b @ v) - v).max(axis=(1, 2))
    expected = np.zeros(m, np.int32)
    expected[[1, 2]] = 1, -1
    accounted = (info == expected).all() and rcond[1] == 0 and np.isnan(rcond[2]) and (rcond[good] > 0).all()
    if not (accounted and np.isnan(x[1:3]).all() and (residual <= limit).all()):
        raise KernelError(
            f"kernel {name} gives wrong results on this machine ({machine.description()}): please report this, and "
            "try another version of llvmlite"
        )
