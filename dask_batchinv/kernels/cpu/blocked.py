"""Matrices beyond the other layouts: n is known only when the kernel runs, and several threads may share a matrix."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from dask_batchinv.kernels.cpu import kept
from dask_batchinv.kernels.cpu.blocked_diagonal import DiagonalMatrix
from dask_batchinv.kernels.cpu.blocked_frame import CHUNK, PANEL
from dask_batchinv.kernels.cpu.blocked_general import GeneralMatrix
from dask_batchinv.kernels.cpu.blocked_matrix import BlockedMatrix
from dask_batchinv.kernels.cpu.blocked_upper import DefiniteMatrix, SymmetricMatrix, TriangularMatrix
from dask_batchinv.kernels.cpu.scaling import RCOND_UNKNOWN
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.outcome import Info
from dask_batchinv.stack import AssumeA

Array = npt.NDArray[Any]

#: The size of the matrices that a kernel is tested with: some panels, strips and what is left.
TESTED = PANEL + CHUNK + 5
#: What is in work, by structure.
MATRICES: Mapping[AssumeA, type[BlockedMatrix]] = {
    "general": GeneralMatrix,
    "positive definite": DefiniteMatrix,
    "symmetric": SymmetricMatrix,
    "hermitian": SymmetricMatrix,
    "upper triangular": TriangularMatrix,
    "lower triangular": TriangularMatrix,
    "diagonal": DiagonalMatrix,
}


def signatures(spec: KernelSpec) -> dict[str, Any]:
    """Return the ctypes prototypes of the functions, by their names."""
    return {
        f"{spec.name}_{name}": ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * count)
        for name, count in MATRICES[spec.structure].FUNCTIONS.items()
    }


def write(spec: KernelSpec) -> str:
    """Write the functions for matrices of a structure and dtype, and any size."""
    module = ir.Module(spec.name)
    MATRICES[spec.structure].write(spec, module)
    return str(module)


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time."""
    return Workspace(1, MATRICES[spec.structure].nbytes(spec))


class BlockedKernel:
    """The functions for matrices of a structure and dtype, and any size."""

    def __init__(self, spec: KernelSpec, functions: Sequence[Callable[..., None]]):
        self.workspace, self._spec, self._functions = workspace(spec), spec, functions

    def run(
        self, a: Array, out: Array, info: Array, rcond: Array, *, nontemporal: bool = False, threads: int = 1
    ) -> None:
        """Invert a block whose arrays are contiguous, one matrix after the other, each by so many threads."""
        if len(a) == 0:
            return
        spec = replace(self._spec, n=a.shape[-1])
        matrix = kept.take(spec)
        if matrix is None:
            matrix = MATRICES[spec.structure](spec, spec.n, self._functions)
        for i in range(len(a)):
            info[i], rcond[i] = matrix.invert(a[i], out[i], threads)
            if info[i] not in (int(Info.GOOD), RCOND_UNKNOWN):
                out[i] = np.nan if out.dtype.kind == "f" else complex(np.nan, np.nan)
        # After an error nobody knows what state it is in.
        kept.give_back(spec, matrix, workspace(spec).nbytes)
