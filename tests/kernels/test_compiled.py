"""What is special to the compiled kernels: widths of vectors, the cache, the self-test, the choice of layout."""

import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from dask_batchinv.kernels.cpu import dispatch
from dask_batchinv.kernels.cpu.dispatch import layout_of, spec_of
from dask_batchinv.kernels.emit import compiler
from tests.support.running import run_cpu as run
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned

KINDS = STRUCTURES
#: Some of every layout, with every remainder of vectors and panels.
SIZES = (1, 2, 3, 5, 6, 9, 13, 17, 33, 45)
#: One of every layout, for structures whose kernels do the same whatever the remainders are.
FEW_SIZES = (2, 3, 9, 45)
OF_FEW_SIZES = ("upper triangular", "lower triangular", "diagonal")


def blocks(n, dtype, kind):
    """Matrices good and bad, and zeros where the results go."""
    a = conditioned(41, n, 1e3, dtype, kind, seed=n)
    a[5] = 0
    a[7, 0, n - 1] = np.nan
    a[20, n // 2, n // 2] = -np.inf
    a[21] *= np.finfo(dtype).tiny
    a[22] *= np.finfo(dtype).max / 4
    a[23] = np.eye(n) * np.finfo(dtype).max / 4
    a[23, 0, n - 1] = np.finfo(dtype).tiny
    return a, np.empty_like(a), np.empty(41, np.int32), np.empty(41, a.real.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "n"), [(kind, n) for kind in KINDS for n in (FEW_SIZES if kind in OF_FEW_SIZES else SIZES)]
)
def test_the_width_of_vectors_changes_no_bit(kind, n, dtype):
    expected = None
    for nbytes in (64, 32, 16) if n in (3, 9, 45) else (64, 32):
        if nbytes > compiler.vector_nbytes():
            continue  # narrower vectors run anywhere, wider ones do not
        a, *results = blocks(n, dtype, kind)
        dispatch._load(spec_of(n, dtype, kind, nbytes)).run(a, *results)
        expected = expected or results
        for got, want in zip(results, expected, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [3, 12, 45])
def test_threads_change_no_bit(n, kind):
    stacks = [conditioned(200, n, 1e6, "float64", kind, seed) for seed in range(4)]
    expected = [run(a, kind) for a in stacks]
    got = [None] * 4

    def work(i):
        got[i] = [run(stacks[i], kind) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, wanted in zip(got, expected, strict=True):
        for result in results:
            for x, y in zip(result, wanted, strict=True):
                assert_same_bits(x, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 10, 45])
def test_the_memory_beside_a_block_is_left_alone(n, kind):
    a = conditioned(23, n, 10, "float32", kind)
    around = [np.full((25, *shape), 77, dtype) for shape, dtype in [((n, n), "f4"), ((), "i4"), ((), "f4")]]
    dispatch.invert(a, *(x[1:-1] for x in around), structure=kind)
    for x in around:
        assert (x[0] == 77).all()
        assert (x[-1] == 77).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
def test_writing_past_the_caches_changes_no_bit_and_no_other_byte(monkeypatch, n, dtype, kind):
    for m in (1, 16, 17, 33, 100):
        a = conditioned(m, n, 10, dtype, kind)
        a[m // 2] = 0
        monkeypatch.setattr(dispatch, "NONTEMPORAL_NBYTES", 2**60)
        x, info, rcond = run(a, kind)
        monkeypatch.setattr(dispatch, "NONTEMPORAL_NBYTES", 0)
        for skew in {0, 16 // a.itemsize, 1, 64 // a.itemsize - 1}:
            around = np.full(a.size + 256, 77, dtype)
            first = -around.ctypes.data % 64 // a.itemsize + 64 + skew
            out = around[first : first + a.size].reshape(a.shape)
            results = out, np.empty_like(info), np.empty_like(rcond)
            dispatch.invert(a, *results, structure=kind)
            for got, want in zip(results, (x, info, rcond), strict=True):
                assert_same_bits(got, want)
            assert (around[:first] == 77).all()
            assert (around[first + a.size :] == 77).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unaligned_block_is_served(dtype):
    a = conditioned(9, 5, 10, dtype)
    shifted = np.frombuffer(b"x" + a.tobytes(), dtype, offset=1).reshape(a.shape)
    assert not shifted.flags.aligned
    for got, want in zip(run(shifted), run(a), strict=True):
        assert_same_bits(got, want)


def test_any_size_can_be_planned_for():
    for kind in KINDS:
        assert dispatch.scratch_nbytes(0, "float64", structure=kind) > 0
        assert dispatch.scratch_nbytes(2**21, "float64", structure=kind) > 2**40 * (kind != "diagonal")
        assert dispatch.compile_nbytes(2**21, "float64", structure=kind) > 0


def test_the_layout_depends_on_size_and_dtype_alone():
    for kind in KINDS:
        for dtype in DTYPES:
            for n in range(1, 70):
                layouts = {layout_of(spec_of(n, dtype, kind, nbytes)).name for nbytes in (16, 32, 64)}
                assert len(layouts) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_products_are_fused_where_the_kernel_says_so_and_nowhere_else(kind):
    for n in (3, 9, 45):
        spec = spec_of(n, "float64", kind, 64)
        text = layout_of(spec).write(spec)
        assert "llvm.fma.v8f64" in text
        assert not re.search(r"\b(fast|contract|reassoc|nnan|ninf|nsz|arcp|afn)\b", text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 6, 8, 12, 21, 45])
def test_overflow_on_the_way_is_noticed_whatever_column_it_is_in(n, dtype, kind):
    limits = np.finfo(dtype)
    for at in (0, n // 2, n - 1):
        a = np.eye(n, dtype=dtype)[None].repeat(4, 0)
        a[1, at, at] = limits.smallest_subnormal * 8
        x, info, rcond = run(a, kind)
        assert list(info) == [0, -2, 0, 0]
        assert np.isnan(x[1]).all()
        assert 0 <= rcond[1] < limits.tiny
        assert_same_bits(x[[0, 2, 3]], a[[0, 2, 3]])


# --- the self-test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["value", "info", "neighbour"])
def test_a_wrongly_compiled_kernel_is_refused(monkeypatch, harm):
    true_run = dispatch._Grouped.run

    def wrong(kernel, a, out, info, rcond):
        true_run(kernel, a, out, info, rcond)
        if harm == "value":
            out[4, 0, 0] *= 1 + 1e-9
        elif harm == "info":
            info[1] = 0
        else:
            out[3] = np.nan

    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(dispatch._Grouped, "run", wrong)
    with pytest.raises(dispatch.KernelError, match=r"kernel general_4_d_\d+ gives wrong results on this machine"):
        dispatch._load(spec_of(4, "float64", "general", compiler.vector_nbytes()))


# --- the cache --------------------------------------------------------------------------------------------------

CALL = """
import numpy as np
from dask_batchinv.kernels.cpu import dispatch
from dask_batchinv.kernels.emit import compiler
compile_ = compiler._compile
def counted(text):
    print("compiled")
    return compile_(text)
compiler._compile = counted
a = np.random.default_rng(0).normal(size=(50, 7, 7))
out, info, rcond = np.empty_like(a), np.empty(50, np.int32), np.empty(50)
dispatch.invert(a, out, info, rcond, structure="general")
assert abs(out @ a - np.eye(7)).max() < 1e-9
print("good")
"""


def call(folder):
    return subprocess.Popen(
        [sys.executable, "-c", CALL],
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process):
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out.split()


def test_a_kernel_is_compiled_once(tmp_path):
    assert outcome(call(tmp_path)) == ["compiled", "good"]
    assert outcome(call(tmp_path)) == ["good"]
    (file,) = (tmp_path / "dask_batchinv").iterdir()
    assert file.name.startswith("general_7_d_")


def test_many_processes_share_the_cache(tmp_path):
    for process in [call(tmp_path) for _ in range(8)]:
        assert outcome(process)[-1] == "good"
    assert [file.suffix for file in (tmp_path / "dask_batchinv").iterdir()] == [".o"]
    assert outcome(call(tmp_path)) == ["good"]


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_damaged_file_is_compiled_anew(tmp_path, damage):
    outcome(call(tmp_path))
    (file,) = (tmp_path / "dask_batchinv").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage is None else damage)
    assert outcome(call(tmp_path)) == ["compiled", "good"]
    assert file.read_bytes() == whole


def test_without_a_cache_it_works_too(tmp_path):
    folder = tmp_path / "a file, not a folder"
    folder.write_text("")
    assert outcome(call(folder)) == ["compiled", "good"]
