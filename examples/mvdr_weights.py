"""Weights of a beamformer that lets its target pass and nulls what disturbs it, per frequency and frame.

Eight microphones in a row listen to a talker at a known angle, while another talker walks by. Of all weights w that
let the target pass unchanged, wᴴa = 1, those with the least output power are w = R⁻¹a / (aᴴR⁻¹a): the beamformer of
minimum variance and without distortion (MVDR; Capon, Proceedings of the IEEE 57, 1969). R is the covariance of what
disturbs, 8 x 8 and Hermitian, one for each frequency and frame, estimated from 16 snapshots in pauses of the target.
With K snapshots of n microphones only the share (K + 2 - n) / (K + 1) of the best signal-to-noise ratio is left, in the
mean (Reed, Mallett and Brennan, IEEE Transactions on Aerospace and Electronic Systems 10, 1974); a constant added to
the diagonal, its loading, gives most of it back.

In some frames the recorder gave nothing but zeros, in others microphone 6 is dead.

    python examples/mvdr_weights.py OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import dask
import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

import dask_batchinv  # noqa: F401  # gives DataArrays their .linalg

MICROPHONES, SNAPSHOTS, FRAMES = 8, 16, 120
FREQUENCIES = np.arange(500, 4001, 125)
SPACING, SPEED_OF_SOUND = 0.04, 343.0
TARGET = 20.0
#: Power of the interferer and of the loading, in units of the noise of one microphone.
INTERFERER, LOADING = 100.0, 3.0
SILENT, DEAD = slice(30, 34), slice(80, 90)
DEAD_MICROPHONE = 6


def steering(angle: xr.DataArray | float) -> xr.DataArray:
    """Return what a wave from that angle (degrees) is at each microphone and frequency."""
    microphone = xr.DataArray(np.arange(MICROPHONES), dims="mic", coords={"mic": np.arange(1, MICROPHONES + 1)})
    frequency = xr.DataArray(FREQUENCIES, dims="frequency", coords={"frequency": FREQUENCIES})
    delay = microphone * SPACING * np.sin(np.deg2rad(angle)) / SPEED_OF_SOUND
    return np.exp(-2j * np.pi * frequency * delay)


def snapshots(interferer: xr.DataArray) -> xr.DataArray:
    """Return what the microphones hear in pauses of the target, lazily: (frequency, frame, mic, snapshot)."""
    rng = da.random.default_rng(0)

    def noise(*dims: str) -> xr.DataArray:
        sizes = {"frequency": FREQUENCIES.size, "frame": FRAMES, "mic": MICROPHONES, "snapshot": SNAPSHOTS}
        shape = [sizes[dim] for dim in dims]
        chunks = [30 if dim == "frame" else -1 for dim in dims]
        real, imaginary = (rng.standard_normal(shape, chunks=chunks) for _ in range(2))
        return xr.DataArray((real + 1j * imaginary) / np.sqrt(2), dims=dims)

    heard = steering(interferer) * np.sqrt(INTERFERER) * noise("frequency", "frame", "snapshot")
    heard = heard + noise("frequency", "frame", "mic", "snapshot")
    silent, dead = np.zeros(FRAMES, bool), np.zeros(FRAMES, bool)
    silent[SILENT], dead[DEAD] = True, True
    lost = xr.DataArray(dead, dims="frame") & (heard.mic == DEAD_MICROPHONE)
    heard = heard.where(~(lost | xr.DataArray(silent, dims="frame")), 0)
    return heard.transpose("frequency", "frame", "mic", "snapshot")


def other(of_microphones: xr.DataArray) -> xr.DataArray:
    """Return the same with the name that columns have."""
    return of_microphones.rename(mic="mic_2")


def weights(inverse: xr.DataArray, a: xr.DataArray) -> xr.DataArray:
    """Return R⁻¹a / (aᴴR⁻¹a)."""
    solved = xr.dot(inverse, other(a), dim="mic_2")
    # R is Hermitian, and aᴴR⁻¹a real.
    return solved * (1 / xr.dot(a.conj(), solved, dim="mic").real)


def gain(w: xr.DataArray, a: xr.DataArray) -> xr.DataArray:
    """Return |wᴴa|²."""
    return np.abs(xr.dot(w.conj(), a, dim="mic")) ** 2


def power(w: xr.DataArray, R: xr.DataArray) -> xr.DataArray:
    """Return wᴴRw, the power of what disturbs."""
    return xr.dot(w.conj(), R, other(w), dim=("mic", "mic_2")).real


def draw(found: xr.Dataset, interferer: xr.DataArray, expected: float, path: Path) -> None:
    """Draw the beam of one frame, that of all frames, and how near the signal-to-noise ratio comes to the optimum."""
    angles = np.arange(-90, 90.5, 0.5)
    a = steering(xr.DataArray(angles, dims="angle", coords={"angle": angles})).sel(frequency=2000)
    beam = 10 * np.log10(gain(found.loaded.sel(frequency=2000), a))
    plain = 10 * np.log10(gain(steering(TARGET).sel(frequency=2000) / MICROPHONES, a) + 1e-6)
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.5), layout="constrained")
    frame = 60
    axes[0].plot(angles, plain, "--", color="0.5", label="delay and sum")
    axes[0].plot(angles, beam.sel(frame=frame), color="#440154", label="MVDR, loaded")
    axes[0].axvline(float(interferer[frame]), color="#21918c", linestyle=":", label="interferer")
    axes[0].axvline(TARGET, color="#e6a700", linestyle="-.", label="target")
    axes[0].set(title=f"beam at 2 kHz, frame {frame} (dB)", xlabel="angle (°)", ylim=(-60, 30))
    axes[0].legend(loc="upper left", fontsize="small")
    beam.where(found["info"].sel(frequency=2000) == 0).plot.imshow(
        ax=axes[1], x="frame", y="angle", vmin=-50, vmax=0, cmap="viridis", cbar_kwargs={"label": ""}
    )
    axes[1].plot(interferer.frame, interferer, ":", color="white")
    axes[1].set(title="beam at 2 kHz (dB); dotted: interferer", xlabel="frame", ylabel="angle (°)", facecolor="0.8")
    for name, color, style in [("sinr_loaded", "#440154", "-"), ("sinr_unloaded", "#21918c", "--")]:
        mean = 10 * np.log10(found[name].where(found["info"] == 0).mean("frequency"))
        axes[2].plot(found.frame, mean, style, color=color, label=name.removeprefix("sinr_"))
    axes[2].axhline(10 * np.log10(expected), color="0.5", linestyle=":", label="expected, unloaded")
    axes[2].set(title="SINR over its optimum (dB)", xlabel="frame", ylim=(-4.5, 0))
    axes[2].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=100)


def main(folder: Path) -> None:
    """Run the example."""
    folder.mkdir(parents=True, exist_ok=True)
    interferer = xr.DataArray(np.linspace(-70, -10, FRAMES), dims="frame", coords={"frame": np.arange(FRAMES)})
    x, a = snapshots(interferer), steering(TARGET)
    R = xr.dot(x, other(x.conj()), dim="snapshot") / SNAPSHOTS
    one = xr.DataArray(np.eye(MICROPHONES), coords={"mic": a.mic, "mic_2": a.mic.values}, dims=("mic", "mic_2"))

    account = R.linalg.inv_ex(dims=("mic", "mic_2"), assume_a="positive definite")
    loaded = (R + LOADING * one).linalg.inv(dims=("mic", "mic_2"), assume_a="positive definite")
    v = steering(interferer)
    R_true = INTERFERER * v * other(v.conj()) + one
    optimum = 1 / power(weights(R_true.linalg.inv(dims=("mic", "mic_2"), assume_a="positive definite"), a), R_true)

    found = account[["info", "rcond"]].assign(
        covariance=R, unloaded=weights(account["inverse"], a), loaded=weights(loaded, a), optimum=optimum
    )
    for name in ("unloaded", "loaded"):
        found[f"sinr_{name}"] = 1 / power(found[name], R_true) / optimum
    with dask.config.set(scheduler="threads"):
        found = found.compute()
    found.to_zarr(folder / "weights.zarr", mode="w", consolidated=False)

    good, info = found["info"] == 0, found["info"].values
    expected = (SNAPSHOTS + 2 - MICROPHONES) / (SNAPSHOTS + 1)
    sinr = {name: float(found[f"sinr_{name}"].where(good).mean()) for name in ("unloaded", "loaded")}
    distortion = float(np.abs(xr.dot(found.loaded.conj(), a, dim="mic") - 1).max())
    at_interferer = 10 * np.log10(gain(found.loaded, v).where(good))
    heard = gain(found.loaded.where(found.mic != DEAD_MICROPHONE, 0), a).isel(frame=DEAD)
    print(f"matrices                       {info.size:,} of {MICROPHONES} microphones")
    for k, count in zip(*np.unique(info, return_counts=True), strict=True):
        print(f"  info {k}                       {count:,}")
    print(f"rcond of the good ones         {float(found['rcond'].where(good).min()):.1e} at least")
    print(f"largest |wᴴa - 1|              below 1e-12: {distortion < 1e-12}")
    print(f"gain towards the interferer    {float(at_interferer.median()):.0f} dB (median)")
    print(f"SINR over optimum, unloaded    {sinr['unloaded']:.3f}, expected {expected:.3f}")
    print(f"SINR over optimum, loaded      {sinr['loaded']:.3f}")
    print(
        f"microphone {DEAD_MICROPHONE} dead, loaded      {10 * np.log10(float(heard.mean())):.1f} dB of the target left"
    )
    draw(found, interferer, expected, folder / "mvdr_weights.png")
    print(f"picture                        {folder / 'mvdr_weights.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
