"""Tensors: what a user of torch expects, and nothing else changed."""

import dask.array as da
import numpy as np
import pytest

from dask_batchinv import InverseEx, SingularMatrixError, inverse, inverse_ex
from tests.support.stacks import DTYPES, STRUCTURES, assert_same_bits, conditioned

torch = pytest.importorskip("torch", reason="torch is not installed")


def test_the_examples_on_the_page_of_torch(monkeypatch):
    monkeypatch.setattr(torch, "inverse", inverse)
    torch.manual_seed(0)
    x = torch.rand(4, 4)
    y = torch.inverse(x)
    z = torch.mm(x, y)
    assert torch.max(torch.abs(z - torch.eye(4))) < 1e-5
    x = torch.randn(2, 3, 4, 4)
    y = torch.inverse(x)
    z = torch.matmul(x, y)
    assert torch.max(torch.abs(z - torch.eye(4).expand_as(x))) < 1e-4


def test_the_examples_for_batches():
    a = torch.tensor([[[-0.9808, -1.5437, 1.1773], [-0.8945, -1.2584, 1.6299], [0.8855, 0.3088, -1.4001]],
                      [[0.4860, -0.8735, -1.1052], [-0.4737, -2.8350, 0.1861], [1.7559, -0.4935, 0.7353]]])  # fmt: skip
    x = inverse(a)
    assert torch.allclose(torch.matmul(a, x), torch.eye(3), atol=1e-5)
    one = torch.tensor([[1.0, 2, 3], [0, 1, 4], [5, 6, 0]]) * torch.ones(3, 1, 1)
    assert torch.allclose(inverse(one), torch.inverse(one), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_device_and_bits(dtype):
    a = conditioned(5, 3, 10, dtype)
    t = torch.tensor(a)
    x = inverse(t)
    assert type(x) is torch.Tensor
    assert (x.dtype, x.device) == (t.dtype, t.device)
    assert_same_bits(x.numpy(), inverse(a))
    ex = inverse_ex(t)
    assert isinstance(ex, InverseEx)
    assert ex.info.dtype == torch.int32
    assert ex.rcond.dtype == t.real.dtype
    assert_same_bits(t.numpy(), a)


def test_small_dtypes_and_integers():
    t = torch.tensor([[2.0, 1], [1, 3]])
    for dtype in (torch.float16, torch.bfloat16):
        assert inverse(t.to(dtype)).dtype == torch.float32
    assert inverse(t.int()).dtype == torch.float64


def test_views_of_any_kind():
    t = torch.tensor(conditioned(6, 3, 10, "complex128"))
    views = [t.conj(), t.mH, t.mT, t[::2], t[0].expand(4, 3, 3), t.real, t.conj().imag, t.unflatten(0, (2, 3))]
    assert views[0].is_conj()
    assert views[6].is_neg()
    for view in views:
        assert torch.allclose(inverse(view), torch.inverse(view), rtol=1e-9)


def test_no_copy_is_made_on_the_way(monkeypatch):
    t = torch.tensor(conditioned(6, 3, 10))
    seen = []
    original = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda a: seen.append(a) or original(a))
    x = inverse(t)
    assert seen[0].ctypes.data == x.data_ptr()
    out = torch.empty_like(t)
    assert inverse(t, out=out, on_error="nan") is out
    assert torch.equal(out, x)


# --- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("assume_a", STRUCTURES)
def test_gradients(dtype, assume_a, lower):
    a = conditioned(2, 3, 4, str(dtype).removeprefix("torch."), "positive definite")
    t = torch.tensor(a, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: inverse(t, assume_a=assume_a, lower=lower), (t,))
    if assume_a == "general":
        assert torch.autograd.gradgradcheck(inverse, (t,))
        assert torch.autograd.gradcheck(lambda t: inverse_ex(t).inverse, (t,))


def test_gradients_are_those_of_torch():
    for dtype in (torch.float32, torch.complex64):
        gradients = []
        for function in (inverse, torch.inverse):
            t = torch.tensor(conditioned(4, 3, 3), dtype=dtype, requires_grad=True)
            (function(t).abs() ** 2).sum().backward()
            gradients.append(t.grad)
        assert torch.allclose(*gradients, rtol=1e-4)
    half = torch.eye(2, dtype=torch.bfloat16, requires_grad=True)
    inverse(half).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_where_there_is_no_gradient():
    t = torch.eye(2, requires_grad=True)
    with torch.no_grad():
        assert not inverse(t).requires_grad
    ex = inverse_ex(t)
    assert ex.inverse.requires_grad
    assert not ex.rcond.requires_grad
    assert inverse(torch.nn.Parameter(torch.eye(2))).requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it first differentiates forwards
def test_forward_derivatives():
    from torch.autograd import forward_ad

    t = torch.tensor(conditioned(2, 3, 4), requires_grad=True)
    assert torch.autograd.gradcheck(inverse, (t,), check_forward_ad=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t.detach(), torch.ones_like(t))
        found, want = (forward_ad.unpack_dual(function(dual)).tangent for function in (inverse, torch.inverse))
        assert torch.allclose(found, want, rtol=1e-9)


def test_autograd_knows_that_out_has_changed():
    weight, out = torch.ones(3, 3, requires_grad=True), torch.ones(3, 3)
    loss = (weight * out).sum()
    inverse(2 * torch.eye(3), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_result_may_be_changed_in_place():
    t = torch.tensor(conditioned(2, 3, 4), requires_grad=True)
    x = inverse(t)
    x.mul_(2)  # torch says what is wrong if it was needed for a gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


# --- out and refusals -----------------------------------------------------------------------------------------


def test_out_is_a_tensor():
    a = conditioned(6, 3, 10)
    for source in (
        torch.tensor(a),
        a,
        da.from_array(a, chunks=(2, 3, 3)),
        torch.tensor(a, requires_grad=True).detach(),
    ):
        out = torch.empty(a.shape, dtype=torch.float64)
        assert inverse(source, out=out) is out
        assert_same_bits(out.numpy(), inverse(a))
    t = torch.tensor(a)
    with pytest.raises(ValueError, match="out overlaps the input"):
        inverse(t, out=t)
    with pytest.raises(TypeError, match="out has dtype float32"):
        inverse(t, out=torch.empty(a.shape))
    with pytest.raises(ValueError, match="out has shape"):
        inverse(t, out=torch.empty(3, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="requires a gradient"):
        inverse(t, out=torch.empty(a.shape, dtype=torch.float64, requires_grad=True))
    with pytest.raises(ValueError, match="elements of out share their memory"):
        inverse(t, out=torch.empty(3, 3, dtype=torch.float64).expand(6, 3, 3))
    with pytest.raises(TypeError, match="out= has no derivative"):
        inverse(torch.tensor(a, requires_grad=True), out=torch.empty(a.shape, dtype=torch.float64))
    with pytest.raises(TypeError, match="conjugate or negative view"):
        inverse(t + 0j, out=torch.empty(a.shape, dtype=torch.complex128).conj())
    with pytest.raises(TypeError, match="out= does not take what comes of Tensor"):
        inverse(t, out=np.empty(a.shape))


def test_failures_are_as_everywhere():
    t = torch.zeros(2, 2, 2)
    with pytest.raises(SingularMatrixError) as caught:
        inverse(t)
    assert caught.value.indices == ((0,), (1,))
    assert inverse(t, on_error="nan").isnan().all()


def test_other_tensors_are_refused():
    for wrong in (torch.eye(2).to_sparse(), torch.eye(2, device="meta")):
        with pytest.raises(TypeError, match=r"pass a\.(to_dense|cpu)\(\)"):
            inverse(wrong)
    for transformed in (torch.func.vmap(inverse), torch.func.grad(lambda t: inverse(t).sum())):
        with pytest.raises(TypeError, match=r"outside of torch\.func: call it on the tensors"):
            transformed(torch.eye(2).expand(2, 2, 2))

    class Subclass(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"pass a\.as_subclass\(torch\.Tensor\)"):
        inverse(torch.eye(2).as_subclass(Subclass))
    with pytest.raises(TypeError, match="stack its items first"):
        inverse([torch.eye(2)])
