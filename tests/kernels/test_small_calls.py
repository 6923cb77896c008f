"""The short way for small stacks: what `inverse` gives by it is what it gives by the long one."""

import dask
import numpy as np
import pytest

from dask_batchinv import IllConditionedWarning, SingularMatrixError, inverse, inverse_ex
from dask_batchinv.kernels import invert_block, invert_small
from dask_batchinv.kernels.cpu import small_calls
from tests.kernels.test_environment import MODES, disturbed, needs_control, now
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned


def long_way(a, structure):
    return invert_block(a, dtype=a.dtype, assume_a=structure, device="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", [(3, 3), (1, 4, 4), (10, 5, 5), (2, 3, 9, 9), (37, 37)])
def test_the_bits_are_those_of_the_long_way(shape, structure, dtype):
    count = int(np.prod(shape[:-2]))
    for seed in range(2):
        a = conditioned(count, shape[-1], 100, dtype, structure, seed).reshape(shape)
        found = invert_small(a, assume_a=structure, account=True)
        for got, want in zip(found, long_way(a, structure), strict=True):
            assert got.shape == want.shape
            assert_same_bits(got, want)
        assert_same_bits(inverse(a, assume_a=structure, device="cpu"), found.inverse)
        assert_same_bits(inverse_ex(a, assume_a=structure, device="cpu").rcond, found.rcond)


def test_results_are_not_overwritten_by_the_next_call():
    a, b = conditioned(2, 3, 10)
    first = inverse_ex(a)
    kept = [np.array(x) for x in first]
    inverse_ex(b)
    for got, want in zip(first, kept, strict=True):
        assert_same_bits(got, want)
    first.inverse[...] = 0  # and can be written to
    assert_same_bits(inverse(a), kept[0])


def test_what_is_not_plainly_good_goes_the_long_way():
    a = conditioned(4, 3, 10)
    inverse(a)
    a[2] = 0
    assert invert_small(a, assume_a="general", account=False) is None
    with pytest.raises(SingularMatrixError, match="1 of 4 matrices"):
        inverse(a)
    assert list(inverse_ex(a).info) == [0, 0, 1, 0]
    a[2] = np.nan
    assert list(inverse_ex(a).info) == [0, 0, -1, 0]
    a[2] = np.diag([1, 1, 1e-17])
    with pytest.warns(IllConditionedWarning, match=r"\(2,\)"):
        inverse(a)
    a[2] = np.eye(3)
    assert invert_small(a, assume_a="general", account=False) is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a[::2],
        lambda a: a[:, ::-1].swapaxes(1, 2),
        np.asfortranarray,
        lambda a: a.astype(">f8"),
        lambda a: a.astype("f2"),
        lambda a: np.rint(a * 9).astype(int) + 40 * np.eye(3, dtype=int),
        lambda a: a.astype(np.longdouble)[:0].astype(float),
        lambda a: a[:, :0, :0],
    ],
)
def test_any_array_is_served(make):
    a = make(conditioned(6, 3, 10))
    a.flags.writeable = False
    for _ in range(2):
        dtype = a.dtype.newbyteorder("=") if a.dtype.char in "fd" else "f4" if a.dtype == "f2" else "f8"
        plain = np.array(a, dtype, order="C")
        assert_same_bits(inverse(a), long_way(plain, "general").inverse)


@pytest.mark.parametrize("shape", [(3,), (), (2, 3), (4, 3, 2)])
def test_what_is_no_stack_is_refused_as_ever(shape):
    with pytest.raises(np.linalg.LinAlgError, match="expected a stack"):
        inverse(np.ones(shape))


def test_options_count():
    a = conditioned(5, 3, 1e3, structure="symmetric")
    lower = np.tril(a)
    assert_same_bits(
        inverse(lower, assume_a="sym", lower=True), inverse(a.swapaxes(1, 2).copy(), assume_a="sym", lower=True)
    )
    assert not np.array_equal(inverse(lower, assume_a="sym"), inverse(lower, assume_a="sym", lower=True))
    assert list(inverse_ex(a, min_rcond=0.5).info) == [-3] * 5
    assert len(inverse_ex(a, logdet=True)) == 5
    with dask.config.set({"batchinv.device": "tpu"}), pytest.raises(ValueError, match=r"batchinv\.device"):
        inverse(a)
    with pytest.raises(ValueError, match="min_rcond"):
        inverse(a, min_rcond=2)
    with pytest.raises(ValueError, match="assume_a"):
        inverse(a, assume_a=["gen"])


@needs_control
@pytest.mark.parametrize("mode", MODES, ids=hex)
def test_what_others_do_to_the_environment_is_neither_seen_nor_undone(mode):
    for dtype in DTYPES:
        a = conditioned(3, 4, 10, dtype) * np.finfo(dtype).tiny ** 0.9
        expected = invert_small(a, assume_a="general", account=True)
        with disturbed(mode):
            before = now()
            found = invert_small(a, assume_a="general", account=True)
            assert now() == before
        for got, want in zip(found, expected, strict=True):
            assert_same_bits(got, want)


def test_a_call_within_a_call_has_memory_of_its_own():
    a, b = conditioned(2, 3, 10)
    expected = inverse(a), inverse(b)
    memory = small_calls.take(a, "general")
    memory._a[...] = a
    assert_same_bits(inverse(b), expected[1])
    assert memory._function(memory._table, memory.count) == 0
    assert_same_bits(memory._inverse, expected[0])
    small_calls.give_back(memory, "general")


def test_a_thread_keeps_memory_for_a_few_shapes_only():
    for m in range(1, 50):
        inverse(conditioned(m, 3, 10))
        assert 1 <= len(small_calls._thread.kept) <= small_calls._KEPT
