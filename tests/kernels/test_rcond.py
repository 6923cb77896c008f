"""`rcond` where norms, or the squares on the way to them, leave the range of the dtype, but the result does not."""

import numpy as np
import pytest

from dask_batchinv.kernels import invert_block, read_part
from tests.support.running import run_cpu
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned

#: One of each layout; on a GPU the last is left to cuBLAS.
SIZES = {"cpu": (2, 3, 5, 10, 30, 500, 520), "gpu": (2, 3, 13, 35, 129), "emulated": (3, 13, 35, 129)}


def with_smallest(a):
    """Put a number into the corners that keeps the matrix from being scaled down."""
    a[0, -1] = a[-1, 0] = np.finfo(a.dtype).tiny
    return a


def large_and_small(n, limits):
    return with_smallest(np.eye(n, dtype=limits.dtype) * 2.0 ** round(0.8 * limits.maxexp))


def barely_scaled(n, limits):
    """Squares just within the range, and those of the inverse just not, all entries of one size."""
    phases = np.exp(2j * np.pi * np.outer(range(n), range(n)) / n)
    return with_smallest(
        (phases * 0.8 * 2.0 ** (limits.maxexp // 2)).astype(np.result_type(limits.dtype, np.complex64))
    )


def ill_conditioned(n, limits):
    a = np.eye(n, dtype=limits.dtype)
    a[-1, -1] = limits.tiny**0.75
    return a


def pair(limits):
    """Two rows and columns with a sum that overflows, and so does that of no number alone."""
    return np.array([[0.7, 0.35], [0.35, 0.7]]) * float(limits.max)


def large_sums(n, limits):
    a = np.eye(n, dtype=limits.dtype) * limits.dtype.type(0.7) * limits.max
    a[:2, :2] = pair(limits)
    return with_smallest(a) if n > 2 else a


def large_sums_of_the_inverse(n, limits):
    a = np.eye(n, dtype=limits.dtype)
    a[-2:, -2:] = np.linalg.inv(pair(limits) / float(limits.max)) / float(limits.max)
    return a


CASES = [
    (case, structure, dtype)
    for case in (large_and_small, ill_conditioned, large_sums, large_sums_of_the_inverse)
    for structure in STRUCTURES
    for dtype in DTYPES
] + [(barely_scaled, "general", dtype) for dtype in ("complex64", "complex128")]


def exact_rcond(a, x):
    """1 / (‖A‖₁ ‖X‖₁) in numbers of a range that is large enough."""
    wide = [np.abs(b.astype(np.result_type(b, np.longdouble))).sum(axis=-2).max(axis=-1) for b in (a, x)]
    return 1 / wide[0] / wide[1]


@pytest.mark.parametrize(("case", "structure", "dtype"), CASES)
def test_rcond_is_right_up_to_the_edges_of_the_range(run, backend, case, structure, dtype):
    limits = np.finfo(dtype)
    for n in SIZES[backend]:
        a = case(n, limits).astype(dtype)[None].repeat(3, 0)
        x, info, rcond = run(a, structure)
        assert not info.any(), n
        assert_same_bits(x[1:], x[:-1])
        want = exact_rcond(read_part(a, structure), x)
        tolerance = {"rtol": 50 * n * limits.eps, "atol": 2 * limits.smallest_subnormal}
        np.testing.assert_allclose(rcond, want, **tolerance, err_msg=f"n = {n}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", ["general", "positive definite"])
@pytest.mark.parametrize("n", [2, 10, 60])
def test_a_matrix_at_the_edge_leaves_its_neighbours_alone(n, structure, dtype):
    a = conditioned(70, n, 10, dtype, structure)
    expected = run_cpu(a, structure)
    strange = np.arange(3, 70, 5)
    a[strange] = large_and_small(n, np.finfo(dtype))
    a[13], a[23] = 0, np.nan
    x, info, rcond = run_cpu(a, structure)
    assert list(np.flatnonzero(info)) == [13, 23]
    good = np.setdiff1d(np.arange(70), strange)
    for got, want in zip((x, info, rcond), expected, strict=True):
        assert_same_bits(got[good], want[good])
    np.testing.assert_allclose(rcond[np.setdiff1d(strange, [13, 23])], 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_min_rcond_throws_nothing_away_that_is_well_conditioned(dtype):
    for n in SIZES["cpu"]:
        a = large_and_small(n, np.finfo(dtype))[None].repeat(3, 0)
        x, info, rcond = invert_block(a, dtype=dtype, min_rcond=0.5, device="cpu")
        assert not info.any()
        assert np.isfinite(x).all()
        np.testing.assert_allclose(rcond, 1)
