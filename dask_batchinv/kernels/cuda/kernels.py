"""The GPU kernels: compiling and launching them through CuPy, in as many batches as memory wants.

Everything here works on the current device and stream. CuPy is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from dask_batchinv.kernels.code_cache import cached
from dask_batchinv.kernels.cuda import launch
from dask_batchinv.kernels.cuda.launch import Launch
from dask_batchinv.kernels.lapack import LETTERS
from dask_batchinv.outcome import Info
from dask_batchinv.stack import AssumeA

#: Arrays of CuPy, whose types need a CUDA installation.
Array = Any

#: Blocks and threads of the kernels that convert numbers.
_CONVERTING = ((1024,), (256,))
#: Of the memory that is free, so much is for temporary arrays.
SHARE = 0.8


def invert(a: Array, out: Array, info: Array, rcond: Array, *, assume_a: AssumeA) -> None:
    """Invert a block that is in GPU memory; the contract is in `dask_batchinv.kernels`, all arrays in C order."""
    import cupy

    if not (_aligned(a) and _aligned(out)):
        # Kernels would stop, and with them all that this process does on the GPU.
        result = _copied(out)
        invert(_copied(a), result, info, rcond, assume_a=assume_a)
        out.view(np.uint8)[...] = result.view(np.uint8)
        return
    overflows = cupy.zeros(1, np.uint32) if a.dtype.char in "fF" else None
    run(a, out, info, rcond, assume_a=assume_a, overflows=overflows)
    if overflows is not None and int(overflows[0]):  # waits for the GPU
        again_in_double(a, out, info, rcond, assume_a=assume_a)


def run(a: Array, out: Array, info: Array, rcond: Array, *, assume_a: AssumeA, overflows: Array | None = None) -> None:
    """Do the same without waiting for the GPU; but what overflowed in single precision is only marked as such.

    `overflows`, an array of one number, is increased by how many did. `a` and `out` begin at multiples of the size of
    their numbers.
    """
    m, n = a.shape[:2]
    if n == 0:
        info[...] = 0
        rcond[...] = 1
    if m == 0 or n == 0:
        return
    chosen = launch.choose_launch(n, a.dtype, assume_a)
    if chosen.layout == "cublas":
        work = partial(_by_cublas, assume_a=assume_a, overflows=overflows)
        _in_batches(work, chosen, a, out, info, rcond)
    elif chosen.layout == "memory":
        _definite(chosen, a, out, info, rcond, overflows)
    else:
        _call(chosen, chosen.layout, m, n, a, out, info, rcond, overflows)


def _aligned(a: Array) -> bool:
    """Whether an array begins at a multiple of the size of its numbers; a view of bytes may not."""
    return bool(a.data.ptr % a.itemsize == 0)


def _copied(a: Array) -> Array:
    """Return a copy, made byte by byte."""
    return a.view(np.uint8).copy().view(a.dtype)


def again_in_double(a: Array, out: Array, info: Array, rcond: Array, *, assume_a: AssumeA) -> None:
    """Invert again in double precision what overflowed in single: on the way, that is, which its inverse need not."""
    import cupy

    overflowed = cupy.flatnonzero(info == int(Info.OVERFLOW))
    wide = np.dtype("d" if a.dtype.char == "f" else "D")
    chosen = launch.choose_launch(a.shape[-1], wide, assume_a)

    def part(_: Launch, some: Array) -> None:
        b = _converted("widen", a[some], wide)
        x, codes, conditions = cupy.empty_like(b), cupy.empty(len(b), np.int32), cupy.empty(len(b), np.float64)
        run(b, x, codes, conditions, assume_a=assume_a)
        x = _converted("narrow", x, a.dtype)
        codes[(codes == int(Info.GOOD)) & ~cupy.isfinite(x).all(axis=(1, 2))] = Info.OVERFLOW
        x[codes != int(Info.GOOD)] = complex(np.nan, np.nan) if a.dtype.kind == "c" else np.nan
        out[some], info[some], rcond[some] = x, codes, _converted("narrow", conditions, rcond.dtype)

    _in_batches(part, chosen, overflowed, of_one=5 * a[0].size * wide.itemsize)


def _in_batches(work: Callable[..., None], chosen: Launch, *arrays: Array, of_one: int | None = None) -> None:
    """Call ``work(chosen, *parts)`` for parts of arrays whose temporary memory is there; for smaller ones if it is not.

    `of_one` is the temporary memory for one matrix; by default that of `_by_cublas`.
    """
    import cupy

    if of_one is None:
        of_one = 2 * arrays[0][0].size * arrays[0].itemsize + 4 * arrays[0].shape[-1] + 64
    pool = cupy.get_default_memory_pool()
    free = cupy.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
    start, step = 0, launch.batch(len(arrays[0]), of_one, int(SHARE * free))
    while start < len(arrays[0]):
        try:
            work(chosen, *(x[start : start + step] for x in arrays))
        except cupy.cuda.memory.OutOfMemoryError:
            if step == 1:
                raise
            pool.free_all_blocks()
            step = -(-step // 2)
        else:
            start += step


def _converted(how: str, a: Array, dtype: Any) -> Array:
    """Return a copy in double precision ("widen") or single ("narrow")."""
    import cupy

    result = cupy.empty(a.shape, dtype)
    chosen = launch.choose_launch(launch.LARGE, "float64", "general")
    count = np.int64(a.size * (2 if a.dtype.kind == "c" else 1))
    _function(chosen.file, chosen.options, how, cupy.cuda.Device().id)(*_CONVERTING, (a, result, count))
    return result


def _definite(chosen: Launch, a: Array, out: Array, info: Array, rcond: Array, overflows: Array | None) -> None:
    import cupy

    m, n = a.shape[:2]
    lines = cupy.empty((chosen.blocks(m), 2 * launch.PANEL + 1, n), a.dtype)
    _call(chosen, "definite", m, n, a, out, info, rcond, overflows, lines)


def _by_cublas(
    chosen: Launch, a: Array, out: Array, info: Array, rcond: Array, *, assume_a: AssumeA, overflows: Array | None
) -> None:
    import cupy
    from cupy_backends.cuda.libs import cublas

    m, n = a.shape[:2]
    work, inverse = cupy.empty_like(a), cupy.empty_like(a)
    finite, shift, excess, ignored = (cupy.empty(m, np.int32) for _ in range(4))
    norm, pivots = cupy.empty_like(rcond), cupy.empty((m, n), np.int32)
    _call(chosen, "prepare", m, n, a, work, finite, shift, excess, norm)
    letter = LETTERS[a.dtype.char]
    factor, invert_factors = (getattr(cublas, f"{letter}{routine}Batched") for routine in ("getrf", "getri"))
    of_work, of_inverse = (x.data.ptr + cupy.arange(m, dtype=np.uint64) * (n * n * x.itemsize) for x in (work, inverse))
    handle = cupy.cuda.Device().cublas_handle
    factor(handle, n, of_work.data.ptr, n, pivots.data.ptr, info.data.ptr, m)
    invert_factors(
        handle, n, of_work.data.ptr, n, pivots.data.ptr, of_inverse.data.ptr, n, ignored.data.ptr, m
    )  # fmt: skip
    tried: list[Array | None] = [None, None]
    if launch.is_tried(a.dtype, assume_a):
        tried = [cupy.empty_like(info), cupy.empty_like(rcond)]
        _definite(launch.choose_launch(n, a.dtype, "positive definite"), a, out, tried[0], tried[1], None)
    _call(chosen, "account", m, n, inverse, out, info, rcond, overflows, finite, shift, excess, norm, *tried)


def _call(chosen: Launch, name: str, m: int, n: int, *arrays: Array | None) -> None:
    import cupy

    kernel = _function(chosen.file, chosen.options, name, cupy.cuda.Device().id)
    pointers = (np.uint64(0) if x is None else x for x in arrays)
    arguments = (*pointers, np.int64(m), np.int32(n))
    kernel((chosen.blocks(m),), (chosen.threads,), arguments, shared_mem=chosen.shared_nbytes)


@cache
def _function(file: str, options: tuple[str, ...], name: str, device: int) -> Any:
    import cupy

    module = cupy.cuda.function.Module()
    module.load(code_for(int(cupy.cuda.Device(device).compute_capability), file, options))
    return module.get_function(name)


def code_for(capability: int, file: str, options: tuple[str, ...]) -> bytes:
    """Return the code of a file of kernels for cards of a compute capability, from the disk where it is known there."""
    from cupy.cuda import nvrtc

    architecture = launch.architecture(capability, nvrtc.getSupportedArchs())
    facts = (launch.source(file), *options, architecture, *map(str, nvrtc.getVersion()))
    make = partial(compile_for, architecture, file, options)
    return cached(f"cuda-{architecture}", "\0".join(facts).encode(), make)


def compile_for(architecture: str, file: str, options: tuple[str, ...]) -> bytes:
    """Return the machine code of a file of kernels for "sm_90" and the like; for "compute_90", what drivers compile.

    Not by way of CuPy's RawModule, which makes the compiler flush subnormal numbers to zero, whatever one says.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(launch.source(file), file, (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={architecture}", *launch.COMPILER_OPTIONS, *options))
        code: bytes = nvrtc.getCUBIN(program) if architecture.startswith("sm_") else nvrtc.getPTX(program)
        return code + b"\0"  # which CuPy leaves out
    except nvrtc.NVRTCError as error:
        error.add_note(nvrtc.getProgramLog(program))
        raise
    finally:
        nvrtc.destroyProgram(program)
