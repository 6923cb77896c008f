"""The source of a job: its metadata are read and checked before Zarr may decode a single byte of it."""

from __future__ import annotations

import base64
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dask
import numpy as np
import xarray as xr
import zarr

from dask_batchinv.job.options import Missing
from dask_batchinv.job.outputs import MEMBERS
from dask_batchinv.job.source.bounded_decoding import open_bounded
from dask_batchinv.job.source.metadata import (
    Node,
    allowed_codecs,
    check_codecs,
    check_coordinate,
    check_layout,
    checked_dtype,
    codecs_of,
    digest_of,
    is_checksum,
    is_name,
    read_node,
    stored_names,
)
from dask_batchinv.location import Location, raised_as, redact
from dask_batchinv.outcome import SourceError
from dask_batchinv.storage import StrictStore, unspecified

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
    sharded: bool
    """Whether chunks stand together in shards, which Zarr reads many chunks at a time."""
    dims: tuple[str, ...]
    """Dimension names; made up where the source has none."""
    core: tuple[int, int]
    """Axes of the rows and the columns."""
    coordinates: tuple[str, ...]
    """Names of the coordinate variables beside it."""
    checksummed: bool
    """Whether its chunks carry a checksum, so that damage is noticed."""
    digest: str
    """SHA-256 of its metadata."""

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
        node = read_node(self.location, self.zarr_format)
        # What is opened must be what was checked, also on a worker hours later.
        if node is None or digest_of(node, self.coordinates) != self.digest:
            raise SourceError(f"the metadata of {self.location.name} have changed since the job began: start it again")
        store = self.location.store(read_only=True)
        if missing == "error":
            store = StrictStore(store)
        return open_bounded(store, node.meta)

    def read_coordinates(self) -> xr.Dataset | None:
        """Read the coordinates, undecoded, into memory; None if there are none. SourceError if that fails."""
        if not self.coordinates or self.group is None:
            return None
        failing = raised_as(SourceError, f"the coordinates of {self.group.name} cannot be read")
        with failing, unspecified(), dask.config.set(scheduler="threads"):
            others = [name for name in array_names(self.group) if name not in self.coordinates]
            found = xr.open_zarr(
                self.group.store(read_only=True), consolidated=False, drop_variables=others, chunks={},
                mask_and_scale=False, decode_times=False,
            ).load()  # fmt: skip
        # What the source had for codecs and chunks is not for the target.
        bare: xr.Dataset = found.drop_encoding().drop_attrs(deep=False)
        return bare


def open_source(path: str | os.PathLike[str], variable: str | None = None, dims: Sequence[str] | None = None) -> Source:
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
        text = f"the source {os.fspath(path)} cannot be opened: {type(error).__name__}: {error}"
        raise SourceError(_shortened(redact(text if not isinstance(error, SourceError) else str(error)))) from error


def _open_source(path: str | os.PathLike[str], variable: str | None, dims: Sequence[str] | None) -> Source:
    root = Location.parse(path)
    node, variable = _find(root, variable, dims)
    inner, _, name = (variable or "").rpartition("/")
    group = None if variable is None else root / inner if inner else root
    location = node.location
    dtype = checked_dtype(node)
    check_codecs(node, allowed_codecs(node), f"{location.name} is not among those that are safe to run")
    check_layout(node, dtype.itemsize)
    stored_names(node)
    array = open_bounded(location.store(read_only=True), node.meta)
    names, core = _name_dims(node, array.ndim, dims, array.shape)
    if array.shape[core[0]] != array.shape[core[1]]:
        raise SourceError(
            f"the core dimensions {names[core[0]]!r} and {names[core[1]]!r} of {location.name} are not equally long: "
            f"shape {array.shape}. Name others with --dims row,column"
        )
    _check_not_packed(node, location)
    sizes = dict(zip(names, array.shape, strict=True))
    coordinates = () if group is None else _coordinates(group, node, sizes, name)
    if taken := sorted({*names, *coordinates} & set(MEMBERS)):
        raise SourceError(
            f"{', '.join(taken)} of {location.name} are names that the target needs itself: rename those "
            "dimensions or coordinates first"
        )
    return Source(
        location=location,
        root=root,
        group=group,
        variable=variable,
        zarr_format=node.zarr_format,
        shape=tuple(array.shape),
        dtype=dtype,
        read_unit=tuple(array.chunks),
        sharded=array.shards is not None,
        dims=names,
        core=core,
        coordinates=coordinates,
        checksummed=any(is_checksum(codec) for codec in codecs_of(node)),
        digest=digest_of(node, coordinates),
    )


def _find(root: Location, variable: str | None, dims: Sequence[str] | None) -> tuple[Node, str | None]:
    """Return the array that is meant, and its name in the group if it is in one."""
    node = read_node(root)
    if node is None:
        raise SourceError(f"there is no Zarr array or group at {root.name}")
    if node.is_array:
        if variable is not None:
            raise SourceError(f"{root.name} is an array, not a group: leave --variable out")
        return node, None
    variable = _known_variable(root, variable, dims)
    node = read_node(root / variable)
    if node is None or not node.is_array:
        raise SourceError(f"there is no variable {variable!r} in {root.name}; it has {_listed(root)}")
    return node, variable


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]} ..."


def _known_variable(group: Location, variable: str | None, dims: Sequence[str] | None) -> str:
    if variable is not None:
        if not variable or {"..", "."} & set(variable.split("/")) or variable.startswith("/"):
            raise SourceError(f"variable {variable!r} is not a name inside the group")
        return variable
    if dims is None:
        stacks = [name for name, shape in array_names(group).items() if len(shape) >= 2 and shape[-1] == shape[-2]]
    else:
        stacks = [name for name, node in _array_nodes(group) if set(dims) <= set(stored_names(node) or ())]
    if len(stacks) == 1:
        return stacks[0]
    raise SourceError(f"{group.name} is a group: name the stack with --variable; it has {_listed(group)}")


def array_names(group: Location) -> dict[str, tuple[int, ...]]:
    """Return the arrays of a group with their shapes, by name."""
    return {name: node.shape for name, node in _array_nodes(group)}


def _array_nodes(group: Location) -> Iterator[tuple[str, Node]]:
    for name in group.children():
        node = read_node(group / name)
        if node is not None and node.is_array:
            yield name, node


def _listed(group: Location) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in array_names(group).items()) or "no arrays"


def _name_dims(
    node: Node, ndim: int, dims: Sequence[str] | None, shape: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Return the names of all dimensions and the axes of the core ones."""
    if ndim < 2:
        raise SourceError(f"expected a stack of matrices with at least two dimensions, got shape {shape}")
    known = stored_names(node) or [None] * ndim
    made_up = [*(f"dim_{axis}" for axis in range(ndim - 2)), "row", "col"]
    names: list[str] = []
    for name, spare in zip(known, made_up, strict=True):
        unique = str(name) if name else spare
        # Covariances are often stored as (*, p, p) with one name twice; Xarray cannot address that.
        while unique in names:
            unique += "_2"
        names.append(unique)
    if dims is None:
        core = (ndim - 2, ndim - 1)
    else:
        if len(dims) != 2 or dims[0] == dims[1]:
            raise SourceError(f"--dims takes two different names, row,column; got {','.join(dims)}")
        if absent := [dim for dim in dims if dim not in names]:
            raise SourceError(f"there is no dimension {', '.join(absent)}; the source has {', '.join(names)}")
        core = (names.index(dims[0]), names.index(dims[1]))
    return tuple(names), core


def _check_not_packed(node: Node, location: Location) -> None:
    """Refuse packed numbers: Xarray would decode them, and we would not."""
    packed = {"scale_factor", "add_offset"} & set(node.attributes)
    for name in ("_FillValue", "missing_value"):
        if name in node.attributes and not _is_nan(node.attributes[name]):
            packed.add(name)
    if node.zarr_format == 2 and "_ARRAY_DIMENSIONS" in node.attributes:
        # Written by Xarray, which takes the fill value of format 2 for "no number"; 0 is everybody's default.
        fill = node.meta.get("fill_value")
        if fill not in (None, 0) and not _is_nan(fill):
            packed.add("fill_value")
    if packed:
        raise SourceError(
            f"{location.name} is packed, its metadata have {', '.join(sorted(packed))}: store it as plain numbers "
            "first, with xarray.open_zarr and then drop_encoding().to_zarr"
        )


def _is_nan(value: Any) -> bool:
    """Tell whether a fill value is NaN, which Xarray stores as a number, as text, or as a float64 in base64."""
    if isinstance(value, list):  # of a complex number
        return all(map(_is_nan, value))
    if isinstance(value, str) and value != "NaN":
        try:
            (value,) = struct.unpack("<d", base64.b64decode(value, validate=True))
        except (ValueError, struct.error):
            return False
    return value == "NaN" or (isinstance(value, float) and math.isnan(value))


def _coordinates(group: Location, node: Node, sizes: dict[str, int], variable: str) -> tuple[str, ...]:
    """Return the arrays of the group that are coordinates of the variable, by CF's and Xarray's rules."""
    root = read_node(group)
    if root is None:
        return ()
    listed = [node.attributes.get("coordinates"), root.attributes.get("coordinates")]
    wanted = {*sizes, *(name for text in listed if isinstance(text, str) for name in text.split())} - {variable}
    found = []
    for name in sorted(filter(is_name, wanted)):  # others would lead out of the group
        # In the format of the group, for in that Xarray will read it.
        coordinate = read_node(group / name, root.zarr_format)
        if coordinate is None or not coordinate.is_array:
            continue
        along = stored_names(coordinate) or ()
        if set(along) <= set(sizes):
            lengths = tuple(sizes[str(dim)] for dim in along)
            if len(along) and lengths != coordinate.shape:
                raise SourceError(f"the coordinate {(group / name).name} is not as long as its dimensions")
            check_coordinate(coordinate)
            found.append(name)
    return tuple(found)
