"""A source that is stored nowhere: a Dask array, or what Xarray has of one, computed tile by tile."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.attributes import refuse_packed
from dask_batchinv.containers import check_meta, plain_block
from dask_batchinv.job.options import JobOptions, Missing
from dask_batchinv.job.seen import ChunkGrid, Seen
from dask_batchinv.job.source.metadata import is_name
from dask_batchinv.job.source.source import Source, digest_of_labels
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.labels import AmbiguousDimsError, Exchange, default_dims, exchange, told_apart
from dask_batchinv.location import Location
from dask_batchinv.out import arrays_in, location_of
from dask_batchinv.outcome import RefusedError, SourceError
from dask_batchinv.stack import check_shape, result_dtype
from dask_batchinv.storage import unspecified
from dask_batchinv.text import harmless

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, kw_only=True, eq=False)
class LazySource(Source):
    """A stack that is computed when it is read."""

    blocks: Any
    """The Dask array, or the part of it that some tiles need."""
    declared: np.dtype[Any]
    """The dtype that its blocks are declared to have."""
    corner: tuple[int, ...]
    """Where that part begins."""
    reads: tuple[Location, ...] = ()
    """Where the arrays of Zarr are that its graph holds."""
    beside: Any = None
    """Its coordinates, as Xarray has them; nothing on workers."""

    is_lazy: ClassVar[bool] = True

    @property
    def locations(self) -> list[Location]:
        """Where the arrays are that it is computed from, as far as its graph holds them."""
        return [*self.reads]

    def open_once(self, run: str, missing: Missing) -> Any:
        """Return nothing: what is computed need not be opened."""

    def look(self, tiling: Tiling) -> Seen:
        """Return that nothing is known of what tiles are computed from: it may change under the same name."""
        n_tiles = tiling.n_tiles
        return Seen(np.ones(n_tiles, np.int64), np.zeros(n_tiles, bool), tells=False, count=n_tiles)

    def shape_now(self) -> tuple[int, ...]:
        """Return its shape."""
        return self.shape

    def for_workers(self) -> LazySource:
        """Return it without what workers do not need."""
        return replace(self, attributes={}, group_attributes={}, beside=None)

    def part_for(self, tiling: Tiling, numbers: range) -> LazySource:
        """Return it with what some tiles need of its graph, and nothing else."""
        regions = [self.there(tiling.region(number, "matrix")) for number in numbers]
        spans = [
            slice(min(span.start for span in along), max(span.stop for span in along))
            for along in zip(*regions, strict=True)
        ]
        (part,) = dask.optimize(self.blocks[tuple(spans)])
        return replace(self, blocks=part, corner=tuple(span.start for span in spans))

    def read_stored(
        self, array: Any, region: Sequence[slice], out: Any = None, coming: Any = None, kept: Any = None
    ) -> npt.NDArray[Any]:
        """Compute a region."""
        spans = zip(self.there(region), self.corner, strict=True)
        part = self.blocks[tuple(slice(span.start - at, span.stop - at) for span, at in spans)]
        computed = part.compute(scheduler="synchronous")
        block = plain_block(computed)
        found: npt.NDArray[Any] = np.asarray(block.get() if hasattr(block, "get") else block)
        shape = tuple(span.stop - span.start for span in self.there(region))
        # Not that of `found`, which is a floating one where integers are masked.
        if found.shape != shape or computed.dtype.newbyteorder("=") != self.declared.newbyteorder("="):
            raise SourceError(
                f"a block has shape {found.shape} and dtype {computed.dtype}, but {shape} and {self.declared} were "
                "declared: "
                "correct chunks= or dtype= where the Dask array is made"
            )
        return found.astype(self.dtype, copy=False)

    def fetch(self, array: Any, region: Sequence[slice], pool: Executor) -> None:
        """Compute nothing ahead."""

    def count_missing(self, array: Any, region: Sequence[slice]) -> int:
        """Return 0: there are no chunks that could be missing."""
        return 0

    def read_coordinates(self, notes: list[str] | None = None) -> xr.Dataset | None:
        """Return the coordinates of the inverse, undecoded, in memory."""
        if self.beside is None or not self.beside.variables:
            return None
        import xarray as xr

        try:
            variables, _ = xr.conventions.cf_encoder(self.beside.load().variables, {})
            store = zarr.storage.MemoryStore({})  # to see whether it can be
            with unspecified():
                xr.Dataset(variables).to_zarr(store, zarr_format=3, consolidated=False)
        except Exception as error:  # whatever Xarray and Zarr make of what they cannot store
            raise SourceError(f"a coordinate cannot be stored, drop it first: {error}") from harmless(error)
        found = xr.Dataset(variables).set_coords(list(variables)).drop_encoding()
        row, col = (self.dims[axis] for axis in self.core)
        return found.rename({row: col, col: row}) if self.exchange is Exchange.LABELS else found


def open_lazy(place: Any, options: JobOptions, token: str | None) -> LazySource:
    """Return a Dask array, a DataArray, or a variable of a Dataset as a source.

    Parameters
    ----------
    place
        What it is.
    options
        Those of the job.
    token
        What it is known by when the job goes on; by default what Dask calls it.

    Raises
    ------
    SourceError
        If it is no stack of square matrices, or none that can be computed on workers.
    """
    if not options.form.is_usual:
        raise SourceError(
            "put the matrices of a lazy array together with Dask or Xarray: (*, n, n) is what is inverted"
        )
    if options.mask is not None or options.select:
        raise SourceError(
            "of a lazy array, select with .sel, and leave matrices out with .where: pass no mask or select"
        )
    try:
        if isinstance(place, da.Array):
            return _source(place, None, options, token)
        return _of_xarray(place, options, token)
    except (np.linalg.LinAlgError, TypeError, ValueError) as error:
        if isinstance(error, RefusedError):
            raise
        raise SourceError(str(error)) from harmless(error)


def _of_xarray(place: Any, options: JobOptions, token: str | None) -> LazySource:
    import xarray as xr

    if isinstance(place, xr.Dataset):
        name = _variable(place, options)
        return replace(
            _of_xarray(place[name], options, token), variable=str(name), group_attributes=_plain(place.attrs)
        )
    if not isinstance(place, xr.DataArray):
        raise SourceError(f"a {type(place).__name__} is no source: pass a DataArray, a Dataset or a Dask array")
    refuse_packed(place.attrs, f"the array {place.name}", "open it with mask_and_scale=True, as by default")
    if not place.chunks:
        dims = _dims(place.dims, place.sizes, place.indexes, options)
        place = place.chunk({dim: -1 if dim in dims else "auto" for dim in place.dims})
    return _source(place.data, place, options, token)


def _variable(ds: xr.Dataset, options: JobOptions) -> Hashable:
    if options.variable is not None:
        if options.variable not in ds:
            raise SourceError(f"there is no variable {options.variable!r}; the Dataset has {', '.join(map(str, ds))}")
        return options.variable
    real = {name: a for name, a in ds.data_vars.items() if a.ndim >= 2 and a.dtype.kind in "fc"}
    stacks = [name for name, a in real.items() if a.shape[-1] == a.shape[-2]]
    if len(stacks) != 1:
        raise SourceError(f"name the stack with variable; the Dataset has {', '.join(map(str, ds))}")
    return stacks[0]


def _dims(dims: Any, sizes: Any, indexes: Any, options: JobOptions) -> Sequence[Hashable]:
    if options.dims is not None:
        named = {str(dim): dim for dim in dims}
        if len(set(options.dims)) != 2 or not set(map(str, options.dims)) <= set(named):
            raise SourceError(f"dims takes two different names of {', '.join(map(str, dims))}, got {options.dims}")
        return [named[str(dim)] for dim in options.dims]
    try:
        return default_dims(dims, dict(sizes), {dim: indexes.get(dim) for dim in dims})
    except AmbiguousDimsError as error:
        raise SourceError(f"{error.reason}. Pass dims=(row, column)") from error


def _source(blocks: da.Array, labelled: Any, options: JobOptions, token: str | None) -> LazySource:
    if any(np.isnan(size) for size in blocks.shape):
        raise SourceError("the Dask array has chunks of unknown sizes: call compute_chunk_sizes() first")
    check_meta(blocks._meta)
    _refuse_futures(blocks)
    if labelled is None:
        if options.dims is not None and tuple(options.dims) != ("row", "col"):
            raise SourceError("a Dask array has no names for dims to take: pass an xarray.DataArray of it")
        check_shape(blocks.shape)
        dims = tuple(map(str, told_apart([*(f"dim_{axis}" for axis in range(blocks.ndim - 2)), "row", "col"])))
        core, indexes, sizes = dims[-2:], {}, {}
    else:
        dims = tuple(map(str, labelled.dims))
        if len(set(dims)) < len(dims):
            raise SourceError(f"a dimension has its name twice, ({', '.join(dims)}): rename one of them")
        indexes, sizes = labelled.indexes, labelled.sizes
        core = tuple(map(str, _dims(labelled.dims, sizes, indexes, options)))
    axes = dims.index(str(core[0])), dims.index(str(core[1]))
    if blocks.shape[axes[0]] != blocks.shape[axes[1]]:
        raise SourceError(f"the core dimensions {core[0]!r} and {core[1]!r} are not equally long: {blocks.shape}")
    dtype = result_dtype(blocks.dtype)
    labels = tuple(indexes.get(dim) for dim in core)
    held = [array for array in arrays_in(blocks) if isinstance(array, zarr.Array)]
    unit = tuple(max(1, *sizes) if sizes else 1 for sizes in blocks.chunks)
    location = Location(f"lazy://{token or blocks.name}")
    beside = None if labelled is None else labelled.coords.to_dataset()
    if beside is not None and (bad := [name for name in map(str, beside.variables) if not is_name(name)]):
        raise SourceError(f"the coordinate {bad[0]!r} cannot be the name of an array: rename it")
    return LazySource(
        location=location, root=location, group=None, variable=None, zarr_format=3, stored_shape=blocks.shape,
        start=(0,) * blocks.ndim, shape=blocks.shape, dtype=dtype, read_unit=unit,
        itemsize_held=2 * dtype.itemsize, sharded=False, packing={}, decoded_dtype=dtype, plain=None,
        chunk_grid=ChunkGrid(blocks.shape, unit, "", "."), checksummed=True, facts={}, dims=dims, core=axes,
        coordinate_names=() if beside is None else tuple(map(str, beside.variables)), coordinates=(),
        exchange=exchange(*labels), labels=digest_of_labels(*labels),
        attributes={} if labelled is None else _plain(labelled.attrs), group_attributes={}, blocks=blocks,
        declared=blocks.dtype, reads=tuple(found for found in map(location_of, held) if isinstance(found, Location)),
        corner=(0,) * blocks.ndim, beside=beside,
    )  # fmt: skip


def _plain(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return attributes as JSON has them."""
    plain = {
        str(name): value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        for name, value in attributes.items()
    }
    for name, value in plain.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise SourceError(f"the attribute {name} cannot be stored, drop it first: {error}") from harmless(error)
    return plain


def _refuse_futures(blocks: da.Array) -> None:
    """Raise SourceError if blocks are on a cluster already, where they may be lost."""
    from distributed.client import futures_of

    if futures_of(blocks):
        raise SourceError(
            "its blocks were persisted on a cluster, where they live as long as its workers do: pass the array as it "
            "was before .persist(), or use inverse(a, out=...)"
        )
