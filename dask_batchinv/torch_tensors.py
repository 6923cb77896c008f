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
    gradient = a.requires_grad and torch.is_grad_enabled()

    def close(part: str, value: Any) -> Any:
        tensor = torch.from_dlpack(value) if is_gpu_array(value) else torch.from_numpy(value)
        if part == "inverse" and gradient:
            tensor = _differentiable().apply(_read(a, assume_a, lower), tensor)
        return tensor

    return _memory_of(a), close


def numbers_of(a: Any) -> Any:
    """Return the numbers of a tensor as NumPy's or CuPy's array, without its gradient."""
    return _memory_of(_widened(a.detach()))


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


def _widened(a: Any) -> Any:
    import torch

    # By torch's own cast, which carries the gradient on; NumPy has no bfloat16.
    return a.float() if a.dtype in (torch.float16, torch.bfloat16) else a


def _memory_of(a: Any) -> Any:
    import torch

    if type(a) not in (torch.Tensor, torch.nn.Parameter) or a.layout is not torch.strided or a.is_quantized:
        raise TypeError(f"expected a dense tensor, got a {type(a).__name__} of layout {a.layout}: pass a.to_dense()")
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
        """Takes matrices and their inverses, and gives these, as functions of the matrices."""

        @staticmethod
        def forward(ctx: Any, a: Any, x: Any) -> Any:
            x = x.view_as(x)
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            # d(A⁻¹) = -A⁻¹ dA A⁻¹ (Giles, An extended collection of matrix derivative results, 2008, 2.2.3)
            (x,) = ctx.saved_tensors
            return -x.mH @ gradient @ x.mH, None

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
