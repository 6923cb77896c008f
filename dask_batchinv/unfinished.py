"""A new Zarr array for ``out=``: it is begun, the same call goes on with it, and finishes it. Nothing is removed."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.chunks.sealed import write_values
from dask_batchinv.location import Location, raised_as
from dask_batchinv.shown import counted
from dask_batchinv.stack import OnError
from dask_batchinv.storage import MARK, FilesStore, StrictStore, array_options

#: From the strictest on: what one lets pass as done, the next ones do too.
_STRICTNESS: tuple[OnError, ...] = ("raise", "skipna", "nan")


@dataclass(frozen=True)
class Call:
    """A call of `inverse`, as far as it decides the result."""

    token: str
    """A name of all that goes into the result but `on_error`: equal for equal calls alone."""
    on_error: OnError
    """What happens when matrices have no inverse."""


@dataclass(frozen=True)
class Unfinished:
    """The array that a call makes, until it is finished."""

    location: Location
    """Where it is."""
    call: Call
    """What makes it."""
    shape: tuple[int, ...]
    """Its shape."""
    chunks: tuple[int, ...]
    """Its chunks."""
    dtype: np.dtype[Any]
    """Its dtype."""

    def begin(self) -> tuple[zarr.Array[Any], bool]:
        """Create the array, or open what the same call has begun; also return whether it is new.

        Raises
        ------
        FileExistsError
            If anything else is there.
        OSError
            If the location cannot be read or written.
        """
        name = self.location.name
        with raised_as(OSError, f"{name} cannot be read"):
            is_free = not self.location.exists() or not self.location.children()
            mark = None if is_free else self._mark()
        if not is_free:
            self._refuse_other(mark)
        with raised_as(OSError, f"{name} cannot be written"):
            if is_free:
                array = zarr.create_array(
                    self.location.store(), shape=self.shape, chunks=self.chunks, dtype=self.dtype,
                    attributes=self._attributes(), **array_options(self.dtype),
                )  # fmt: skip
                return array, True
            array = zarr.open_array(self.location.store(), mode="r+")
        if (array.shape, array.chunks, array.dtype) != (self.shape, self.chunks, self.dtype):
            raise _of_another_call(name)
        if dict(array.attrs) != self._attributes():  # from now on failures may pass that did not before
            with raised_as(OSError, f"{name} cannot be written"):
                array.attrs.put(self._attributes())
        # Zarr up to 3.1 takes no notice of a configuration that is given when an array is opened.
        return array.with_config({"write_empty_chunks": True}), False

    def _refuse_other(self, mark: dict[str, Any] | None) -> None:
        """Raise FileExistsError unless a mark is that of this call."""
        name = self.location.name
        if mark is None:
            raise FileExistsError(f"{name} exists: pass the path of a new array, or delete that yourself")
        if mark.get("call") != self.call.token or mark.get("on_error") not in _STRICTNESS:
            raise _of_another_call(name)
        begun = mark["on_error"]
        if _STRICTNESS.index(begun) > _STRICTNESS.index(self.call.on_error):
            raise FileExistsError(
                f"{name} holds the unfinished result of a call with on_error={begun!r}, which let matrices fail: make "
                "that call again, delete the array yourself, or pass another path"
            )

    def _mark(self) -> dict[str, Any] | None:
        """Return our mark on what is there; None if there is none."""
        mark = None
        with suppress(ValueError, RecursionError):  # it is not ours
            meta = self.location.read_json("zarr.json") or {}
            attributes = meta.get("attributes")
            text = attributes.get(MARK) if isinstance(attributes, dict) else None
            mark = json.loads(text) if isinstance(text, str) and meta.get("node_type") == "array" else None
        return mark if isinstance(mark, dict) and "call" in mark else None

    def _attributes(self) -> dict[str, Any]:
        mark = {"call": self.call.token, "on_error": self.call.on_error}
        return {MARK: json.dumps(mark), "complete": 0}

    def check(self) -> None:
        """Raise FileNotFoundError unless the array is still there, and unfinished."""
        mark = self._mark()
        if mark is None or mark.get("call") != self.call.token:
            raise FileNotFoundError(
                f"the array at {self.location.name} was finished, replaced or deleted by another call meanwhile"
            )

    def write(self, array: Any, region: tuple[slice, ...], block: Any) -> None:
        """Write a block, unless the array is no longer there: tasks of Dask run on when another has failed."""
        with raised_as(OSError, f"{self.location.name} cannot be written"):
            self.check()
            if self.location.is_local and self._is_chunk(region, block):
                place = [span.start // size for span, size in zip(region, self.chunks, strict=True)]
                path = os.path.join(self.location.url, array.metadata.encode_chunk_key(tuple(place)))
                os.makedirs(os.path.dirname(path), exist_ok=True)
                write_values(path, block)
            else:
                array[region] = block

    def _is_chunk(self, region: tuple[slice, ...], block: Any) -> bool:
        """Tell whether a block is in memory what one chunk is in its store but for the checksum."""
        starts = all(span.start % size == 0 for span, size in zip(region, self.chunks, strict=True))
        return bool(
            starts and isinstance(block, np.ndarray) and block.shape == self.chunks and block.dtype == self.dtype
            and block.dtype.isnative and sys.byteorder == "little" and block.flags.c_contiguous
        )  # fmt: skip

    def missing_blocks(self, chunks: tuple[tuple[int, ...], ...], *, here: bool) -> list[int]:
        """Return which blocks, in C order, are not in the store or not as they were written; `here` in this process."""
        template = da.zeros(self.shape, chunks=chunks, dtype=bool)
        done = template.map_blocks(
            _is_done, self.location, dtype=bool, chunks=tuple((1,) * len(sizes) for sizes in chunks),
            meta=np.empty((0,) * len(chunks), bool),
        )  # fmt: skip
        found: npt.NDArray[np.bool_] = done.compute(**({"scheduler": "threads"} if here else {}))
        return [int(number) for number in np.flatnonzero(~found)]

    def finish(self, array: zarr.Array[Any]) -> zarr.Array[Any]:
        """Take the mark off, and return the array."""
        with raised_as(OSError, f"{self.location.name} cannot be finished"):
            self.check()
            if missing := array.nchunks - array.nchunks_initialized:
                raise FileNotFoundError(f"{counted(missing, 'chunk')} removed meanwhile")
            array.attrs.put({})
        return array


def _of_another_call(name: str) -> FileExistsError:
    return FileExistsError(
        f"{name} holds the unfinished result of another call: delete it yourself, or pass another path"
    )


def _is_done(block: Any, location: Location, block_info: Any = None) -> Any:
    """Tell whether all chunks of a block are in the store and have the checksums that they end with."""
    done = True
    if block_info:
        try:
            array = zarr.open_array(StrictStore(FilesStore(location.store(read_only=True))), mode="r")
            array[tuple(slice(*span) for span in block_info[0]["array-location"])]
        except Exception:  # whatever is wrong with it: it is done again, and what cannot be written will be said
            done = False
    return np.full((1,) * block.ndim, done)
