"""What surrounds the GPU kernels, tested with what stands for CuPy: batches, pieces, arrays, jobs."""

import dask
import dask.array as da
import numpy as np
import pytest

from dask_batchinv import DeviceError, IllConditionedWarning, SingularMatrixError, inverse, inverse_ex, invert_store
from dask_batchinv.job.target.found import existing
from dask_batchinv.job.target.ledger import Ledger
from dask_batchinv.kernels.cuda import kernels as cuda
from dask_batchinv.kernels.cuda import staging
from tests.gpu import fake_cupy
from tests.support.lapack_types import TYPES
from tests.support.running import LIMIT, check, results_for, run_cpu, run_gpu
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned, residual_ratio
from tests.support.targets import read_target, spoilt

pytestmark = pytest.mark.skipif(not fake_cupy.COMPILER, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def cupy():
    with fake_cupy.installed() as module:
        yield module


def spoilt_stack(n, dtype="float64"):
    """Good and bad matrices of any size, and what info must say."""
    a = conditioned(60, n, 100, dtype)
    a[[5, 11]], a[20, 0, 0], a[33, -1, 0], a[41] = 0, np.nan, np.inf, np.eye(n) * np.finfo(dtype).smallest_subnormal
    info = np.zeros(60, np.int32)
    info[[5, 11, 20, 33, 41]] = 1, 1, -1, -1, -2
    return a, info


@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        *[(2, "complex128"), (12, "float32"), (130, "float32")],
        *(pytest.param(40, dtype, marks=pytest.mark.slow) for dtype in ("float32", "complex128")),
        *(pytest.param(130, dtype, marks=pytest.mark.slow) for dtype in ("float64", "complex128")),
    ],
)
def test_a_stack_from_main_memory_goes_over_the_gpu_in_pieces(monkeypatch, n, dtype):
    a, info = spoilt_stack(n, dtype)
    whole = run_gpu(a)
    assert_same_bits(whole[1], info)
    for pieces in (1, 2, 3, 7):
        for name in ("PIECE_NBYTES", "PIECE_FOR_CUBLAS_NBYTES"):
            monkeypatch.setattr(staging, name, -(-60 // pieces) * a[0].nbytes)
        results = results_for(a)
        staging.invert(a, *results, assume_a="general")
        for got, want in zip(results, whole, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "complex128", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("float64", "complex64"))],
)
@pytest.mark.parametrize("kind", TYPES)
def test_types_of_lapack(kind, dtype):
    for n in (3, 13, 34, 129):
        assert check(kind, n, dtype, 10 if n < 32 else 2, run=run_gpu)[0] <= LIMIT


def test_pieces_of_nothing():
    for shape in ((0, 3, 3), (4, 0, 0)):
        x, info, rcond = inverse_ex(np.empty(shape), device="gpu")
        assert x.shape == shape
        assert not info.any()
        assert (rcond == 1).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_matrices_beyond_our_kernels_with_little_memory(structure):
    a, _ = spoilt_stack(131)
    whole = run_gpu(a, structure)
    with fake_cupy.installed(free=10 * a[0].nbytes):
        for got, want in zip(run_gpu(a, structure), whole, strict=True):
            assert_same_bits(got, want)


def test_out_of_memory_halves_the_batch(monkeypatch):
    a, _ = spoilt_stack(131)
    whole = run_gpu(a)
    by_cublas, sizes = cuda._by_cublas, []

    def full(chosen, a, *results, **options):
        sizes.append(len(a))
        if len(a) > 4:
            raise fake_cupy.OutOfMemoryError
        by_cublas(chosen, a, *results, **options)

    monkeypatch.setattr(cuda, "_by_cublas", full)
    for got, want in zip(run_gpu(a), whole, strict=True):
        assert_same_bits(got, want)
    assert sizes[:5] == [60, 30, 15, 8, 4]
    assert sum(sizes[4:]) == 60

    def never(*arguments, **options):
        raise fake_cupy.OutOfMemoryError

    monkeypatch.setattr(cuda, "_by_cublas", never)
    with pytest.raises(fake_cupy.OutOfMemoryError):
        run_gpu(a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cupy_arrays_in_cupy_arrays_out(cupy, dtype):
    a = conditioned(10, 3, 10, dtype)
    on_gpu = cupy.array(a)
    results = inverse_ex(on_gpu)
    assert all(isinstance(x, cupy.ndarray) for x in results)
    assert residual_ratio(a, results.inverse.get()).max() <= 3
    assert results.inverse.dtype == dtype
    out = cupy.empty_like(on_gpu)
    assert inverse(on_gpu, out=out) is out
    assert_same_bits(out, results.inverse)
    assert_same_bits(on_gpu, a)
    with pytest.raises(ValueError, match="overlaps"):
        inverse(on_gpu, out=on_gpu)
    with pytest.raises(TypeError, match=r"a is on the GPU, but out is ndarray: .*cupy\.asnumpy"):
        inverse(on_gpu, out=np.empty_like(a))
    with pytest.raises(TypeError, match="out is on the GPU, but a is not"):
        inverse(a, out=out)
    on_gpu[4] = 0
    with pytest.raises(np.linalg.LinAlgError, match=r"\(4,\): singular \(pivot 1"):
        inverse(on_gpu)
    half = inverse(cupy.array(a.real.astype("float16")))
    assert half.dtype == np.float32
    assert isinstance(half, cupy.ndarray)


def test_judgement_of_arrays_on_the_gpu(cupy):
    a = np.stack([np.eye(3), np.full((3, 3), np.nan), np.diag([1, 1, 1e-20]), np.diag([2.0, 3, 4])])
    on_gpu = cupy.array(a)
    with pytest.warns(IllConditionedWarning, match=r"\(2,\): rcond 1e-20"):
        x = inverse(on_gpu, on_error="skipna")
    assert isinstance(x, cupy.ndarray)
    assert_same_bits(x.get()[3], inverse(a[3]))
    assert inverse_ex(on_gpu, min_rcond=1e-10).info.get().tolist() == [0, -1, -3, 0]
    with pytest.raises(SingularMatrixError, match=r"\(2,\): rcond is below"):
        inverse(on_gpu, on_error="skipna", min_rcond=1e-10)
    lower = conditioned(4, 3, 10, "complex128", "hermitian")
    x = inverse(cupy.array(lower + np.triu(np.full((3, 3), np.nan), 1)), assume_a="her", lower=True).get()
    np.testing.assert_allclose(x, inverse(lower, assume_a="her"), rtol=0, atol=1e-13)


def test_dask_arrays_keep_their_kind_of_blocks(cupy):
    a, info = spoilt(60, 3)
    lazy = da.from_array(cupy.array(a), chunks=(25, 3, 3), asarray=False)
    results = inverse_ex(lazy)
    assert [type(x._meta) for x in results] == [cupy.ndarray] * 3
    assert [x.dtype for x in results] == [np.float64, np.int32, np.float64]
    x, codes, _ = dask.compute(*results, scheduler="sync")
    assert isinstance(x, cupy.ndarray)
    assert_same_bits(np.asarray(codes), info)
    assert_same_bits(np.asarray(x), run_gpu(a)[0])
    with pytest.raises(np.linalg.LinAlgError, match=r"2 of 25 matrices of this block have no inverse: \((5|33),\): "):
        inverse(lazy).compute(scheduler="sync")
    with pytest.raises(TypeError, match=r"out takes no blocks from the GPU: append \.map_blocks\(cupy\.asnumpy\)"):
        inverse(lazy, out=np.empty_like(a))
    plain = inverse(lazy, on_error="nan").map_blocks(cupy.asnumpy)
    assert type(plain.compute(scheduler="sync")) is np.ndarray


def test_which_device_a_block_gets(cupy):
    a = conditioned(4, 3, 10)
    on_cpu, on_gpu = run_cpu(a)[0], run_gpu(a)[0]
    assert on_cpu.tobytes() != on_gpu.tobytes()  # else the rest would show nothing
    assert_same_bits(inverse(a), on_gpu)
    assert_same_bits(inverse(a, device="cpu"), on_cpu)
    assert_same_bits(inverse(a, device="gpu"), on_gpu)
    with dask.config.set({"batchinv.device": "cpu"}):
        assert_same_bits(inverse(a), on_cpu)
    with pytest.raises(DeviceError, match="the block is a CuPy array: convert it"):
        inverse(cupy.array(a), device="cpu")
    with fake_cupy.installed(devices=0):
        assert_same_bits(inverse(a), on_cpu)
        with pytest.raises(DeviceError, match='device="gpu": CUDA finds no GPU: look at nvidia-smi'):
            inverse(a, device="gpu")


@pytest.mark.parametrize("library", ["nvrtc", "cublas"])
def test_a_gpu_without_a_library_of_cuda_is_none(library):
    a = conditioned(4, 3, 10)
    with fake_cupy.installed(without=library):
        assert_same_bits(inverse(a), run_cpu(a)[0])
        with pytest.raises(
            DeviceError, match=rf"CuPy cannot use it \(.*{library}.*\): pip install 'dask_batchinv\[gpu\]'"
        ):
            inverse(a, device="gpu")


def test_a_card_that_the_compiler_does_not_know():
    a = conditioned(4, 3, 10)
    with fake_cupy.installed(capability=120):
        assert_same_bits(inverse(a, device="gpu"), run_gpu(a)[0])


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("n", [3, 13, 34, 130])
def test_numbers_that_begin_anywhere(cupy, n, dtype):
    a = conditioned(5, n, 10, dtype)
    a[3] = np.eye(n) * np.finfo(dtype).smallest_subnormal  # is done again in double precision
    want = run_gpu(a)

    def shifted(nbytes):
        memory = cupy.zeros(a.nbytes + nbytes, np.uint8)
        return memory[nbytes:].view(dtype).reshape(a.shape)

    half = a.itemsize // 2
    for of_input, of_output in [(half, 0), (0, half), (half, half), (4, 4), (a.itemsize, a.itemsize)]:
        given, out = shifted(of_input), shifted(of_output)
        given[...] = a
        results = [cupy.array(x) for x in results_for(a)]
        cuda.invert(given, out, *results[1:], assume_a="general")
        for got, expected in zip((out, *results[1:]), want, strict=True):
            assert_same_bits(got, expected)


def test_overflow_in_single_precision_is_counted_by_the_kernels(monkeypatch, cupy):
    again = []
    monkeypatch.setattr(cuda, "again_in_double", lambda a, *others, **options: again.append(len(a)))
    for n in (3, 13, 34, 130):
        a = conditioned(6, n, 10, "float32")
        run_gpu(a)
        assert not again
        a[2] = np.eye(n) * np.finfo("f4").smallest_subnormal
        run_gpu(a)
        staging.invert(a, *results_for(a), assume_a="general")
        assert again == [6, 6]
        again.clear()


def test_a_job_on_the_gpu(tmp_path, make_source, threads):
    a, info = spoilt(60, 3)
    source = make_source(a, chunks=(10, 3, 3))
    options = {"client": threads, "max_failed": None, "tile_size": 720}
    report = invert_store(source, tmp_path / "gpu", device="gpu", **options)
    assert report.kernel == "cuda: general"
    assert report.devices == {"cpu": 0, "gpu": 6}
    assert "6 tiles on GPUs, 0 on CPUs" in str(report)
    x, codes, _ = read_target(tmp_path / "gpu")
    assert_same_bits(codes, info)
    assert_same_bits(x, run_gpu(a)[0])
    assert invert_store(source, tmp_path / "auto", **options).devices == {"cpu": 0, "gpu": 6}
    assert invert_store(source, tmp_path / "cpu", device="cpu", **options).devices == {"cpu": 6, "gpu": 0}


def test_a_job_that_began_on_cpus_goes_on_where_gpus_are(tmp_path, make_source, threads):
    a, _ = spoilt(60, 3)
    source = make_source(a, chunks=(10, 3, 3))
    options = {"client": threads, "max_failed": None, "tile_size": 720}

    def stop(progress):
        if progress.matrices_done >= 20:
            raise KeyboardInterrupt

    with fake_cupy.installed(devices=0), pytest.raises(KeyboardInterrupt):
        invert_store(source, tmp_path / "t", on_progress=stop, **options)
    report = invert_store(source, tmp_path / "t", **options)
    assert report.complete
    assert report.devices["cpu"] >= 2
    assert report.devices == {"cpu": 6 - report.tiles_now, "gpu": report.tiles_now}
    on = Ledger(*existing(tmp_path / "t")).column("device")
    x = read_target(tmp_path / "t")[0]
    for tile, device in enumerate(on):
        part = slice(10 * tile, 10 * tile + 10)
        assert_same_bits(x[part], (run_gpu if device else run_cpu)(a)[0][part])


def test_a_job_for_gpus_is_refused_where_workers_have_none(tmp_path, make_source, threads):
    source = make_source(conditioned(4, 3, 10))
    match = r'device="gpu", but 1 of 1 worker without one, first .*CUDA finds no GPU'
    with fake_cupy.installed(devices=0), pytest.raises(DeviceError, match=match):
        invert_store(source, tmp_path / "t", device="gpu", client=threads)
    assert not (tmp_path / "t").exists()
