"""Residuals over the matrices that LAPACK tests itself with."""

import pytest

from tests.support.lapack_types import SIZES, TYPES
from tests.support.running import LIMIT, check
from tests.support.stacks import DTYPES

#: A million matrices and more over all kinds, types, sizes and dtypes.
MANY = {1: 3000, 2: 3000, 3: 3000, 4: 3000, 5: 3000, 8: 1600, 10: 1600, 16: 800, 32: 160, 33: 160, 50: 60, 64: 40}


#: Of structures with one algorithm in each layout some sizes are enough; all are taken by the slow test.
FEW_SIZES = (1, 3, 5, 10, 33, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "n"),
    [(kind, n) for kind in TYPES for n in (SIZES if kind in ("general", "positive definite") else FEW_SIZES)],
)
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
