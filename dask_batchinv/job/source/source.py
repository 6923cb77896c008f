"""The source of a job: its metadata are read and checked before Zarr may decode a single byte of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.attributes import PLACING
from dask_batchinv.job.form import rows_of
from dask_batchinv.job.options import Missing
from dask_batchinv.job.seen import Seen
from dask_batchinv.job.source.coordinate import Coordinate
from dask_batchinv.job.source.coordinates import Found, find
from dask_batchinv.job.source.coordinates import read as read_coordinates
from dask_batchinv.job.source.mask import Mask, open_mask
from dask_batchinv.job.source.metadata import Node, read_node, stored_names
from dask_batchinv.job.source.parts import Parts, read_in_parts
from dask_batchinv.job.source.selection import Selection, find_window
from dask_batchinv.job.source.stored_array import Region, StoredArray
from dask_batchinv.job.source.variable import find_stack
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.labels import AmbiguousDimsError, Exchange, Index, default_dims, exchange, named, told_apart
from dask_batchinv.location import Location, Place
from dask_batchinv.outcome import SourceError
from dask_batchinv.text import clean, harmless

if TYPE_CHECKING:
    import xarray as xr

#: An error may say so much.
_TEXT_LENGTH = 1500


@dataclass(frozen=True, kw_only=True)
class Source(StoredArray):
    """A stack in a store, as its metadata describe it."""

    root: Location
    """What the user named: the array itself, or a group above it."""
    group: Location | None
    """The group (Xarray dataset) that it is a variable of."""
    variable: str | None
    """Its name there."""
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
    window: dict[str, range] = field(default_factory=dict, compare=False)
    """What of its dimensions was selected."""
    mask: Mask | None = None
    """By which matrices are left out."""
    attributes: dict[str, Any] = field(compare=False)
    """Those of the array."""
    group_attributes: dict[str, Any] = field(compare=False)
    """Those of the group."""
    left_out: tuple[str, ...] = field(default=(), compare=False)
    """Names of arrays beside it that are left out, because they are broken or not safe to read."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """A sentence for each array beside it that is left out, because it is broken or not safe to read."""

    @property
    def n(self) -> int:
        """Rows of one matrix."""
        return self.shape[self.core[0]]

    #: Whether it is computed, not stored.
    is_lazy: ClassVar[bool] = False

    def part_for(self, tiling: Tiling, numbers: range) -> Source:
        """Return it with what some tiles need, and nothing else."""
        return self

    def open_once(self, run: str, missing: Missing) -> zarr.Array[Any]:
        """Return the array, kept open for a run."""
        return _open_once(run, self, missing)

    @property
    def locations(self) -> list[Location]:
        """Where its arrays are."""
        return [self.location, *([] if self.mask is None else [self.mask.location])]

    @property
    def form_dims(self) -> dict[int, str]:
        """Names of dimensions that arrays in its form have beside its own."""
        return {}

    @property
    def packings(self) -> Any:
        """By what its numbers are decoded."""
        return self.packing

    def read_in_parts(self, array: zarr.Array[Any], region: Region, out: npt.NDArray[Any]) -> Parts:
        """Read a region of the array, which was opened for reading, chunk by chunk."""
        batch = [axis for axis in range(len(self.shape)) if axis not in self.core]
        return read_in_parts(self, array, region, out, batch)

    def look(self, tiling: Tiling) -> Seen:
        """Return what the store says of what each tile is made from."""
        seen = super().look(tiling)
        return seen if self.mask is None else seen.also(self.mask.look(tiling))

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
        spans = {dim: slice(span.start, span.stop) for dim, span in self.window.items() if dim in found.dims}
        found = found.isel(spans)
        if self.exchange is Exchange.LABELS:
            found = found.rename({row: col, col: row})
        return found


@lru_cache(maxsize=8)
def _open_once(run: str, source: Source, missing: Missing) -> zarr.Array[Any]:
    return source.open(missing)


def open_source(
    path: Place,
    variable: str | None = None,
    dims: Sequence[str] | None = None,
    mask: str | None = None,
    select: Selection | None = None,
) -> Source:
    """Read the metadata of a source and check that it is a stack of matrices.

    Parameters
    ----------
    path : str or path
        A Zarr array, or a group with `variable` in it; Zarr format 2 or 3, a path or an fsspec URL.
    variable : str, optional
        Name of the array in a group; may be left out where only one array is a stack.
    dims : (row, column), optional
        Names of the core dimensions; by default the last two.
    mask : str, optional
        Name of an array beside it that is not 0 where a matrix is left out; with a ``~`` before it, 0.
    select : mapping, optional
        Which part of it, as `as_text` writes it.

    Raises
    ------
    SourceError
        If there is no such array, it is no stack of square matrices, or its dtype or a codec is not on the list
        of those that are safe and have an inverse.
    """
    try:
        return _open_source(path, variable, dims, mask, select or {})
    except Exception as error:  # whatever a file system may raise
        if isinstance(error, SourceError) and len(str(error)) <= _TEXT_LENGTH:
            raise
        text = str(error)
        if not isinstance(error, SourceError):
            name = path.name if isinstance(path, Location) else os.fspath(path)
            text = f"the source {name} cannot be opened: {type(error).__name__}: {text}"
        raise SourceError(_shortened(clean(text))) from harmless(error)


def _open_source(
    path: Place, variable: str | None, dims: Sequence[str] | None, mask: str | None, select: Selection
) -> Source:
    root = Location.parse(path)
    node, variable = find_stack(root, variable, dims)
    inner, _, name = (variable or "").rpartition("/")
    group = None if variable is None else root / inner if inner else root
    location, found = node.location, StoredArray.of(node)
    shape = found.shape
    stored, names = name_dims(node, len(shape), group)
    if dims is not None:
        _check_square(location, names, _axes(names, stored, dims), shape)
    sizes = dict(zip(names, shape, strict=True))
    beside = Found() if group is None else find(root, inner, node, sizes, name)
    labels = {dim: beside.labels(dim) for dim in _deciding(names, stored, sizes, dims)}
    core = _axes(names, stored, _default_dims(node, names, sizes, labels) if dims is None else dims)
    _check_square(location, names, core, shape)
    row, col = (labels.get(names[axis]) for axis in core)
    batch = [name for axis, name in enumerate(names) if axis not in core]
    window = find_window(select, sizes, batch, beside.labels)
    masked = None if mask is None else mask_beside(group, mask, sizes, core)
    if masked is not None:
        masked = masked.part({masked.axes.index(names.index(dim)): span for dim, span in window.items()
                              if names.index(dim) in masked.axes})  # fmt: skip
    # One name given twice means one set of labels.
    twice = stored[core[0]] == stored[core[1]]
    return Source(
        **vars(found.part({names.index(dim): span for dim, span in window.items()})),
        root=root,
        group=group,
        variable=variable,
        dims=names,
        core=core,
        coordinate_names=tuple(beside.coordinates),
        coordinates=tuple(beside.coordinates.values()),
        exchange=Exchange.NOTHING if twice else exchange(row, col),
        labels=digest_of_labels(row, col),
        window=window,
        mask=masked,
        attributes=node.attributes,
        group_attributes={} if group is None else group_attributes_of(group),
        left_out=tuple(sorted(beside.left_out)),
        notes=beside.notes(),
    )


def mask_beside(group: Location | None, mask: str, sizes: dict[str, int], core: tuple[int, int]) -> Mask:
    """Return the mask that is named in the group of a stack; SourceError if it is in none."""
    if group is None:
        raise SourceError("a mask stands beside the stack in a group: name the group, and the stack with `variable=`")
    return open_mask(group, mask, sizes, core)


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]} ..."


def name_dims(node: Node, ndim: int, group: Location | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
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


def group_attributes_of(group: Location) -> dict[str, Any]:
    """Return the attributes of a group that are those of its inverses, too."""
    node = read_node(group)
    # What Xarray names there is found as coordinates.
    return {} if node is None else {name: value for name, value in node.attributes.items() if name not in PLACING}


def _axes(names: tuple[str, ...], stored: tuple[str, ...], dims: Sequence[Hashable]) -> tuple[int, int]:
    """Return where the core dimensions are."""
    not_two = SourceError(f"`dims=` takes two different names, row,column; got {','.join(map(str, dims))}")
    if len(dims) != 2:
        raise not_two
    if (found := named(dims, names, stored)) is None:
        if absent := [str(dim) for dim in dims if dim not in names]:
            raise SourceError(f"there is no dimension {', '.join(absent)}; the source has {', '.join(names)}")
        raise not_two
    return names.index(str(found[0])), names.index(str(found[1]))


def _check_square(location: Location, names: tuple[str, ...], core: tuple[int, int], shape: tuple[int, ...]) -> None:
    row, col = (shape[axis] for axis in core)
    if row == col:
        return
    if core == (len(shape) - 2, len(shape) - 1):
        text = (
            f"the last two dimensions of {location.name}, shape {shape}, are {row} and {col} long: these are no square "
            "matrices"
        )
    else:
        text = (
            f"the core dimensions {names[core[0]]!r} and {names[core[1]]!r} of {location.name} are not equally long: "
            f"shape {shape}"
        )
    others = ". Name others with `dims=`" if len(set(shape)) < len(shape) else ""
    n = 0 if shape[-1] == shape[-2] else rows_of(shape[-1]) or 0
    packed = f". If these are packed triangles of {n} x {n} matrices, say so with `packed=`" if n > 1 else ""
    raise SourceError(f"{text}{others}{packed}")


def _deciding(
    names: tuple[str, ...], stored: tuple[str, ...], sizes: dict[str, int], dims: Sequence[str] | None
) -> list[str]:
    """Return the dimensions whose labels decide what comes out: those that are named, or could be meant."""
    if dims is not None:
        return [names[axis] for axis in _axes(names, stored, dims)]
    lengths = list(sizes.values())  # what is not as long as another could not be a row or a column
    return [dim for dim, size in sizes.items() if lengths.count(size) > 1]


def digest_of_labels(row: Index | None, col: Index | None) -> str:
    """Return what the labels of rows and columns are known by; nothing where there are none."""
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
        choices = " or ".join(f"`dims={(str(row), str(col))}`" for row, col in error.choices)
        raise SourceError(f"{node.location.name}: {error.reason}. Pass {choices}") from error
