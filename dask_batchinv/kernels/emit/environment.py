"""The floating-point environment of a thread: rounding to nearest, and no subnormal number taken for zero.

Libraries that share the process may have changed it, those compiled with -ffast-math when they are loaded. Other
results, or an inverse of zeros that counts as good, would be what comes of that.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from dask_batchinv.kernels.emit import compiler

#: What compiling the function takes, once for a process; measured: 30 MiB, nearly all of it LLVM.
COMPILE_NBYTES = 2**25
#: The function that is written for each processor.
NAME = "exchange_environment"
#: Holds on to the interpreter lock: letting go of it takes longer than the call.
_SIGNATURE = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True)
class _Register:
    """Where a processor keeps the environment."""

    standard: int
    """What is in it when a program begins."""
    text: str
    """A function that puts a value into it, and returns the one before."""


_MXCSR = _Register(
    0x1F80,
    f"""
    declare void @llvm.x86.sse.stmxcsr(ptr)
    declare void @llvm.x86.sse.ldmxcsr(ptr)
    define i64 @{NAME}(i64 %new) {{
        %place = alloca i32
        call void @llvm.x86.sse.stmxcsr(ptr %place)
        %old = load i32, ptr %place
        %narrow = trunc i64 %new to i32
        store i32 %narrow, ptr %place
        call void @llvm.x86.sse.ldmxcsr(ptr %place)
        %wide = zext i32 %old to i64
        ret i64 %wide
    }}
    """,
)
_FPCR = _Register(
    0,
    f"""
    declare i64 @llvm.aarch64.get.fpcr()
    declare void @llvm.aarch64.set.fpcr(i64)
    define i64 @{NAME}(i64 %new) {{
        %old = call i64 @llvm.aarch64.get.fpcr()
        call void @llvm.aarch64.set.fpcr(i64 %new)
        ret i64 %old
    }}
    """,
)
REGISTERS = {"x86_64": _MXCSR, "aarch64": _FPCR, "arm64": _FPCR}


class standard_environment:  # noqa: N801 used like a function
    """Compute in the standard environment of the processor; afterwards the thread has its own again.

    Not a generator, which would take three times as long. Other processors than x86-64 and ARM64 are left as they are.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        access = _access()
        self._before = access.exchange(access.standard)

    def __exit__(self, *_: object) -> None:
        _access().exchange(self._before)


@dataclass(frozen=True)
class _Access:
    """How the environment of this thread is exchanged."""

    exchange: Callable[[int], int]
    standard: int


@cache
def _access() -> _Access:
    register = REGISTERS.get(platform.machine())
    if register is None:
        return _Access(lambda environment: environment, 0)
    (exchange,) = compiler.load(NAME, lambda: register.text, register.text.encode(), {NAME: _SIGNATURE})
    return _Access(exchange, register.standard)
