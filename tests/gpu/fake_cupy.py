"""As much of CuPy as dask_batchinv uses, on a CPU: arrays of NumPy's, the kernels compiled as C++, LAPACK for cuBLAS.

So that everything but the card itself can be tested where there is none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from scipy.linalg import get_lapack_funcs

from dask_batchinv.kernels.cuda import kernels as cuda
from dask_batchinv.kernels.cuda import launch
from dask_batchinv.kernels.device import why_unusable

COMPILER = shutil.which("g++") or shutil.which("clang++")
#: The variable with the folder of what was compiled.
FOLDER = "DASK_BATCHINV_EMULATED"
#: So few that the blocks of a kernel have to take turns.
BLOCKS = 2
_HEADER = Path(__file__).with_name("emulator.h")
_lock = threading.Lock()


class ndarray(np.ndarray):  # noqa: N801 the name that CuPy gives it
    """An array that counts as one in GPU memory."""

    __module__ = "cupy"

    device = nullcontext()

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)

    def __array_function__(self, *arguments: Any) -> Any:
        # Its own, so that Dask does not take it for NumPy's.
        return super().__array_function__(*arguments)

    def set(self, host: Any, stream: Any = None) -> None:
        self[...] = host

    def get(self, stream: Any = None, out: Any = None, blocking: bool = True) -> Any:
        out = np.empty(self.shape, self.dtype) if out is None else out
        out[...] = self
        return out


def array(a: Any) -> ndarray:
    """Return a copy on the "GPU"."""
    return np.array(a).view(ndarray)


@functools.cache
def _library(file: str, options: tuple[str, ...]) -> ctypes.CDLL:
    assert COMPILER
    # For all processes of a run of tests: each takes seconds to compile.
    digest = hashlib.sha256(" ".join((file, *options)).encode()).hexdigest()
    path = Path(os.environ[FOLDER]) / f"{digest}.so"
    if not path.exists():
        made, text = path.with_suffix(f".{os.getpid()}"), path.with_suffix(f".{os.getpid()}.cu")
        text.write_text(launch.source(file))
        exports = " ".join(
            f"EXPORT({name})" for name in re.findall(r"__global__ void[^;{]*?(\w+)\(const", text.read_text())
        )
        command = [COMPILER, "-x", "c++", "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-shared", "-fPIC",
                   "-w", "-fno-strict-aliasing", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",
                   f'-DKERNELS="{text}"', f"-DEXPORTS={exports}", *options, _HEADER, "-o", made]  # fmt: skip
        subprocess.run(command, check=True)
        made.rename(path)
    return ctypes.CDLL(str(path))


class _Module:
    """Its "machine code" are the file and the options that it was compiled with."""

    _compiled: tuple[str, tuple[str, ...]]

    def load(self, code: bytes) -> None:
        file, options = json.loads(code.rstrip(b"\0"))
        self._compiled = file, tuple(options)

    def get_function(self, name: str) -> Any:
        pointer = ctypes.c_void_p.in_dll(_library(*self._compiled), f"run_{name}").value

        def call(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...], *, shared_mem: int = 0) -> None:
            assert shared_mem <= launch.SHARED_NBYTES
            assert grid[0] >= 1
            types = {"u8": ctypes.c_void_p, "i8": ctypes.c_longlong, "i4": ctypes.c_int}
            given = [
                ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else types[x.dtype.str[1:]](int(x))
                for x in arguments
            ]
            assert all(x.flags.c_contiguous for x in arguments if isinstance(x, np.ndarray))
            function = ctypes.CFUNCTYPE(None, *(ctypes.c_uint,) * 3, *map(type, given))(pointer)
            with _lock:
                function(min(grid[0], BLOCKS), block[0], shared_mem, *given)

        return call


class NVRTCError(RuntimeError):
    """As CuPy's."""


class _Program:
    def __init__(self, source: str, name: str, headers: Any, names: Any):
        assert source == launch.source(name)
        self.name = name

    def compile(self, options: tuple[str, ...]) -> None:
        architecture, *others = options
        assert architecture in ("--gpu-architecture=sm_90", "--gpu-architecture=compute_90")
        assert tuple(others[: len(launch.COMPILER_OPTIONS)]) == launch.COMPILER_OPTIONS
        self.options = others[len(launch.COMPILER_OPTIONS) :]


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


class _Event:
    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


class _Device:
    compute_capability = "90"
    cublas_handle = None

    def __init__(self, number: int = 0):
        self.id = number

    def synchronize(self) -> None:
        pass


class _Stream:
    def __init__(self, non_blocking: bool = False):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _at(pointer: int, shape: tuple[int, ...], dtype: Any) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype).reshape(shape)


def _getrf(letter: str, _: Any, n: int, matrices: int, lda: int, pivots: int, info: int, m: int) -> None:
    assert lda == n
    for i, pointer in enumerate(_at(matrices, (m,), np.uint64)):
        a = _at(int(pointer), (n, n), letter)
        lu, pivot, code = get_lapack_funcs("getrf", (a,))(a.T)
        a.T[...] = lu
        _at(pivots, (m, n), np.int32)[i] = pivot
        _at(info, (m,), np.int32)[i] = code


def _getri(
    letter: str, _: Any, n: int, matrices: int, lda: int, pivots: int, inverses: int, ldc: int, info: int, m: int
) -> None:
    assert lda == ldc == n
    for i, (pointer, other) in enumerate(
        zip(_at(matrices, (m,), np.uint64), _at(inverses, (m,), np.uint64), strict=True)
    ):
        a, x = _at(int(pointer), (n, n), letter), _at(int(other), (n, n), letter)
        inverse, code = get_lapack_funcs("getri", (a,))(a.T, _at(pivots, (m, n), np.int32)[i])
        x.T[...] = inverse if code == 0 else np.nan
        _at(info, (m,), np.int32)[i] = code


def _like(function: Any) -> Any:
    return lambda *arguments, **options: function(*arguments, **options).view(ndarray)


@contextmanager
def installed(
    free: int = 2**30, devices: int = 1, capability: int = 90, without: str | None = None
) -> Iterator[ModuleType]:
    """Have this process find a GPU with so much free memory, but not one of the libraries "nvrtc" and "cublas"."""
    cupy, backends = ModuleType("cupy"), ModuleType("cupy_backends.cuda.libs")
    pool = SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: None)
    runtime = SimpleNamespace(
        getDeviceCount=lambda: devices, memGetInfo=lambda: (free, free), CUDARuntimeError=CUDARuntimeError
    )
    nvrtc: Any = ModuleType("cupy.cuda.nvrtc")
    nvrtc.getVersion, nvrtc.NVRTCError, nvrtc.createProgram = (lambda: (0, 0)), NVRTCError, _Program
    nvrtc.getSupportedArchs = lambda: (75, 80, 86, 90)
    nvrtc.compileProgram, nvrtc.destroyProgram = _Program.compile, id
    nvrtc.getCUBIN = lambda program: json.dumps([program.name, program.options]).encode()
    nvrtc.getPTX = nvrtc.getCUBIN
    members = {
        "ndarray": ndarray, "array": array, "asnumpy": lambda a: a.get(),
        "shares_memory": np.shares_memory, "copyto": np.copyto, "asarray": array, "isfinite": np.isfinite,
        "get_default_memory_pool": lambda: pool,
        "cuda": SimpleNamespace(
            runtime=runtime, Stream=_Stream, alloc_pinned_memory=bytearray,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            Device=type("Device", (_Device,), {"compute_capability": str(capability)}), Event=_Event,
            get_elapsed_time=lambda begin, end: 1000 * (end.time - begin.time),
            function=SimpleNamespace(Module=_Module), nvrtc=nvrtc,
        ),
    }  # fmt: skip

    def raw_kernel(code: str, name: str) -> Any:
        def compile_it() -> None:
            if without == "nvrtc":
                raise RuntimeError("CuPy failed to load libnvrtc.so.13")

        return SimpleNamespace(compile=compile_it)

    members["RawKernel"] = raw_kernel
    members |= {
        name: _like(getattr(np, name))
        for name in ("empty", "empty_like", "zeros", "arange", "flatnonzero", "concatenate")
    }
    for name, member in members.items():
        setattr(cupy, name, member)
    cupy.__getattr__ = functools.partial(getattr, np)  # what Dask registers
    letters = {"s": "f", "d": "d", "c": "F", "z": "D"}
    routines = {"getrf": _getrf, "getri": _getri}
    backends.cublas = SimpleNamespace(
        **{
            f"{letter}{name}Batched": functools.partial(routine, dtype)
            for letter, dtype in letters.items()
            for name, routine in routines.items()
        }
    )
    cupy_cuda: Any = ModuleType("cupy.cuda")
    cupy_cuda.nvrtc = nvrtc
    modules = {"cupy": cupy, "cupy.cuda": cupy_cuda, "cupy_backends.cuda.libs": backends}
    modules["cupy_backends.cuda.libs.cublas"] = None if without == "cublas" else backends.cublas
    modules |= {name: ModuleType(name) for name in ("cupy_backends", "cupy_backends.cuda")}
    before = {name: sys.modules.get(name) for name in modules}
    _forget()
    # One by one: mock.patch.dict empties the whole of sys.modules for a moment, in which other threads import.
    sys.modules.update(modules)
    try:
        yield cupy
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        _forget()


def _forget() -> None:
    why_unusable.cache_clear()
    cuda._function.cache_clear()
