"""What is timed is right: the table of the benchmarks, with small stacks."""

import numpy as np
import pytest

from tests.benchmarks.cases import CASES
from tests.support.running import ratios
from tests.support.running import run_cpu as run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    a = case.make(2**12)
    x, info, rcond = run(a, case.kind)
    assert not info.any()
    assert (rcond > 1e-4).all()
    assert ratios(a, x).max() <= 3
    np.testing.assert_allclose(x[0], np.linalg.inv(a[0].astype(np.result_type(a, np.float64))), rtol=1e-2, atol=1e-4)
