"""Jobs that compute in double precision what is stored in single."""

import numpy as np
import pytest

from dask_batchinv import TargetError, inverse_ex, invert_store, verify_store
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_in_double_precision(tmp_path, make_source, client, dtype):
    a = conditioned(40, 6, 1e5, dtype)
    source, target = make_source(a), tmp_path / "t"
    assert invert_store(source, target, client=client, precision="double").exit_code == 0
    wide = inverse_ex(a.astype(np.result_type(dtype, np.float64)))
    found, _, rcond = read_target(target)
    assert_same_bits(found, wide.inverse.astype(dtype))
    np.testing.assert_allclose(rcond, wide.rcond, rtol=1e-6)
    assert verify_store(target, source=source, client=client).exit_code == 0
    assert "nothing was left to do" in str(invert_store(source, target, client=client, precision="double"))
    with pytest.raises(TargetError, match="precision was 'double', is 'same'"):
        invert_store(source, target, client=client)
