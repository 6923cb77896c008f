"""Noise of a polarisation map: one 3 x 3 covariance of I, Q and U per pixel, from packed triangles.

A detector that is sensitive to polarisation sees d = I + Q cos 2ψ + U sin 2ψ + noise, where ψ is its angle on the sky.
All samples that fall into one pixel make its normal matrix, the sum of (1, cos 2ψ, sin 2ψ) times itself, over the
variance of the noise. Its inverse is the covariance of the three numbers of the map, and takes the sums of the data
to the map itself. Where the sky was seen under too few angles, I, Q and U cannot be told apart, and the pixel is cut.

Two detectors at right angles scan a strip of the sky in circles. A plane grid of pixels stands for the sphere.

    python examples/cmb_pixel_covariances.py OUTPUT_FOLDER
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

SHAPE = 120, 240
#: Standard deviation of the noise of one sample, in µK.
NOISE = 300.0
#: Where the numbers of a packed matrix stand in the whole one: the upper triangle by rows.
ROWS, COLUMNS = np.triu_indices(3)
PAIRS = ["II", "IQ", "IU", "QQ", "QU", "UU"]


def scan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixel of each sample, as an index into the flat map, and its angle ψ."""
    ny, nx = SHAPE
    radius = 0.31 * ny
    centre = np.linspace(-radius, nx + radius, 900)[:, None]
    phase = rng.uniform(0, 2 * np.pi, centre.shape) + np.linspace(0, 2 * np.pi, 700, endpoint=False)
    # The axis of the circles wobbles, and with it the strip.
    axis = ny / 2 + ny / 8 * np.sin(2 * np.pi * centre / nx)
    y, x = axis + radius * np.sin(phase), centre + radius * np.cos(phase)
    seen = (x >= 0) & (x < nx)
    pixel = (y.astype(int) * nx + x.astype(int))[seen]
    # One detector along the circle, one across it.
    along = phase[seen] + np.pi / 2
    return np.concatenate([pixel, pixel]), np.concatenate([along, along + np.pi / 2])


def binned(pixel: np.ndarray, psi: np.ndarray, data: np.ndarray) -> xr.Dataset:
    """Return the packed normal matrices, the weighted sums of the data, and the number of samples of each pixel."""
    weights = np.stack([np.ones_like(psi), np.cos(2 * psi), np.sin(2 * psi)])

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(pixel, values, minlength=SHAPE[0] * SHAPE[1]).reshape(SHAPE)

    normal = np.stack([summed(weights[i] * weights[j]) for i, j in zip(ROWS, COLUMNS, strict=True)], axis=-1)
    sums = np.stack([summed(weight * data) for weight in weights], axis=-1)
    return xr.Dataset(
        {
            "normal_matrix": (("y", "x", "pair"), normal / NOISE**2, {"units": "µK-2"}),
            "weighted_sum": (("y", "x", "stokes"), sums / NOISE**2, {"units": "µK-1"}),
            "hits": (("y", "x"), summed(np.ones_like(psi)).astype(int)),
        },
        {"pair": PAIRS, "stokes": ["I", "Q", "U"]},
    )


def unpacked(packed: np.ndarray) -> np.ndarray:
    """Return whole matrices (..., 3, 3)."""
    whole = np.empty((*packed.shape[:-1], 3, 3))
    whole[..., ROWS, COLUMNS] = whole[..., COLUMNS, ROWS] = packed
    return whole


def draw(found: xr.Dataset, hits: xr.DataArray, path: Path) -> None:
    """Draw how often each pixel was seen, how well conditioned its matrix is, what was cut, and the error of Q."""
    cut = xr.where(hits == 0, 1, xr.where(found["info"] != 0, 2, 0))
    error = np.sqrt(found["inverse"].sel(pair="QQ"))
    figure, axes = plt.subplots(2, 2, figsize=(9, 4.6), layout="constrained")
    hits.where(hits > 0).plot.imshow(ax=axes[0, 0], robust=True, cmap="viridis", cbar_kwargs={"label": ""})
    np.log10(found["rcond"].where(found["rcond"] > 0)).plot.imshow(
        ax=axes[0, 1], vmin=-3.5, cmap="cividis", cbar_kwargs={"label": ""}
    )
    colors = ListedColormap(plt.get_cmap("cividis")([0.3, 0.0, 1.0]))
    ticks = {"ticks": range(3), "label": ""}
    drawn = cut.plot.imshow(ax=axes[1, 0], cmap=colors, vmin=-0.5, vmax=2.5, cbar_kwargs=ticks)
    drawn.colorbar.ax.set_yticklabels(["in the map", "not observed", "singular or cut"])
    error.plot.imshow(ax=axes[1, 1], robust=True, cmap="viridis", cbar_kwargs={"label": ""})
    titles = ["samples", "log₁₀ rcond", "what became of each pixel", "standard error of Q (µK)"]
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set(title=title, xlabel="", ylabel="", aspect="equal", xticks=[], yticks=[])
        ax.set_facecolor("0.8")
    figure.savefig(path, dpi=100)


def main(folder: Path) -> None:
    """Run the example."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "normal_matrices.zarr", folder / "covariances.zarr"
    for old in (source, target):
        shutil.rmtree(old, ignore_errors=True)

    rng = np.random.default_rng(0)
    pixel, psi = scan(rng)
    # A sky without signal: the map is then noise alone, and known to be that of the covariances.
    sky = binned(pixel, psi, NOISE * rng.standard_normal(pixel.size))
    sky.chunk(y=30).to_zarr(source, zarr_format=2)

    report = dask_batchinv.invert_store(
        source,
        target,
        variable="normal_matrix",
        packed="upper by rows",
        assume_a="positive definite",
        min_rcond=1e-3,
        like_source=True,
        max_failed=None,
    )
    with dask.config.set(scheduler="threads"):
        found = xr.open_zarr(target, consolidated=False).load()
    print(f"{report}\n")

    covariance = unpacked(found["inverse"].values)
    stokes = sky.weighted_sum.copy(data=np.einsum("...ij,...j->...i", covariance, sky.weighted_sum.values))
    stokes.assign_attrs(units="µK").to_dataset(name="noise_map").to_zarr(
        folder / "noise_map.zarr", mode="w", zarr_format=2
    )

    seen, info = sky.hits.values > 0, found["info"].values
    good = info == 0
    chi2 = np.einsum("...i,...i->...", stokes.values, sky.weighted_sum.values)[good]
    # As TOAST has it: the smallest eigenvalue over the largest.
    eigenvalues = np.linalg.eigvalsh(unpacked(sky.normal_matrix.values[seen]))
    cut_there = eigenvalues[:, 0] < 1e-3 * eigenvalues[:, -1]
    errors = [f"{np.median(covariance[good][:, i, i]) ** 0.5:.1f}" for i in range(3)]
    print(f"samples                     {pixel.size:,} in {seen.sum():,} of {seen.size:,} pixels")
    print(f"not observed                {(~seen).sum():,}, all with info 1: {bool((info[~seen] == 1).all())}")
    print(f"observed and cut            {(~good & seen).sum():,}, singular or with rcond below 1e-3")
    print(f"cut by their eigenvalues    {cut_there.sum():,}, all of them cut here: {not good[seen][cut_there].any()}")
    print(f"standard errors of I, Q, U  {', '.join(errors)} µK (medians)")
    print(f"χ² of the noise map         {chi2.mean():.3f} per pixel, 3 expected")
    draw(found, sky.hits, folder / "cmb_pixel_covariances.png")
    print(f"picture                     {folder / 'cmb_pixel_covariances.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
