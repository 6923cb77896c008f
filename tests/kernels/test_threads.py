"""Calls that are shared out over threads: which threads, and the same bits."""

import os
import signal
import threading

import dask
import dask.array as da
import numpy as np
import pytest

from dask_batchinv import SingularMatrixError, inverse, inverse_ex
from dask_batchinv.kernels import invert_block, threads
from dask_batchinv.kernels.cpu import dispatch
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned


@pytest.fixture
def in_short_parts(monkeypatch):
    monkeypatch.setattr(dispatch, "SHORTEST_PART", 1)
    monkeypatch.setattr(threads, "CPU_COUNT", 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n", [2, 9, 33])
def test_threads_change_no_bit(in_short_parts, monkeypatch, n, structure, dtype):
    a = conditioned(203, n, 100, dtype, structure)
    a[17] = 0
    a[150, 0, 0] = np.nan
    a[90] = np.eye(n) * np.finfo(dtype).smallest_subnormal
    for nontemporal in (dispatch.NONTEMPORAL_NBYTES, 0):
        monkeypatch.setattr(dispatch, "NONTEMPORAL_NBYTES", nontemporal)
        expected = invert_block(a, dtype=dtype, assume_a=structure, device="cpu")
        for given in (a, a[::-1][::-1], np.asfortranarray(a)):
            found = invert_block(given, dtype=dtype, assume_a=structure, device="cpu", threads=4)
            for got, want in zip(found, expected, strict=True):
                assert_same_bits(got, want)


def test_several_threads_are_at_work(in_short_parts, monkeypatch):
    seen, together, run = set(), threading.Barrier(3, timeout=60), dispatch._Grouped.run
    waiting = threading.local()

    def noted(*arguments, **options):
        if not getattr(waiting, "has", False):
            waiting.has = True
            seen.add(threading.get_ident())
            together.wait()
        run(*arguments, **options)

    a = conditioned(2000, 3, 10)
    dispatch._load(dispatch.spec_of(3, "float64", "general", dispatch.compiler.vector_nbytes()))
    monkeypatch.setattr(dispatch._Grouped, "run", noted)
    with dask.config.set({"batchinv.threads": 3}):
        inverse(a.repeat(10, axis=0))
    assert len(seen) == 3


def test_small_work_and_dask_tasks_have_one_thread(in_short_parts, monkeypatch, processes):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads.threads_for_call() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.threads_for_call() == 3
    with dask.config.set({"batchinv.threads": 2}):
        assert threads.threads_for_call() == 2
    blocks = da.zeros(8, chunks=1)

    def ask(block):
        return np.full(block.shape, threads.threads_for_call())

    for scheduler in ("threads", processes.get):
        with dask.config.set(scheduler=scheduler):
            assert (blocks.map_blocks(ask, dtype=int).compute() == 1).all()
    assert threads.threads_for_call() == 3


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "two", True, None])
def test_what_is_no_number_of_threads_is_refused(wrong):
    with dask.config.set({"batchinv.threads": wrong}), pytest.raises(ValueError, match=r"batchinv\.threads must be"):
        inverse(np.zeros((300, 9, 9)) + np.eye(9) / 0.3)


def test_an_error_in_a_thread_is_the_error_of_the_call(in_short_parts, monkeypatch):
    run, calls = dispatch._Grouped.run, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError("no more")
        run(*arguments, **options)

    a = conditioned(20_000, 3, 10)
    inverse(a[:3])
    monkeypatch.setattr(dispatch._Grouped, "run", failing)
    with dask.config.set({"batchinv.threads": 4}), pytest.raises(MemoryError, match="no more"):
        inverse(a)
    assert threads._busy == 0
    monkeypatch.setattr(dispatch._Grouped, "run", run)
    with dask.config.set({"batchinv.threads": 4}):
        a[15_000] = 0
        with pytest.raises(SingularMatrixError) as caught:
            inverse(a)
    assert caught.value.indices == ((15_000,),)


def test_calls_at_the_same_time_share_the_processors(monkeypatch):
    monkeypatch.setattr(threads, "CPU_COUNT", 4)
    with threads._claimed(3) as first, threads._claimed(3) as second, threads._claimed(3) as third:
        assert (first, second, third) == (3, 1, 1)
    with threads._claimed(9) as wanted:
        assert wanted == 9  # who asks for more has them


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(in_short_parts):
    a = conditioned(5000, 4, 10)
    with dask.config.set({"batchinv.threads": 2}):
        expected = inverse_ex(a)
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            status = 1
            try:
                status = int(not np.array_equal(inverse_ex(a).inverse, expected.inverse))
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
