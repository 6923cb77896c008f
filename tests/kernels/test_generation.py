"""The bits of our own kernels are those of their generation: else a target could be made of two kinds of them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dask_batchinv.kernels import GENERATION, invert_block
from tests.support.stacks import DTYPES, STRUCTURES

RECORDED = Path(__file__).with_suffix(".json")
#: In each layout, and not whole groups of them.
SIZES = (1, 2, 3, 4, 7, 12, 33, 100, 130)
#: And one matrix of this size.
LARGE = 520


def digest_of_bits(structure, dtype):
    """Return a digest of the results for matrices that are the same wherever and whenever they are made."""
    digest = hashlib.sha256()
    for n in (*SIZES, LARGE):
        m = 19 if n in SIZES else 1
        count = m * n * n * 2
        numbers = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)).astype(float)
        numbers = (numbers / 2**31 - 1).reshape(2, m, n, n)
        a = numbers[0] + (1j * numbers[1] if np.dtype(dtype).kind == "c" else 0)
        if structure == "positive definite":
            # In integers, so that no BLAS has a say in it.
            a = np.rint(a * 64)
            a = sum(a[:, :, k, None] * a.conj()[:, None, :, k] for k in range(n)) + n * 4096 * np.eye(n)
        results = invert_block(a.astype(dtype), dtype=dtype, assume_a=structure, device="cpu")
        for array in (results.inverse, results.info, results.rcond):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_bits_are_those_of_the_generation(structure, dtype):
    recorded = json.loads(RECORDED.read_text())[str(GENERATION)]
    # If this fails, and the change is meant: raise GENERATION, and record what the new one gives.
    assert digest_of_bits(structure, dtype) == recorded[f"{structure} {dtype}"]
