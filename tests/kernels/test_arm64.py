"""All kernels compiled for ARM64, with the bits of this processor."""

from dataclasses import replace

import numpy as np
import pytest

from dask_batchinv.kernels.cpu import blocked, dispatch
from dask_batchinv.kernels.cpu.dispatch import layout_of, spec_of
from dask_batchinv.kernels.cpu.scaling import RCOND_UNKNOWN
from dask_batchinv.kernels.emit import compiler
from tests.kernels.test_compiled import blocks
from tests.support import arm64
from tests.support.running import results_for
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned

pytest.importorskip("unicorn", reason="the emulator of ARM64 is not installed: pip install unicorn pyelftools")
pytest.importorskip("elftools", reason="the reader of object files is not installed: pip install pyelftools")


def grouped(spec):
    """Return a kernel that runs in the emulator."""
    layout = layout_of(spec)
    function = arm64.functions(layout.write(spec))(spec.name)
    return dispatch._Grouped(function, layout.workspace(spec), lambda *_: 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n", [3, 9, 45])
def test_the_bits_are_those_of_this_processor(n, structure, dtype):
    spec = spec_of(n, dtype, structure, arm64.VECTOR_NBYTES)
    kernel = grouped(spec)
    dispatch._test(kernel, spec)
    a, *results = blocks(n, dtype, structure)
    kernel.run(a, *results)
    expected = results_for(a)
    dispatch._load(spec).run(a, *expected)
    for _, info, rcond in (results, expected):
        rcond[info == RCOND_UNKNOWN] = 0  # to be found by others; NaN has either sign
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", blocked.MATRICES)
def test_so_are_those_of_large_matrices(structure, dtype):
    spec = replace(spec_of(513, dtype, structure, arm64.VECTOR_NBYTES), n=0)
    functions = arm64.functions(blocked.write(spec))
    kernel = blocked.BlockedKernel(spec, [functions(name) for name in blocked.signatures(spec)])
    dispatch._test(kernel, spec)
    a = conditioned(1, 141, 1e4, dtype, structure)
    results, expected = results_for(a), results_for(a)
    kernel.run(a, *results)
    dispatch._load(spec_of(513, dtype, structure, compiler.vector_nbytes())).run(a, *expected)
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got, want)


def test_a_wrong_result_would_be_seen():
    spec = spec_of(3, "float64", "general", arm64.VECTOR_NBYTES)
    text = layout_of(spec).write(spec).replace("fdiv", "fmul")
    kernel = dispatch._Grouped(arm64.functions(text)(spec.name), layout_of(spec).workspace(spec), lambda *_: 1)
    with pytest.raises(dispatch.KernelError), np.errstate(all="ignore"):
        dispatch._test(kernel, spec)
