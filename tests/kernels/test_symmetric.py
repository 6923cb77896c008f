"""Symmetric and Hermitian matrices whose pivots are of every kind, side by side: each goes its own way."""

import numpy as np
import pytest

from dask_batchinv.kernels.cpu import dispatch
from dask_batchinv.kernels.cpu.dispatch import spec_of
from dask_batchinv.kernels.emit import compiler
from tests.support.running import ratios, results_for, run_cpu
from tests.support.stacks import DTYPES, assert_same_bits, normal

#: In each layout but `blocked`, odd and even.
SIZES = (2, 5, 6, 7, 8, 15, 40, 41, 70)
#: Real Hermitian matrices have the kernels of symmetric ones.
KINDS = [*(("symmetric", dtype) for dtype in DTYPES), *(("hermitian", dtype) for dtype in DTYPES[2:])]


def of_every_kind(n, dtype, structure):
    """Good matrices by name: with pivots of one row, of two, and of both."""
    rng = np.random.default_rng(n)

    def across(a):
        return a.T.conj() if structure == "hermitian" else a.T

    a = normal(rng, (n, n), dtype)
    a = a + across(a)
    definite = normal(rng, (n, n), dtype)
    definite = definite @ across(definite) + n * np.eye(n)
    pairs = np.eye(n)
    for i in range(0, n - 1, 2):
        pairs[i : i + 2, i : i + 2] = [[0, 1 + i], [1 + i, 0]]
    no_diagonal = a - np.diag(np.diag(a)) + np.eye(n)[::-1] * n
    if n % 2:
        no_diagonal[n // 2, n // 2] = 1
    # The largest of the diagonal is small beside its row, and that is small beside the row of the partner, which makes
    # two other rows nearly the same: swept as a pair they would be lost in what the pair adds to them.
    alone = np.diag(np.linspace(1, 1.5, n)) * 2.0**-12
    alone[0, 0] = 2.0**-11
    alone[0, 1:2] = alone[1:2, 0] = 2.0**-10
    alone[1, 2:4] = alone[2:4, 1] = 1
    sizes = 2.0 ** np.linspace(-15, 15, n).round()
    matrices = {
        "indefinite": a,
        "definite": definite,
        "negative": -definite,
        "pairs": pairs,
        "pairs the other way round": pairs[::-1, ::-1],
        "no diagonal": no_diagonal,
        "diagonal": np.diag(np.arange(1.0, n + 1)),
        "unlike in size": a * np.outer(sizes, sizes),
        "large": a * 2.0**90,
        "small": a * 2.0**-90,
        "pivots alone": alone,
    }
    return {name: np.asarray(a, dtype) for name, a in matrices.items()}


def of_every_failure(n, dtype):
    """Bad matrices, with their ``info``."""
    limits = np.finfo(dtype)
    nan, overflow, zeros = np.eye(n, dtype=dtype), np.eye(n, dtype=dtype), np.zeros((n, n), dtype)
    nan[0, n - 1] = np.nan
    overflow[n // 2, n // 2] = limits.smallest_subnormal * 8
    row = np.eye(n, dtype=dtype)
    row[n - 1, n - 1] = 0
    return [(nan, -1), (overflow, -2), (zeros, 1), (row, n)]


@pytest.mark.parametrize(("structure", "dtype"), KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_each_matrix_goes_its_own_way(n, dtype, structure):
    good = of_every_kind(n, dtype, structure)
    bad = of_every_failure(n, dtype)
    stack = np.array([*good.values(), *(a for a, _ in bad)])
    expected = [run_cpu(a[None], structure) for a in stack]
    assert [int(info[0]) for _, info, _ in expected] == [0] * len(good) + [info for _, info in bad]
    for at, (name, a) in enumerate(good.items()):
        assert ratios(a[None], expected[at][0]).max() <= 3, name
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = rng.integers(0, len(stack), 37)
        results = run_cpu(stack[order], structure)
        for at, which in enumerate(order):
            for got, want in zip(results, expected[which], strict=True):
                assert_same_bits(got[at], want[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [4, 5, 7, 9, 39, 41])
def test_pivots_near_the_edge_of_the_range_do_not_depend_on_neighbours(n, dtype):
    rng, limits = np.random.default_rng(n), np.finfo(dtype)
    a = np.tile(np.eye(n, dtype=dtype), (200, 1, 1))
    corners = rng.integers(-3, 4, (200, 3, 3))
    a[:, -3:, -3:] = np.ldexp((corners + corners.swapaxes(1, 2)).astype(dtype), int(-limits.maxexp))
    pairs = np.eye(n, dtype=dtype)
    pairs[: n - 1, : n - 1] = np.kron(np.eye((n - 1) // 2), [[0, 1], [1, 0]]) if n % 2 else np.eye(n - 1)[::-1]
    both = np.empty((400, n, n), dtype)
    expected = [run_cpu(matrix[None], "symmetric") for matrix in a]
    for neighbour in (np.eye(n, dtype=dtype), pairs, np.eye(n, dtype=dtype)[::-1]):
        both[::2], both[1::2] = a, neighbour
        results = run_cpu(both, "symmetric")
        for at, alone in enumerate(expected):
            for got, want in zip(results, alone, strict=True):
                assert_same_bits(got[2 * at], want[0])


@pytest.mark.parametrize("zeros", [1, 41, 42, 43, 80])
@pytest.mark.parametrize("first", [0, 3])
def test_the_first_zero_pivot_is_the_one_that_counts(first, zeros):
    a = np.eye(520)
    a[first, first] = 0
    a[range(521 - zeros, 520), range(521 - zeros, 520)] = 0
    for threads in (1, 2):
        results = results_for(a[None])
        dispatch.invert(a[None], *results, structure="symmetric", threads=threads)
        assert results[1][0] == first + 1


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("n", [*SIZES, 520])
def test_what_the_imaginary_parts_of_a_hermitian_diagonal_are_changes_no_bit(n, dtype):
    a = np.array(list(of_every_kind(n, dtype, "hermitian").values()))[: None if n < 500 else 1]
    expected = run_cpu(a, "hermitian")
    for number in (np.nan, np.inf, 3.0):
        for places in ([n - 1], range(n - 1), range(n)):
            b = a.copy()
            b.imag[:, places, places] = number
            for got, want in zip(run_cpu(b, "hermitian"), expected, strict=True):
                assert_same_bits(got, want)


@pytest.mark.parametrize(("structure", "dtype"), KINDS)
@pytest.mark.parametrize("n", [2, 45, 46, 131])
def test_large_ones_have_pivots_of_every_kind(n, dtype, structure):
    good, bad = of_every_kind(n, dtype, structure), of_every_failure(n, dtype)
    stack = np.array([*good.values(), *(a for a, _ in bad)])
    expected = [0] * len(good) + [info for _, info in bad]
    # Which takes small ones as well.
    kernel = dispatch._load(spec_of(4096, dtype, structure, compiler.vector_nbytes()))
    results, by_two = results_for(stack), results_for(stack)
    kernel.run(stack, *results)
    assert list(results[1]) == expected
    for at, (name, a) in enumerate(good.items()):
        x = results[0][at]
        assert ratios(a[None], x[None]).max() <= 3, name
        assert (x == (x.T.conj() if structure == "hermitian" else x.T)).all()
    kernel.run(stack, *by_two, threads=2)
    for got, want in zip(by_two, results, strict=True):
        assert_same_bits(got, want)
