"""Memory that is kept for the next call."""

import gc
import os
import weakref

import numpy as np
import pytest

from dask_batchinv import inverse
from dask_batchinv.kernels.cpu import kept
from tests.support.stacks import assert_same_bits, conditioned


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(kept, "_kept", [])


def test_one_at_a_time_has_what_was_given_back():
    kept.give_back("kind", thing := object(), 8)
    assert kept.take("other kind") is None
    assert kept.take("kind") is thing
    assert kept.take("kind") is None


def test_the_oldest_goes_when_there_is_no_room():
    for i in range(5):
        kept.give_back(i, i, kept.LARGEST_NBYTES // 4)
    assert [kept.take(i) for i in range(5)] == [None, 1, 2, 3, 4]
    kept.give_back(0, 0, 8)
    kept.give_back("too large", 0, kept.LARGEST_NBYTES + 1)
    assert kept.take("too large") is None
    assert kept.take(0) == 0


def test_scratch_memory_comes_back_but_not_after_an_error():
    with kept.scratch(100) as memory, kept.scratch(100) as other:
        assert memory is not other
        assert memory.ctypes.data % 64 == 0
    with kept.scratch(100) as again:
        assert any(again is one for one in (memory, other))
        with pytest.raises(ZeroDivisionError), kept.scratch(100):
            raise ZeroDivisionError
    with kept.scratch(100) as last:
        assert last is again


@pytest.mark.parametrize("structure", ["general", "symmetric", "positive definite", "lower triangular", "diagonal"])
@pytest.mark.parametrize("n", [100, 530])
def test_nothing_of_one_matrix_is_in_the_next(n, structure):
    a = conditioned(1, n, 10, "float64", structure)
    expected = inverse(a, assume_a=structure)
    poison = a.copy()
    poison[0, n // 2] = poison[0, :, n // 2] = np.nan
    kept._kept.clear()
    assert np.isnan(inverse(poison, assume_a=structure, on_error="nan")).all()
    huge = a * np.finfo(a.dtype).max / np.abs(a).max()
    inverse(huge * 1e-300, assume_a=structure, on_error="nan")
    assert kept._kept
    assert_same_bits(inverse(a, assume_a=structure), expected)


@pytest.mark.parametrize("n", [100, 530])
def test_no_array_of_the_caller_is_kept(n):
    a = conditioned(2, n, 10)
    x = inverse(a)
    left = [weakref.ref(a), weakref.ref(x)]
    del a, x
    gc.collect()
    assert kept._kept
    assert [ref() for ref in left] == [None, None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_forgets_what_is_kept_and_waits_for_nobody():
    kept.give_back("kind", 1, 8)
    with kept._lock:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if kept.take("kind") is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
