"""What users of a GPU would otherwise call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], Any]


def _cupy(a: Any, out: Any, info: Any) -> Run:
    import cupy

    return lambda: cupy.linalg.inv(a)


def _torch(a: Any, out: Any, info: Any) -> Run:
    import torch

    tensor = torch.from_dlpack(a)
    return lambda: torch.linalg.inv_ex(tensor)


def _jax(a: Any, out: Any, info: Any) -> Run:
    import jax

    jax.config.update("jax_enable_x64", True)
    array, inverse = jax.dlpack.from_dlpack(a), jax.jit(jax.numpy.linalg.inv)
    return lambda: inverse(array).block_until_ready()


def _matinv(a: Any, out: Any, info: Any) -> Run:
    """cuBLAS' routine for n up to 32, which CuPy does not have."""
    import cupy

    m, n = a.shape[:2]
    if n > 32:
        raise ImportError("for n up to 32 alone")
    from cupy_backends.cuda.libs import cublas

    handle = cupy.cuda.Device().cublas_handle
    version = cublas.getVersion(handle)
    # Of several, that of CuPy: a handle of one is none of another.
    library = next((one for one in _loaded("libcublas.so") if _has_version(one, version)), None)
    if library is None:
        raise RuntimeError("the cuBLAS that CuPy uses is not found among what is loaded")
    letter = {"f": "S", "d": "D", "F": "C", "D": "Z"}[a.dtype.char]
    function = getattr(library, f"cublas{letter}matinvBatched")
    addresses = [x.data.ptr + cupy.arange(m, dtype=np.uint64) * (n * n * x.itemsize) for x in (a, out)]
    # They must live as long as `run`, which has them by its default argument.
    pointers = [ctypes.c_void_p(x.data.ptr) for x in (*addresses, info)]

    def run(alive: Any = addresses) -> Any:
        code = function(ctypes.c_void_p(handle), n, pointers[0], n, pointers[1], n, pointers[2], m)
        if code:
            raise RuntimeError(f"cublas{letter}matinvBatched returns {code}")

    return run


def _loaded(name: str) -> list[ctypes.CDLL]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [ctypes.CDLL(path) for path in sorted({line.split()[-1] for line in lines if name in line})]


def _has_version(library: ctypes.CDLL, version: int) -> bool:
    """Whether a cuBLAS has the version of another, by a function that takes no handle."""
    found = [ctypes.c_int() for _ in range(3)]
    for which, number in enumerate(found):  # major, minor, patch
        library.cublasGetProperty(which, ctypes.byref(number))
    return found[0].value * 10000 + found[1].value * 100 + found[2].value == version


#: Each makes a function that inverts `a`; an ImportError says that it does not apply.
PEERS = {"CuPy": _cupy, "torch": _torch, "JAX": _jax, "cuBLAS matinv": _matinv}
