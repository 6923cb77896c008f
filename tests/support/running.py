"""Bare kernels run on arrays in main memory, and how far their results are off."""

import numpy as np

from dask_batchinv.kernels import choose_kernel
from dask_batchinv.kernels.cuda import kernels as cuda
from tests.support.lapack_types import TYPES, sample
from tests.support.stacks import DTYPES

#: LAPACK's own tests use 30.
LIMIT = 3


def run_cpu(a, structure="general"):
    out, info, rcond = results_for(a)
    choose_kernel(structure, "cpu").invert(a, out, info, rcond)
    return out, info, rcond


def run_gpu(a, structure="general"):
    import cupy

    on_gpu = [cupy.array(x) for x in (a, *results_for(a))]
    cuda.invert(*on_gpu, assume_a=structure)
    return tuple(cupy.asnumpy(x) for x in on_gpu[1:])


def results_for(a):
    """Return arrays for inverse, info and rcond, filled with what they must not keep."""
    return np.full(a.shape, 99, a.dtype), np.full(len(a), 99, np.int32), np.full(len(a), 99, np.finfo(a.dtype).dtype)


def ratios(a, x):
    """max(‖XA - I‖₁, ‖AX - I‖₁) / (n u ‖A‖₁ ‖X‖₁), u half of NumPy's eps, in a precision that does not count."""
    return np.maximum(*ratios_of_sides(a, x))


def ratios_of_sides(a, x):
    """The same for either side: of XA, and of AX."""
    n, real = a.shape[-1], a.real.dtype
    if real == np.float64 and n <= 16:
        aw, xw = a.astype(np.result_type(a, np.longdouble)), x.astype(np.result_type(a, np.longdouble))
        products = np.einsum("mij,mjk->mik", xw, aw), np.einsum("mij,mjk->mik", aw, xw)
    else:  # double precision for single, and for double, as LAPACK does it, itself
        aw, xw = a.astype(np.result_type(a, np.float64)), x.astype(np.result_type(a, np.float64))
        products = xw @ aw, aw @ xw

    def norm(b):
        return np.abs(b).sum(axis=-2).max(axis=-1)

    residuals = [norm(product - np.eye(n)) for product in products]
    # Two divisions: near overflow and underflow the product of the norms is out of range.
    scale = n * np.finfo(real).eps / 2
    return [np.asarray(residual / norm(aw) / norm(xw) / scale, float) for residual in residuals]


def check(kind, n, dtype, m, seed=0, run=run_cpu):
    """Return the largest ratio of a kind, size and dtype, and of how many matrices."""
    worst, _, count = check_sides(kind, n, dtype, m, seed, run)
    return worst, count


def check_sides(kind, n, dtype, m, seed=0, run=run_cpu):
    """The same, and before the count the largest ratio of the better of the two sides."""
    worst, better, count = 0.0, 0.0, 0
    for number, type_ in enumerate(TYPES[kind]):
        rng = np.random.default_rng([seed, number, n, DTYPES.index(dtype)])
        drawn = sample(rng, kind, type_, m, n, dtype)
        x, info, _ = run(drawn.a, kind)
        assert (info == drawn.info).all(), (type_, n, dtype, info)
        count += m
        if drawn.info == 0:
            sides = ratios_of_sides(drawn.a, x)
            worst, better = max(worst, np.maximum(*sides).max()), max(better, np.minimum(*sides).max())
    return worst, better, count
