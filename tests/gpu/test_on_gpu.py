"""On a card alone: what can go wrong only there."""

import dask
import dask.array as da
import numpy as np
import pytest

from dask_batchinv import inverse, inverse_ex
from tests.support.lapack_types import TYPES
from tests.support.running import LIMIT, check, run_gpu
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned

pytestmark = pytest.mark.gpu
#: Sizes on both sides of each change of layout, for all dtypes.
SIZES = (1, 2, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 40, 41, 48, 64, 80, 96, 97, 128, 129, 256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", TYPES)
def test_types_of_lapack(kind, n, dtype):
    assert check(kind, n, dtype, 100 if n <= 32 else 10, run=run_gpu)[0] <= LIMIT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_row_of_a_long_stack(structure, dtype):
    """More matrices than blocks of CUDA's second and third dimension, failures among them."""
    a = np.resize(conditioned(101, 3, 100, dtype, structure), (200_003, 3, 3))
    a[::1009] = 0
    x, info, rcond = run_gpu(a, structure)
    assert (np.flatnonzero(info) == np.arange(0, len(a), 1009)).all()
    few = run_gpu(a[:101], structure)
    for start in range(101, len(a), 101 * 100):  # each at another place of a block
        part = slice(start, min(start + 101, len(a)))
        good = info[part] == 0
        for got, want in zip((x, rcond), (few[0], few[2]), strict=True):
            want = want[: part.stop - part.start]
            both = good & (few[1][: len(good)] == 0)
            assert_same_bits(got[part][both], want[both])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [129, 130, 256, 300])
def test_cublas_does_not_mind_how_many_there_are(n, dtype):
    a = conditioned(64, n, 100, dtype)
    whole = run_gpu(a)
    for m in (1, 2, 7):
        for got, want in zip(run_gpu(a[:m]), whole, strict=True):
            assert_same_bits(got, want[:m])


def test_a_stack_of_more_than_two_to_the_31_numbers():
    import cupy

    m = 2**31 // 4 + 1000
    if cupy.cuda.runtime.memGetInfo()[0] < 3 * 16 * m:
        pytest.skip("takes 26 GB of GPU memory")
    a = cupy.empty((m, 2, 2), np.float32)
    a[:] = cupy.asarray([[2, 1], [1, 1]], np.float32)
    a[m - 1] = 0
    x, info, _ = inverse_ex(a)
    assert int(cupy.count_nonzero(info)) == 1
    assert int(info[m - 1]) == 1
    assert (cupy.asnumpy(x[m - 1000 : m - 1]) == [[1, -1], [-1, 2]]).all()


@pytest.mark.parametrize("n", [3, 20, 70, 300])
def test_from_main_memory_as_from_the_gpus(n):
    import cupy

    a = conditioned(1000 if n < 50 else 20, n, 100)
    assert_same_bits(inverse(a, device="gpu"), cupy.asnumpy(inverse(cupy.asarray(a))))


def test_dask_arrays_of_cupy_blocks():
    import cupy

    a = conditioned(100, 5, 100)
    lazy = da.from_array(cupy.asarray(a), chunks=(30, 5, 5), asarray=False)
    results = inverse_ex(lazy)
    assert all(isinstance(x._meta, cupy.ndarray) for x in results)
    computed = dask.compute(*results, scheduler="threads")
    assert all(isinstance(x, cupy.ndarray) for x in computed)
    assert_same_bits(cupy.asnumpy(computed[0]), run_gpu(a)[0])


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("n", [3, 13, 34, 130])
def test_numbers_that_begin_anywhere(n, dtype):
    import cupy

    a = conditioned(5, n, 10, dtype)
    want = run_gpu(a)[0]
    for nbytes in (4, 8, 16):
        memory = cupy.zeros(a.nbytes + nbytes, np.uint8)
        memory[nbytes:] = cupy.asarray(a).view(np.uint8).ravel()
        given = memory[nbytes:].view(dtype).reshape(a.shape)
        out = cupy.zeros(a.nbytes + nbytes, np.uint8)[nbytes:].view(dtype).reshape(a.shape)
        inverse(given, out=out)
        assert_same_bits(np.frombuffer(cupy.asnumpy(out.view(np.uint8)), dtype).reshape(a.shape), want)


def test_tensors_stay_where_they_are():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch is installed, but not for CUDA")
    a = conditioned(50, 5, 100)
    tensor = torch.from_numpy(a).cuda()
    out = torch.empty_like(tensor)
    before = torch.cuda.memory_allocated()
    inverse(tensor, out=out)
    assert torch.cuda.memory_allocated() == before
    assert_same_bits(out.cpu().numpy(), run_gpu(a)[0])
    x = inverse(tensor)
    assert x.device == tensor.device
    assert_same_bits(x.cpu().numpy(), run_gpu(a)[0])
    with torch.cuda.stream(torch.cuda.Stream()):  # what is still to be computed there is waited for
        later = inverse(tensor * 2)
        assert torch.allclose(later * 2, x)


def test_other_streams_are_heeded():
    import cupy

    a = cupy.asarray(conditioned(50, 4, 100))
    cupy.cuda.Device().synchronize()  # or the copy to the GPU may still be on its way
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = inverse(a, on_error="nan")
        stream.synchronize()
    assert_same_bits(cupy.asnumpy(x), run_gpu(cupy.asnumpy(a))[0])
