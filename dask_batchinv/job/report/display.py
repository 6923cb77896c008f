"""Progress for people: a bar on a terminal, a line now and then elsewhere. On standard error."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dask_batchinv.job.report.run_record import OnProgress, Progress
from dask_batchinv.job.report.streams import Lasting
from dask_batchinv.shown import counted

#: Seconds between two lines where there is no terminal.
LINE_SECONDS = 10.0
#: Before the numbers; what earlier runs have done is read back first, and what they have done it from.
_WORDS = {"checking": "reading back: ", "comparing": "comparing with the source: ", "inverting": "", "verifying": ""}


@contextmanager
def shown(*, enabled: bool | None = True, stream: Any = None) -> Iterator[OnProgress | None]:
    """Yield a callback that shows the progress of a job; None for `enabled`: only where somebody looks at it."""
    stream, is_notebook = Lasting(sys.stderr if stream is None else stream), _is_in_notebook()
    is_watched = is_notebook or stream.isatty()
    if not enabled and (enabled is not None or not is_watched):
        yield None
    elif is_watched:
        with _bar(stream, is_notebook=is_notebook) as bar:
            yield lambda now: _move(bar, now)
    else:
        yield _Lines(stream)


def _is_in_notebook() -> bool:
    """Tell whether a notebook runs this process: its standard error is no terminal, but is seen all the same."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _bar(stream: Any, *, is_notebook: bool) -> Any:
    """Return a bar; not imported before it is needed: most jobs of scripts are watched by nobody."""
    if is_notebook and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm

        return tqdm(unit=" matrices", unit_scale=True, smoothing=0.05)
    from tqdm import tqdm

    return tqdm(unit=" matrices", unit_scale=True, file=stream, dynamic_ncols=True, smoothing=0.05)


def _move(bar: Any, now: Progress) -> None:
    if bar.total is None or bar.desc != _WORDS[now.activity]:
        # What an earlier run, or the reading back, has done must not count for the rate.
        bar.reset(total=now.matrices)
        bar.start_t -= now.seconds  # of a run that began before anybody looked
        bar.desc = _WORDS[now.activity]
        bar.initial = now.matrices_before
        bar.n = now.matrices_before
    bar.set_postfix_str(_troubles(now), refresh=False)
    bar.update(now.matrices_done - bar.n)


def _troubles(now: Progress) -> str:
    tiles = counted(now.failed_tiles, "tile")
    if now.activity == "verifying":
        return f"{tiles} not right"
    if now.activity == "checking":
        return f"{tiles} damaged"
    if now.activity == "comparing":
        return f"{tiles} changed"
    return f"{now.failed:,} without an inverse" + (f", {tiles} failed" if now.failed_tiles else "")


class _Lines:
    """Prints a line at the beginning, every few seconds, and at the end."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._next = 0.0
        self._last: Progress | None = None

    def __call__(self, now: Progress) -> None:
        clock, is_at_end, before = time.monotonic(), now.matrices_done >= now.matrices, self._last
        if before is not None and now.activity == before.activity:
            # The end is told of by each of several that come to it.
            is_said = replace(now, seconds=before.seconds) == before if is_at_end else clock < self._next
            if is_said:
                return
        self._last = now
        self._next = clock + LINE_SECONDS
        done = now.matrices_done - now.matrices_before
        rate = done / now.seconds if now.seconds else 0.0
        left = f"{(now.matrices - now.matrices_done) / rate:,.0f} s left" if rate else "time left unknown"
        share = now.matrices_done / now.matrices if now.matrices else 1.0
        done_of = f"{_WORDS[now.activity]}{now.matrices_done:,} of {counted(now.matrices, 'matrix')} ({share:.0%})"
        now_is = time.strftime("%H:%M:%S")  # whoever reads a log asks when
        print(f"{now_is} {done_of}, {rate:,.0f}/s, {left}, {_troubles(now)}", file=self._stream, flush=True)
