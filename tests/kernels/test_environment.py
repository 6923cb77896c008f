"""What other libraries do to the floating-point environment of a thread: kernels neither see nor undo it."""

import ctypes
import ctypes.util
import platform
import subprocess
import sys
import threading
from contextlib import contextmanager

import llvmlite.binding as llvm
import numpy as np
import pytest

from dask_batchinv.kernels import invert_block
from dask_batchinv.kernels.cpu import dispatch
from dask_batchinv.kernels.emit import environment
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned

LIBM = ctypes.PyDLL(ctypes.util.find_library("m")) if platform.libc_ver()[0] == "glibc" else None
#: Which 32-bit word of glibc's fenv_t decides, which of its bits are no flags of what has happened, and what flushes
#: subnormal numbers to zero, and rounds up, down, and towards zero.
WORD, CONTROL, MODES = {
    "x86_64": (7, 0xFFC0, (0x8040, 0x4000, 0x2000, 0x6000, 0xE040)),
    "aarch64": (0, 0xFFFFFFFF, (1 << 24, 1 << 22, 2 << 22, 3 << 22, 7 << 22)),
}.get(platform.machine(), (0, 0, ()))
needs_control = pytest.mark.skipif(LIBM is None or not MODES, reason="needs glibc on x86-64 or ARM64")


def now():
    """Return how numbers are computed with now."""
    words = (ctypes.c_uint32 * 16)()
    assert LIBM.fegetenv(words) == 0
    return words[WORD] & CONTROL


@contextmanager
def disturbed(mode):
    before, words = (ctypes.c_uint32 * 16)(), (ctypes.c_uint32 * 16)()
    LIBM.fegetenv(before)
    LIBM.fegetenv(words)
    words[WORD] |= mode
    LIBM.fesetenv(words)
    try:
        yield
    finally:
        LIBM.fesetenv(before)


def stack(n, dtype, structure, m=9):
    """Ordinary matrices, one of subnormal numbers, and one whose inverse is such."""
    a = conditioned(m, n, 30, dtype, structure)
    a[1] *= 16 * np.finfo(dtype).tiny
    a[2] *= np.finfo(dtype).max / 8
    return a


@needs_control
@pytest.mark.parametrize("mode", MODES, ids=hex)
def test_the_test_disturbs(mode):
    tiny = np.array([np.finfo("float64").tiny, 1, -1, 5, -5])
    plain = tiny / 3
    with disturbed(mode):
        assert now() & mode == mode
        other = tiny / 3
    assert other.tobytes() != plain.tobytes()
    assert now() & mode == 0


@needs_control
@pytest.mark.parametrize("mode", MODES, ids=hex)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_environment_of_the_caller_changes_no_bit_and_is_left_as_it_is(structure, dtype, mode):
    for n in (3, 12, 45) if structure in ("general", "positive definite") else (4,):
        a = stack(n, dtype, structure)
        expected = invert_block(a, dtype=dtype, assume_a=structure, device="cpu", min_rcond=1e-30)
        with disturbed(mode):
            before = now()
            results = invert_block(a, dtype=dtype, assume_a=structure, device="cpu", min_rcond=1e-30)
            assert now() == before
        assert not expected.info.any()
        assert np.abs(expected.inverse[2]).max() < 1000 * np.finfo(dtype).tiny
        for got, want in zip(results, expected, strict=True):
            assert_same_bits(got, want)


@needs_control
@pytest.mark.parametrize("mode", MODES[::3], ids=hex)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("structure", ["general", "positive definite", "symmetric", "upper triangular", "diagonal"])
def test_nor_does_it_where_threads_share_a_large_matrix(structure, threads, mode):
    a = stack(513, "complex64", structure, 3)
    expected = invert_block(a, dtype="complex64", assume_a=structure, device="cpu", threads=threads)
    with disturbed(mode):
        results = invert_block(a, dtype="complex64", assume_a=structure, device="cpu", threads=threads)
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got, want)


@needs_control
def test_numbers_that_become_subnormal_on_their_way_in_are_no_zeros():
    a = np.diag([1e-40, 1])[None]
    expected = invert_block(a, dtype="float32", device="cpu")
    with disturbed(MODES[0]):
        results = invert_block(a, dtype="float32", device="cpu")
    assert expected.info[0] == -2
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got, want)


@needs_control
@pytest.mark.parametrize("mode", MODES, ids=hex)
def test_after_an_error_it_is_as_before_too(monkeypatch, mode):
    def fail(*_, **__):
        assert now() & mode == 0
        raise MemoryError

    monkeypatch.setattr(dispatch, "invert", fail)
    with disturbed(mode):
        before = now()
        with pytest.raises(MemoryError):
            invert_block(np.eye(3)[None], dtype="float64", assume_a="symmetric", device="cpu")
        assert now() == before


@needs_control
def test_each_thread_has_its_own():
    a, seen = stack(12, "float32", "general"), []
    expected = invert_block(a, dtype="float32", device="cpu")

    def work():
        with disturbed(MODES[0]):
            before = now()
            results = [invert_block(a, dtype="float32", device="cpu") for _ in range(20)]
            seen.append((now() == before, results))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        invert_block(a, dtype="float32", device="cpu")
        assert now() & MODES[0] == 0
    thread.join()
    ((same, results),) = seen
    assert same
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert_same_bits(got, want)


COMPILE = """
import sys
import numpy as np
from dask_batchinv.kernels import invert_block
from tests.kernels.test_environment import MODES, disturbed, stack
a = stack(5, "float32", "general")
with disturbed(int(sys.argv[1])):
    results = invert_block(a, dtype="float32", device="cpu")
sys.stdout.buffer.write(b"".join(x.tobytes() for x in results))
"""


@needs_control
def test_kernels_are_compiled_and_tried_in_the_standard_one(tmp_path, monkeypatch):
    printed = []
    for number, mode in enumerate((0, MODES[-1])):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))
        printed.append(
            subprocess.run([sys.executable, "-c", COMPILE, str(mode)], check=True, capture_output=True).stdout
        )
    assert printed[0] == printed[1]
    assert printed[0]


@pytest.mark.parametrize("architecture", environment.REGISTERS)
def test_every_processor_has_its_function(architecture):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(f"{architecture}-linux-gnu").create_target_machine()
    assembly = target.emit_assembly(llvm.parse_assembly(environment.REGISTERS[architecture].text))
    assert ("ldmxcsr" if architecture == "x86_64" else "FPCR") in assembly
