"""The pictures of a report, as SVG that takes the colour of text from the page that it stands in."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

from dask_batchinv.job.report.page.findings import Histogram, as_text
from dask_batchinv.job.report.page.maps import GOOD, MASKED, PENDING, Map
from dask_batchinv.outcome import FAILURE_KINDS, failures_of
from dask_batchinv.stack import AssumeA

#: Stands for the colour of text, whatever that is where the picture is seen.
_INK = "#010203"
_STYLE = {
    "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "batchinv", "font.family": "sans-serif",
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
    ),
}  # fmt: skip
#: Of Okabe and Ito, whom the colour-blind can tell apart; they are seen on white and on black.
_FAILURE_COLOURS = ("#d55e00", "#cc79a7", "#e69f00", "#0072b2", "#f0e442")
_OTHER_COLOURS = {
    GOOD: ("#8093a5", 0.4, "inverted"),
    MASKED: ("#8093a5", 0.12, "left out"),
    PENDING: (_INK, 0, "to do"),
}
_BAR, _LINE = "#0072b2", "#d55e00"
#: So many failures that stand alone get marks that are larger than a pixel, or none if there are more.
_MOST_MARKS = 300
#: So long is the label of a place along an axis.
_LONGEST_LABEL = 16
#: Matplotlib's settings are those of the whole process.
_LOCK = threading.Lock()
#: By dimension, some places along it and their coordinates.
Ticks = Mapping[str, Sequence[tuple[int, Any]]]
#: Bins of the throughput of a run, at most.
_MOST_BINS = 60
_WIDTH = 6.4


def map_of_failures(seen: Map, ticks: Ticks, assume_a: AssumeA) -> str:
    """Return the map of what happened to matrices: which share of them failed, where a pixel is more than one."""

    def draw(figure: Any) -> None:
        axes = _axes_for(figure, seen)
        colours = [to_rgba(colour) for colour in _FAILURE_COLOURS]
        colours += [to_rgba(colour, alpha) for colour, alpha, _ in _OTHER_COLOURS.values()]
        present = np.unique(seen.kinds)
        if seen.matrices == 1:
            _show(axes, seen, ticks, np.array(colours)[seen.kinds])
        else:
            _show(axes, seen, ticks, np.array(colours)[np.where(seen.kinds < GOOD, GOOD, seen.kinds)])
            present = present[present >= GOOD]
        if seen.matrices > 1 and seen.share.any():
            share = np.where(seen.share > 0, 100 * seen.share, np.nan)
            image = _show(axes, seen, ticks, share, cmap="plasma_r", vmin=0, vmax=max(1e-9, np.nanmax(share)))
            figure.colorbar(image, ax=axes, label="without an inverse (%)", location="bottom", shrink=0.8)
        rows, columns = np.nonzero(_alone(seen.kinds < GOOD))
        left, right, low, high = seen.extent
        x = left + (columns + 0.5) * (right - left) / seen.kinds.shape[1]
        y = low + (rows + 0.5) * (high - low) / seen.kinds.shape[0]
        fill = [_FAILURE_COLOURS[kind] for kind in seen.kinds[rows, columns]] if seen.matrices == 1 else "none"
        axes.scatter(x, y, s=14, c=fill, marker="s", edgecolors=_INK, linewidths=0.5)
        names = [
            *(failure.words for failure in failures_of(assume_a)),
            *(word for _, _, word in _OTHER_COLOURS.values()),
        ]
        patches = [Patch(facecolor=colours[kind], edgecolor=_INK, linewidth=0.5, label=names[kind]) for kind in present]
        if patches:
            figure.legend(handles=patches, loc="outside lower left", ncols=2, frameon=False)

    return _svg("failures", draw, _height_of(seen))


def map_of_rcond(seen: Map, ticks: Ticks, eps: float) -> str:
    """Return the map of the smallest rcond; what is below eps is as good as singular, and looks alike."""

    def draw(figure: Any) -> None:
        axes = _axes_for(figure, seen)
        least, lowest = float(np.nanmin(seen.log_rcond)), float(np.log10(eps))
        image = _show(axes, seen, ticks, seen.log_rcond, cmap="viridis", vmin=max(least, lowest))
        label = "log₁₀ rcond" if seen.matrices == 1 else "log₁₀ of the smallest rcond"
        extend = "min" if least < lowest else "neither"
        figure.colorbar(image, ax=axes, label=label, location="bottom", shrink=0.8, extend=extend)

    return _svg("rcond", draw, _height_of(seen))


def histogram(found: Histogram, marks: Sequence[tuple[str, float]]) -> str:
    """Return the histogram of rcond, with marks at some values of it."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.stairs(found.counts, found.edges, fill=True, color=_BAR)
        positive = [count for count in found.counts if count]
        if max(positive) > 100 * min(positive):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))  # 10³ would be a formula
            axes.yaxis.set_minor_formatter(NullFormatter())
        for number, (words, value) in enumerate(marks):
            axes.axvline(np.log10(value), color=_LINE, linestyle=("--", ":")[number % 2])
            axes.annotate(
                words, (np.log10(value), 1 - 0.1 * number), (4, -10), xycoords=("data", "axes fraction"),
                textcoords="offset points",
            )  # fmt: skip
        scale = " (log scale)" if axes.get_yscale() == "log" else ""
        axes.set(xlabel="log₁₀ rcond", ylabel=f"matrices{scale}")

    return _svg("histogram", draw, 2.8)


def throughput(timelines: Sequence[Sequence[tuple[float, int]]]) -> str:
    """Return how many matrices a second runs have done, one after the other."""

    def draw(figure: Any) -> None:
        axes, begin = figure.add_subplot(), 0.0
        for timeline in timelines:
            seconds, counts = np.array(timeline).T
            edges = np.linspace(0, seconds[-1], max(2, min(_MOST_BINS, len(timeline) // 2)))
            rates = np.diff(np.interp(edges, seconds, counts)) / np.diff(edges)
            axes.stairs(rates, begin + edges, fill=True, color=_BAR)
            if begin:
                axes.axvline(begin, color=_INK, linestyle=":")
            begin += seconds[-1]
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set(xlabel="seconds at work, all runs", ylabel="matrices per second", ylim=(0, None))

    return _svg("throughput", draw, 2.4)


def _alone(failed: Any) -> Any:
    """Return which failures have none beside them; none of them where there are too many to be marked."""
    padded = np.pad(failed, 1)
    beside = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    alone = failed & ~beside
    return alone if alone.sum() <= _MOST_MARKS else np.zeros_like(alone)


def _axes_for(figure: Any, seen: Map) -> Any:
    axes = figure.add_subplot()
    for side in axes.spines.values():
        side.set_visible(True)
    axes.set_xlabel(seen.dims[-1])
    if len(seen.dims) == 2:
        axes.set_ylabel(seen.dims[0])
    else:
        axes.set_yticks([])
    for axis in (axes.xaxis, axes.yaxis) if len(seen.dims) == 2 else (axes.xaxis,):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    return axes


def _show(axes: Any, seen: Map, ticks: Ticks, pixels: Any, **options: Any) -> Any:
    left, right, low, high = seen.extent
    columns, rows = seen.lengths
    is_square = 1 / 3 < rows / columns < 3
    image = axes.imshow(
        pixels, extent=(left, right, high, low), aspect="equal" if is_square else "auto", interpolation="nearest",
        origin="upper", **options,
    )  # fmt: skip
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    for axis, dim in zip((axes.yaxis, axes.xaxis), ("", *seen.dims)[-2:], strict=True):
        if some := ticks.get(dim):
            axis.set_ticks([place + 0.5 for place, _ in some], [_as_label(value) for _, value in some])
    if len(seen.dims) == 2 and _grows(ticks.get(seen.dims[0], ())):
        axes.set_ylim(0, rows)  # as latitudes do: upwards
    return image


def _as_label(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else as_text(value)[:_LONGEST_LABEL]


def _grows(some: Sequence[tuple[int, Any]]) -> bool:
    values = [value for _, value in some]
    return len(values) > 1 and all(isinstance(value, float) for value in values) and values == sorted(values)


def _height_of(seen: Map) -> float:
    return 4.6 if len(seen.dims) == 2 else 1.6


def _svg(name: str, draw: Callable[[Any], None], height: float) -> str:
    """Return what is drawn, without what only a file of its own needs; a name keeps it apart from others in a page."""
    assert len(_FAILURE_COLOURS) == len(FAILURE_KINDS)
    # Whatever the user has set, and without a word on glyphs, for texts stay texts.
    with (
        _LOCK,
        mpl.rc_context(),
        warnings.catch_warnings(action="ignore", category=UserWarning),
    ):  # glyphs, see fonttype
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", dpi=144)
        draw(figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    used = {*re.findall(r"#([\w-]+)", text)} & {*re.findall(r'id="([^"]+)"', text)}
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r"#([\w-]+)", lambda found: f"#{name}-{found[1]}" if found[1] in used else found[0], text)
