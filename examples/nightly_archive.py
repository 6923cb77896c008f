"""An archive that grows: each night only what is new or was corrected is inverted.

Every day brings one 4 × 4 covariance of four channels for each pixel of an image, which is appended to a Zarr store.
A job makes the inverses, the weights of a later fit. The same call is made every night for two weeks, and each night
something else has happened: a day was added, none was, three days were replaced because a channel had been dead, the
run was killed while it worked off eighty days from another archive. In the end the inverses are compared with those of
one fresh run over everything: they are the same, bit for bit.

    python examples/nightly_archive.py OUTPUT_FOLDER
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import dask
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.colors import ListedColormap

import dask_batchinv

CHANNELS = ["blue", "green", "red", "infrared"]
HEIGHT, WIDTH, SAMPLES = 30, 40, 24
DEAD = range(20, 23)
#: What has happened before each run: so many days were added, or some were replaced.
NIGHTS = [30, 1, 1, 0, 2, 1, 1, "days replaced", 1, 0, 80, 0, 1, 1]
KILLED_NIGHT = 11
OPTIONS = {"variable": "cov", "assume_a": "positive definite", "chunks": {"day": 1}, "compress": "zstd"}
COMMAND = [
    sys.executable, "-m", "dask_batchinv.cli", "run", "--variable", "cov", "--assume-a", "positive definite",
    "--chunks", "day=1", "--compress", "zstd", "--max-failed", "any", "--quiet",
]  # fmt: skip
LEGEND = {
    "not there yet": "white",
    "left as it was": "#d9d9d9",
    "new": "#0072b2",
    "done again: the source had changed": "#e69f00",
    "written by the run that was killed": "#000000",
}
ABSENT, LEFT, NEW, CHANGED, KILLED = range(len(LEGEND))


def days(first: int, count: int, *, repaired: bool = False) -> xr.Dataset:
    """Return the covariances of some days; on some of them the infrared channel is dead in a part of the image."""
    cov = np.empty((count, HEIGHT, WIDTH, 4, 4))
    for number in range(count):
        rng = np.random.default_rng(first + number)
        samples = rng.normal(size=(HEIGHT, WIDTH, SAMPLES, 4)) * [1.0, 1.2, 1.5, 3.0] + rng.normal(
            size=(HEIGHT, WIDTH, SAMPLES, 1)
        )
        if first + number in DEAD and not repaired:
            samples[:5, ..., 3] = 0
        cov[number] = samples.swapaxes(-2, -1) @ samples / SAMPLES
    coords = {"day": np.arange(first, first + count), "channel": CHANNELS, "channel_2": CHANNELS}
    return xr.Dataset({"cov": (("day", "y", "x", "channel", "channel_2"), cov)}, coords)


def append(source: Path, count: int) -> None:
    """Add days to the archive, or begin it."""
    first = xr.open_zarr(source).sizes["day"] if source.exists() else 0
    more = {"append_dim": "day"} if source.exists() else {}
    days(first, count).chunk(day=1).to_zarr(source, zarr_format=2, **more)


def replace_days(source: Path) -> None:
    """Replace the days on which a channel was dead."""
    repaired = days(DEAD.start, len(DEAD), repaired=True)["cov"].drop_vars(["day", "channel", "channel_2"])
    repaired.to_dataset().chunk(day=1).to_zarr(source, zarr_format=2, region={"day": slice(DEAD.start, DEAD.stop)})


def written(target: Path) -> dict[int, int]:
    """Return when the inverses of each day were written, as the file system says."""
    return {int(path.name.split(".")[1]): path.stat().st_mtime_ns for path in target.glob("inverse/c.*.0")}


def kill_half_way(source: Path, target: Path, tiles: int) -> None:
    """Start the job in a process of its own, and kill it when half of its tiles are written."""
    goal = len(written(target)) + tiles // 2
    with subprocess.Popen([*COMMAND, source, target]) as job:
        while job.poll() is None and len(written(target)) < goal:
            time.sleep(0.005)
        job.kill()
    if job.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the job was to be killed, but ended before that, with exit code {job.returncode}")


def draw(history: list[dict[int, int]], path: Path) -> None:
    """Draw what each night did to each day of the archive, and how many tiles that were."""
    colours = list(LEGEND.values())
    nights, length = np.arange(1, len(history) + 1), max(map(len, history))
    picture = np.array([[kinds.get(day, ABSENT) for day in range(length)] for kinds in history])
    figure, (top, ax) = plt.subplots(2, 1, figsize=(9, 6.5), layout="constrained", sharex=True, height_ratios=[1, 3])
    counts = {kind: (picture == kind).sum(axis=1) for kind in (NEW, CHANGED, KILLED)}
    for kind, count in counts.items():
        top.bar(nights, count, color=colours[kind])  # no night has two kinds
    for night, count in zip(nights, sum(counts.values()), strict=True):
        top.annotate(f"{count}", (night, count), ha="center", va="bottom")
    top.margins(y=0.3)
    top.set_ylabel("tiles written")
    colour_map = ListedColormap(colours)
    ax.pcolormesh(nights, range(length), picture.T, cmap=colour_map, vmin=-0.5, vmax=len(colours) - 0.5)
    ax.vlines(nights + 0.5, 0, length, color="white", lw=2)
    ax.set(xlabel="night", ylabel="day in the archive: one tile each", xticks=nights)
    patches = [plt.Rectangle((0, 0), 1, 1, fc=colour, ec="grey", lw=0.5) for colour in colours]
    ax.legend(patches, LEGEND, loc="upper left")
    figure.savefig(path, dpi=100)


def opened(target: Path) -> xr.Dataset:
    """Return a finished target."""
    with dask.config.set(scheduler="threads"):
        return xr.open_zarr(target, consolidated=False).load()


def run_night(number: int, source: Path, target: Path) -> dict[int, int]:
    """Let happen what happens before a night's run, run it, print a line, and return what it did to each day."""
    before, happened = written(target), NIGHTS[number - 1]
    words = happened if isinstance(happened, str) else f"days added: {happened}"
    if isinstance(happened, str):
        replace_days(source)
    elif happened:
        append(source, happened)
    # In an archive hours go by. Of a file that was written a moment ago nobody can say that it will not change again
    # unseen: it would be read once more on the next night.
    time.sleep(0.1)
    if number == KILLED_NIGHT:
        kill_half_way(source, target, happened)
        kind, told = KILLED, "the run is killed"
    else:
        report = dask_batchinv.invert_store(source, target, max_failed=None, **OPTIONS)
        kind = CHANGED if report.changed_tiles else NEW
        told = f"{report.tiles_proven:9} {report.n_failed:11,}"
    after = written(target)
    touched = {day for day in after if after[day] != before.get(day)}
    print(f"{number:5}  {words:16} {len(after):5} {len(touched):8}  {told}")
    return {day: kind if day in touched else LEFT for day in after}


def main(folder: Path) -> None:
    """Run the example."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target, fresh = (folder / f"{name}.zarr" for name in ("covariances", "inverses", "fresh"))
    for old in (source, target, fresh):
        shutil.rmtree(old, ignore_errors=True)

    print("night  what happened    tiles  written  read back  no inverse")
    history = [run_night(number, source, target) for number in range(1, len(NIGHTS) + 1)]
    draw(history, folder / "nightly_archive.png")

    checked = dask_batchinv.verify_store(target, source=source)
    print(f"\n{checked}")
    dask_batchinv.invert_store(source, fresh, **OPTIONS)
    one, other = opened(target), opened(fresh)
    same = {name: one[name].values.tobytes() == other[name].values.tobytes() for name in ("inverse", "info", "rcond")}
    print(f"the same bits as a fresh run over all {one.sizes['day']} days: {same}")
    figures = {
        "written": [sorted(day for day, kind in kinds.items() if kind != LEFT) for kinds in history],
        "verified": checked.ok,
        "same": same,
    }
    (folder / "nightly_archive.json").write_text(json.dumps(figures))
    print(f"picture  {folder / 'nightly_archive.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
