"""Tensors of torch: opened without a copy, and their inverses differentiable as those of `torch.inverse` are.

torch is imported by none of this until a tensor came in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from dask_batchinv.kernels.device import is_gpu_array
from dask_batchinv.stack import AssumeA


def is_tensor(a: Any) -> bool:
    """Tell whether something is a tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(a, torch.Tensor)


def opened(a: Any, assume_a: AssumeA, *, lower: bool) -> tuple[Any, Callable[[str, Any], Any]]:
    """Return the numbers of a tensor as NumPy's or CuPy's array, and what makes tensors of results.

    Raises
    ------
    TypeError
        If it is not a dense tensor in main memory or on a CUDA device.
    """
    import torch

    a = _widened(a)
    numbers = _memory_of(a)

    def close(part: str, value: Any) -> Any:
        if part in ("sign", "logdet") and _has_derivative(a):
            raise TypeError("determinants have no derivative here: use torch.linalg.slogdet, or pass a.detach()")
        tensor = torch.from_dlpack(value) if is_gpu_array(value) else torch.from_numpy(value)
        if part == "inverse" and _has_derivative(a):
            tensor = _differentiable().apply(_read(a, assume_a, lower), [tensor])
        return tensor

    return numbers, close


def numbers_for_out(a: Any) -> Any:
    """Return the numbers of a tensor as NumPy's or CuPy's array; TypeError if a derivative would be lost."""
    if _has_derivative(a):
        raise TypeError("out= has no derivative, but the input requires one: use what is returned, or pass a.detach()")
    return _memory_of(_widened(a))


def _has_derivative(a: Any) -> bool:
    import torch
    from torch.autograd import forward_ad

    return (a.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(a).tangent is not None


def memory_of_out(out: Any) -> Any:
    """Return the memory of a tensor that results are written into as NumPy's or CuPy's array.

    Raises
    ------
    TypeError
        If that cannot be.
    """
    if out.requires_grad:
        raise TypeError("out= is a tensor that requires a gradient, which would be wrong: use what is returned instead")
    if out.is_conj() or out.is_neg():
        raise TypeError("out= is a conjugate or negative view: pass the tensor itself")
    return _memory_of(out)


def mark_changed(out: Any) -> None:
    """Tell autograd that a tensor was written into, so that it does not take its numbers for what they were."""
    import torch

    torch.autograd.graph.increment_version(out)


def _widened(a: Any) -> Any:
    import torch

    # By torch's own cast, which carries the gradient on; NumPy has no bfloat16.
    return a.float() if a.dtype in (torch.float16, torch.bfloat16) else a


def _memory_of(a: Any) -> Any:
    import torch

    if type(a) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(
            f"expected a torch.Tensor, got {type(a).__name__}: pass a.as_subclass(torch.Tensor) if its numbers alone "
            "are meant"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(a):
        raise TypeError(
            "dask_batchinv computes outside of torch.func: call it on the tensors themselves, with autograd, or use "
            "torch.linalg.inv there"
        )
    if a.layout is not torch.strided or a.is_quantized or a.is_nested:
        raise TypeError(f"expected a dense tensor, got one of layout {a.layout}: pass a.to_dense() or torch.stack(a)")
    # Views that torch conjugates or negates only when they are read.
    a = a.detach().resolve_conj().resolve_neg()
    if a.device.type == "cpu":
        return a.numpy()
    if a.device.type == "cuda":
        import cupy

        return cupy.from_dlpack(a)
    raise TypeError(f"a tensor on the device {a.device} has no inverse here: pass a.cpu()")


@lru_cache(maxsize=1)
def _differentiable() -> Any:
    import torch

    class Inverse(torch.autograd.Function):  # type: ignore[misc]  # known only here
        """Takes matrices, and in a list their inverses, and gives these as functions of the matrices."""

        @staticmethod
        def forward(ctx: Any, a: Any, inverses: list[Any]) -> Any:
            (x,) = inverses
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return x

        # d(A⁻¹) = -A⁻¹ dA A⁻¹ (Giles, An extended collection of matrix derivative results, 2008, 2.2.3)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            (x,) = ctx.saved_tensors
            return -x.mH @ gradient @ x.mH, None

        @staticmethod
        def jvp(ctx: Any, tangent: Any, nothing: Any) -> Any:
            (x,) = ctx.saved_tensors
            return -x @ tangent @ x

    return Inverse


def _read(a: Any, assume_a: AssumeA, lower: bool) -> Any:
    """Return the matrices that are read, as torch's function of the tensor: as `kernels.read_part`."""
    if assume_a == "general":
        return a
    if assume_a == "diagonal":
        return a.diagonal(dim1=-2, dim2=-1).diag_embed()
    if assume_a == "upper triangular":
        return a.triu()
    if assume_a == "lower triangular":
        return a.tril()
    half = a.tril(-1) if lower else a.triu(1)
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    if assume_a == "symmetric":
        return half + half.mT + diagonal.diag_embed()
    return half + half.mH + diagonal.real.to(a.dtype).diag_embed()
