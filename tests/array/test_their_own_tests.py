"""The tests that NumPy and SciPy have of their own `inv`, with ours in its place."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

#: Where we differ on purpose.
DIFFERENT = {
    "test_overwrite_a": "we never write into what is inverted, not even where that is allowed",
    "test_dtypes and longdouble": "wider floating numbers are refused, and not rounded in silence",
    "test_wrong_assume_a": "an unknown word is a ValueError, not a KeyError",
}


@pytest.mark.parametrize("module", ["numpy.linalg.tests.test_linalg", "scipy.linalg.tests.test_basic"])
def test_inv(module):
    if find_spec(module.rpartition(".")[0]) is None:
        pytest.skip("this NumPy or SciPy was installed without its tests")
    chosen = "TestInv and not " + " and not ".join(f"({test})" for test in DIFFERENT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.in_their_place", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-c", "/dev/null", "--pyargs", module, "-k", chosen],
        capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 7
