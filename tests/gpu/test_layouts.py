"""The GPU kernels where their layouts differ: on both sides of every change, with hostile neighbours, at the edges."""

import numpy as np
import pytest

from dask_batchinv.kernels.cuda.launch import choose_launch
from tests.gpu import fake_cupy
from tests.support.running import ratios_of_sides, run_gpu
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned

pytestmark = pytest.mark.skipif(not fake_cupy.COMPILER, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def cupy():
    with fake_cupy.installed() as module:
        yield module


def sizes(dtype):
    """The smallest and the largest n of each layout that is compiled for each n, and one of each other."""
    found, last = [], ""
    for n in range(1, 40):
        chosen = choose_launch(n, dtype, "general")
        kind = next((option for option in chosen.options if option.startswith("-DLANES")), chosen.layout)
        if kind != last:
            found += [n - 1, n] if n > 1 else [n]
        last = kind
    return found


def hostile(n, dtype, structure):
    """Good matrices among all that can go wrong, and at the edges of the range; which are good, and their number."""
    limits = np.finfo(dtype)
    a = conditioned(40, n, 1e3, dtype, structure)
    strange = np.arange(1, 40, 2)
    identity = np.eye(n, dtype=dtype)
    edge = identity * limits.dtype.type(2.0 ** round(0.8 * limits.maxexp))
    edge[0, -1] = edge[-1, 0] = limits.tiny
    tiny = identity.copy()
    tiny[-1, -1] = limits.smallest_subnormal
    cases = [
        0 * identity, identity * limits.smallest_subnormal, identity * np.nan, identity * limits.max, edge, tiny,
        identity * limits.tiny * 8, np.full((n, n), np.inf), np.ones((n, n)), a[0] * (limits.max / 64),
    ]  # fmt: skip
    with np.errstate(invalid="ignore", over="ignore"):
        a[strange] = np.resize(np.array(cases, dtype), (len(strange), n, n))
    return a, np.setdiff1d(np.arange(40), strange)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "structure",
    [pytest.param(one, marks=[] if one in ("general", "hermitian") else pytest.mark.slow) for one in STRUCTURES],
)
def test_a_matrix_among_hostile_ones_has_the_bits_that_it_has_alone(structure, dtype):
    for n in sizes(dtype):
        a, good = hostile(n, dtype, structure)
        results = run_gpu(a, structure)
        assert not results[1][good].any()
        for got, want in zip(results, run_gpu(a[good], structure), strict=True):
            assert_same_bits(got[good], want)
        for i in (0, 5, 39):
            for got, want in zip(results, run_gpu(a[i : i + 1], structure), strict=True):
                assert_same_bits(got[i : i + 1], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_too_small_for_a_key_is_not_singular(dtype):
    """Pivots are chosen by their first bits, and the smallest numbers have none."""
    limits = np.finfo(dtype)
    for n in (2, *sizes(dtype)[-3:]):
        if n == 1:
            continue
        a = np.eye(n, dtype=dtype)[None].repeat(4, 0)
        a[0, -1, -1] = a[1, -1, -2] = limits.smallest_subnormal
        a[1, -1, -1], a[1, -2, -2] = 0, 0
        a[1, -2, -1] = limits.smallest_subnormal
        a[2, -1, -1] = 0
        # In double precision, of which single is done again, the first two have inverses out of the range of single.
        assert list(run_gpu(a)[1]) == [-2, -2, n, 0]


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_rcond_of_complex_matrices_whose_inverses_have_squares_out_of_range(dtype):
    limits = np.finfo(dtype)
    for n in (3, 13, 34, 130):
        for structure in ("general", "positive definite"):
            a = np.eye(n, dtype=dtype)[None].repeat(3, 0)
            smallest = 2.0 ** (round(0.9 * limits.minexp))
            a[1, -1, -1] = smallest
            x, info, rcond = run_gpu(a, structure)
            assert not info.any()
            np.testing.assert_allclose(x[1, -1, -1], 1 / smallest)
            np.testing.assert_allclose(rcond, [1, smallest, 1])


def smooth(n, dtype, length):
    """The covariances of values of a smooth function: definite, and nearly singular."""
    at = np.linspace(0, 1, n)
    a = np.exp(-(((at[:, None] - at) / length) ** 2))
    if np.dtype(dtype).kind == "c":
        a = a * np.exp(3j * (at[:, None] - at))
    return (a + 10 * n * np.finfo(dtype).eps * np.eye(n)).astype(dtype)


@pytest.mark.parametrize("structure", ["general", "hermitian", "positive definite"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smooth_covariances(structure, dtype):
    """Positive definite ones from both sides; elimination with pivots is good from one alone, as LAPACK's is."""
    for n in (8, 14, 30, 35, *([130, 145] if structure != "general" else [])):
        a = np.stack([smooth(n, dtype, length) for length in (0.01, 0.1, 0.3, 1)])
        x, info, _ = run_gpu(a, structure)
        assert not info.any()
        of_xa, of_ax = ratios_of_sides(a, x)
        assert np.minimum(of_xa, of_ax).max() <= 3, n
        assert structure == "general" or max(of_xa.max(), of_ax.max()) <= 3, n


@pytest.mark.parametrize("structure", ["general", "hermitian"])
@pytest.mark.parametrize(
    ("dtype", "n"),
    [
        *[("float32", 47), ("float32", 90), ("float64", 47), ("complex64", 47), ("complex128", 45)],
        *(
            pytest.param(dtype, n, marks=pytest.mark.slow)
            for dtype, sizes_of_it in {
                "float32": (48, 57, 64, 73, 80, 96, 101, 128),
                "float64": (48, 57, 64, 90, 128),
                "complex64": (48, 57, 64, 70, 96, 101, 128),
                "complex128": (36, 37, 40, 48, 57, 64, 70, 96),
            }.items()
            for n in sizes_of_it
        ),
    ],
)
def test_tiles_of_every_form(dtype, n, structure):
    a = conditioned(4, n, 1e3, dtype, structure)
    a[2] = 0
    if structure == "hermitian":
        a[3] = conditioned(1, n, 1e3, dtype, "positive definite")[0]
    x, info, _ = run_gpu(a, structure)
    assert list(info) == [0, 0, 1, 0]
    good = info == 0
    assert max(side.max() for side in ratios_of_sides(a[good], x[good])) <= 3


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_what_comes_after_a_pivot_whose_reciprocal_overflows(dtype):
    smallest = np.finfo(dtype).smallest_subnormal
    for n in (4, 10, 34, 130):
        first = np.ones(n)
        first[0] = smallest
        second = np.ones(n)
        second[1], second[2] = smallest, 0
        negative = np.ones(n)
        negative[1] = -1
        a = np.stack([np.diag(d).astype(dtype) for d in (first, second, negative)])
        assert list(run_gpu(a, "positive definite")[1]) == [-2, -2, 2]
        if n < 129:
            for structure in ("upper triangular", "lower triangular", "diagonal"):
                assert list(run_gpu(a, structure)[1]) == [-2, 3, 0]


def test_a_definite_matrix_with_a_pivot_below_the_range_is_done_again_in_double():
    b = np.eye(4)
    b[0, 1] = b[1, 0] = 2.0**-63
    b[1, 1] = 2.0**-126 * (1 + 2.0**-22)
    x, info, _ = run_gpu((b * 2.0**30).astype(np.float32)[None], "positive definite")
    assert info[0] == 0
    assert x[0, 1, 1] > 3e35


@pytest.mark.parametrize("structure", ["general", "symmetric", "positive definite", "upper triangular"])
def test_no_zero_is_negative(structure):
    limits = np.finfo(float)
    for n in (3, 14, 34):
        a = np.diag(np.linspace(0.1, 1, n) * limits.max * 0.9)[None]
        a[0, 0, 1] = a[0, 1, 0] = 2 * limits.tiny
        x = run_gpu(a, structure)[0]
        assert not np.signbit(x[x == 0]).any()
