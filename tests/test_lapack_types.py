"""Residuals over the matrices that LAPACK tests itself with."""

import numpy as np
import pytest
from conftest import run_cpu
from lapack_types import SIZES, TYPES, sample
from stacks import DTYPES

#: A million matrices and more over all kinds, types, sizes and dtypes.
MANY = {1: 3000, 2: 3000, 3: 3000, 4: 3000, 5: 3000, 8: 1600, 10: 1600, 16: 800, 32: 160, 33: 160, 50: 60, 64: 40}
#: LAPACK's own tests use 30.
LIMIT = 3


def ratios(a, x):
    """min(‖XA - I‖₁, ‖AX - I‖₁) / (n u ‖A‖₁ ‖X‖₁), u half of NumPy's eps, in a precision that does not count."""
    n, real = a.shape[-1], a.real.dtype
    if real == np.float64 and n <= 16:
        aw, xw = a.astype(np.result_type(a, np.longdouble)), x.astype(np.result_type(a, np.longdouble))
        products = np.einsum("mij,mjk->mik", xw, aw), np.einsum("mij,mjk->mik", aw, xw)
    else:  # double precision for single, and for double, as LAPACK does it, itself
        aw, xw = a.astype(np.result_type(a, np.float64)), x.astype(np.result_type(a, np.float64))
        products = xw @ aw, aw @ xw

    def norm(b):
        return np.abs(b).sum(axis=-2).max(axis=-1)

    residual = np.minimum(*(norm(product - np.eye(n)) for product in products))
    # Two divisions: near overflow and underflow the product of the norms is out of range.
    return np.asarray(residual / norm(aw) / norm(xw) / (n * np.finfo(real).eps / 2), float)


def check(kind, n, dtype, m, seed=0, run=run_cpu):
    """Return the largest ratio of a kind, size and dtype, and of how many matrices."""
    worst, count = 0.0, 0
    for number, type_ in enumerate(TYPES[kind]):
        rng = np.random.default_rng([seed, number, n, DTYPES.index(dtype)])
        drawn = sample(rng, kind, type_, m, n, dtype)
        x, info, _ = run(drawn.a, kind)
        assert (info == drawn.info).all(), (type_, n, dtype, info)
        count += m
        if drawn.info == 0:
            worst = max(worst, ratios(drawn.a, x).max())
    return worst, count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", TYPES)
def test_types_of_lapack(kind, n, dtype):
    assert check(kind, n, dtype, 40 if n <= 16 else 8 if n <= 64 else 2)[0] <= LIMIT


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_matrices_of_lapacks_types(capsys):
    total, worst = 0, {}
    for kind in TYPES:
        for n in SIZES:
            for dtype in DTYPES:
                worst[kind, n, dtype], count = check(kind, n, dtype, MANY.get(n, 10), seed=1)
                total += count
    with capsys.disabled():
        for dtype in DTYPES:
            for kind in TYPES:
                print(f"\n{dtype} {kind}: " + ", ".join(f"{n}: {worst[kind, n, dtype]:.2f}" for n in SIZES), end="")
        print(f"\n{total} matrices, largest ratio {max(worst.values()):.2f}")
    assert total >= 1_000_000
    assert max(worst.values()) <= LIMIT
