"""What can be known of the GPU kernels without a GPU: they compile, and who takes which matrices."""

import ctypes
import importlib.util
import re
from pathlib import Path

import pytest

from dask_batchinv.kernels.cuda import launch
from dask_batchinv.kernels.cuda.launch import choose_launch
from tests.support.stacks import DTYPES, STRUCTURES


def compiler():
    """NVIDIA's run-time compiler from PyPI, or None."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations if found else ():
        for path in sorted(Path(folder).glob("**/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    return None


NVRTC = compiler()


def compile_for(architecture, chosen):
    """Compile a kernel; return the size of the machine code, the assembly, and the bytes spilled by a thread."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = launch.source(chosen.file).encode()
    assert NVRTC.nvrtcCreateProgram(ctypes.byref(program), text, chosen.file.encode(), 0, None, None) == 0
    options = f"--gpu-architecture={architecture}", *launch.COMPILER_OPTIONS, *chosen.options, "--ptxas-options=-v"
    given = [option.encode() for option in options]
    failed = NVRTC.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    NVRTC.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    NVRTC.nvrtcGetProgramLog(program, log)
    log = log.value.decode()
    assert not failed, log
    assert "warning" not in log
    assert NVRTC.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert NVRTC.nvrtcGetPTX(program, text) == 0
    NVRTC.nvrtcGetCUBINSize(program, ctypes.byref(size))
    return size.value, text.value.decode(), max(map(int, re.findall(r"(\d+) bytes spill stores", log)))


#: The largest n of each layout, which is the hardest for the compiler.
LARGEST = {
    "float32": (12, 16, 32, 64, 128, 200),
    "float64": (8, 16, 32, 64, 128, 200),
    "complex64": (8, 16, 32, 64, 128, 200),
    "complex128": (6, 16, 32, 64, 96, 200),
}
#: What is compiled each time; the others take minutes.
SOON = [
    ("general", "float32", 12, "sm_90"), ("general", "complex128", 6, "sm_90"), ("general", "float64", 16, "sm_90"),
    ("general", "float32", 64, "sm_90"), ("general", "complex64", 200, "sm_90"), ("symmetric", "float64", 8, "sm_90"),
    ("positive definite", "complex64", 16, "sm_90"), ("positive definite", "complex128", 64, "sm_90"),
    ("positive definite", "float64", 200, "sm_90"), ("general", "complex64", 8, "sm_80"),
    ("general", "float64", 64, "sm_80"), ("general", "float32", 16, "sm_100"), ("general", "float32", 64, "sm_75"),
]  # fmt: skip


@pytest.mark.skipif(NVRTC is None, reason="needs nvidia-cuda-nvrtc, which PyPI has for Linux alone")
@pytest.mark.parametrize(
    ("kind", "dtype", "n", "architecture"),
    [
        pytest.param(*case, marks=[] if case in SOON else pytest.mark.slow)
        for dtype in DTYPES
        for n in LARGEST[dtype]
        for architecture in ("sm_90", "sm_75", "sm_80", "sm_100")
        for kind in STRUCTURES
        for case in [(kind, dtype, n, architecture)]
        if kind in ("general", "symmetric", "positive definite") or architecture == "sm_90"
    ],
)
def test_kernels_compile(kind, dtype, n, architecture):
    chosen = choose_launch(n, dtype, kind)
    size, assembly, spilled = compile_for(architecture, chosen)
    assert size > 1000
    assert ".ftz.f32" not in assembly  # would take the smallest numbers for zeros
    # Layouts were chosen for sm_90 and general matrices, so that nothing is spilled; one compiler spills 40 bytes where
    # another does not. Of the others, some numbers of a thread's hundreds may be.
    in_registers = kind == "general" and architecture == "sm_90" and chosen.layout in ("per_thread", "per_block")
    assert spilled <= (40 if in_registers else 1024)


def test_the_cases_that_are_compiled_each_time_are_cases():
    for kind, dtype, n, _ in SOON:
        assert kind in STRUCTURES
        assert n in LARGEST[dtype]


def test_every_matrix_has_a_kernel():
    for dtype in DTYPES:
        for structure in STRUCTURES:
            order = ["per_thread", "per_warp", "per_block", "memory" if structure == "positive definite" else "cublas"]
            layouts = [choose_launch(n, dtype, structure).layout for n in range(1, 1025)]
            assert list(dict.fromkeys(layouts)) == order
            for n in range(1, 1025):
                chosen = choose_launch(n, dtype, structure)
                # What every card has since 2017.
                assert chosen.shared_nbytes <= launch.SHARED_NBYTES
                assert chosen.threads % 32 == 0
                assert 32 <= chosen.threads <= 1024


@pytest.mark.parametrize("n", [2, 16, 64, 300])
def test_any_number_of_matrices(n):
    chosen = choose_launch(n, "float64", "general")
    assert chosen.blocks(1) == 1
    for m in (10**6, 2**31, 2**40):
        # No more blocks than CUDA has in a row, and all matrices are somebody's turn.
        assert chosen.blocks(m) == min(-(-m // chosen.matrices), 2**31 - 1)


def test_batches_fit_the_memory_that_is_free():
    for m, of_one, free in [(10, 100, 10**9), (10**6, 2**20, 2**30), (5, 2**30, 2**20), (2**33, 8, 2**40)]:
        step = launch.batch(m, of_one, free)
        assert 1 <= step <= m
        assert step * of_one <= free or step == 1
        assert step < 2**31
