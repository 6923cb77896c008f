"""Jacobians of a finite-element mesh: ten million 3 × 3 inverses, as fast as they can be read.

A finite-element code knows the derivatives of its fields along the edges of the reference element, and wants them
along x, y and z. In between stands the Jacobian of the map from the reference element to the element in space, 3 × 3,
another one at each of the eight Gauss points of each hexahedron; its inverse takes one kind of derivative to the other.

Two figures say whether it has worked. A linear field has the right gradient on any mesh (the patch test of finite
elements), and the error of a curved field halves with the size of the elements. Then some elements are damaged, as
moving meshes damage theirs, and `info` and `rcond` tell which Jacobians have no inverse, or a poor one.

    python examples/jacobians.py OUTPUT_FOLDER [COUNT]

COUNT is about how many Jacobians there are, by default 200,000. Ten million take 5 GB of memory and some minutes.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import dask
import matplotlib.pyplot as plt
import numpy as np
from dask.system import CPU_COUNT

import dask_batchinv

GAUSS = (0.5 - np.sqrt(1 / 12), 0.5 + np.sqrt(1 / 12))
ROUNDS = 5
OURS = "dask_batchinv.inverse"
#: As in the first call: its result is in new memory, as those of all others are always.
FIRST = f"{OURS}, new memory"
#: What the page calls a poor Jacobian: of sixteen digits ten are left, or fewer.
POOR = 1e-6


def points_on(nodes: np.ndarray, axis: int) -> np.ndarray:
    """Interpolate along an axis of the mesh, from its nodes to the two Gauss points of each element."""
    a = np.moveaxis(nodes, axis, 0)
    both = np.stack([(1 - g) * a[:-1] + g * a[1:] for g in GAUSS], axis=1)
    return np.moveaxis(both.reshape(-1, *a.shape[1:]), 0, axis)


def derivatives(nodes: np.ndarray) -> np.ndarray:
    """Return the derivatives of a field along the edges of the elements, at all Gauss points, as the last axis."""
    columns = []
    for direction in range(3):
        # Of differences along edges: where an edge has no length, the derivative is exactly zero.
        column = np.repeat(np.diff(nodes, axis=direction), 2, axis=direction)
        for axis in {0, 1, 2} - {direction}:
            column = points_on(column, axis)
        columns.append(column)
    return np.stack(columns, axis=-1)


def at_points(nodes: np.ndarray) -> np.ndarray:
    """Interpolate a field to all Gauss points."""
    for axis in range(3):
        nodes = points_on(nodes, axis)
    return nodes


def mesh(elements: int) -> np.ndarray:
    """Return the nodes of a deformed unit cube, (i, j, k, 3): a bar that is bent, twisted and a little uneven."""
    line = np.linspace(0, 1, elements + 1)
    x, y, z = np.meshgrid(line, line, line, indexing="ij")
    angle = 0.9 * z
    u, v = x - 0.5, (y - 0.5) * (1 + 0.3 * np.sin(3 * x))
    nodes = np.stack([np.cos(angle) * u - np.sin(angle) * v, np.sin(angle) * u + np.cos(angle) * v + 0.4 * z**2, z], -1)
    uneven = np.random.default_rng(1).uniform(-1, 1, nodes.shape)
    return nodes + 0.1 / elements * uneven


def damaged(nodes: np.ndarray) -> np.ndarray:
    """Return a mesh with four damaged places in its middle layer."""
    nodes, n, k = nodes.copy(), len(nodes), len(nodes) // 2
    flat, sliver, turned, lost = ((n * i // 8, n * j // 8) for i, j in ((2, 2), (6, 3), (2, 6), (6, 6)))
    for corner in np.ndindex(2, 2):
        for (i, j), height in ((flat, 0.0), (sliver, 1e-8), (turned, -0.5)):
            below = nodes[i + corner[0], j + corner[1], k]
            above = nodes[i + corner[0], j + corner[1], k + 1]
            above[:] = below + height * (above - below)
    nodes[(*lost, k)] = np.nan
    return nodes


def physical(inverses: np.ndarray, derivatives: np.ndarray) -> np.ndarray:
    """Return gradients in x, y and z: J⁻¹ has the derivatives of the element's own coordinates in its rows."""
    return np.einsum("...d,...dc->...c", derivatives, inverses)


def wave(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a curved field, and its gradient."""
    k = np.array([3.0, 2.0, -4.0])
    return np.sin(x @ k), np.cos(x @ k)[..., None] * k


def gradient_error(nodes: np.ndarray, inverses: np.ndarray) -> np.ndarray:
    """Return the lengths of the errors of the curved field's gradient, relative to that of its largest gradient."""
    exact = wave(at_points(nodes))[1]
    found = physical(inverses, derivatives(wave(nodes)[0]))
    return np.linalg.norm(found - exact, axis=-1) / np.nanmax(np.linalg.norm(exact, axis=-1))


def adjugate(J: np.ndarray) -> np.ndarray:
    """Invert by Cramer's rule, as one would write it in NumPy."""
    x = np.empty_like(J)
    for i in range(3):
        for j in range(3):
            p, q, r, s = (i + 1) % 3, (i + 2) % 3, (j + 1) % 3, (j + 2) % 3
            x[..., j, i] = J[..., p, r] * J[..., q, s] - J[..., p, s] * J[..., q, r]
    x /= (J[..., 0, :] * x[..., :, 0]).sum(axis=-1)[..., None, None]
    return x


def on_one_thread(J: np.ndarray) -> np.ndarray:
    """Invert with one thread, as NumPy does."""
    with dask.config.set({"batchinv.threads": 1}):
        return dask_batchinv.inverse(J)


def competitors() -> dict[str, tuple[Callable[[np.ndarray], object], int]]:
    """Return what is timed: names, with functions and their numbers of threads."""
    all_of_them = {
        OURS: (dask_batchinv.inverse, CPU_COUNT),
        f"{OURS}, one thread": (on_one_thread, 1),
        "adjugate, in NumPy": (adjugate, 1),
        "numpy.linalg.inv": (np.linalg.inv, 1),
    }
    if find_spec("torch"):
        import torch

        threads = torch.get_num_threads()
        all_of_them["torch.linalg.inv"] = (lambda J: torch.linalg.inv(torch.from_numpy(J)), threads)
    return all_of_them


def times(J: np.ndarray) -> dict[str, float]:
    """Return the best time of each, in rounds in which all take turns."""
    J = J.reshape(-1, 3, 3)
    best = {}
    for turn in range(ROUNDS):
        for name, (invert, _) in competitors().items():
            invert(J)  # as in a loop: the call before has compiled what is compiled, and its result is gone
            seconds = timed(invert, J)
            best[name] = min(seconds, best.get(name, seconds))
            if name == OURS:
                # Less by some matrices: the memory of no earlier result is as long as this one's, so that it is new.
                seconds = timed(invert, J[turn + 1 :])
                best[FIRST] = min(seconds, best.get(FIRST, seconds))
    return best


def timed(invert: Callable[[np.ndarray], object], J: np.ndarray) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    invert(J)
    return time.perf_counter() - begin


def processor() -> str:
    """Return the model of the processor, where the system says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def draw_mesh(place: np.ndarray, account: dict[str, np.ndarray], path: Path) -> None:
    """Draw a layer of Gauss points: how well conditioned the Jacobians are, and the gradient's error."""
    info, rcond, sign = (account[name] for name in ("info", "rcond", "sign"))
    marks = {
        "info 3: an edge has no length": ("s", "red", info > 0),
        "info -1: a node is NaN": ("D", "black", info == int(dask_batchinv.Info.NOT_FINITE)),
        f"info 0, rcond < {POOR:g}": ("^", "magenta", (info == 0) & (rcond < POOR)),
        "info 0, determinant < 0": ("o", "darkorange", (info == 0) & (sign < 0)),
    }
    panels = {"rcond": ("log₁₀ rcond of the Jacobians", "viridis"),
              "error": ("log₁₀ relative error of the gradient", "cividis")}  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained", sharey=True)
    bad = np.logical_or.reduce([which for *_, which in marks.values()])
    for ax, (name, (title, colours)) in zip(axes, panels.items(), strict=True):
        values = np.ma.log10(np.ma.masked_array(account[name], bad))
        low, high = np.percentile(values.compressed(), [0.5, 99.5])
        dots = ax.pcolormesh(*place.T, values.T, cmap=colours, vmin=low, vmax=high)
        figure.colorbar(dots, ax=ax)
        for words, (mark, colour, which) in marks.items():
            ax.plot(*place[which].T, mark, mec=colour, mfc="none", ms=6, label=words)
        ax.set(title=title, xlabel="x", aspect="equal")
    axes[0].set_ylabel("y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=95)
    plt.close(figure)


def draw_times(best: dict[str, float], count: int, path: Path) -> None:
    """Draw the times as bars, with how many times longer each takes than ours."""
    names, seconds = zip(*reversed(best.items()), strict=True)
    figure, ax = plt.subplots(figsize=(9, 3.0), layout="constrained")
    bars = ax.barh(names, seconds, color=["#0072b2" if name.startswith("dask") else "#999999" for name in names])
    ax.bar_label(bars, [f"{s:.3g} s, {s / best[OURS]:.1f} ×" for s in seconds], padding=4)
    ax.set(xlabel="seconds", title=f"{count:,} Jacobians, float64, {processor()}, {CPU_COUNT} processors")
    ax.margins(x=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def examine(nodes: np.ndarray, folder: Path) -> dict[str, int]:
    """Damage the mesh, print what is told of its Jacobians, draw a layer, and return how many are of each kind."""
    broken = damaged(nodes)
    J = derivatives(broken)
    try:
        np.linalg.inv(J)
    except np.linalg.LinAlgError as error:
        print(f"\nthe damaged mesh: numpy.linalg.inv raises {type(error).__name__}: {error}")
    inverses, info, rcond = dask_batchinv.inverse_ex(J)
    layer = np.s_[:, :, 2 * (len(nodes) // 2)]
    # LAPACK computes determinants, which takes its time: of one layer only.
    sign = dask_batchinv.inverse_ex(J[layer], logdet=True).sign
    kinds = {
        "flat": int((info > 0).sum()),
        "not finite": int((info == int(dask_batchinv.Info.NOT_FINITE)).sum()),
        "poor": int(((info == 0) & (rcond < POOR)).sum()),
        "inside out": int(((info[layer] == 0) & (sign < 0)).sum()),
        "inverted": int((info == 0).sum()),
    }
    print(f"info > 0: an edge has no length            {kinds['flat']:11,}")
    print(f"info = -1: a node is NaN                   {kinds['not finite']:11,}")
    print(f"info = 0: inverted                         {kinds['inverted']:11,}")
    print(f"  of these with rcond < {POOR:g}              {kinds['poor']:11,}")
    print(f"  with a determinant < 0, in the layer drawn {kinds['inside out']:9,}")
    account = {
        "info": info[layer],
        "rcond": rcond[layer],
        "sign": sign,
        "error": gradient_error(broken, inverses)[layer],
    }
    draw_mesh(at_points(nodes)[layer][..., :2], account, folder / "jacobians.png")
    return kinds


def main(folder: Path, count: int = 200_000) -> None:
    """Run the example."""
    folder.mkdir(parents=True, exist_ok=True)
    elements = round((count / 8) ** (1 / 3))
    nodes = mesh(elements)
    J = derivatives(nodes)
    print(f"{J[..., 0, 0].size:,} Jacobians, 3 × 3, float64, at the Gauss points of {elements**3:,} hexahedra")
    print(f"{processor()}, {CPU_COUNT} processors; best of {ROUNDS} rounds\n")

    best = times(J)
    threads = {name: number for name, (_, number) in competitors().items()} | {FIRST: CPU_COUNT}
    for name, seconds in best.items():
        print(f"{name:36} {seconds:8.4f} s  {seconds / best[OURS]:5.1f} ×  {threads[name]} thread(s)")
    draw_times(best, J[..., 0, 0].size, folder / "jacobians_times.png")

    inverses = dask_batchinv.inverse(J)
    slope = np.array([1.0, -2.0, 0.5])
    patch = float(np.abs(physical(inverses, derivatives(nodes @ slope)) - slope).max())
    print(f"\npatch test: largest error of a linear field's gradient  {patch:.1e}")
    error = float(np.sqrt((gradient_error(nodes, inverses) ** 2).mean()))
    coarse = mesh(elements // 2)
    coarse_error = float(np.sqrt((gradient_error(coarse, dask_batchinv.inverse(derivatives(coarse))) ** 2).mean()))
    print(f"a curved field: {error:.2%} of its largest gradient, with elements twice as large {coarse_error:.2%}")
    del J, inverses  # at ten million, 720 MB each

    kinds = examine(nodes, folder)
    figures = {"seconds": best, "patch": patch, "error": error, "coarse_error": coarse_error, "kinds": kinds}
    (folder / "jacobians.json").write_text(json.dumps(figures, indent=1))
    print(f"\npictures  {folder / 'jacobians.png'}, {folder / 'jacobians_times.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"), *map(int, sys.argv[2:3]))
