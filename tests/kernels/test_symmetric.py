"""Symmetric and Hermitian matrices whose pivots are of every kind, side by side: each goes its own way."""

import numpy as np
import pytest

from dask_batchinv.kernels.cpu import dispatch
from dask_batchinv.kernels.cpu.dispatch import spec_of
from dask_batchinv.kernels.emit import compiler
from tests.support.running import ratios, results_for, run_cpu
from tests.support.stacks import DTYPES, assert_same_bits, normal

#: In each layout, odd and even.
SIZES = (2, 5, 6, 7, 8, 15, 40, 41, 70)


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


@pytest.mark.parametrize("structure", ["symmetric", "hermitian"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_each_matrix_goes_its_own_way(n, dtype, structure):
    good = of_every_kind(n, dtype, structure)
    bad = of_every_failure(n, dtype)
    stack = np.array([*good.values(), *(a for a, _ in bad)])
    expected = [run_cpu(a[None], structure) for a in stack]
    assert [int(info[0]) for _, info, _ in expected] == [0] * len(good) + [info for _, info in bad]
    for (name, a), (x, _, _) in zip(good.items(), expected, strict=False):
        assert ratios(a[None], x).max() <= 3, name
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = rng.integers(0, len(stack), 37)
        results = run_cpu(stack[order], structure)
        for at, which in enumerate(order):
            for got, want in zip(results, expected[which], strict=True):
                assert_same_bits(got[at], want[0])


@pytest.mark.parametrize("structure", ["symmetric", "hermitian"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 45, 46, 131])
def test_the_kernel_for_large_ones_takes_all_of_them(n, dtype, structure):
    good, bad = of_every_kind(n, dtype, structure), of_every_failure(n, dtype)
    stack = np.array([*good.values(), *(a for a, _ in bad)])
    expected = [0] * len(good) + [info for _, info in bad]
    kernel = dispatch._load(spec_of(4096, dtype, structure, compiler.vector_nbytes()))
    for threads in (1, 2):
        x, info, _ = results = results_for(stack)
        kernel.run(stack, *results, threads=threads)
        assert list(info) == expected
        for name, a, inverse in zip(good, stack, x, strict=False):
            assert ratios(a[None], inverse[None]).max() <= 3, name
            assert (inverse == (inverse.T.conj() if structure == "hermitian" else inverse.T)).all()
