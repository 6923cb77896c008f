"""Small stacks, for which the way to the kernel would take longer than the kernel.

Such a stack is copied into memory that a thread keeps for stacks of its shape, and whose addresses are known. The
machine code sets the floating-point environment itself, and looks through what came out: where nothing failed and
nothing is ill-conditioned there is nothing to be said in Python.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_batchinv.kernels.cpu.aligned import aligned
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.emit import environment
from dask_batchinv.stack import AssumeA

Array = npt.NDArray[Any]
#: ``f(arrays, count)``, see `text_for`; it holds on to the interpreter lock, as letting go of it takes longer.
SIGNATURE = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
#: Bytes of a stack up to which it is a small one: other threads wait for the lock that long.
LARGEST_NBYTES = 2**15
#: Shapes for which a thread keeps memory at a time.
_KEPT = 8


def name_for(spec: KernelSpec) -> str:
    """Return the name of the function."""
    return f"{spec.name}_small"


def text_for(spec: KernelSpec, workspace: Workspace) -> str:
    """Return LLVM's text of ``name_for(spec)(arrays, count)``, which calls the kernel of the same module.

    `arrays` are the addresses of matrices, inverses, ``info``, ``rcond`` and scratch, with room for whole groups. It
    returns 0 if no ``info`` of the first `count` is anything but 0, and no ``rcond`` less than eps.
    """
    real = "float" if spec.itemsize == 4 else "double"
    eps = f"0x{np.float64(np.finfo(spec.dtype).eps).view(np.uint64):016X}"
    addresses = "\n".join(
        f"  %at{i} = getelementptr ptr, ptr %arrays, i64 {i}\n  %p{i} = load ptr, ptr %at{i}" for i in range(5)
    )
    register = environment.REGISTERS.get(platform.machine())
    before = f"%before = call i64 @{environment.NAME}(i64 {register.standard})" if register else ""
    after = f"%ours = call i64 @{environment.NAME}(i64 %before)" if register else ""
    definition = register.text.replace("define i64", "define internal i64") if register else ""
    return f"""
{definition}
define i64 @{name_for(spec)}(ptr %arrays, i64 %count) {{
entry:
{addresses}
  %more = add i64 %count, {workspace.group - 1}
  %groups = udiv i64 %more, {workspace.group}
  {before}
  call void @{spec.name}(ptr %p0, ptr %p1, ptr %p2, ptr %p3, i64 %groups, ptr %p4, i64 0) noinline
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %next, %head ]
  %found = phi i64 [ 0, %entry ], [ %more_found, %head ]
  %info_at = getelementptr i32, ptr %p2, i64 %i
  %info = load i32, ptr %info_at
  %rcond_at = getelementptr {real}, ptr %p3, i64 %i
  %rcond = load {real}, ptr %rcond_at
  %failed = icmp ne i32 %info, 0
  %poor = fcmp ult {real} %rcond, {eps}
  %bad = or i1 %failed, %poor
  %one = zext i1 %bad to i64
  %more_found = or i64 %found, %one
  %next = add i64 %i, 1
  %again = icmp ult i64 %next, %count
  br i1 %again, label %head, label %end
end:
  {after}
  ret i64 %more_found
}}
"""


class Memory:
    """What a thread keeps for stacks of a shape, dtype and structure."""

    def __init__(self, shape: tuple[int, ...], spec: KernelSpec, workspace: Workspace, function: Callable[..., int]):
        *batch, n, _ = shape
        self.shape, self.dtype = shape, spec.dtype
        self.count = int(np.prod(batch, dtype=np.intp))
        m = -(-self.count // workspace.group) * workspace.group
        real = np.finfo(spec.dtype).dtype
        # Zeros are quick, whatever is in the places of no matrix.
        arrays = [aligned((m, n, n), spec.dtype), aligned((m, n, n), spec.dtype), aligned((m,), np.dtype(np.int32))]
        arrays += [aligned((m,), real), aligned((workspace.nbytes,), np.dtype(np.uint8))]
        for array in arrays:
            array[...] = 0
        self._arrays = arrays
        self._addresses = (ctypes.c_void_p * 5)(*(array.ctypes.data for array in arrays))
        self._table = ctypes.addressof(self._addresses)
        self._function = function
        self._a, self._inverse = (array[: self.count].reshape(shape) for array in arrays[:2])
        self._info, self._rcond = (array[: self.count].reshape(batch) for array in arrays[2:4])

    def invert(self, a: Array, *, account: bool) -> Any:
        """Return the inverses, or with `account` these, ``info`` and ``rcond``; None if there is more to be said."""
        self._a[...] = a
        if self._function(self._table, self.count):
            return None
        inverse = self._inverse.copy()
        return (inverse, self._info.copy(), self._rcond.copy()) if account else inverse


class _Thread(threading.local):
    """What a thread keeps, by shape, dtype and structure of the stacks."""

    def __init__(self) -> None:
        self.kept: dict[tuple[tuple[int, ...], np.dtype[Any], AssumeA], Memory] = {}


_thread = _Thread()


def take(a: Array, structure: AssumeA) -> Memory | None:
    """Return the memory for a stack, if this thread has some; until it is given back nobody else has it."""
    return _thread.kept.pop((a.shape, a.dtype, structure), None)


def give_back(memory: Memory, structure: AssumeA) -> None:
    """Keep memory for the next stack."""
    if len(_thread.kept) >= _KEPT:
        _thread.kept.clear()
    _thread.kept[memory.shape, memory.dtype, structure] = memory
