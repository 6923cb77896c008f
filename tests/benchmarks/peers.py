"""What a user would otherwise call, each as a function that times one call in seconds."""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from dask_batchinv.kernels import choose_kernel
from dask_batchinv.kernels.emit import compiler
from dask_batchinv.kernels.emit.emitter import Emitter

Array = npt.NDArray[Any]
Timed = Callable[[], float]


def _timed(call: Callable[[], Any]) -> Timed:
    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def ours(a: Array, kind: str = "general") -> Timed:
    """Time our kernel: inverse, info and rcond."""
    kernel = choose_kernel(kind, "cpu")
    out, info, rcond = np.empty_like(a), np.empty(len(a), np.int32), np.empty(len(a), a.real.dtype)
    return _timed(lambda: kernel.invert(a, out, info, rcond))


def copy(a: Array) -> Timed:
    """Time a copy of the stack."""
    out = np.empty_like(a)
    return _timed(lambda: np.copyto(out, a))


def _numpy(a: Array) -> Timed:
    return _timed(lambda: np.linalg.inv(a))


def _scipy(a: Array) -> Timed:
    return _timed(lambda: scipy.linalg.inv(a, check_finite=False))


def _torch(a: Array) -> Timed:
    import torch

    torch.set_num_threads(1)
    tensor = torch.from_numpy(a)
    return _timed(lambda: torch.linalg.inv_ex(tensor))


def _jax(a: Array) -> Timed:
    import jax

    jax.config.update("jax_enable_x64", True)
    inverse = jax.jit(jax.numpy.linalg.inv)
    array = jax.numpy.asarray(a)
    return _timed(lambda: inverse(array).block_until_ready())


def _mkl(a: Array) -> Timed:
    """getrf and getri for a whole batch, with pivots; a fresh copy of the input is not part of the time."""
    library = ctypes.CDLL(str(next((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))))
    library.MKL_Set_Threading_Layer(1)  # sequential
    letter = {"f": "s", "d": "d", "F": "c", "D": "z"}[a.dtype.char]
    factor, invert = (getattr(library, f"{letter}{routine}_batch_strided") for routine in ("getrf", "getri_oop"))
    m, n = a.shape[:2]
    work, out = np.empty_like(a), np.empty_like(a)
    pivots, info = np.empty((m, n), np.int32), np.empty(m, np.int32)
    number = [ctypes.byref(ctypes.c_int(value)) for value in (n, n * n, m)]
    of_n, of_square, of_m = number
    arrays = (work, pivots, out, info)
    data = [ctypes.c_void_p(x.ctypes.data) for x in arrays]

    def run() -> float:
        work[:] = a
        assert arrays  # alive as long as this function
        start = time.perf_counter()
        factor(of_n, of_n, data[0], of_n, of_square, data[1], of_n, of_m, data[3])
        invert(of_n, data[0], of_n, of_square, data[1], of_n, data[2], of_n, of_square, of_m, data[3])
        return time.perf_counter() - start

    run()
    if not np.allclose(out[0], np.linalg.inv(a[0].astype(np.result_type(a, np.float64))), rtol=1e-3, atol=1e-3):
        raise RuntimeError("MKL's result is wrong: it was not called as it should be")
    return run


PEERS: dict[str, Callable[[Array], Timed]] = {
    "NumPy": _numpy,
    "SciPy": _scipy,
    "torch": _torch,
    "JAX": _jax,
    "MKL batch": _mkl,
}
PACKAGES = {"NumPy": "numpy", "SciPy": "scipy", "torch": "torch", "JAX": "jax", "MKL batch": "mkl"}


def version(peer: str) -> str:
    """Return a peer's version."""
    return importlib.metadata.version(PACKAGES[peer])


def peak_gflops(itemsize: int) -> float:
    """Measure the most multiply-adds that one core does, in 10^9 operations a second."""
    lanes, chains, rounds = compiler.vector_nbytes() // itemsize, 16, 1_000_000
    name = f"peak_{itemsize}"

    def write() -> str:
        e = Emitter(name, itemsize, lanes)
        sums = [e.variable(e.load(e.at(e.a, i * lanes))) for i in range(chains)]
        factor, term = e.load(e.inverse), e.load(e.info)
        with e.loop(0, e.count):
            for total in sums:
                total.set(e.fma(total.get(), factor, term))
        for i, total in enumerate(sums):
            e.store(total.get(), e.at(e.a, i * lanes))
        return e.finish()

    (function,) = compiler.load(name, write, b"", {name: compiler.SIGNATURE})
    memory = np.zeros(chains * lanes, f"f{itemsize}")
    run = _timed(lambda: function(*[memory.ctypes.data] * 4, rounds, memory.ctypes.data, 0))
    seconds = min(run() for _ in range(5))
    return 2 * chains * lanes * rounds / seconds / 1e9
