"""Standard errors of the diffusion tensor, voxel by voxel.

In diffusion MRI the log signal of a voxel is linear in seven parameters: the six elements of its diffusion tensor
and the log of its signal without diffusion weighting. The weighted-least-squares fit has the normal matrix X'WX, 7 x 7
and symmetric positive definite, one per voxel, because the weights are the squared signals of that voxel. Its inverse,
times the variance of the residuals, is the covariance of the seven parameters: the square roots of its diagonal are
their standard errors.

The data are a real volume of 10 x 10 x 10 voxels with 64 gradient directions, which comes with the package dipy.

    python examples/diffusion_mri.py OUTPUT_FOLDER
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
from dipy.core.gradients import gradient_table
from dipy.data import get_fnames
from dipy.io.gradients import read_bvals_bvecs
from dipy.io.image import load_nifti
from dipy.reconst.dti import design_matrix

import dask_batchinv

PARAMETERS = ["Dxx", "Dxy", "Dyy", "Dxz", "Dyz", "Dzz", "minus ln S0"]


def load() -> tuple[xr.DataArray, np.ndarray]:
    """Return the signals (x, y, z, measurement), and the design matrix for diffusivities in µm²/ms."""
    image, bvals_file, bvecs_file = map(str, get_fnames(name="small_64D"))
    signal, affine = load_nifti(image)
    bvals, bvecs = read_bvals_bvecs(bvals_file, bvecs_file)
    # b from s/mm² to ms/µm², so that all columns are of one size.
    X = design_matrix(gradient_table(bvals / 1000, bvecs=bvecs, b0_threshold=0.05))
    size = np.linalg.norm(affine[:3, :3], axis=0)
    coords = {axis: (axis, size[i] * np.arange(signal.shape[i]), {"units": "mm"}) for i, axis in enumerate("xyz")}
    return xr.DataArray(signal.astype(float), dims=("x", "y", "z", "measurement"), coords=coords), X


def normal_matrices(signal: xr.DataArray, X: np.ndarray) -> xr.DataArray:
    """Return X'WX for every voxel. A measurement of zero has no logarithm, and gets the weight zero."""
    matrices = np.einsum("...m,mp,mq->...pq", signal.values**2, X, X)
    coords = {"p": PARAMETERS, "q": PARAMETERS, **{axis: signal.coords[axis] for axis in "xyz"}}
    return xr.DataArray(matrices, dims=("x", "y", "z", "p", "q"), coords=coords, name="normal_matrix")


def fit(signal: xr.DataArray, X: np.ndarray, inverse: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Return the parameters and their covariances, from the inverses that the job has made."""
    weight = signal.values**2
    log_signal = np.log(np.where(signal.values > 0, signal.values, 1.0))
    parameters = np.einsum("...pq,mq,...m->...p", inverse.values, X, weight * log_signal)
    residuals = log_signal - parameters @ X.T
    measured = (signal.values > 0).sum(axis=-1)
    variance = (weight * residuals**2).sum(axis=-1) / (measured - X.shape[1])
    return inverse.isel(q=0, drop=True).copy(data=parameters), inverse * variance[..., None, None]


def draw(parameters: xr.DataArray, covariances: xr.DataArray, account: xr.Dataset, path: Path) -> None:
    """Draw one slice: mean diffusivity, its relative standard error, and how well conditioned the matrices are."""
    diagonal = ["Dxx", "Dyy", "Dzz"]
    mean = parameters.sel(p=diagonal).mean("p")
    # The three are not independent: their covariances count, and that takes the whole inverse.
    error = np.sqrt(covariances.sel(p=diagonal, q=diagonal).mean(("p", "q")))
    panels = [
        (mean, "mean diffusivity (µm²/ms)", {"robust": True}),
        (100 * error / mean, "its standard error (%)", {"robust": True, "vmin": 0}),
        (np.log10(account["rcond"]), "log₁₀ rcond of X'WX", {}),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for ax, (panel, title, options) in zip(axes, panels, strict=True):
        panel.isel(z=5).plot.imshow(ax=ax, x="x", y="y", cbar_kwargs={"label": ""}, **options)
        ax.set(title=title, xlabel="x (mm)", ylabel="y (mm)", aspect="equal")
    figure.savefig(path, dpi=120)


def main(folder: Path) -> None:
    """Run the example."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "normal_matrices.zarr", folder / "covariances.zarr"
    for old in (source, target):
        shutil.rmtree(old, ignore_errors=True)

    signal, X = load()
    matrices = normal_matrices(signal, X)
    matrices.to_dataset().chunk({"x": 2}).to_zarr(source, zarr_format=2)
    print(f"normal matrices of {matrices[..., 0, 0].size:,} voxels -> {source}\n")

    report = dask_batchinv.invert_store(
        source,
        target,
        variable="normal_matrix",
        assume_a="positive definite",
        min_rcond=1e-12,
        max_failed=None,
        tile_size="80kB",
        progress=True,
    )
    report.to_html(folder / "report.html")

    with dask.config.set(scheduler="threads"):
        account = xr.open_zarr(target).load()
    parameters, covariances = fit(signal, X, account["inverse"])
    errors = np.sqrt(xr.DataArray(np.einsum("...pp->...p", covariances.values), coords=parameters.coords))
    print("\nparameter      median   median standard error")
    for name in PARAMETERS:
        middle, error = (float(values.sel(p=name).median()) for values in (parameters, errors))
        print(f"{name:12} {middle:8.3f}   {error:.3f}")
    errors.to_dataset(name="standard_error").drop_encoding().to_zarr(
        folder / "standard_errors.zarr", mode="w", zarr_format=2
    )
    draw(parameters, covariances, account, folder / "standard_errors.png")

    print(f"\n{report}\n")
    print(f"covariances      {target}")
    print(f"standard errors  {folder / 'standard_errors.zarr'}")
    print(f"map              {folder / 'standard_errors.png'}")
    print(f"report           {folder / 'report.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
