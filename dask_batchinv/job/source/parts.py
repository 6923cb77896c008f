"""Reads a region chunk by chunk, where it cannot be read as a whole: what is damaged is named, and all else read."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.job.results import BadChunk, is_final
from dask_batchinv.job.source.stored_array import StoredArray
from dask_batchinv.storage import DamagedChunkError, write_unit
from dask_batchinv.text import clean

Array = npt.NDArray[Any]
Place = tuple[int, ...]
Region = tuple[slice, ...]


@dataclass
class Parts:
    """A region that was read chunk by chunk."""

    stored: Array
    """What is stored there; of matrices that cannot be read, anything."""
    unreadable: npt.NDArray[np.bool_]
    """Which of its matrices that is."""
    bad: list[BadChunk] = field(default_factory=list)
    """The chunks that cannot be read."""


def read_in_parts(
    source: StoredArray, array: zarr.Array[Any], region: Region, out: Array, batch: Sequence[int]
) -> Parts:
    """Read a region of an array, which was opened for reading, into `out`, chunk by chunk.

    Its axes `batch` are those of different matrices.

    Raises
    ------
    Exception
        Whatever was raised that says nothing of a chunk, but of its store.
    """
    spans = [range(span.start, span.stop) for span in source.there(region)]
    parts = Parts(out, np.zeros([out.shape[axis] for axis in batch], bool))
    for place in _places(spans, write_unit(array)):
        key = array.metadata.encode_chunk_key(place)
        whole = _common(spans, place, write_unit(array))
        if (bad := _read(source, array, key, whole, spans, parts)) is None:
            continue
        inner = {at: _common(whole, at, source.read_unit) for at in _places(whole, source.read_unit)}
        found = {at: _read(source, array, key, part, spans, parts) for at, part in inner.items() if len(inner) > 1}
        damaged = {at: each for at, each in found.items() if each is not None}
        if len(damaged) == len(found):  # all of it
            parts.bad.append(bad)
            parts.unreadable[_there(whole, spans, batch)] = True
            continue
        for at, each in damaged.items():
            name = f"{key} [{', '.join(map(str, _inside(at, place, source, array)))}]"
            parts.bad.append(replace(each, key=name))
            parts.unreadable[_there(inner[at], spans, batch)] = True
    return parts


def _places(spans: Sequence[range], unit: Sequence[int]) -> Iterator[Place]:
    """Yield the places in a grid of all chunks that have a part of a region."""
    along = (range(span.start // step, -(-span.stop // step)) for span, step in zip(spans, unit, strict=True))
    return itertools.product(*along)


def _common(spans: Sequence[range], place: Place, unit: Sequence[int]) -> list[range]:
    """Return what the chunk at a place in a grid has of a region."""
    return [
        range(max(span.start, at * step), min(span.stop, (at + 1) * step))
        for span, at, step in zip(spans, place, unit, strict=True)
    ]


def _inside(at: Place, place: Place, source: StoredArray, array: zarr.Array[Any]) -> Place:
    """Return where a chunk is in its shard."""
    counts = (whole // part for whole, part in zip(write_unit(array), source.read_unit, strict=True))
    return tuple(a - p * count for a, p, count in zip(at, place, counts, strict=True))


def _there(part: Sequence[range], spans: Sequence[range], axes: Sequence[int]) -> Region:
    """Return where a part is in a region, along some axes."""
    return tuple(slice(part[k].start - spans[k].start, part[k].stop - spans[k].start) for k in axes)


def _read(
    source: StoredArray, array: zarr.Array[Any], key: str, part: Sequence[range], spans: Sequence[range], parts: Parts
) -> BadChunk | None:
    """Read a part of a region; if the chunk is the cause that this cannot be done, return it."""
    region = tuple(slice(span.start, span.stop) for span in part)
    try:
        parts.stored[_there(part, spans, range(len(part)))] = source.read_there(array, region)
    except Exception as error:
        if not _is_of_chunk(error, array, key):
            raise
        if not isinstance(error, DamagedChunkError):
            # Its store can give it now: what it gives must be what cannot be decoded, not what came on a bad line.
            with suppress(type(error)):
                parts.stored[_there(part, spans, range(len(part)))] = source.read_there(array, region)
                return None
        return BadChunk(key, clean(f"{type(error).__name__}: {error}"), is_final(error))
    return None


def _is_of_chunk(error: Exception, array: zarr.Array[Any], key: str) -> bool:
    """Tell whether an error says that a chunk is damaged, not that its store cannot be reached."""
    store = array.store
    assert isinstance(store, BoundedStore)
    if isinstance(error, DamagedChunkError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.EIO and store.is_local  # a bad sector
    return not isinstance(error, MemoryError) and store.gives(key)  # what it gives cannot be decoded
