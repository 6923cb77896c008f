"""Large matrices: n known when the kernel runs, and several threads at one matrix."""

import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from dask_batchinv.kernels import choose_kernel
from dask_batchinv.kernels.cpu import blocked, dispatch
from dask_batchinv.kernels.cpu.blocked_frame import PANEL
from dask_batchinv.kernels.cpu.blocked_schedule import Crew, Elimination, Pieces
from dask_batchinv.kernels.cpu.dispatch import layout_of, spec_of
from dask_batchinv.kernels.emit import compiler
from tests.support.running import ratios, results_for, run_cpu
from tests.support.stacks import DTYPES, assert_same_bits, conditioned

#: The smallest for which `dispatch` takes it.
FIRST = 513


def run_blocked(a, threads=1, vector_nbytes=None):
    """Run the blocked kernel on matrices of any size."""
    spec = spec_of(FIRST, a.dtype, "general", vector_nbytes or compiler.vector_nbytes())
    results = results_for(a)
    dispatch._load(spec).run(np.ascontiguousarray(a), *results, threads=threads)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_layout_begins_where_within_ends(dtype):
    names = [layout_of(spec_of(n, dtype, "general", 32)).name for n in (FIRST - 1, FIRST, 4096)]
    assert names == ["within", "blocked", "blocked"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [33, 97, 200])
def test_the_bits_are_those_of_elimination_within_a_matrix(n, dtype):
    a = conditioned(3, n, 1e4, dtype)
    x, info, rcond = run_blocked(a)
    expected = run_cpu(a)
    assert_same_bits(x, expected[0])
    assert_same_bits(info, expected[1])
    np.testing.assert_allclose(rcond, expected[2], rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_the_width_of_vectors_nor_threads_change_a_bit(dtype):
    a = conditioned(1, 2 * PANEL + 41, 1e3, dtype)
    expected = run_blocked(a, vector_nbytes=16)
    for nbytes in (16, 32, 64):
        for threads in (1, 2, 3, 7):
            if nbytes <= compiler.vector_nbytes():
                for got, want in zip(run_blocked(a, threads, nbytes)[:2], expected[:2], strict=True):
                    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals(dtype):
    n, eps = FIRST, np.finfo(dtype).eps
    for cond, one_large in ((2, False), (0.1 / eps, False), (0.1 / eps, True)):
        a = conditioned(1, n, cond, dtype, one_large=one_large)
        x, info, rcond = run_cpu(a)
        assert not info.any()
        assert ratios(a, x).max() <= 3
        norms = np.abs(a).sum(axis=1).max(axis=1) * np.abs(x).sum(axis=1).max(axis=1)
        np.testing.assert_allclose(rcond, 1 / norms, rtol=50 * n * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_each_failure_has_its_code_and_disturbs_no_neighbour(dtype, threads):
    n, limits = FIRST, np.finfo(dtype)
    a = np.eye(n, dtype=dtype)[None] * np.linspace(1, 2, 9)[:, None, None].astype(dtype)
    a[:, 0, n - 1] = 0.5
    clean = a.copy()
    a[1] = 0
    a[2, 3, 500] = np.nan
    a[3, 500, 3] = -np.inf
    a[4, :, 300] = 0
    a[5] *= limits.smallest_subnormal
    a[6] *= limits.tiny
    a[7] *= limits.max / 4
    a[8, 7, 7] = limits.smallest_subnormal
    x, info, rcond = results_for(a)
    dispatch.invert(a, x, info, rcond, structure="general", threads=threads)
    assert list(info) == [0, 1, -1, -1, 301, -2, 0, 0, -2]
    assert np.isnan(x[info != 0]).all()
    assert np.isnan(rcond[[2, 3]]).all()
    assert (rcond[[1, 4]] == 0).all()
    assert_same_bits(x[0], run_cpu(clean[:1])[0][0])
    assert_same_bits(x[6] * limits.tiny, run_cpu(a[6:7] / limits.tiny)[0][0])
    assert np.isfinite(x[7]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [0, -1, -2, 0.6, -0.6])
def test_the_bits_at_the_edges_of_the_range(dtype, exponent):
    limits = np.finfo(dtype)
    a = conditioned(2, 70, 10, dtype)
    parts = a.view(a.real.dtype)
    parts /= np.abs(parts).max()
    scale = limits.max * 2.0**exponent if exponent in (0, -1, -2) else 2.0 ** int(exponent * limits.maxexp)
    parts *= np.finfo(dtype).dtype.type(scale)
    assert_same_bits(run_blocked(a)[0], run_cpu(a)[0])


def test_singular_in_any_column():
    rng = np.random.default_rng(0)
    for k in (0, 95, 96, 130, 199):
        a = rng.integers(-3, 4, (1, 200, 200)).astype(float)
        a[0, :, k] = 0
        assert run_blocked(a)[1][0] == k + 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_strides_and_what_is_beside_a_block(threads):
    a = conditioned(4, 520, 10, "float64")
    expected = run_cpu(a)
    around = [np.full((len(x) + 2, *x.shape[1:]), 7, x.dtype) for x in expected]
    results = [x[1:-1] for x in around]
    dispatch.invert(a.swapaxes(1, 2).copy().swapaxes(1, 2), *results, structure="general", threads=threads)
    for got, want, whole in zip(results, expected, around, strict=True):
        assert_same_bits(got, want)
        assert (whole[[0, -1]] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [FIRST, 1000])
def test_memory_is_what_the_plan_says(n, dtype):
    spec = spec_of(n, dtype, "general", compiler.vector_nbytes())
    planned = choose_kernel("general").scratch_nbytes(n, dtype)
    matrix = blocked.BlockedMatrix(spec, n, [None] * 5)
    taken = sum(x.nbytes for x in vars(matrix).values() if isinstance(x, np.ndarray))
    taken += sum(x.nbytes for kept in matrix._kept for x in kept)
    assert taken <= blocked.workspace(spec).nbytes <= 1.1 * taken + 2**17
    assert planned >= taken


@pytest.mark.parametrize("seed", range(30))
def test_every_order_of_the_work_is_a_right_one(seed):
    draw = random.Random(seed)
    panels, split = draw.randint(1, 7), draw.choice([1, 3])
    eliminated, level = [], [0] * (panels * split)

    def eliminate(k):
        assert eliminated == list(range(k))
        assert all(level[i] == k for i in range(k * split, (k + 1) * split))
        # Its memory is that of the panel before the last.
        assert k < 2 or all(done >= k - 1 for i, done in enumerate(level) if i // split != k - 2)
        eliminated.append(k)
        for i in range(k * split, (k + 1) * split):
            level[i] += 1

    def update(k, chunk):
        assert k in eliminated
        assert level[chunk] == k
        assert chunk // split != k
        level[chunk] += 1

    stage, running = Elimination(panels, split, eliminate, update), []
    while True:
        task = stage.take() if len(running) < 4 else None
        if task:
            running.append(task)
            continue
        if not running:
            break
        task = running.pop(draw.randrange(len(running)))
        task.work()
        task.done()
    assert level == [panels] * (panels * split)


INTERRUPTED = """
import faulthandler, random, signal, time
import dask, numpy as np
from dask_batchinv import inverse

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
a = np.random.default_rng(0).normal(size=(1, 530, 530)).astype("f4")
draw, count, out = random.Random(0), 0, np.zeros_like(a)
with dask.config.set({"batchinv.threads": 3}):
    expected = inverse(a)
    while count < 200:
        faulthandler.dump_traceback_later(20, exit=True)
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 0.02))
            inverse(a, out=out, on_error="nan")
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            count += 1
            now = out.copy()
            time.sleep(0.004)
            assert now.tobytes() == out.tobytes(), "a thread is still at work"
    assert inverse(a).tobytes() == expected.tobytes()
print(count, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that send signals")
def test_ctrl_c_at_any_moment_ends_a_call():
    found = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=150)
    assert found.stdout.strip() == "200", found.stderr[-3000:]


def test_an_error_ends_all_threads():
    done = []

    def fail():
        raise ZeroDivisionError

    crew = Crew([Pieces([fail, *[lambda: done.append(1)] * 3]), Pieces([lambda: done.append(2)])])
    with pytest.raises(ZeroDivisionError):
        crew.run(3)
    assert 2 not in done
