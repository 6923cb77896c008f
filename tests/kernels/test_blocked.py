"""Large matrices: n known when the kernel runs, and several threads at one matrix."""

import ctypes
import itertools
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from dask_batchinv.kernels import choose_kernel, lapack
from dask_batchinv.kernels.cpu import blocked, blocked_symmetric, dispatch
from dask_batchinv.kernels.cpu.blocked_frame import PANEL
from dask_batchinv.kernels.cpu.blocked_schedule import Crew, Stage, TaskRunner
from dask_batchinv.kernels.cpu.blocked_work import Task
from dask_batchinv.kernels.cpu.dispatch import layout_of, spec_of
from dask_batchinv.kernels.emit import compiler
from tests.support.running import LIMIT, check, ratios, results_for, run_cpu
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned

#: The smallest that all structures have such kernels for.
FIRST = 513
#: Structures with an elimination that is shared out.
ELIMINATED = [structure for structure in STRUCTURES if structure != "diagonal"]


def run_blocked(a, threads=1, vector_nbytes=None, structure="general"):
    """Run the blocked kernel on matrices of any size."""
    spec = spec_of(FIRST, a.dtype, structure, vector_nbytes or compiler.vector_nbytes())
    results = results_for(a)
    dispatch._load(spec).run(np.ascontiguousarray(a), *results, threads=threads)
    return results


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_layout_begins_where_others_end(dtype, structure):
    first = 449 if structure == "general" else FIRST
    names = [layout_of(spec_of(n, dtype, structure, 32)).name for n in (first - 1, first, 4096)]
    assert names == ["diagonal" if structure == "diagonal" else "within", "blocked", "blocked"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [33, 97, 200])
def test_the_bits_are_those_of_elimination_within_a_matrix(n, dtype):
    a = conditioned(3, n, 1e4, dtype)
    for got, want in zip(run_blocked(a), run_cpu(a), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_one_that_is_not_yet_large_with_the_same_bits(dtype):
    a = conditioned(2, 400, 1e4, dtype)
    a[1, :, 7] = 0
    expected = run_cpu(a)
    results = results_for(a)
    dispatch.invert(a, *results, structure="general", threads=3)
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 97, 2 * PANEL + 41])
def test_neither_the_width_of_vectors_nor_threads_change_a_bit(n, dtype, structure):
    a = conditioned(1, n, 1e3, dtype, structure)
    expected = run_blocked(a, vector_nbytes=16, structure=structure)
    for nbytes in (16, 32, 64):
        for threads in (1, 2, 3, 7):
            if nbytes <= compiler.vector_nbytes():
                for got, want in zip(run_blocked(a, threads, nbytes, structure), expected, strict=True):
                    assert_same_bits(got, want)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals(dtype, structure):
    n, eps = FIRST, np.finfo(dtype).eps
    for cond, one_large in ((2, False), (0.1 / eps, False), (0.1 / eps, True)):
        a = choose_part(conditioned(1, n, cond, dtype, structure, one_large=one_large), structure)
        x, info, rcond = run_cpu(poisoned(a, structure), structure)
        assert not info.any()
        assert ratios(a, x).max() <= 3
        assert_same_bits(x, choose_part(x, structure))
        norms = np.abs(a).sum(axis=1).max(axis=1) * np.abs(x).sum(axis=1).max(axis=1)
        np.testing.assert_allclose(rcond, 1 / norms, rtol=50 * n * eps)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_types_of_lapack(dtype, structure):
    assert check(structure, FIRST, dtype, 1)[0] <= LIMIT


def made(spec, n):
    """Return what would be in work, without functions."""
    kind = blocked.MATRICES[spec.structure]
    return kind(spec, n, [None] * len(kind.FUNCTIONS))


def choose_part(a, structure):
    """Return matrices made of the part of others that a structure names."""
    return lapack.METHODS[structure].read(a).astype(a.dtype)


def poisoned(a, structure):
    """Put NaN where a structure has nothing to read."""
    n, a = a.shape[-1], a.copy()
    upper = structure == "upper triangular" or structure not in ("general", "lower triangular", "diagonal")
    if structure != "general":
        unread = ~(
            np.eye(n, dtype=bool)
            if structure == "diagonal"
            else np.tri(n, dtype=bool).T
            if upper
            else np.tri(n, dtype=bool)
        )
        a[:, unread] = np.nan
    return a


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES[1:])
def test_each_failure_of_a_structure(structure, dtype, threads):
    n, limits = FIRST, np.finfo(dtype)
    a = np.eye(n, dtype=dtype)[None] * np.linspace(1, 2, 9)[:, None, None].astype(dtype)
    a[1] = 0
    a[2, 500, 500] = np.nan
    a[3, 3, 3] = -np.inf
    a[4, 300, 300] = 0
    a[5] *= limits.smallest_subnormal
    a[6] *= limits.tiny
    a[7] *= limits.max / 4
    a[8, 400, 400] = -1
    x, info, rcond = results_for(a)
    dispatch.invert(a, x, info, rcond, structure=structure, threads=threads)
    assert list(info) == [0, 1, -1, -1, 301, -2, 0, 0, 401 if structure == "positive definite" else 0]
    assert np.isnan(x[info != 0]).all()
    assert np.isnan(rcond[[2, 3]]).all()
    assert (rcond[[1, 4]] == 0).all()
    assert_same_bits(x[6] * limits.tiny, run_cpu(a[6:7] / limits.tiny, structure)[0][0])
    np.testing.assert_allclose(
        np.einsum("mii->mi", x[[0, 7]]) * np.einsum("mii->mi", a[[0, 7]]), 1, rtol=4 * limits.eps
    )


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


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [FIRST, 1000])
def test_memory_is_what_the_plan_says(n, dtype, structure):
    spec = spec_of(n, dtype, structure, compiler.vector_nbytes())
    planned = choose_kernel(structure).scratch_nbytes(n, dtype)
    matrix = made(spec, n)
    arrays = [x for x in (*vars(matrix).values(), *vars(matrix).get("_held", {}).values()) if isinstance(x, np.ndarray)]
    taken = sum(x.nbytes for x in {id(x): x for x in arrays}.values())
    assert taken <= blocked.workspace(spec).nbytes <= 1.1 * taken + 2**17
    assert planned >= taken


@pytest.mark.parametrize("structure", ["symmetric", "hermitian"])
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("n", [40, FIRST, 700])
def test_symmetric_pivots_are_found_alone_and_then_every_row_is_updated_once(n, threads, structure):
    matrix = made(replace(spec_of(FIRST, "float64", structure, 16), n=0), n)
    rounds = [list(group) for _, group in itertools.groupby(matrix._tasks(threads), lambda task: task.needs)]
    assert [group[0].needs for group in rounds] == list(itertools.accumulate(map(len, rounds), initial=0))[:-1]
    finding, updating = rounds[::2], rounds[1::2]
    assert [[task.action for task in group] for group in finding] == [[0]] * len(updating)
    # Pairs for which there is no room leave every panel a row short.
    assert len(finding) * (blocked_symmetric.SWEEPS - 1) >= n
    for group in updating:
        assert {task.action for task in group} == {1}
        assert covered((task.start, task.stop) for task in group) == list(range(-(-n // 8) * 8))


@pytest.mark.parametrize("structure", [word for word in ELIMINATED if word not in ("symmetric", "hermitian")])
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("n", [96, 97, 192, FIRST, 700])
def test_tasks_that_are_done_at_the_same_time_do_not_meet_and_leave_nothing_out(n, threads, structure):
    matrix = made(replace(spec_of(FIRST, "float64", structure, 16), n=0), n)
    tasks, end = matrix._tasks(threads), n if structure == "general" else -(-n // 8) * 8
    assert [task.needs for task in tasks] == sorted(task.needs for task in tasks)
    #: Of each panel: what its actions take, by whether these are blocks of columns or rows.
    taken = defaultdict(list)
    for task in tasks:
        assert tasks[task.needs].needs == task.needs
        if task.width:
            taken[task.k0, task.needs, structure != "general" and task.action == 1].append((task.start, task.stop))
    for ranges in taken.values():
        ranges.sort()
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(ranges))
    for k0 in range(0, end, PANEL):
        after = min(k0 + PANEL, end)
        others = {*range(k0), *(range(after, end) if "triangular" not in structure else ())}
        updated = [at for (k, _, blocks), ranges in taken.items() if k == k0 and not blocks for at in covered(ranges)]
        assert sorted(updated) == sorted(others)
        if structure != "general":
            swept = [at for (k, _, blocks), ranges in taken.items() if k == k0 and blocks for at in covered(ranges)]
            assert sorted(swept) == list(range(matrix._blocks))


def covered(ranges):
    return [at for start, stop in ranges for at in range(start, stop)]


def test_a_thread_that_waits_comes_back_and_goes_on():
    """The second task needs the first, which another thread has taken, and is long at."""
    calls = []

    def work(tasks, count, counters, own):
        number = ctypes.c_int64.from_address(own)
        calls.append(number.value)
        number.value = count if len(calls) == 3 else 1

    runner(work).run(lambda: False)
    assert calls == [-1, 1, 1]


def test_a_thread_waits_no_more_when_all_has_ended():
    calls = []

    def work(tasks, count, counters, own):
        ctypes.c_int64.from_address(own).value = 1
        calls.append(1)

    runner(work).run(lambda: len(calls) == 5)
    assert len(calls) == 5


def runner(work):
    made = TaskRunner(work, [Task(*[0] * len(Task._fields))] * 2, 64)
    made.begin()
    return made


@pytest.mark.parametrize("structure", ["general", "positive definite", "symmetric"])
def test_many_threads_at_small_tasks(structure):
    a = conditioned(1, FIRST, 10, "float32", structure)
    expected = run_blocked(a, structure=structure)
    for _ in range(20):
        for got, want in zip(run_blocked(a, 8, structure=structure), expected, strict=True):
            assert_same_bits(got, want)


INTERRUPTED = """
import faulthandler, random, signal, sys, time
from contextlib import suppress
import dask, numpy as np
from dask_batchinv import inverse

def interrupt(*_):
    global left
    if left:
        left -= 1
        if not left:
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

often, left = int(sys.argv[1]), 0
signal.signal(signal.SIGALRM, interrupt)
a = (np.eye(530) * 530 + np.ones((530, 530))).astype("f4")[None]
draw, count, out = random.Random(0), 0, np.zeros_like(a)
structures = ["general", "positive definite", "symmetric", "upper triangular"]

def interrupt_a_call():
    global left, count
    faulthandler.dump_traceback_later(20, exit=True)
    structure = draw.choice(structures)
    try:
        left = often
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 0.01), draw.choice([1e-4, 3e-4, 1e-3]))
        inverse(a, out=out, assume_a=structure)
        left = 0
    except KeyboardInterrupt:
        left, count = 0, count + 1
        now = out.copy()
        time.sleep(0.004)
        assert now.tobytes() == out.tobytes(), "a thread is still at work"

with dask.config.set({"batchinv.threads": 3}):
    expected = {structure: inverse(a, assume_a=structure) for structure in structures}
    while count < 120:
        # Another may come while the first is being caught.
        with suppress(KeyboardInterrupt), suppress(KeyboardInterrupt):
            interrupt_a_call()
        left = 0
    signal.setitimer(signal.ITIMER_REAL, 0)
    for structure in structures:
        assert inverse(a, assume_a=structure).tobytes() == expected[structure].tobytes()
print(count, flush=True)
"""


@pytest.mark.parametrize("often", [1, 2, 3])
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that send signals")
def test_ctrl_c_at_any_moment_ends_a_call(often):
    command = [sys.executable, "-c", INTERRUPTED, str(often)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert found.stdout.strip() == "120", found.stderr[-3000:]


def test_an_error_ends_all_threads():
    done = []

    def fail():
        raise ZeroDivisionError

    crew = Crew([Stage([fail, *[lambda: done.append(1)] * 3]), Stage([lambda: done.append(2)])])
    with pytest.raises(ZeroDivisionError):
        crew.run(3)
    assert 2 not in done
