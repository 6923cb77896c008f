"""``out=``: results put into NumPy arrays, Zarr arrays, and stores that are created for them."""

from __future__ import annotations

import itertools
import math
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import dask
import dask.array as da
import dask.local
import dask.threaded
import numpy as np
import numpy.typing as npt
import zarr
import zarr.storage
from dask.base import get_scheduler

from dask_batchinv.attributes import refuse_packed
from dask_batchinv.kernels.device import is_gpu_array
from dask_batchinv.location import Location
from dask_batchinv.places import unwrapped
from dask_batchinv.stack import result_dtype
from dask_batchinv.storage import fill_means_missing, innermost, write_unit
from dask_batchinv.unfinished import Call, Unfinished

Chunks = tuple[tuple[int, ...], ...]
#: Tells this process from others.
_PROCESS = uuid.uuid4().hex


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


def fill(out: Any, result: da.Array, call: Call) -> Any:
    """Compute `result`, of a call, into `out`."""
    if is_gpu_array(result._meta):
        raise TypeError("out takes no blocks from the GPU: append .map_blocks(cupy.asnumpy) to the input")
    if is_plain(out):
        check_out(out, result)
        refuse_overlap(out, result)
        _write_to_memory(out, result)
        return out
    if isinstance(out, (str, os.PathLike)):
        return _fill_new(Location.parse(out), result, call)
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


def _fill_new(location: Location, result: da.Array, call: Call) -> zarr.Array[Any]:
    """Compute `result` into a new Zarr array, or what the same call has left undone of one."""
    if any(math.isnan(size) for size in result.shape):
        raise ValueError("a new Zarr array needs a known shape: call compute_chunk_sizes() on the input first")
    sources = [source for source in arrays_in(result) if isinstance(source, zarr.Array)]
    for source in sources:
        if isinstance(place := location_of(source), Location) and place.contains(location):
            raise ValueError(f"out, {location.name}, is in the array that the input is read from: write elsewhere")
    if any(map(is_in_memory, sources)):  # in another process the same names mean other data
        call = replace(call, token=f"{call.token} {_PROCESS}")
    chunks = tuple(max(1, *sizes) for sizes in result.chunks)
    unfinished = Unfinished(location, call, tuple(map(int, result.shape)), chunks, result.dtype)
    array, is_new = unfinished.begin()
    try:
        result = result.rechunk(safe_chunks(result.chunks, write_unit(array)))
        here = is_in_memory(array)
        chosen = None if is_new else unfinished.missing_blocks(result.chunks, here=here)
        if here:
            _write_to_memory(array, result, chosen)
        else:
            _compute(_written(result, array, unfinished), chosen)
        return unfinished.finish(array)
    except BaseException as failure:
        failure.add_note(f"what is done stays in {location.name}: make the same call again to go on, or delete that")
        raise


def is_plain(out: Any) -> bool:
    """Tell whether an array is NumPy's own, in memory or in a file, and holds nothing but its numbers."""
    return type(out) in (np.ndarray, np.memmap)


def _write_to_memory(out: Any, result: da.Array, chosen: Sequence[int] | None = None) -> None:
    """Write `result` into an array of this process, block by block, so that the whole is never held beside it."""
    scheduler = get_scheduler(collections=[result]) or dask.threaded.get
    if scheduler in (dask.threaded.get, dask.local.get_sync):
        # In this process, where tasks can write themselves.
        held = _Held(out)
        try:
            _compute(_written(result, held, None), chosen)
        finally:
            held.array = None  # when one task fails, Dask lets those go on that run
        return
    regions, blocks = list(_regions(result.chunks)), list(result.to_delayed().ravel())
    if chosen is not None:
        regions, blocks = [regions[number] for number in chosen], [blocks[number] for number in chosen]
    client = getattr(scheduler, "__self__", None)
    distributed = sys.modules.get("distributed")  # who has a client has imported it
    if distributed is None or not isinstance(client, distributed.Client):
        for region, block in zip(regions, dask.compute(*blocks), strict=True):
            out[region] = block
        return
    futures = client.compute(blocks)
    where = dict(zip(futures, regions, strict=True))
    try:
        for future, block in distributed.as_completed(futures, loop=client.loop, with_results=True):
            out[where.pop(future)] = block
    finally:
        # A traceback that is kept would keep them, and the scheduler give the same failure to the same call again.
        for future in futures:
            future.release()


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


def _write(out: zarr.Array[Any], result: da.Array) -> None:
    """Write `result` into a Zarr array."""
    result = result.rechunk(safe_chunks(result.chunks, write_unit(out)))
    if is_in_memory(out):
        _write_to_memory(out, result)
    else:
        _compute(_written(result, out, None), None)


def _compute(written: da.Array, chosen: Sequence[int] | None) -> None:
    """Write all blocks, or those with the numbers in `chosen`."""
    if chosen is None:
        written.compute()
    elif chosen:
        blocks = written.to_delayed().ravel()
        dask.compute(*(blocks[number] for number in chosen))


def _written(result: da.Array, out: Any, unfinished: Unfinished | None) -> da.Array:
    """Return a lazy array of which each block writes one of `result`."""
    return result.map_blocks(
        _write_block, out, unfinished, dtype=bool, chunks=tuple((1,) * len(sizes) for sizes in result.chunks),
        meta=np.empty((0,) * result.ndim, bool),
    )  # fmt: skip


def _write_block(block: Any, out: Any, unfinished: Unfinished | None, block_info: Any = None) -> Any:
    if block_info:
        region = tuple(slice(*span) for span in block_info[0]["array-location"])
        if unfinished is None:
            out[region] = block
        else:
            unfinished.write(out, region, block)
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
    for source in arrays_in(result):
        if isinstance(out, np.ndarray):
            if isinstance(source, np.ndarray) and shares_memory(source, out):
                raise ValueError("out overlaps the input: pass an array of its own memory")
        elif isinstance(source, zarr.Array) and _are_one(location_of(source), location_of(out)):
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


def location_of(array: zarr.Array[Any]) -> Location | tuple[Any, str]:
    """Return where an array is; its store and its name there if that is no place that others could open."""
    store = innermost(array.store)
    if isinstance(store, zarr.storage.LocalStore):
        return Location(os.path.realpath(os.path.join(store.root, array.path)))
    if not isinstance(store, zarr.storage.FsspecStore):
        return store, array.path
    fs, path = unwrapped(store.fs, f"{store.path}/{array.path}".rstrip("/"))
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return Location(os.path.realpath(path) if protocol in ("file", "local") else f"{protocol}://{path}")


def _are_one(source: Location | tuple[Any, str], out: Location | tuple[Any, str]) -> bool:
    if not (isinstance(source, Location) and isinstance(out, Location)):
        return source == out
    return source.contains(out) or out.contains(source) or source.has_chunks_in([out])


def arrays_in(collection: da.Array) -> Iterator[Any]:
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
