"""Compiles LLVM's text for the processor at hand, and loads it as a function."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from dask_batchinv.kernels.code_cache import cached, digest_of_sources

#: ``f(a, inverse, info, rcond, count, scratch, nontemporal)``; ctypes lets go of the interpreter lock while it runs.
Function = Callable[[int, int, int, int, int, int, int], None]
SIGNATURE = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
#: LLVM's compiler is shared by the threads of a process. A child forked while one of them uses it would find it in use
#: for ever: forks wait until it is not. The lock is one that its thread may take again, should it fork itself.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
#: All that were loaded, for good: to let go of one is another use of LLVM, at any time and in any thread. Each needs a
#: name of its own.
_libraries: list[Any] = []


@cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    # More effort takes twice the time, and its longer-lived registers make the unrolled kernels slower.
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=1, reloc="pic", jit=True
    )


@cache
def _engine() -> Any:
    return llvm.create_lljit_compiler(_target())


@cache
def vector_nbytes() -> int:
    """Bytes of the widest vectors that this machine computes with."""
    with _lock:
        features = llvm.get_host_cpu_features()
    if all(features.get(name) for name in ("avx512f", "avx512dq", "avx512bw", "avx512vl")):
        return 64
    return 32 if features.get("avx2") else 16


@cache
def _toolchain() -> bytes:
    """Digest of what makes machine code of a text: LLVM, the processor, and what wraps LLVM here."""
    facts = (llvmlite.__version__, ".".join(map(str, llvm.llvm_version_info)), llvm.get_host_cpu_name())
    features = llvm.get_host_cpu_features().flatten()
    return digest_of_sources(Path(__file__).parent) + "\0".join((*facts, features)).encode()


def description() -> str:
    """Processor and compiler, in words."""
    with _lock:
        version, processor = ".".join(map(str, llvm.llvm_version_info)), llvm.get_host_cpu_name()
    return f"{processor}, LLVM {version}, llvmlite {llvmlite.__version__}"


def load(name: str, write: Callable[[], str], sources: bytes, functions: Mapping[str, Any]) -> list[Any]:
    """Return functions, compiled from what `write` returns or read from the cache, where they are called `name`.

    `sources` is a digest of what `write` is made of; `functions` has the ctypes prototype of each. The machine code
    stays as long as the process.
    """

    def make() -> bytes:
        text = write()
        gc.collect()  # what wrote the text is large and full of cycles: let it go before LLVM takes as much
        return _compile(text)

    with _lock:
        code = cached(name, sources + _toolchain(), make)
        builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
        for function in functions:
            builder.export_symbol(function)
        library = builder.link(_engine(), f"{name}-{len(_libraries)}")
        _libraries.append(library)
    return [prototype(library[function]) for function, prototype in functions.items()]


def _compile(text: str, target: Any = None) -> bytes:
    """Return the object file for a target machine, by default this one."""
    target = target or _target()
    module = llvm.parse_assembly(text)
    # The kernels spell out their vectors and unrolling; LLVM is left to clean up.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(target, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = target.emit_object(module)
    return code
