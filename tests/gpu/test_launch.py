"""What can be known of the GPU kernels without a GPU: they compile, and who takes which matrices."""

import ctypes
import importlib.util
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
    """Compile a kernel; return the size of the machine code, and the assembly."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = launch.source(chosen.file).encode()
    assert NVRTC.nvrtcCreateProgram(ctypes.byref(program), text, chosen.file.encode(), 0, None, None) == 0
    options = f"--gpu-architecture={architecture}", *launch.COMPILER_OPTIONS, *chosen.options
    given = [option.encode() for option in options]
    failed = NVRTC.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    NVRTC.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    NVRTC.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    assert NVRTC.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert NVRTC.nvrtcGetPTX(program, text) == 0
    NVRTC.nvrtcGetCUBINSize(program, ctypes.byref(size))
    return size.value, text.value.decode()


#: What is compiled each time: each takes a quarter of a minute.
SOON = [("general", "complex128", "sm_90"), ("positive definite", "float32", "sm_90")]


@pytest.mark.skipif(NVRTC is None, reason="needs nvidia-cuda-nvrtc, which PyPI has for Linux alone")
@pytest.mark.parametrize(
    ("kind", "dtype", "architecture"),
    [
        pytest.param(kind, dtype, architecture, marks=[] if (kind, dtype, architecture) in SOON else pytest.mark.slow)
        for kind in ("general", "positive definite")
        for dtype in ("float32", "float64", "complex64", "complex128")
        for architecture in ("sm_90", "sm_80")
    ],
)
def test_kernels_compile(kind, dtype, architecture):
    """The largest n of each layout, which is the hardest for the compiler."""
    sizes = [
        n for n in range(1, 130) if choose_launch(n, dtype, kind).layout != choose_launch(n + 1, dtype, kind).layout
    ]
    for n in [*sizes, 200]:
        size, assembly = compile_for(architecture, choose_launch(n, dtype, kind))
        assert size > 1000
        assert ".ftz.f32" not in assembly  # would take the smallest numbers for zeros


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
