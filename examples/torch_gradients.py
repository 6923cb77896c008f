"""Gradients through inverses: a maximum-likelihood fit of covariances with torch.

An instrument measures vectors of four channels, one per pixel. The covariance of each is the sum of a signal, which
has the same shape everywhere and a strength that is known for each pixel, and of the noise of the channels:

    S = strength · L Lᵀ + diag(exp(log_noise))

Ten numbers of the triangle L and four of the noise are to be found by maximum likelihood, from one vector r of each
pixel. The likelihood needs rᵀ S⁻¹ r, and its gradient goes through an inverse for every pixel, of every step of the
fit. `dask_batchinv.inverse` takes the place of `torch.linalg.inv`: the gradients are the same, as is the fit. It is
differentiable twice, so that the Hessian at the maximum gives the standard errors.

    python examples/torch_gradients.py OUTPUT_FOLDER
"""

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

if not find_spec("torch"):
    sys.exit("This example needs torch: pip install torch")

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

import dask_batchinv

PIXELS = 20_000
ROUNDS = 5
ROW, COLUMN = torch.tril_indices(4, 4)
NAMES = [f"L{i + 1}{j + 1}" for i, j in zip(ROW.tolist(), COLUMN.tolist(), strict=True)] + [
    f"log noise {i}" for i in (1, 2, 3, 4)
]
INVERSES = {"dask_batchinv": dask_batchinv.inverse, "torch": torch.linalg.inv}
TRUTH = torch.tensor([1.0, 0.6, 0.8, -0.3, 0.4, 0.7, 0.2, -0.5, 0.3, 0.9, -1.0, -0.5, -1.5, -0.7], dtype=torch.float64)


def covariances(parameters: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Return the covariance of each pixel."""
    L = torch.zeros(4, 4, dtype=parameters.dtype).index_put((ROW, COLUMN), parameters[:10])
    return strength[:, None, None] * (L @ L.T) + torch.diag(parameters[10:].exp())


def observe() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the strengths of the signal, and a vector drawn from the true covariance of each pixel."""
    rng = torch.Generator().manual_seed(1)
    strength = torch.randn(PIXELS, dtype=torch.float64, generator=rng).exp()
    noise = torch.randn(PIXELS, 4, 1, dtype=torch.float64, generator=rng)
    return strength, (torch.linalg.cholesky(covariances(TRUTH, strength)) @ noise)[..., 0]


def loss(
    parameters: torch.Tensor,
    strength: torch.Tensor,
    r: torch.Tensor,
    inverse: Callable[[torch.Tensor], torch.Tensor] = dask_batchinv.inverse,
) -> torch.Tensor:
    """Return minus the mean log likelihood of a pixel, but for a constant."""
    S = covariances(parameters, strength)
    mahalanobis = torch.einsum("pi,pij,pj->p", r, inverse(S), r)
    return (mahalanobis + torch.linalg.slogdet(S).logabsdet).mean() / 2


def fit(start: torch.Tensor, strength: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Return the parameters with the largest likelihood, and what the loss was on the way."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-12)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(parameters, strength, r)
        value.backward()
        losses.append(value.item())
        return value

    optimizer.step(closure)
    return parameters.detach(), losses


def gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a function at a point."""
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def times(strength: torch.Tensor, r: torch.Tensor, at: torch.Tensor) -> dict[tuple[str, str], float]:
    """Return the best times of parts of a step, with each of two inverses, in rounds in which all take turns."""
    a = covariances(at, strength).requires_grad_()
    weights = a.detach().clone()
    parts = {
        "the inverses": lambda inverse: inverse(a.detach()),
        "the inverses and their gradient": lambda inverse: torch.autograd.grad(inverse(a), a, weights),
        "a step, all of it": lambda inverse: gradient(lambda p: loss(p, strength, r, inverse), at),
    }
    best: dict[tuple[str, str], float] = {}
    for turn in range(ROUNDS + 1):
        for part, compute in parts.items():
            for name, inverse in INVERSES.items():
                begin = time.perf_counter()
                compute(inverse)
                seconds = time.perf_counter() - begin
                if turn:  # the first call compiles, and does not count
                    best[part, name] = min(seconds, best.get((part, name), seconds))
    return best


def draw(found: torch.Tensor, error: torch.Tensor, losses: list[float], path: Path) -> None:
    """Draw the way down, and how far the parameters are from those that made the data, in standard errors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    above = np.array(losses) - min(losses)
    left.semilogy(np.arange(1, len(above) + 1)[above > 0], above[above > 0], ".-", color="#0072b2")
    left.set(xlabel="evaluation of loss and gradient", ylabel="loss above the smallest")
    positions = np.arange(len(NAMES))
    right.axhspan(-2, 2, color="#dddddd", label="± 2 standard errors")
    right.plot(positions, (found - TRUTH) / error, "o", color="#d55e00", label="found - true")
    right.set_xticks(positions, NAMES, rotation=60, ha="right")
    right.set(ylabel="standard errors", ylim=(-4, 4))
    right.legend(loc="upper right")
    figure.savefig(path, dpi=100)


def begin_from(strength: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Return parameters to begin with: half of what is measured is taken for signal, half for noise."""
    half = torch.einsum("pi,pj->ij", r, r) / PIXELS / 2
    return torch.cat([torch.linalg.cholesky(half / strength.mean())[ROW, COLUMN], half.diagonal().log()])


def main(folder: Path) -> None:
    """Run the example."""
    folder.mkdir(parents=True, exist_ok=True)
    strength, r = observe()
    start = begin_from(strength, r)

    found, losses = fit(start, strength, r)
    hessian = torch.autograd.functional.hessian(lambda p: loss(p, strength, r), found)
    error = dask_batchinv.inverse(PIXELS * hessian, assume_a="positive definite").diagonal().sqrt()
    print(f"{PIXELS:,} pixels, {len(losses)} evaluations of loss and gradient\n")
    print("parameter     true    found   standard error")
    for name, true, value, width in zip(NAMES, TRUTH, found, error, strict=True):
        print(f"{name:12} {true:5.2f}  {value:7.4f}   {width:.4f}")

    ours, torchs = (gradient(lambda p, inverse=i: loss(p, strength, r, inverse), start) for i in INVERSES.values())
    print(f"\ngradient at the start, from that with torch.linalg.inv: {relative(ours, torchs):.1e}")
    _, info, rcond = dask_batchinv.inverse_ex(covariances(found, strength))
    print(f"at the maximum {int((info != 0).sum())} of {PIXELS:,} have no inverse; smallest rcond {rcond.min():.2g}")

    print(f"\n{PIXELS:,} matrices, 4 × 4, float64, {torch.get_num_threads()} thread(s), best of {ROUNDS} rounds")
    best = times(strength, r, start)
    for (part, name), seconds in best.items():
        print(f"{part:32} {name:14} {seconds * 1e3:7.1f} ms  {seconds / best[part, 'dask_batchinv']:5.1f} ×")

    draw(found, error, losses, folder / "torch_gradients.png")
    numbers = {"strength": strength, "r": r, "start": start, "gradient": ours, "found": found, "error": error}
    np.savez(folder / "torch_gradients.npz", true=TRUTH, **numbers)
    print(f"\npicture  {folder / 'torch_gradients.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
