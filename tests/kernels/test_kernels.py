"""The contract of kernels, for every kernel there is."""

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from dask_batchinv.kernels import choose_kernel, invert_block, lapack
from dask_batchinv.kernels.blas_threads import one_blas_thread
from tests.support.running import results_for, run_cpu
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned, residual_ratio

#: Kernels for GPUs are tested here on the CPU, and take their time: one size of each layout.
SIZES = {"cpu": (1, 2, 3, 4, 7, 16, 33), "gpu": (1, 2, 3, 4, 7, 16, 33, 65, 129), "emulated": (3, 13, 35)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_residual_over_condition_numbers(run, backend, structure, dtype):
    eps = np.finfo(dtype).eps
    for n in SIZES[backend]:
        for cond in (2, eps**-0.25, eps**-0.5, 0.1 / eps):
            m = 20 if n < 32 else 5
            a = np.concatenate([conditioned(m, n, cond, dtype, structure, one_large=mode) for mode in (False, True)])
            x, info, rcond = run(a, structure)
            assert not info.any()
            assert residual_ratio(a, x).max() <= 3
            norms = np.abs(a).sum(axis=1).max(axis=1) * np.abs(x).sum(axis=1).max(axis=1)
            np.testing.assert_allclose(rcond, 1 / norms, rtol=50 * n * eps)


@pytest.mark.parametrize("structure", ["symmetric", "hermitian", "positive definite"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_exactly_symmetric(run, structure, dtype):
    x, _, _ = run(conditioned(50, 7, 1e3, dtype, structure), structure)
    mirrored = x.swapaxes(1, 2) if structure == "symmetric" else x.conj().swapaxes(1, 2)
    assert np.array_equal(x, mirrored)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_failure_has_its_code_and_disturbs_no_neighbour(run, structure, dtype):
    n = 5
    clean = conditioned(40, n, 100, dtype, structure)
    expected, _, expected_rcond = run(clean, structure)
    a = clean.copy()
    a[3] = 0
    a[11, 1, 1] = np.nan
    a[12, 1, 1] = np.inf
    a[13, 1, 1] = -np.inf
    a[17] = np.eye(n) * np.finfo(dtype).smallest_subnormal
    x, info, rcond = run(a, structure)
    assert info[3] == 1
    assert list(info[11:14]) == [-1, -1, -1]
    assert info[17] == -2
    failed = np.flatnonzero(info)
    assert list(failed) == [3, 11, 12, 13, 17]
    assert np.isnan(x[failed]).all()
    if x.dtype.kind == "c":
        assert np.isnan(x[failed].real).all()
        assert np.isnan(x[failed].imag).all()
    assert rcond[3] == 0
    assert np.isnan(rcond[11:14]).all()
    good = np.setdiff1d(np.arange(40), failed)
    assert_same_bits(x[good], expected[good])
    assert_same_bits(rcond[good], expected_rcond[good])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_info_is_the_number_of_the_zero_pivot(run, k, dtype):
    diagonal = np.eye(4, dtype=dtype)
    diagonal[k - 1, k - 1] = 0
    for structure in STRUCTURES:
        assert run(diagonal[None], structure)[1][0] == k


def test_info_of_a_matrix_that_is_not_positive_definite(run):
    a = np.array([[[1.0, 0, 0], [0, 2, 3], [0, 3, 4]], [[-1.0, 0, 0], [0, 1, 0], [0, 0, 1]]])
    x, info, rcond = run(a, "positive definite")
    assert list(info) == [3, 1]
    assert np.isnan(x).all()
    assert not rcond.any()


UNREAD = {
    "symmetric": np.tri(4, k=-1, dtype=bool),
    "hermitian": np.tri(4, k=-1, dtype=bool),
    "positive definite": np.tri(4, k=-1, dtype=bool),
    "upper triangular": np.tri(4, k=-1, dtype=bool),
    "lower triangular": ~np.tri(4, dtype=bool),
    "diagonal": ~np.eye(4, dtype=bool),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", UNREAD)
def test_only_the_named_part_is_read(run, structure, dtype):
    a = conditioned(9, 4, 10, dtype, structure)
    expected = run(a, structure)
    a[:, UNREAD[structure]] = np.nan
    for got, want in zip(run(a, structure), expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("structure", ["hermitian", "positive definite"])
def test_the_imaginary_part_of_a_hermitian_diagonal_is_not_read(run, structure, dtype):
    a = conditioned(9, 4, 10, dtype, structure)
    a[:, range(4), range(4)] = a[:, range(4), range(4)].real
    expected = run(a, structure)
    a.imag[:, range(4), range(4)] = np.nan
    for got, want in zip(run(a, structure), expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("power", [-0.85, -0.31, 0.45, 0.9])
def test_a_power_of_two_changes_the_exponent_alone(run, structure, dtype, power):
    # Also near the ends of the range, where sums inside LAPACK would overflow or underflow.
    a = conditioned(30, 4, 50, dtype, structure)
    shift = round(power * np.finfo(dtype).maxexp)

    def times_power_of_two(b, power):
        return np.ldexp(b.view(b.real.dtype), power).view(b.dtype)

    x, _, rcond = run(a, structure)
    scaled, info, scaled_rcond = run(times_power_of_two(a, shift), structure)
    assert not info.any()
    assert_same_bits(scaled, times_power_of_two(x, -shift))
    assert_same_bits(scaled_rcond, rcond)


@pytest.mark.parametrize("structure", ["general", "upper triangular"])
def test_rcond_does_not_vanish_where_the_product_of_the_norms_overflows(run, structure):
    a = np.zeros((3, 4, 4), np.float32) + np.diag([0.9, 0.9, 0.9, 3e-38]).astype(np.float32)
    a[:, :-1, -1] = 0.9
    wide = a[0].astype(np.float64)
    want = 1 / np.linalg.norm(wide, 1) / np.linalg.norm(np.linalg.inv(wide), 1)
    assert want < np.finfo(np.float32).tiny
    _, info, rcond = run(a, structure)
    assert (info == 0).all()
    np.testing.assert_allclose(rcond, want, rtol=1e-5)


def test_overflow_of_the_inverse_is_not_singularity(run):
    for dtype in DTYPES:
        tiny = np.eye(3, dtype=dtype)[None] * np.finfo(dtype).tiny
        barely = tiny * 4
        assert list(run(np.concatenate([tiny / 64, barely]))[1]) == [-2, 0]


def test_where_an_inverse_is_the_largest_number_it_stands(run):
    a = np.diag([2.0**-1000, 2.0**1000])[None]
    x, info, rcond = run(a)
    assert not info.any()
    assert_same_bits(x, np.diag([2.0**1000, 2.0**-1000])[None])
    assert rcond[0] == 0  # 2**-2000 is less than the smallest number


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_the_smallest_number_in_one_matrix(run, structure, dtype):
    info = np.finfo(dtype)
    large = info.max / 64
    a = np.array([[[large, info.smallest_subnormal], [info.smallest_subnormal, 1]]]).astype(dtype)
    if structure in ("upper triangular", "lower triangular"):
        a = np.triu(a) if structure == "upper triangular" else np.tril(a)
    x, codes, _ = run(a, structure)
    assert codes[0] == 0
    np.testing.assert_allclose(x[0, [0, 1], [0, 1]], [1 / large, 1], rtol=4 * info.eps, atol=info.smallest_subnormal)


@pytest.mark.parametrize("structure", ["general", "symmetric", "hermitian"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_overflow_on_the_way_is_not_lost(run, backend, structure, dtype):
    """Where one number keeps a matrix from being scaled, a pivot may overflow, and its reciprocal must not be 0."""
    limits = np.finfo(dtype)
    b = 0.75 * float(limits.max)
    for n in {"cpu": (3, 8, 20, 34, 130, 520), "emulated": (3, 14, 34), "gpu": (3, 14, 34, 130)}[backend]:
        a = np.eye(n, dtype=dtype)[None] * limits.dtype.type(b)
        a[0, 0, 1], a[0, 0, -1], a[0, -1, 0] = b, limits.tiny, limits.tiny
        a[0, 1, :2] = (-b, b) if structure == "general" else (b, -b)
        want = [[0.5, -0.5], [0.5, 0.5]] if structure == "general" else [[0.5, 0.5], [0.5, -0.5]]
        by_lapack = results_for(a)
        lapack.invert(a, *by_lapack, structure=structure)
        for x, info, _ in (run(a, structure), by_lapack):
            if info[0]:
                assert info[0] == -2
            else:  # single precision is done again in double
                np.testing.assert_allclose(x[0, :2, :2] * b, want, rtol=1e-6)


@pytest.mark.parametrize("structure", ["general", "symmetric"])
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_parts_of_a_pivot_may_be_finite_where_their_sum_is_not(run, structure, dtype):
    limits = np.finfo(dtype)
    for n in (3, 14, 34):
        a = np.zeros((1, n, n), dtype)
        a.real[0, range(n), range(n)] = a.imag[0, range(n), range(n)] = limits.dtype.type(0.9) * limits.max
        a[0, 0, -1] = a[0, -1, 0] = limits.tiny
        x, info, rcond = run(a, structure)
        assert info[0] == -2 or (x[0, 0, 0] != 0 and rcond[0] > 0.1)


def test_single_precision_may_have_an_inverse_beyond_its_range_before_scaling(run):
    n = 150
    a = ((np.triu(-np.ones((n, n)), 1) + np.eye(n)) * 2.0**110).astype(np.float32)[None]
    x, info, _ = run(a)
    assert info[0] == 0
    np.testing.assert_allclose(x, np.linalg.inv(a.astype(float)), rtol=1e-5)


def test_an_output_of_any_layout():
    a = conditioned(5, 3, 10, "complex128")
    out = np.empty(a.shape, a.dtype, order="F")
    choose_kernel("general").invert(a, out, np.empty(5, np.int32), np.empty(5))
    assert_same_bits(out, run_cpu(a)[0])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_empty_stacks_and_matrices(run, structure):
    x, info, _ = run(np.empty((0, 3, 3)), structure)
    assert x.shape == (0, 3, 3)
    assert info.shape == (0,)
    x, info, rcond = run(np.empty((4, 0, 0)), structure)
    assert x.shape == (4, 0, 0)
    assert not info.any()
    assert (rcond == 1).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_input_is_never_changed(run, structure):
    a = conditioned(10, 4, 10, "float64", structure)
    a[2] = 0
    before = a.copy()
    a.flags.writeable = False
    run(a, structure)
    assert_same_bits(a, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_place_in_the_stack(run, backend, dtype):
    rng = np.random.default_rng(5)
    for n in (*SIZES[backend], 129):
        a = conditioned(25, n, 1e4, dtype)
        order = rng.permutation(25)
        x, _, rcond = run(a)
        shuffled, _, shuffled_rcond = run(a[order])
        assert_same_bits(shuffled, x[order])
        assert_same_bits(shuffled_rcond, rcond[order])
        for i in range(0, 25, 6):
            assert_same_bits(run(a[i : i + 1])[0][0], x[i])


def test_groups_do_not_show(monkeypatch):
    a = conditioned(100, 4, 100)
    a[::7] = 0
    whole = run_cpu(a)
    monkeypatch.setattr(lapack, "GROUP_NBYTES", 3 * 4 * 4 * 8)
    for got, want in zip(run_cpu(a), whole, strict=True):
        assert_same_bits(got, want)


def test_a_blas_whose_determinant_disagrees_is_survived(monkeypatch):
    a = conditioned(50, 4, 100)
    a[[7, 8, 30]] = 0
    expected = run_cpu(a)
    monkeypatch.setattr(np.linalg, "slogdet", lambda s: (np.ones(len(s)), np.zeros(len(s))))
    for got, want in zip(run_cpu(a), expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a[::2],
        lambda a: a[:, ::-1, ::-1],
        lambda a: a.swapaxes(1, 2),
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(a.dtype.newbyteorder("S")),
        lambda a: np.broadcast_to(a[:1], a.shape),
    ],
    ids=["every second", "reversed", "transposed", "Fortran order", "swapped bytes", "broadcast"],
)
def test_any_layout_gives_the_bits_of_a_plain_copy(make):
    a = make(conditioned(12, 3, 10))
    a.flags.writeable = False
    for got, want in zip(
        invert_block(a, dtype="float64"), run_cpu(np.array(a, dtype="float64", order="C")), strict=True
    ):
        assert_same_bits(got, want)


def test_min_rcond():
    a = np.array([np.diag([1.0, 1e-3]), np.diag([1.0, 1e-1]), np.zeros((2, 2))])
    x, info, rcond = invert_block(a, dtype="float64", min_rcond=1e-2)
    assert list(info) == [-3, 0, 1]
    assert np.isnan(x[0]).all()
    np.testing.assert_allclose(rcond, [1e-3, 1e-1, 0])


def test_blas_has_one_thread_inside_and_as_many_as_before_outside():
    def threads():
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    before = threads()
    assert before
    inside, entered, leave = [], threading.Event(), threading.Event()

    def other():
        with one_blas_thread():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with one_blas_thread():
        inside = threads()
    still = threads()  # the other thread is inside yet
    leave.set()
    thread.join()
    assert set(inside) == set(still) == {1}
    assert threads() == before


def test_the_choice_of_kernel():
    assert choose_kernel("general").device == "cpu"
    with pytest.raises(ValueError, match=r"assume_a must be one of 'general'.*got 'pos'"):
        choose_kernel("pos")
    with pytest.raises(ValueError, match="device must be one of"):
        choose_kernel("general", "tpu")
    assert choose_kernel("general", "gpu").device == "gpu"
