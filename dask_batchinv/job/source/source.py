"""The source of a job: its metadata are read and checked before Zarr may decode a single byte of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Hashable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.attributes import PLACING
from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.chunks.direct_reading import DirectReader, Fetched, KeptChunk
from dask_batchinv.chunks.plain import PlainChunks, plain_chunks
from dask_batchinv.job.options import Missing
from dask_batchinv.job.seen import ChunkGrid, Seen, look_at_source
from dask_batchinv.job.source.bounded_decoding import open_bounded
from dask_batchinv.job.source.coordinate import Coordinate
from dask_batchinv.job.source.coordinates import Found, find
from dask_batchinv.job.source.coordinates import read as read_coordinates
from dask_batchinv.job.source.decoding import Packing, decode, decoded_dtype, read_packing
from dask_batchinv.job.source.held import itemsize_held
from dask_batchinv.job.source.metadata import (
    Node,
    allowed_codecs,
    check_codecs,
    check_layout,
    checked_dtype,
    chunk_grid_of,
    data_codecs,
    facts_of,
    is_checksummed,
    read_node,
    stored_names,
    wholly_decoded,
)
from dask_batchinv.job.source.variable import find_stack
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.labels import AmbiguousDimsError, Exchange, Index, default_dims, exchange, named, told_apart
from dask_batchinv.location import Location, Place, raised_as
from dask_batchinv.outcome import SourceError
from dask_batchinv.storage import StrictStore, write_unit
from dask_batchinv.text import clean, harmless

if TYPE_CHECKING:
    import xarray as xr

#: An error may say so much.
_TEXT_LENGTH = 1500


@dataclass(frozen=True)
class Source:
    """A stack in a store, as its metadata describe it."""

    location: Location
    """Where the array is."""
    root: Location
    """What the user named: the array itself, or a group above it."""
    group: Location | None
    """The group (Xarray dataset) that it is a variable of."""
    variable: str | None
    """Its name there."""
    zarr_format: Literal[2, 3]
    """Zarr format of the array."""
    shape: tuple[int, ...]
    """Shape, in the order stored."""
    dtype: np.dtype[Any]
    """dtype as stored, byte order included."""
    read_unit: tuple[int, ...]
    """Shape of what must be decoded whole: a chunk (of a shard, where there are shards)."""
    itemsize_held: int
    """Bytes alive at once for an element of it while it is decoded."""
    sharded: bool
    """Whether chunks stand together in shards, which Zarr reads many chunks at a time."""
    dims: tuple[str, ...]
    """Dimension names; made up where the source has none."""
    core: tuple[int, int]
    """Axes of the rows and the columns."""
    coordinate_names: tuple[str, ...]
    """Names of what says where its matrices are."""
    coordinates: tuple[Coordinate, ...] = field(compare=False)
    """That; nothing on workers."""
    exchange: Exchange
    """What changes places in the inverse."""
    labels: str
    """SHA-256 of the labels of rows and columns; empty where there are none."""
    attributes: dict[str, Any] = field(compare=False)
    """Those of the array."""
    group_attributes: dict[str, Any] = field(compare=False)
    """Those of the group."""
    packing: Packing = field(compare=False)
    """By which its numbers are decoded."""
    decoded_dtype: np.dtype[Any]
    """dtype of the numbers, once decoded."""
    plain: PlainChunks | None = field(hash=False)
    """How its chunks are stored, where that is so plain that they are read without Zarr."""
    chunk_grid: ChunkGrid
    """Where its stored chunks are."""
    checksummed: bool
    """Whether its chunks carry a checksum, so that damage is noticed."""
    facts: dict[str, str] = field(hash=False)
    """What its metadata say that decides on its numbers, but for the shape: see `facts_of`."""
    left_out: tuple[str, ...] = field(default=(), compare=False)
    """Names of arrays beside it that are left out, because they are broken or not safe to read."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """A sentence for each array beside it that is left out, because it is broken or not safe to read."""

    @property
    def n(self) -> int:
        """Rows of one matrix."""
        return self.shape[self.core[0]]

    def open(self, missing: Missing = "error") -> zarr.Array[Any]:
        """Open the array for reading.

        Parameters
        ----------
        missing : {"error", "fill"}
            What a chunk that is not in the store means: `MissingChunkError`, or the fill value.
        """
        node = self._checked_node()
        store = self.location.store(read_only=True)
        if missing == "error":
            store = StrictStore(store)
        # It may have grown meanwhile: that is for a later run.
        return open_bounded(store, node.meta | {"shape": list(self.shape)})

    def look(self, tiling: Tiling) -> Seen:
        """Return what the store says of what each tile is read from; SourceError if it says nothing."""
        with raised_as(SourceError, f"the source {self.location.name} cannot be looked at"):
            return look_at_source(self.location, self.chunk_grid, tiling)

    def shape_now(self) -> tuple[int, ...]:
        """Return the shape that it has now.

        Raises
        ------
        SourceError
            If it has become another array, or smaller.
        """
        return self._checked_node().shape

    def _checked_node(self) -> Node:
        """Read its metadata again; what is opened must be what was checked, also on a worker hours later."""
        node = read_node(self.location, self.zarr_format)
        if node is None or facts_of(node) != self.facts:
            raise SourceError(f"the metadata of {self.location.name} have changed since the job began: start it again")
        if any(now < then for now, then in zip(node.shape, self.shape, strict=True)):
            raise SourceError(f"{self.location.name} has become smaller since the job began: start it again")
        return node

    def read_stored(
        self,
        array: zarr.Array[Any],
        region: tuple[slice, ...],
        out: npt.NDArray[Any] | None = None,
        coming: Future[Any] | Fetched | None = None,
        kept: KeptChunk | None = None,
    ) -> npt.NDArray[Any]:
        """Read a region of the array, which was opened for reading, as it is stored.

        Into `out` where Zarr does not read it; from what is `coming`, if `fetch` was called for it before; and from
        what was `kept` when its neighbour was read.
        """
        if isinstance(coming, Future):
            stored: npt.NDArray[Any] = coming.result()
            return stored
        if (reader := self._reader(array)) is None:
            return np.asarray(array[region])
        return reader.read(self._of_all_axes(region), out, coming, kept)

    def fetch(self, array: zarr.Array[Any], region: tuple[slice, ...], pool: Executor) -> Future[Any] | Fetched | None:
        """Begin to read a region ahead, with the threads of a pool; None where there is nothing to wait for."""
        reader = self._reader(array)
        if reader is None:
            return pool.submit(self.read_stored, array, region)
        return None if reader.store.is_local else reader.fetch(self._of_all_axes(region), pool)

    def _reader(self, array: zarr.Array[Any]) -> DirectReader | None:
        store = array.store
        return DirectReader(array, self.plain, store) if self.plain and isinstance(store, BoundedStore) else None

    def _of_all_axes(self, region: tuple[slice, ...]) -> tuple[slice, ...]:
        return (*region, *map(slice, self.shape[len(region) :]))

    def read_block(self, array: zarr.Array[Any], region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read a region of the array, which was opened for reading, and decode its numbers."""
        return self.decode(self.read_stored(array, region))

    def decode(self, block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the numbers that a block stands for which was read of it."""
        return decode(block, self.packing)

    def count_missing(self, array: zarr.Array[Any], region: tuple[slice, ...]) -> int:
        """Return how many chunks of a region are not in the store, of an array that was opened with "fill".

        Shards are counted where there are some. Of chunks that were read just now it is known; others are looked for.

        Raises
        ------
        ChunkSizeError
            If one is damaged, not missing.
        """
        store = array.store
        assert isinstance(store, BoundedStore)
        spans = (slice(*span.indices(size)) for span, size in zip(region, self.shape, strict=True))
        units = (
            range(span.start // unit, -(-span.stop // unit)) if span.stop > span.start else range(0)
            for span, unit in zip(spans, write_unit(array), strict=True)
        )
        return store.count_missing(map(array.metadata.encode_chunk_key, itertools.product(*units)))

    def target_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names that coordinates of the source have in the target."""
        row, col = (self.dims[axis] for axis in self.core)
        swapped = {row: col, col: row} if self.exchange is Exchange.LABELS else {}
        return tuple(swapped.get(name, name) for name in names)

    @property
    def target_dims(self) -> tuple[str, ...]:
        """Names of the dimensions of the inverse: its rows are what the columns were."""
        row, col = (self.dims[axis] for axis in self.core)
        swapped = {row: col, col: row} if self.exchange is Exchange.NAMES else {}
        return tuple(swapped.get(dim, dim) for dim in self.dims)

    def for_workers(self) -> Source:
        """Return it without what workers do not need, for it is sent to them with every task."""
        return replace(self, attributes={}, group_attributes={}, coordinates=(), notes=())

    def read_coordinates(self, notes: list[str] | None = None) -> xr.Dataset | None:
        """Read the coordinates of the inverse, undecoded, into memory; None if there are none.

        Parameters
        ----------
        notes : list of str, optional
            Gets a sentence for each that is damaged, and then left out. Without it that is an error, as it always is
            of labels of rows and columns.

        Raises
        ------
        SourceError
            If that fails.
        """
        if not self.coordinates:
            return None
        row, col = core = tuple(self.dims[axis] for axis in self.core)
        found = read_coordinates(self.coordinates, needed=core, notes=notes)
        if self.exchange is Exchange.LABELS:
            found = found.rename({row: col, col: row})
        return found


def open_source(path: Place, variable: str | None = None, dims: Sequence[str] | None = None) -> Source:
    """Read the metadata of a source and check that it is a stack of matrices.

    Parameters
    ----------
    path : str or path
        A Zarr array, or a group with `variable` in it; Zarr format 2 or 3, a path or an fsspec URL.
    variable : str, optional
        Name of the array in a group; may be left out where only one array is a stack.
    dims : (row, column), optional
        Names of the core dimensions; by default the last two.

    Raises
    ------
    SourceError
        If there is no such array, it is no stack of square matrices, or its dtype or a codec is not on the list
        of those that are safe and have an inverse.
    """
    try:
        return _open_source(path, variable, dims)
    except Exception as error:  # whatever a file system may raise
        if isinstance(error, SourceError) and len(str(error)) <= _TEXT_LENGTH:
            raise
        text = str(error)
        if not isinstance(error, SourceError):
            name = path.name if isinstance(path, Location) else os.fspath(path)
            text = f"the source {name} cannot be opened: {type(error).__name__}: {text}"
        raise SourceError(_shortened(clean(text))) from harmless(error)


def _open_source(path: Place, variable: str | None, dims: Sequence[str] | None) -> Source:
    root = Location.parse(path)
    node, variable = find_stack(root, variable, dims)
    inner, _, name = (variable or "").rpartition("/")
    group = None if variable is None else root / inner if inner else root
    location = node.location
    dtype = checked_dtype(node)
    check_codecs(node, allowed_codecs(node), f"{location.name} is not among those that are safe to run")
    check_layout(node, dtype.itemsize)
    stored_names(node)
    array = open_bounded(location.store(read_only=True), node.meta)
    stored, names = _name_dims(node, array.ndim, group)
    if dims is not None:
        _check_square(location, names, _axes(names, stored, dims), array.shape)
    sizes = dict(zip(names, array.shape, strict=True))
    beside = Found() if group is None else find(root, inner, node, sizes, name)
    packing = read_packing(node, array)
    decoded = decoded_dtype(dtype, packing)
    labels = {dim: beside.labels(dim) for dim in _deciding(names, stored, sizes, dims)}
    core = _axes(names, stored, _default_dims(node, names, sizes, labels) if dims is None else dims)
    _check_square(location, names, core, array.shape)
    row, col = (labels.get(names[axis]) for axis in core)
    # One name given twice means one set of labels.
    twice = stored[core[0]] == stored[core[1]]
    return Source(
        location=location,
        root=root,
        group=group,
        variable=variable,
        zarr_format=node.zarr_format,
        shape=tuple(array.shape),
        dtype=dtype,
        read_unit=write_unit(array) if wholly_decoded(node) else tuple(array.chunks),
        itemsize_held=itemsize_held(dtype, data_codecs(node), sharded=array.shards is not None),
        sharded=array.shards is not None,
        dims=names,
        core=core,
        coordinate_names=tuple(beside.coordinates),
        coordinates=tuple(beside.coordinates.values()),
        exchange=Exchange.NOTHING if twice else exchange(row, col),
        labels=_digest_of_labels(row, col),
        attributes=node.attributes,
        group_attributes={} if group is None else _attributes_of(group),
        packing=packing,
        decoded_dtype=decoded,
        checksummed=is_checksummed(node),
        plain=plain_chunks(node.meta),
        chunk_grid=chunk_grid_of(node),
        facts=facts_of(node),
        left_out=tuple(sorted(beside.left_out)),
        notes=beside.notes(),
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]} ..."


def _name_dims(node: Node, ndim: int, group: Location | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all dimensions as stored, made up where there are none, and told apart."""
    if ndim < 2:
        raise SourceError(f"expected a stack of matrices with at least two dimensions, got shape {node.shape}")
    known = stored_names(node) or [None] * ndim
    taken: set[str] = set()
    if group is not None and len(set(filter(None, known))) < ndim:
        taken = {*group.known_children()}
    made_up = [*(f"dim_{axis}" for axis in range(ndim - 2)), "row", "col"]
    # An array beside it that has such a name by chance is no coordinate of it.
    spare = [told_apart([name, name], taken)[1] if name in taken else name for name in made_up]
    stored = tuple(str(name or new) for name, new in zip(known, spare, strict=True))
    return stored, tuple(map(str, told_apart(stored, taken)))


def _attributes_of(group: Location) -> dict[str, Any]:
    node = read_node(group)
    # What Xarray names there is found as coordinates.
    return {} if node is None else {name: value for name, value in node.attributes.items() if name not in PLACING}


def _axes(names: tuple[str, ...], stored: tuple[str, ...], dims: Sequence[Hashable]) -> tuple[int, int]:
    """Return where the core dimensions are."""
    if len(dims) != 2:
        raise SourceError(f"--dims takes two different names, row,column; got {','.join(map(str, dims))}")
    if (found := named(dims, names, stored)) is None:
        if absent := [str(dim) for dim in dims if dim not in names]:
            raise SourceError(f"there is no dimension {', '.join(absent)}; the source has {', '.join(names)}")
        raise SourceError(f"--dims takes two different names, row,column; got {','.join(map(str, dims))}")
    return names.index(str(found[0])), names.index(str(found[1]))


def _check_square(location: Location, names: tuple[str, ...], core: tuple[int, int], shape: tuple[int, ...]) -> None:
    if shape[core[0]] != shape[core[1]]:
        raise SourceError(
            f"the core dimensions {names[core[0]]!r} and {names[core[1]]!r} of {location.name} are not equally long: "
            f"shape {shape}. Name others with --dims row,column"
        )


def _deciding(
    names: tuple[str, ...], stored: tuple[str, ...], sizes: dict[str, int], dims: Sequence[str] | None
) -> list[str]:
    """Return the dimensions whose labels decide what comes out: those that are named, or could be meant."""
    if dims is not None:
        return [names[axis] for axis in _axes(names, stored, dims)]
    lengths = list(sizes.values())  # what is not as long as another could not be a row or a column
    return [dim for dim, size in sizes.items() if lengths.count(size) > 1]


def _digest_of_labels(row: Index | None, col: Index | None) -> str:
    if row is None and col is None:
        return ""
    texts = [None if labels is None else list(map(str, labels)) for labels in (row, col)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _default_dims(
    node: Node, names: tuple[str, ...], sizes: dict[str, int], labels: dict[str, Index | None]
) -> tuple[Hashable, Hashable]:
    """Return the last two dimensions if nothing else could be meant."""
    stored = stored_names(node)
    if stored is None or None in stored or "" in stored or names != tuple(stored):
        return names[-2], names[-1]  # NumPy's rule, where names tell nothing, or one is given twice
    try:
        return default_dims(names, sizes, labels)
    except np.linalg.LinAlgError:
        return names[-2], names[-1]
    except AmbiguousDimsError as error:
        choices = " or ".join(f"--dims {row},{col}" for row, col in error.choices)
        raise SourceError(f"{node.location.name}: {error.reason}. Pass {choices}") from error
