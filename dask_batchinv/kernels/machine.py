"""From LLVM's text to a function to call: compilation for the machine at hand, and a cache of the results."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

#: ``f(a, out, info, rcond, count, scratch, past_caches)``; ctypes lets go of the interpreter lock while it runs.
Function = Callable[[int, int, int, int, int, int, int], None]
_SIGNATURE = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
#: LLVM's compiler is shared by the threads of a process.
_lock = threading.Lock()
_DIGEST_NBYTES = 32
#: Libraries need names of their own.
_count = itertools.count()


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
    features = llvm.get_host_cpu_features()
    if all(features.get(name) for name in ("avx512f", "avx512dq", "avx512bw", "avx512vl")):
        return 64
    return 32 if features.get("avx2") else 16


@cache
def _sources() -> bytes:
    """Digest of what decides on the machine code: the package that writes it, LLVM, and the processor."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    llvm_version = ".".join(map(str, llvm.llvm_version_info))
    for fact in (llvmlite.__version__, llvm_version, llvm.get_host_cpu_name()):
        digest.update(fact.encode() + b"\0")
    digest.update(llvm.get_host_cpu_features().flatten().encode())
    return digest.digest()


def description() -> str:
    """Processor and compiler, in words."""
    version = ".".join(map(str, llvm.llvm_version_info))
    return f"{llvm.get_host_cpu_name()}, LLVM {version}, llvmlite {llvmlite.__version__}"


def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dask_batchinv"


def load(name: str, write: Callable[[], str]) -> tuple[Function, Any]:
    """Return the function `name`, compiled from what `write` returns or read from the cache.

    The second value keeps the machine code alive: hold on to it as long as to the function.
    """

    def make() -> bytes:
        text = write()
        gc.collect()  # what wrote the text is large and full of cycles: let it go before LLVM takes as much
        return _compile(text)

    with _lock:
        code = cached(name, make)
        library = (
            llvm.JITLibraryBuilder()
            .add_object_img(code)
            .add_current_process()
            .export_symbol(name)
            .link(_engine(), f"{name}-{next(_count)}")
        )
    return _SIGNATURE(library[name]), library


def _compile(text: str) -> bytes:
    module = llvm.parse_assembly(text)
    # The kernels spell out their vectors and unrolling; LLVM is left to clean up.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(_target(), options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = _target().emit_object(module)
    return code


# --- the cache: one file per kernel, replaced whole, so that many processes may share it ------------------------


def cached(name: str, make: Callable[[], bytes]) -> bytes:
    """Return machine code of a name from the cache; if it is not there, what `make` returns, which is kept."""
    path = _path(name)
    code = _read(path)
    if code is None:
        code = make()
        _keep(path, code)
    return code


def _path(name: str) -> Path | None:
    """Return the file of a kernel, or None where the cache cannot be trusted: it holds code that will run."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        return None
    key = hashlib.sha256(_sources() + name.encode()).hexdigest()[:24]
    return folder / f"{name}-{key}.o"


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        found = path.read_bytes()
    except OSError:
        return None
    digest, code = found[:_DIGEST_NBYTES], found[_DIGEST_NBYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path | None, code: bytes) -> None:
    if path is None:
        return
    # A full or read-only disk costs the next process its compilation, nothing else.
    with suppress(OSError):
        descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(partial, path)
        except OSError:
            os.unlink(partial)
            raise
