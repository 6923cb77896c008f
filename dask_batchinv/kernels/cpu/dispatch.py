"""The CPU kernels of our own: which one takes which matrices, and calling it.

Layouts share the work. Which one a matrix gets depends on its structure, size and dtype, not on the machine, and each
gives the same bits for vectors of any width:

    `registers`, `interleaved`   one matrix per lane: the smallest matrices, and small ones
    `within`                     vectors within a matrix
    `blocked`                    the same for large ones, of which several threads may share one
    `diagonal`                   for diagonal matrices but large ones
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dask_batchinv.kernels import lapack, widened
from dask_batchinv.kernels.code_cache import digest_of_sources
from dask_batchinv.kernels.cpu import (
    blocked,
    diagonal,
    interleaved_gauss_jordan,
    interleaved_group,
    interleaved_ldl,
    interleaved_symmetric,
    interleaved_triangular,
    kept,
    registers_gauss_jordan,
    registers_ldl,
    registers_symmetric,
    registers_triangular,
    small_calls,
    within_gauss_jordan,
    within_sweep,
    within_symmetric,
    within_triangular,
)
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.emit import compiler
from dask_batchinv.kernels.threads import run_all
from dask_batchinv.outcome import Info
from dask_batchinv.stack import AssumeA

Array = npt.NDArray[Any]

#: Bytes of inverses from which on they are written with non-temporal stores.
NONTEMPORAL_NBYTES = 2**23
#: The smallest n of general matrices that several threads share, if there are not enough for all; measured.
_SHARED_FROM = {"f": 384, "d": 320, "F": 320, "D": 256}
#: The largest n of which each thread has a matrix of its own: beyond, scratch memory for all of them would be too much.
_SHARED_OUT = 1024
#: Parts that a block is cut into for each thread, so that none waits long for another; and the time in nanoseconds, a
#: rough estimate, that no part should take less than.
PARTS_PER_THREAD, SHORTEST_PART = 4, 50_000


class KernelError(RuntimeError):
    """A kernel was compiled wrongly."""


@dataclass(frozen=True)
class Layout:
    """How matrices of a structure are inverted, up to a size."""

    name: str
    """How their numbers are laid out."""
    structure: AssumeA
    """Their structure."""
    largest: Mapping[str, int]
    """The largest n, by the letter of the dtype; measured."""
    write: Callable[[KernelSpec], str]
    """Writes the text that LLVM compiles."""
    workspace: Callable[[KernelSpec], Workspace]
    """What the kernel works on at a time."""

    def takes(self, spec: KernelSpec) -> bool:
        """Tell whether a kernel is written in this layout."""
        # Where rows of matrices are a high power of two apart, a group of them maps to the same cache sets.
        crowded = self.name in ("registers", "interleaved") and spec.n % 32 == 0 and spec.n > 0
        # n = 0 is planned for, but needs no kernel.
        return self.structure == spec.structure and spec.n <= self.largest[spec.dtype.char] and not crowded


_PER_LANE = interleaved_group.workspace
#: The largest n: there is none.
LARGEST = sys.maxsize
_ALL_512, _ALL = dict.fromkeys("fdFD", 512), dict.fromkeys("fdFD", LARGEST)
#: The first that takes a matrix has it.
LAYOUTS = (
    Layout("registers", "general", {"f": 6, "d": 6, "F": 4, "D": 4}, registers_gauss_jordan.write, _PER_LANE),
    Layout("interleaved", "general", {"f": 24, "d": 20, "F": 16, "D": 14}, interleaved_gauss_jordan.write, _PER_LANE),
    Layout("within", "general", dict.fromkeys("fdFD", 448), within_gauss_jordan.write, within_gauss_jordan.workspace),
    Layout("blocked", "general", _ALL, blocked.write, blocked.workspace),
    Layout("registers", "positive definite", {"f": 7, "d": 7, "F": 4, "D": 4}, registers_ldl.write, _PER_LANE),
    Layout("interleaved", "positive definite", {"f": 40, "d": 36, "F": 40, "D": 40}, interleaved_ldl.write, _PER_LANE),
    Layout("within", "positive definite", _ALL_512, within_sweep.write, within_sweep.workspace),
    Layout("blocked", "positive definite", _ALL, blocked.write, blocked.workspace),
    Layout("diagonal", "diagonal", _ALL_512, diagonal.write, diagonal.workspace),
    Layout("blocked", "diagonal", _ALL, blocked.write, blocked.workspace),
    *(
        layout
        for word in ("upper triangular", "lower triangular")
        for layout in (
            Layout("registers", word, {"f": 6, "d": 6, "F": 4, "D": 4}, registers_triangular.write, _PER_LANE),
            Layout("interleaved", word, {"f": 40, "d": 40, "F": 40, "D": 40}, interleaved_triangular.write, _PER_LANE),
            Layout("within", word, _ALL_512, within_triangular.write, within_triangular.workspace),
            Layout("blocked", word, _ALL, blocked.write, blocked.workspace),
        )
    ),
    *(
        layout
        for word in ("symmetric", "hermitian")
        for layout in (
            Layout("registers", word, {"f": 6, "d": 6, "F": 4, "D": 4}, registers_symmetric.write, _PER_LANE),
            Layout(
                "interleaved",
                word,
                dict.fromkeys("fdFD", 40),
                interleaved_symmetric.write,
                interleaved_symmetric.workspace,
            ),
            Layout("within", word, _ALL_512, within_symmetric.write, within_symmetric.workspace),
            Layout("blocked", word, _ALL, blocked.write, blocked.workspace),
        )
    ),
)


@cache
def spec_of(n: int, dtype: np.dtype[Any] | str, structure: AssumeA, vector_nbytes: int) -> KernelSpec:
    """Return what a kernel for vectors of a width is written for."""
    dtype = np.dtype(dtype)
    if structure == "hermitian" and dtype.kind == "f":
        structure = "symmetric"
    real_nbytes = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    return KernelSpec(structure, n, dtype, vector_nbytes // real_nbytes)


def layout_of(spec: KernelSpec) -> Layout:
    """Return the layout of a kernel.

    Examples
    --------
    >>> [layout_of(spec_of(n, "float64", "general", 64)).name for n in (6, 7, 21, 448, 449)]
    ['registers', 'interleaved', 'within', 'within', 'blocked']
    """
    return next(layout for layout in LAYOUTS if layout.takes(spec))


@cache
def _sources() -> bytes:
    return digest_of_sources(Path(__file__).parent)


class _Kernel(Protocol):
    """A compiled kernel."""

    workspace: Workspace

    def run(
        self, a: Array, out: Array, info: Array, rcond: Array, *, nontemporal: bool = False, threads: int = 1
    ) -> None:
        """Invert a block whose arrays are contiguous."""


@dataclass
class _Grouped:
    """A compiled kernel for groups of matrices."""

    function: compiler.Function
    workspace: Workspace
    on_small: Callable[[int, int], int]
    """The same for small stacks."""

    def run(
        self, a: Array, out: Array, info: Array, rcond: Array, *, nontemporal: bool = False, threads: int = 1
    ) -> None:
        """Invert a block whose arrays are contiguous, by one thread."""
        with kept.scratch(self.workspace.nbytes) as memory:
            self._run(a, out, info, rcond, nontemporal, memory.ctypes.data)

    def _run(self, a: Array, out: Array, info: Array, rcond: Array, nontemporal: bool, scratch: int) -> None:
        def call(start: int, count: int, *arrays: Array) -> None:
            at, *others = (x[start:].ctypes.data for x in arrays)
            self.function(at, others[0], others[1], others[2], count, scratch, nontemporal)

        m, group = len(a), self.workspace.group
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


_loaded: dict[KernelSpec, _Kernel] = {}
#: Forks wait for it as they do for that of the compiler, which is taken within: before a fork, too, as it is younger.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def scratch_nbytes(n: int, dtype: npt.DTypeLike, *, structure: AssumeA) -> int:
    """Return the working memory of `invert` in bytes, whatever the number of matrices."""
    spec, others = spec_of(n, np.dtype(dtype), structure, compiler.vector_nbytes()), lapack.scratch_nbytes(n, dtype)
    group, nbytes = layout_of(spec).workspace(spec)
    copies = 2 * max(lapack.GROUP_NBYTES, group * n * n * spec.dtype.itemsize)
    return others + nbytes + copies


def compile_nbytes(n: int, dtype: npt.DTypeLike, *, structure: AssumeA) -> int:
    """Return the memory that compiling and testing a kernel takes, once for a process.

    Measured: compiling takes 40 to 55 MiB.
    """
    spec = spec_of(n, np.dtype(dtype), structure, compiler.vector_nbytes())
    layout = layout_of(spec)
    m, n = _tested(replace(spec, n=0) if layout.name == "blocked" else spec, layout.workspace(spec))
    return 64 * 2**20 + 5 * m * n * n * np.dtype(np.complex128).itemsize


def _tested(spec: KernelSpec, workspace: Workspace) -> tuple[int, int]:
    """Return how many matrices a kernel is tested with, and their size."""
    return max(3, workspace.group + 1), spec.n or blocked.TESTED


def invert(a: Array, out: Array, info: Array, rcond: Array, *, structure: AssumeA, threads: int = 1) -> None:
    """Invert a block; the contract is in `dask_batchinv.kernels`."""
    if a.shape[-1] == 0:
        info[:], rcond[:] = int(Info.GOOD), 1  # as LAPACK's gecon
        return
    kernel = _load(_spec_for(len(a), a.shape[-1], a.dtype, structure, threads))
    nontemporal = out.nbytes >= NONTEMPORAL_NBYTES

    def work(part: slice, *, threads: int = 1) -> None:
        arrays = (x[part] for x in (a, out, info, rcond))
        _invert(kernel, *arrays, structure=structure, nontemporal=nontemporal, threads=threads)

    if isinstance(kernel, blocked.BlockedKernel):
        each = len(a) // threads if a.shape[-1] <= _SHARED_OUT else 0
        parts = [slice(start, start + each) for start in range(0, each * threads, max(1, each))]
        run_all(work, parts, threads)
        work(slice(each * threads, None), threads=threads)
        return
    parts = _parts(a, kernel.workspace.group, threads)
    if len(parts) == 1:
        work(parts[0])
    else:
        run_all(work, parts, threads)


def _spec_for(m: int, n: int, dtype: np.dtype[Any], structure: AssumeA, threads: int) -> KernelSpec:
    """Return what the kernel for a stack is written for."""
    spec = spec_of(n, dtype, structure, compiler.vector_nbytes())
    if structure == "general" and m < threads and n >= _SHARED_FROM[dtype.char]:
        # Where there is not one for each thread they had better share it, with the same bits.
        return replace(spec, n=LARGEST)
    return spec


def _parts(a: Array, group: int, threads: int) -> list[slice]:
    """Cut a block for threads: into whole groups, and no parts that are done as soon as a thread is asked."""
    m, n = a.shape[:2]
    # Roughly: a few operations for each product of the elimination, and a few bytes a nanosecond.
    nanoseconds = m * n * n * (n / 16 + a.itemsize / 4)
    count = int(min(PARTS_PER_THREAD * threads, nanoseconds / SHORTEST_PART, m / group)) if threads > 1 else 1
    step = -(-m // max(1, count) // group) * group
    return [slice(start, start + step) for start in range(0, m, step)] if count > 1 else [slice(None)]


def _invert(
    kernel: _Kernel,
    a: Array,
    out: Array,
    info: Array,
    rcond: Array,
    *,
    structure: AssumeA,
    nontemporal: bool,
    threads: int,
) -> None:
    m, n = a.shape[:2]
    # As many as are copied at a time, where they must be.
    step = max(kernel.workspace.group, lapack.GROUP_NBYTES // (n * n * a.itemsize))
    if all(x.flags.c_contiguous and x.flags.aligned for x in (a, out, info, rcond)):
        kernel.run(a, out, info, rcond, nontemporal=nontemporal, threads=threads)
    else:
        for start in range(0, m, step):
            _on_copies(partial(kernel.run, threads=threads), slice(start, start + step), a, out, info, rcond)
    double = np.result_type(a, np.float64)
    unfinished = np.flatnonzero(info < int(Info.NOT_FINITE))
    for start in range(0, len(unfinished), step):
        part = unfinished[start : start + step]
        overflowed = info[part] == int(Info.OVERFLOW)
        # What overflowed on the way need not in double precision, nor the way that LAPACK takes.
        again = lapack.invert if a.dtype == double else partial(invert_in, double)
        _on_copies(partial(again, structure=structure), part[overflowed], a, out, info, rcond)
        # No pivot was zero, whatever LAPACK makes of what became infinite.
        info[part[overflowed & (info[part] > 0)]] = Info.OVERFLOW
        _on_copies(partial(_find_rcond, structure=structure), part[~overflowed], a, out, info, rcond)


def invert_in(
    dtype: np.dtype[Any], a: Array, out: Array, info: Array, rcond: Array, *, structure: AssumeA, threads: int = 1
) -> None:
    """Invert a block as `invert` does, but in a wider dtype than its own."""
    m, n = a.shape[:2]
    layout = layout_of(_spec_for(m, n, dtype, structure, threads))
    # Large ones are left to `invert` to share out.
    own = threads if layout.name == "blocked" else 1
    step = max(own, lapack.GROUP_NBYTES // max(1, n * n * dtype.itemsize))

    def work(part: slice) -> None:
        for start in range(part.start, part.stop, step):
            group = slice(start, min(start + step, part.stop))
            widened.invert_in(
                dtype, partial(invert, structure=structure, threads=own), *(x[group] for x in (a, out, info, rcond))
            )

    parts = _parts(a, 1, threads // own)
    run_all(work, [slice(*part.indices(len(a))) for part in parts], threads // own)


def invert_small(a: Array, *, structure: AssumeA, account: bool) -> Any:
    """Invert a stack by the way that is short for small ones.

    Returns
    -------
    array, or with `account` tuple of arrays
        The inverses, or these, ``info`` and ``rcond``. None if there is no short way for such a stack, or some matrix
        is not plainly good.
    """
    memory = small_calls.take(a, structure)
    if memory is None:
        if (
            a.ndim < 2
            or a.shape[-1] != a.shape[-2]
            or a.size == 0
            or a.dtype.char not in "fdFD"
            or not a.dtype.isnative
        ):
            return None
        spec = spec_of(a.shape[-1], a.dtype, structure, compiler.vector_nbytes())
        if not isinstance(kernel := _load(spec), _Grouped):
            return None
        memory = small_calls.Memory(a.shape, spec, kernel.workspace, kernel.on_small)
    try:
        return memory.invert(a, account=account)
    finally:
        small_calls.give_back(memory, structure)


def _find_rcond(a: Array, out: Array, info: Array, rcond: Array, *, structure: AssumeA) -> None:
    """Account for good matrices whose inverses are there, but not what their kernel could not tell."""
    rcond[:] = lapack.rcond_at_any_scale(lapack.METHODS[structure].read(a), out)
    info[:] = int(Info.GOOD)


def _on_copies(invert_part: Callable[..., None], part: slice | Array, a: Array, *results: Array) -> None:
    """Invert some matrices of a block by way of contiguous copies."""
    copies = [np.array(x[part], order="C") for x in results]
    invert_part(np.array(a[part], order="C"), *copies)
    for x, copy in zip(results, copies, strict=True):
        x[part] = copy


def _load(spec: KernelSpec) -> _Kernel:
    """Return a kernel, compiled and tested."""
    layout = layout_of(spec)
    if layout.name == "blocked":
        spec = replace(spec, n=0)
    with _lock:
        if spec not in _loaded:
            kernel = _load_blocked(spec) if spec.n == 0 else _load_grouped(spec, layout)
            _test(kernel, spec)
            _loaded[spec] = kernel
        return _loaded[spec]


def _load_grouped(spec: KernelSpec, layout: Layout) -> _Kernel:
    workspace, small = layout.workspace(spec), small_calls.name_for(spec)
    function, on_small = compiler.load(
        spec.name,
        lambda: layout.write(spec) + small_calls.text_for(spec, workspace),
        _sources(),
        {spec.name: compiler.SIGNATURE, small: small_calls.SIGNATURE},
    )
    return _Grouped(function, workspace, on_small)


def _load_blocked(spec: KernelSpec) -> _Kernel:
    functions = compiler.load(spec.name, lambda: blocked.write(spec), _sources(), blocked.signatures(spec))
    return blocked.BlockedKernel(spec, functions)


def _test(kernel: _Kernel, spec: KernelSpec) -> None:
    """Try a kernel on matrices whose outcome is known: compilers have been wrong about wide vectors."""
    (m, n), dtype = _tested(spec, kernel.workspace), spec.dtype
    i, j = np.indices((n, n))
    a = np.empty((m, n, n), dtype)
    for at in range(m):
        # Hermitian and diagonally dominant; for general matrices with the rows in another order.
        x = np.cos((i + 1) * (j + 1) * (at + 1)) + 2 * n * (i == j)
        if dtype.kind == "c":
            x = x + 1j * np.sin((i - j) * (at + 1))
        a[at] = np.roll(x, at, axis=0) if spec.structure == "general" else x
    if spec.structure in ("symmetric", "hermitian"):
        # Of some rows, of one matrix, two belong together.
        first = np.arange(0, n - 1, 4)
        a[0, first, first] = a[0, first + 1, first + 1] = 0
        a[0, first, first + 1] = a[0, first + 1, first] = 2 * n
    a[1] = 0
    a[2, -1, -1] = np.nan
    x, info, rcond = np.zeros_like(a), np.full(m, 9, np.int32), np.zeros(m, a.real.dtype)
    kernel.run(a, x, info, rcond)
    good = np.setdiff1d(np.arange(m), [1, 2])
    wide = np.result_type(a, np.float64)
    b, y = lapack.METHODS[spec.structure].read(a[good]).astype(wide), x[good].astype(wide)
    # X (A v) = v for a few vectors: enough to notice one wrong entry, and quick for large n too.
    v = 1 + np.arange(n)[:, None] % [2, 3, 5]
    limit = 10 * n * np.finfo(dtype).eps * np.abs(b).sum(axis=2).max(axis=1) * np.abs(y).sum(axis=2).max(axis=1) * 5
    residual = np.abs(y @ (b @ v) - v).max(axis=(1, 2))
    expected = np.zeros(m, np.int32)
    expected[[1, 2]] = 1, Info.NOT_FINITE
    accounted = (info == expected).all() and rcond[1] == 0 and np.isnan(rcond[2]) and (rcond[good] > 0).all()
    if not (accounted and np.isnan(x[1:3]).all() and (residual <= limit).all()):
        raise KernelError(
            f"kernel {spec.name} gives wrong results on this machine ({compiler.description()}): please report this, "
            "and try another version of llvmlite"
        )
