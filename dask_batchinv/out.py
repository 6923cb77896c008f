"""``out=``: results put into NumPy arrays, Zarr arrays, and stores that are created for them."""

from __future__ import annotations

import itertools
import math
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import dask.local
import dask.threaded
import distributed
import numpy as np
import numpy.typing as npt
import zarr
import zarr.storage
from dask.base import get_scheduler

from dask_batchinv.attributes import refuse_packed
from dask_batchinv.kernels.device import is_gpu_array
from dask_batchinv.location import Location
from dask_batchinv.stack import result_dtype
from dask_batchinv.storage import array_options, fill_means_missing, innermost, write_unit
from dask_batchinv.text import redact

Chunks = tuple[tuple[int, ...], ...]
#: How long `remove_array` tries.
_REMOVAL_SECONDS = 5.0


def check_out(out: Any, like: Any) -> None:
    """Raise ValueError or TypeError unless `out` can take the inverse of `like`."""
    if isinstance(out, np.ndarray) and not out.flags.writeable:  # CuPy has no such flag
        raise ValueError("out is read-only")
    if not isinstance(out, zarr.Array) and _overlaps_itself(out):
        raise ValueError("several elements of out share their memory: pass an array that was not expanded or broadcast")
    if tuple(out.shape) != tuple(like.shape):
        raise ValueError(f"out has shape {tuple(out.shape)}, but the result has {tuple(like.shape)}")
    dtype = result_dtype(like.dtype)
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}, but the result has {dtype}")


def _overlaps_itself(out: Any) -> bool:
    """Tell whether elements of an array may share memory: sorted, each stride must step over all that is within."""
    end = out.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(out.strides, out.shape, strict=True)):
        if size > 1 and stride < end:
            return bool(out.size)
        end += (size - 1) * stride
    return False


def fill(out: Any, result: da.Array) -> Any:
    """Compute `result` into `out`."""
    if is_gpu_array(result._meta):
        raise TypeError("out takes no blocks from the GPU: append .map_blocks(cupy.asnumpy) to the input")
    if is_plain(out):
        check_out(out, result)
        refuse_overlap(out, result)
        _write_to_memory(out, result)
        return out
    if isinstance(out, (str, os.PathLike)):
        if any(math.isnan(size) for size in result.shape):
            raise ValueError("a new Zarr array needs a known shape: call compute_chunk_sizes() on the input first")
        location, chunks = Location.parse(out), tuple(max(1, *sizes) for sizes in result.chunks)
        if location.exists() and location.read_json("zarr.json") is None:  # else Zarr refuses it
            # What is there is not ours: a failure would remove it.
            raise FileExistsError(f"{location.name} exists: pass the path of a new array, or delete that yourself")
        created = zarr.create_array(
            location.store(), shape=result.shape, chunks=chunks, dtype=result.dtype, **array_options(result.dtype)
        )
        try:
            refuse_overlap(created, result)
            _write(created, result, location)
        except BaseException as failure:
            # What is half filled must not be taken for a result, nor be in the way of the next try.
            try:
                remove_array(location)
            except Exception as error:  # whatever a file system may raise
                failure.add_note(redact(f"{location.name} is half filled and could not be removed: {error}"))
            raise
        return created
    if not isinstance(out, zarr.Array):
        raise TypeError(
            f"out must be a NumPy array, a torch tensor, a zarr.Array or a store location, got {type(out).__name__}"
        )
    check_out(out, result)
    attributes = dict(out.attrs)
    missing = {"_FillValue": out.fill_value} if fill_means_missing(out, attributes) else {}
    refuse_packed(attributes | missing, f"out, the array at {out.store_path},", "pass an array without these")
    refuse_overlap(out, result)
    _write(out, result)
    return out


def is_plain(out: Any) -> bool:
    """Tell whether an array is NumPy's own, in memory or in a file, and holds nothing but its numbers."""
    return type(out) in (np.ndarray, np.memmap)


def _write_to_memory(out: Any, result: da.Array) -> None:
    """Write `result` into an array of this process, block by block, so that the whole is never held beside it."""
    regions = list(_regions(result.chunks))
    scheduler = get_scheduler(collections=[result]) or dask.threaded.get
    if scheduler in (dask.threaded.get, dask.local.get_sync):
        # In this process, where tasks can write themselves.
        held = _Held(out)
        try:
            _written(result, held, None).compute()
        finally:
            held.array = None  # when one task fails, Dask lets those go on that run
        return
    blocks = list(result.to_delayed().ravel())
    client = getattr(scheduler, "__self__", None)
    if not isinstance(client, distributed.Client):
        for region, block in zip(regions, dask.compute(*blocks), strict=True):
            out[region] = block
        return
    where = dict(zip(client.compute(blocks), regions, strict=True))
    for future, block in distributed.as_completed(list(where), loop=client.loop, with_results=True):
        out[where.pop(future)] = block


class _Held:
    """An array that tasks write to, hidden from Dask, which would look at all its bytes to give it a name."""

    def __init__(self, array: Any):
        self.array: Any | None = array

    def __dask_tokenize__(self) -> str:
        return uuid.uuid4().hex

    def __setitem__(self, region: Any, block: Any) -> None:
        if (array := self.array) is not None:
            array[region] = block


def _regions(chunks: Chunks) -> Iterator[tuple[slice, ...]]:
    """Yield where each block is, in the order of `to_delayed().ravel()`."""
    bounds = [[0, *np.cumsum(sizes).tolist()] for sizes in chunks]
    return itertools.product(*([slice(*pair) for pair in itertools.pairwise(ends)] for ends in bounds))


def _write(out: zarr.Array[Any], result: da.Array, location: Location | None = None) -> None:
    """Write `result` into a Zarr array, which is at `location` if a failure removes it."""
    result = result.rechunk(safe_chunks(result.chunks, write_unit(out)))
    if is_in_memory(out):
        _write_to_memory(out, result)
        return
    _written(result, out, location).compute()


def _written(result: da.Array, out: Any, location: Location | None) -> da.Array:
    """Return a lazy array of which each block writes one of `result`."""
    return result.map_blocks(
        _write_block, out, location, dtype=bool, chunks=tuple((1,) * len(sizes) for sizes in result.chunks),
        meta=np.empty((0,) * result.ndim, bool),
    )  # fmt: skip


def _write_block(block: Any, out: Any, location: Location | None, block_info: Any = None) -> Any:
    if block_info:
        # When one task fails, Dask lets those go on that run: they must not write where no array is any more.
        if location is not None and location.read_json("zarr.json") is None:
            raise FileNotFoundError(f"the array at {location.name} was removed because another block failed")
        out[tuple(slice(*span) for span in block_info[0]["array-location"])] = block
    return np.ones((1,) * block.ndim, bool)


def safe_chunks(chunks: Chunks, unit: tuple[int, ...]) -> Chunks:
    """Return `chunks`, or others of about the same size whose inner bounds are all bounds of write units.

    No write unit is then touched by two tasks, which would lose data without an error.
    """
    return tuple(_safe_sizes(sizes, step) for sizes, step in zip(chunks, unit, strict=True))


def _safe_sizes(sizes: tuple[int, ...], step: int) -> tuple[int, ...]:
    bounds = np.cumsum(sizes)
    if not np.any(bounds[:-1] % step):
        return sizes
    size = step * max(1, round(max(sizes) / step))
    whole, rest = divmod(int(bounds[-1]), size)
    return (size,) * whole + ((rest,) if rest else ())


def remove_array(location: Location) -> None:
    """Remove an array that tasks may still be writing to, if they look for its metadata before each block.

    Raises
    ------
    OSError
        If it cannot be removed.
    """
    deadline, absent = time.monotonic() + _REMOVAL_SECONDS, 0
    while absent < 3:
        failure = None
        try:
            # First what makes it an array, so that no task begins another block.
            location.remove(first="zarr.json")
        except OSError as error:  # a block in hand was written meanwhile, or it is gone
            failure = error
        absent = 0 if location.exists() else absent + 1
        if not absent and time.monotonic() > deadline:
            raise failure or OSError(f"something keeps writing to {location.name}")
        time.sleep(0.05)


def shares_memory(a: Any, b: npt.NDArray[Any]) -> bool:
    """Tell whether two arrays share memory; True where that is too hard to say."""
    if not isinstance(a, np.ndarray):  # both are CuPy's
        import cupy

        return bool(cupy.shares_memory(a, b))
    effort: Any = 10_000  # NumPy's types know only -1 and 0 in some versions
    try:
        return np.shares_memory(a, b, max_work=effort)
    except np.exceptions.TooHardError:
        return True


def refuse_overlap(out: Any, result: da.Array) -> None:
    """Raise ValueError if computing `result` reads the memory or the Zarr array that `out` writes.

    Sees the arrays in the graph, also inside Xarray's wrappers; not those that a task opens by itself.
    """
    for source in _arrays_in(result):
        if isinstance(out, np.ndarray):
            if isinstance(source, np.ndarray) and shares_memory(source, out):
                raise ValueError("out overlaps the input: pass an array of its own memory")
        elif isinstance(source, zarr.Array) and _location(source) == _location(out):
            raise ValueError(f"out is the array at {out.store_path} that the input is read from: write elsewhere")


def is_in_memory(array: zarr.Array[Any]) -> bool:
    """Tell whether an array lives in this process alone, so that no other can write to it."""
    store = innermost(array.store)
    return isinstance(store, zarr.storage.MemoryStore) or (
        isinstance(store, zarr.storage.FsspecStore) and _protocol(store) == "memory"
    )


def _protocol(store: zarr.storage.FsspecStore) -> str:
    protocol = store.fs.protocol
    return protocol if isinstance(protocol, str) else protocol[0]


def _location(array: zarr.Array[Any]) -> object:
    """Return what two arrays have in common if and only if they are one."""
    store = innermost(array.store)
    if isinstance(store, zarr.storage.LocalStore):
        return os.path.realpath(os.path.join(store.root, array.path))
    if isinstance(store, zarr.storage.FsspecStore):
        protocol, path = _protocol(store), f"{store.path}/{array.path}".rstrip("/")
        return os.path.realpath(path) if protocol in ("file", "local") else f"{protocol}://{path}"
    return store, array.path


def _arrays_in(collection: da.Array) -> Iterator[Any]:
    """Yield the NumPy and Zarr arrays that the tasks of a collection hold."""
    seen: set[int] = set()
    todo = list(dict(collection.__dask_graph__()).values())
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (np.ndarray, zarr.Array)):
            yield thing
        elif isinstance(thing, (tuple, list)):
            todo += thing
        else:
            # Tasks of Dask, and the lazy arrays of Xarray, which wrap each other.
            todo += [getattr(thing, name) for name in ("value", "args", "array", "_array") if hasattr(thing, name)]
