"""A part of a source, by labels, or by numbers where there are none: ``time=2026-01-02``, ``y=0..99``, ``x=5..``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import numpy as np

from dask_batchinv.labels import Index
from dask_batchinv.outcome import SourceError
from dask_batchinv.stack import shown

#: What stands between the first and the last label of a range.
_RANGE = ".."
Selection = Mapping[str, str]


def as_text(select: Mapping[Any, Any] | None) -> dict[str, str]:
    """Return a selection as it is written: labels, and slices of them, as Xarray's ``sel`` takes them.

    Raises
    ------
    SourceError
        If it has something else.

    Examples
    --------
    >>> as_text({"time": "2026-01-02", "y": slice(0, 99), "x": slice(5, None)})
    {'time': '2026-01-02', 'y': '0..99', 'x': '5..'}
    """
    if select is not None and not isinstance(select, Mapping):
        raise SourceError(f"select takes a mapping such as {{'time': '2026-01-02'}}, got {shown(select)}")
    return {str(dim): _text(str(dim), value) for dim, value in (select or {}).items()}


def _text(dim: str, value: Any) -> str:
    if not isinstance(value, slice):
        if np.ndim(value):
            raise SourceError(f"a selection along {dim} is one label or a slice of them, not several")
        return _label_text(value)
    if value.step not in (None, 1):
        raise SourceError(f"a selection along {dim} has no steps: take a slice of all that is between two labels")
    return _RANGE.join("" if end is None else _label_text(end) for end in (value.start, value.stop))


def _label_text(value: Any) -> str:
    """Return a label as text: of a time all digits, for fewer would mean all of a day."""
    if isinstance(value, np.datetime64):
        return str(value.astype("M8[ns]"))
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds")
    return str(value)


def find_window(
    select: Selection, sizes: Mapping[str, int], batch: list[str], labels_of: Callable[[str], Index | None]
) -> dict[str, range]:
    """Return what a selection means, by dimension.

    Parameters
    ----------
    select
        What is wanted.
    sizes
        The lengths of all dimensions.
    batch
        Those along which can be selected.
    labels_of
        Returns the labels of a dimension.

    Raises
    ------
    SourceError
        If there is no such dimension, or nothing there, or it is not in one piece.
    """
    if unknown := [dim for dim in select if dim not in batch]:
        raise SourceError(f"a part can be selected along {', '.join(batch) or 'no dimension'}, not along {unknown[0]}")
    window = {}
    for dim, text in select.items():
        labels = labels_of(dim)
        found = _by_number(text, sizes[dim]) if labels is None else _by_label(text, labels)
        if found is None or not found:
            what = f"{sizes[dim]} long, without labels" if labels is None else f"labelled {_shown(labels)}"
            raise SourceError(f"{dim}={text} selects nothing, or not one piece: {dim} is {what}")
        window[dim] = found
    return window


def _shown(labels: Index) -> str:
    return f"{labels[0]} to {labels[-1]}" if len(labels) else "with nothing"


def _by_number(text: str, size: int) -> range | None:
    try:
        if _RANGE not in text:
            number = int(text)
            return range(size)[number : number + 1 or None]
        first, _, last = text.partition(_RANGE)
        return range(size)[int(first) if first else None : int(last) if last else None]
    except ValueError:
        return None


def _by_label(text: str, labels: Index) -> range | None:
    try:
        # Of times Pandas takes more for a label than is one, such as a time and two dots.
        is_label = labels.inferred_type == "string" and text in labels
        if _RANGE in text and not is_label:
            first, _, last = text.partition(_RANGE)
            found = labels.slice_indexer(*(_label(end, labels) if end else None for end in (first, last)))
        else:
            found = labels.get_loc(_label(text, labels))
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(found, slice):
        found = range(len(labels))[found]
        return found if found.step == 1 else None
    return range(found, found + 1) if isinstance(found, (int, np.integer)) else None


def _label(text: str, labels: Index) -> Any:
    """Return a label from what is written."""
    kind = labels.dtype.kind
    if kind in "iu" and text.lstrip("+-").isdecimal():
        return int(text)
    return float(text) if kind in "iuf" else text
