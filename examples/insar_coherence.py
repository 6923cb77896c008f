"""How well can a phase history be known? The Cramér-Rao bound of InSAR time series, pixel by pixel.

A radar satellite passes over the same ground n times. What a pixel has in common from pass to pass is its coherence
matrix, n x n, with ones on the diagonal. Whatever the estimator, the phases of the passes cannot be known better than
the Cramér-Rao bound: with L looks their Fisher information is X = 2 L (|Γ| ∘ |Γ|⁻¹ - I), where ∘ multiplies element by
element (Guarnieri and Tebaldini, IEEE Signal Processing Letters 14, 2007). Phases are relative: the rows of X sum to
zero. With the first pass as the reference, its row and column go, and the inverse of the rest is the covariance.

The ground is simulated: fields that decorrelate from pass to pass, |γ_ij| = ρ^|i-j|, and a town whose coherence does
not depend on time, |γ_ij| = ρ. On the water nothing is coherent, behind the mountain there are no data, and one
building is coherent to the last digit.

    python examples/insar_coherence.py OUTPUT_FOLDER
"""

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import dask
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.colors import ListedColormap

import dask_batchinv

PASSES = [10, 30, 60]
LOOKS = 50
FIELD, TOWN, WATER, SHADOW, BUILDING = range(5)
OUTCOMES = ["bound found", "no data", "singular: coherence 1", "no information"]


def ground(ny: int = 24, nx: int = 36) -> xr.Dataset:
    """Return what each pixel is, and its ρ: the coherence of neighbouring passes, in the town that of all passes."""
    y, x = np.mgrid[:ny, :nx]
    kind = np.where((y - 9) ** 2 + (x - 11) ** 2 < 40, TOWN, FIELD)
    kind[(y > 18) & (x < 16)] = WATER
    kind[x + y > 50] = SHADOW
    kind[5, 12] = BUILDING
    noise = np.random.default_rng(0).uniform(-0.03, 0.03, kind.shape)
    rho = np.select([kind == TOWN, kind == WATER, kind == BUILDING], [0.6, 0.0, 1.0], 0.5 + 0.4 * x / nx)
    rho = np.where(np.isin(kind, [FIELD, TOWN]), rho + noise, rho)
    return xr.Dataset({"kind": (("y", "x"), kind), "rho": (("y", "x"), rho)})


def coherence_matrices(scene: xr.Dataset, n: int) -> xr.DataArray:
    """Return |Γ| of every pixel: zero where there are no data."""
    lag = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    rho = scene.rho.values[..., None, None]
    kind = scene.kind.values[..., None, None]
    constant = np.where(lag == 0, 1.0, rho)
    gamma = np.where(np.isin(kind, [TOWN, BUILDING]), constant, rho**lag)
    return xr.DataArray(np.where(kind == SHADOW, 0.0, gamma), dims=("y", "x", "i", "j"), name="coherence")


def covariances(gamma: xr.DataArray, inverse: xr.DataArray) -> xr.Dataset:
    """Return the bound of the phases against that of the first pass: `inverse`, `info` and `rcond`."""
    fisher = 2 * LOOKS * (gamma * inverse - np.eye(gamma.sizes["i"]))
    return fisher[..., 1:, 1:].linalg.inv_ex(dims=("i", "j"), assume_a="positive definite")


def outcomes(first: xr.DataArray, second: xr.DataArray) -> xr.DataArray:
    """Return a number of `OUTCOMES` for every pixel, from the `info` of both inversions."""
    return xr.where(first == 1, 1, xr.where(first > 1, 2, xr.where(second > 0, 3, 0)))


def draw_map(scene: xr.Dataset, bound: xr.DataArray, outcome: xr.DataArray, rcond: xr.DataArray, path: Path) -> None:
    """Draw the bound of the last pass, what became of each pixel, and how well conditioned its matrix is."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 2.8), layout="constrained")
    bound.plot.imshow(ax=axes[0], robust=True, cmap="viridis", cbar_kwargs={"label": ""})
    colors = ListedColormap(plt.get_cmap("cividis")([0.3, 0.0, 1.0, 0.7]))
    ticks = {"ticks": range(4), "label": ""}
    drawn = outcome.plot.imshow(ax=axes[1], cmap=colors, vmin=-0.5, vmax=3.5, cbar_kwargs=ticks)
    drawn.colorbar.ax.set_yticklabels(OUTCOMES)
    np.log10(rcond.where(rcond > 0)).plot.imshow(ax=axes[2], cmap="cividis", cbar_kwargs={"label": ""})
    titles = [f"bound of phase {int(bound['pass'])} (rad)", "what became of each pixel", "log₁₀ rcond of |Γ|"]
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel="", ylabel="", aspect="equal", xticks=[], yticks=[])
        ax.set_facecolor("0.8")
    figure.savefig(path, dpi=100)


def draw_histories(histories: dict[int, tuple[xr.Dataset, xr.DataArray]], path: Path) -> None:
    """Draw the bound of one field and of one pixel of the town as it grows, or does not, with time."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    shades = plt.get_cmap("viridis")([0.0, 0.4, 0.75])
    for ax, (name, y, x) in zip(axes, [("field", 9, 27), ("town", 9, 11)], strict=True):
        # Marks are hollow, and smaller from series to series: they lie upon each other.
        for (n, (scene, bound)), shade, size in zip(histories.items(), shades, [9, 6, 3], strict=True):
            rho = float(scene.rho[y, x])
            ax.plot(range(1, n), closed_form(name, rho, n), "-", color=shade, linewidth=1)
            marks = {"color": shade, "markersize": size, "markerfacecolor": "none"}
            ax.plot(range(1, n), bound[y, x], "o", label=f"{n} passes", **marks)
        ax.set(title=f"{name}, ρ = {rho:.2f}", xlabel="pass", ylabel="bound of its phase (rad)")
        ax.legend(title="circles: computed, lines: closed form")
    figure.savefig(path, dpi=100)


def closed_form(name: str, rho: float, n: int) -> np.ndarray:
    """Return the bound of passes 1 to n - 1, from the inverses of |Γ| that are known: tridiagonal, Sherman-Morrison.

    X is the Laplacian of a graph: a path for fields, whose resistances add up, the complete graph for towns.
    """
    passes = np.arange(1, n)
    if name == "field":
        return np.sqrt(passes * (1 - rho**2) / (2 * LOOKS * rho**2))
    return np.full(n - 1, np.sqrt((1 - rho) * (1 + (n - 1) * rho) / (n * LOOKS * rho**2)))


def main(folder: Path) -> None:
    """Run the example."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = ground()
    scene.to_zarr(folder / "ground.zarr", mode="w", consolidated=False)
    histories = {}
    for n in PASSES:
        source, target = folder / f"coherence_{n}.zarr", folder / f"inverse_{n}.zarr"
        for old in (source, target):
            shutil.rmtree(old, ignore_errors=True)
        coherence_matrices(scene, n).to_dataset().chunk(y=6).to_zarr(source, consolidated=False)
        report = dask_batchinv.invert_store(
            source, target, variable="coherence", assume_a="positive definite", max_failed=None
        )
        checked = dask_batchinv.verify_store(target, source=source)

        with dask.config.set(scheduler="threads"):
            gamma = xr.open_zarr(source, consolidated=False)["coherence"].load()
            account = xr.open_zarr(target, consolidated=False).load()
        phases = covariances(gamma, account["inverse"])
        variance = xr.DataArray(np.einsum("...kk->...k", phases["inverse"].values), dims=("y", "x", "pass"))
        bound = np.sqrt(variance).assign_coords({"pass": range(1, n)})
        outcome = outcomes(account["info"], phases["info"])
        histories[n] = scene, bound
        bound.to_dataset(name="bound").to_zarr(folder / f"bound_{n}.zarr", mode="w", consolidated=False)

        counts = ", ".join(f"{int((outcome == k).sum())} {name}" for k, name in enumerate(OUTCOMES))
        good = account["rcond"].where(account["info"] == 0)
        print(f"{n} passes: {report.n_failed} of {outcome.size} without an inverse, verified: {checked.ok}")
        print(f"  {counts}")
        print(f"  rcond of |Γ| from {float(good.min()):.1e} to {float(good.max()):.1e}")
        for name, kind in [("field", FIELD), ("town", TOWN)]:
            last = bound.values[scene.kind.values == kind, -1]
            expected = [closed_form(name, rho, n)[-1] for rho in scene.rho.values[scene.kind.values == kind]]
            met = np.allclose(last, expected, rtol=1e-9)
            print(f"  {name:5}  median bound of the last phase {np.median(last):.3f} rad, as in closed form: {met}")
        if n == PASSES[1]:
            draw_map(scene, bound[..., -1], outcome, account["rcond"], folder / "insar_coherence.png")
    draw_histories(histories, folder / "insar_coherence_histories.png")
    print(f"\npictures  {folder / 'insar_coherence.png'}, {folder / 'insar_coherence_histories.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
