"""The report of a target as a page that stands alone: it asks nobody for anything, and runs nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from dask_batchinv.job.report.at_work import state_of
from dask_batchinv.job.report.page.findings import FailedMatrix, Findings, as_text
from dask_batchinv.outcome import RefusedError, failures_of
from dask_batchinv.shown import counted
from dask_batchinv.stack import real_dtype
from dask_batchinv.text import clean
from dask_batchinv.urls import without

#: A share below it is not said in digits.
_SMALLEST_SHARE = 1e-5
#: A timeline of fewer points tells nothing.
_FEWEST_POINTS = 4
#: What was not asked for.
_NOTHING = ("", "no", "none", "nothing", "{}", "[]", "False", "0")
#: Runs and workers are named one by one up to so many.
_MOST_ROWS = 20
_CSS = """
:root { color-scheme: light dark;
  --ink: #1b2733; --paper: #ffffff; --quiet: #5b6b7a; --line: #d5dde5; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #12181f; --quiet: #9fb0c0; --line: #2f3b47; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p.state { font-weight: 600; border-left: 0.4rem solid var(--mark); padding-left: 0.6rem; }
p.open { border-color: #d55e00; }
td.index { white-space: nowrap; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.6rem; margin: 1rem 0; }
dl.facts div { border: 1px solid var(--line); border-radius: 0.4rem; padding: 0.4rem 0.7rem; }
dt { color: var(--quiet); font-size: 0.85rem; } dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.7rem 0.3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; white-space: nowrap; }
td:last-child { overflow-wrap: anywhere; min-width: 8rem; }
h1, p { overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; }
figcaption, footer, .quiet { color: var(--quiet); font-size: 0.85rem; }
@media print { :root { --ink: #000; --paper: #fff; --quiet: #444; } body { max-width: none; padding: 0; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } .wide { overflow: visible; } }
"""


def page_of(report: Findings) -> str:
    """Return the page.

    Raises
    ------
    RefusedError
        If Matplotlib is not installed.
    """
    check_matplotlib()
    title = f"{os.path.basename(report.account.target)}: inverses of {report.asked['variable'] or 'a stack'}"
    body = "".join(f"{part}\n" for part in _parts(report, title))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n'
        f"<body>\n{body}</body>\n</html>\n"
    )


def check_matplotlib() -> None:
    """Raise RefusedError if Matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RefusedError(
            f"a report as a page is drawn with Matplotlib, which cannot be imported ({error}): pip install matplotlib, "
            "or take the report as JSON"
        ) from error


def check_output(path: str | os.PathLike[str], target: str, source: str, variable: str | None) -> None:
    """Raise RefusedError if a page cannot be written to a file, or must not: in a store it would be damage.

    Parameters
    ----------
    path
        The file.
    target, source, variable
        The names of the stores, and of the array in a source that is a group.
    """
    check_matplotlib()
    real = os.path.realpath(path)
    stores = [target, source, without(source, variable) if variable else source]
    for store in map(os.path.realpath, stores):
        if os.path.commonpath([store, real]) == store:
            raise RefusedError(f"the report cannot be written to {path}: that is in {store}, which it would damage")
    folder = os.path.dirname(real)
    if not os.path.isdir(folder) or os.path.isdir(real) or not os.access(folder, os.W_OK):
        raise RefusedError(f"the report cannot be written to {path}: name a file in a folder that you can write to")


def _parts(report: Findings, title: str) -> Iterator[str]:
    account = report.account
    yield f"<h1>{_text(title)}</h1>"
    is_open = "" if account.complete else " open"
    yield f'<p class="state{is_open}">{_text(state_of(account, report.at_work))}</p>'
    yield f'<p class="quiet">{_text(account.heading())}</p>'
    if report.at_work is not None:
        yield f"<p>At work: {_text(report.at_work.row()[1])}</p>"
    yield from (f"<p>Note: {_text(note)}</p>" for note in report.notes)
    yield from (f"<p>{label.capitalize()}: {_text(words)}</p>" for label, words in report.obstacles())
    failed = f"{account.n_failed:,}"
    if account.n_failed:
        failed += f" ({_share(account.n_failed, account.matrices_done)})"
    yield _facts(
        (f"matrices, {report.n} × {report.n}", f"{account.matrices:,}"),
        ("inverted", f"{account.matrices_done - account.n_failed - account.masked:,}"),
        ("without an inverse", failed),
        *([("left out by the mask", f"{account.masked:,}")] if account.masked else []),
        *([("to do", f"{account.matrices - account.matrices_done:,}")] if not account.complete else []),
        ("smallest rcond of the inverted", _value(account.smallest_rcond) or "none"),
        ("inverted with rcond below eps", f"{account.ill_conditioned:,}"),
    )
    yield from _pictures(report)
    yield "<h2>Matrices without an inverse</h2>"
    yield from _failures(report)
    yield "<h2>Work</h2>"
    yield from _work(report)
    yield "<h2>What was asked for</h2>"
    asked = [("target", account.target), *report.asked.items(), ("shape", report.shape), ("tile", report.tile)]
    yield _table((), [(name, _value(value)) for name, value in asked if _value(value) not in _NOTHING])
    if report.runs and report.runs[-1].get("versions"):
        yield "<h2>Versions of the last run</h2>"
        yield _table((), sorted(report.runs[-1]["versions"].items()))
    yield f"<footer><p>Made {_text(_when(report.made))} from what the target tells of itself.</p></footer>"


def _failures(report: Findings) -> Iterator[str]:
    account = report.account
    if not account.n_failed:
        yield f"<p>None of {account.matrices_done:,}.</p>"
        return
    rows = []
    for failure in failures_of(account.assume_a):
        if number := account.failed[failure.kind]:
            rows.append((failure.words, f"{number:,}", _share(number, account.matrices_done)))
    yield _table(("what", "matrices", "share"), rows)
    singular = failures_of(account.assume_a)[0]
    if account.failed[singular.kind]:
        yield f'<p class="quiet">{_text(singular.advice)}</p>'
    if report.failed:
        names = list(dict.fromkeys(name for each in report.failed for name in each.coordinates))
        yield '<p class="quiet">The first of each kind; all of them are in the array of codes of the target.</p>'
        heads = (f"index ({', '.join(report.dims)})", "why", *names)
        yield _table(heads, (_of_matrix(each, names) for each in report.failed))


def _of_matrix(each: FailedMatrix, names: Sequence[str]) -> Sequence[str]:
    coordinates = (as_text(each.coordinates.get(name, "")) for name in names)
    return ", ".join(map(str, each.index)), each.why, *coordinates


def _share(number: int, of: int) -> str:
    share = number / max(1, of)
    return f"{share:.3%}" if share >= _SMALLEST_SHARE or not number else f"less than {_SMALLEST_SHARE:.3%}"


def _pictures(report: Findings) -> Iterator[str]:
    from dask_batchinv.job.report.page import figures  # with it Matplotlib is imported

    account, pictures = report.account, list[str]()
    eps = float(np.finfo(real_dtype(np.dtype(report.asked["stored as"]))).eps)
    if (seen := report.map) is not None:
        across = " and ".join(seen.dims)
        pixel = "" if seen.matrices == 1 else f" A pixel is up to {counted(seen.matrices, 'matrix')}"
        pixel += ", as the ledger counts them." if seen.by_tile else "." * bool(pixel)
        what = "What happened to each matrix" if seen.matrices == 1 else "Which share of the matrices has no inverse"
        caption = f"{what}, along {across}.{pixel} Small squares mark what stands alone."
        pictures.append(_figure(figures.map_of_failures(seen, report.ticks, account.assume_a), caption))
        if np.isfinite(seen.log_rcond).any():
            caption = f"How well conditioned the inverted ones are, along {across}.{pixel}"
            pictures.append(_figure(figures.map_of_rcond(seen, report.ticks, eps), caption))
    if (found := report.histogram) is not None:
        marks = [("eps", eps), *([("min_rcond", report.asked["min_rcond"])] if report.asked["min_rcond"] else [])]
        some = "" if found.tiles is None else f", of {counted(found.tiles, 'tile')} spread evenly"
        caption = (
            f"rcond of {counted(found.matrices, 'matrix')} with an inverse{some}. Left of the dashed line, eps, an "
            "inverse may have no correct digit."
        )
        pictures.append(_figure(figures.histogram(found, marks), caption))
    timelines = [run["timeline"] for run in report.runs if _is_drawable(run["timeline"])]
    if timelines:
        caption = "How fast it went." if len(timelines) == 1 else "How fast it went; dotted lines part the runs."
        pictures.append(_figure(figures.throughput(timelines), caption))
    if pictures:
        yield f'<h2>Pictures</h2>\n<div class="pictures">{"".join(pictures)}</div>'


def _is_drawable(timeline: Sequence[Any]) -> bool:
    return len(timeline) >= _FEWEST_POINTS and timeline[-1][0] > 0


def _work(report: Findings) -> Iterator[str]:
    account = report.account
    devices = ", ".join(f"{count:,} on {device}" for device, count in account.devices.items() if count)
    done = f"Tiles: {account.tiles_done:,} of {account.tiles:,} done ({devices or 'none'})"
    yield f"<p>{done}, {report.retried:,} tried more than once.</p>"
    if report.runs:
        heads = ("began", "seconds", "tiles", "tried again", "workers", "died", "restarted", "where", "stopped")
        keys = ("seconds", "tiles_now", "retries", "workers", "deaths", "restarts", "where", "stopped")
        some = report.runs[: -_MOST_ROWS - 1 : -1]
        yield _table(heads, ([_when(run.get("started")), *(_value(run.get(key)) for key in keys)] for run in some))
        if len(some) < len(report.runs):
            yield f'<p class="quiet">The last {len(some)} of {len(report.runs)} recorded runs.</p>'
        figures = list(report.runs[-1]["per_worker"].items())
        if figures:
            yield "<p>Workers of the last run:</p>"
            columns = ("tiles", "failed", "seconds", "cpu_seconds", "requests")
            rows = ([address, *(_value(done.get(key)) for key in columns)] for address, done in figures[:_MOST_ROWS])
            yield _table(("address", "tiles", "failed", "seconds", "of CPU", "requests"), rows)
    if report.slowest:
        yield "<p>The slowest tiles:</p>"
        rows = ([tile.place, f"{tile.seconds:.2f}", str(tile.attempts)] for tile in report.slowest)
        yield _table(("tile", "seconds", "attempts"), rows)


def _facts(*facts: tuple[str, str]) -> str:
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{cells}</dl>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in heads)
    head = f"<thead><tr>{head}</tr></thead>" if heads else ""
    body = "".join(_row(row, is_named=not heads) for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _row(row: Sequence[str], *, is_named: bool) -> str:
    first, *others = map(_text, row)
    name = f'<th scope="row">{first}</th>' if is_named else f'<td class="index">{first}</td>'
    return f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


def _figure(picture: str, caption: str) -> str:
    picture = picture.replace("<svg", f'<svg role="img" aria-label="{_text(caption)}"', 1)
    return f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>"


def _when(moment: Any) -> str:
    return str(moment).replace("T", " ").replace("+00:00", " UTC")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return "" if value is None else str(value)


def _text(text: Any) -> str:
    return escape(clean(str(text)))
