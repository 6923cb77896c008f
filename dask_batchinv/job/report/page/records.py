"""The records of runs as a report shows them: what is no such record, for it is damaged, is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

#: What a record says in a word or a number.
_PLAIN = (
    "started", "ended", "seconds", "cpu_seconds", "requests", "tiles_now", "retries", "deaths", "restarts", "workers",
    "threads_per_worker", "where", "stopped", "n_failed_tiles", "n_bad_chunks", "bytes_read", "bytes_written",
)  # fmt: skip
_OF_WORKERS = ("tiles", "failed", "seconds", "cpu_seconds", "requests")
#: So long a text is shown.
_LONGEST = 2000


def sound(runs: Iterable[Any]) -> tuple[dict[str, Any], ...]:
    """Return what can be shown of some records.

    Examples
    --------
    >>> (run,) = sound(["x", {"seconds": float("nan"), "workers": 2, "timeline": [[0, 0], [1, 5]], "versions": 5}])
    >>> run["workers"], run["timeline"], run["versions"], "seconds" in run
    (2, ((0.0, 0.0), (1.0, 5.0)), {}, False)
    """
    return tuple(_sound(run) for run in runs if isinstance(run, dict))


def _sound(run: dict[str, Any]) -> dict[str, Any]:
    workers = run.get("per_worker")
    some = workers.items() if isinstance(workers, dict) else ()
    return _plain(run, _PLAIN) | {
        "timeline": _timeline(run.get("timeline")),
        "per_worker": {str(name): _plain(done, _OF_WORKERS) for name, done in some if isinstance(done, dict)},
        "versions": {str(name): str(text)[:_LONGEST] for name, text in _items(run.get("versions"))},
        "notes": _texts(run.get("notes")),
        "worker_events": _texts(run.get("worker_events")),
        "failed_tiles": [_plain(tile, ("number", "cause")) for tile in _dicts(run.get("failed_tiles"))],
        "bad_chunks": [_plain(chunk, ("key", "cause")) for chunk in _dicts(run.get("bad_chunks"))],
    }


def _plain(found: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: found[name] if not isinstance(found[name], str) else found[name][:_LONGEST]
            for name in names if name in found and _is_plain(found[name])}  # fmt: skip


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and abs(value) < 2**63 and math.isfinite(value)


def _timeline(found: Any) -> tuple[tuple[float, float], ...]:
    points = found if isinstance(found, (list, tuple)) else ()
    if not all(
        isinstance(point, (list, tuple)) and len(point) == 2 and all(map(_is_number, point)) for point in points
    ):
        return ()
    seconds = [point[0] for point in points]
    if seconds != sorted(seconds) or any(second < 0 for second in seconds):
        return ()
    return tuple((float(second), float(count)) for second, count in points)


def _items(found: Any) -> Iterable[tuple[Any, Any]]:
    return found.items() if isinstance(found, dict) else ()


def _dicts(found: Any) -> list[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, (list, tuple)) else []


def _texts(found: Any) -> tuple[str, ...]:
    return tuple(each[:_LONGEST] for each in found if isinstance(each, str)) if isinstance(found, (list, tuple)) else ()
