"""The source of a job: its metadata read and checked, before Zarr may decode a single byte of it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr

from dask_batchinv.outcome import SourceError
from dask_batchinv.place import Place, redact
from dask_batchinv.stack import KEPT
from dask_batchinv.storage import StrictStore

Missing = Literal["error", "fill"]

# Codecs that turn bytes into numbers and do nothing else. Above all not pickle, nor any codec of objects; and codecs
# are looked at one by one, for one that must not run can stand behind one that may.
_NUMCODECS = (
    *("adler32", "astype", "bitround", "blosc", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32"),
    *("gzip", "jenkins_lookup3", "lz4", "lzma", "packbits", "pcodec", "quantize", "shuffle", "zfpy", "zlib", "zstd"),
)
_ALLOWED_V2 = frozenset(_NUMCODECS)
_ALLOWED_V3 = frozenset(
    ["blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "zstd"]
    + [f"numcodecs.{name}" for name in _NUMCODECS]
)
#: What the target holds; dimensions and coordinates cannot have these names.
RESERVED = ("inverse", "info", "rcond", "ledger")
_CHECKSUMS = frozenset(["adler32", "crc32", "crc32c", "fletcher32", "gzip", "jenkins_lookup3", "zlib"])
_DTYPES = frozenset([*KEPT, "bool", "float16", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))])


@dataclass(frozen=True)
class Source:
    """A stack in a store, as its metadata describe it."""

    place: Place
    """Where the array is."""
    root: Place
    """What the user named: the array itself, or a group above it."""
    group: Place | None
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
        store = self.place.store(read_only=True)
        if missing == "error":
            store = StrictStore(store)
        return zarr.open_array(store, mode="r", zarr_format=self.zarr_format)


def open_source(
    location: str | os.PathLike[str], variable: str | None = None, dims: Sequence[str] | None = None
) -> Source:
    """Read the metadata of a source and check that it is a stack of matrices.

    Parameters
    ----------
    location : str or path
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
        return _open_source(location, variable, dims)
    except SourceError:
        raise
    except Exception as error:  # whatever a file system may raise
        text = f"the source {os.fspath(location)} cannot be opened: {type(error).__name__}: {error}"
        raise SourceError(redact(text)) from error


def _open_source(location: str | os.PathLike[str], variable: str | None, dims: Sequence[str] | None) -> Source:
    root, group = Place.parse(location), None
    place = root
    node = _read_node(place)
    if node is None:
        raise SourceError(f"there is no Zarr array or group at {place.name}")
    if not node.is_array:
        variable = _known_variable(root, variable, dims)
        inner, _, name = variable.rpartition("/")
        group = root / inner if inner else root
        place = root / variable
        node = _read_node(place)
        if node is None or not node.is_array:
            raise SourceError(f"there is no variable {variable!r} in {root.name}; it has {_listed(root)}")
    elif variable is not None:
        raise SourceError(f"{place.name} is an array, not a group: leave --variable out")
    dtype = _checked_dtype(node.meta)
    _check_codecs(node.meta, place)
    array = zarr.open_array(place.store(read_only=True), mode="r", zarr_format=node.zarr_format)
    names, core = _name_dims(node, array.ndim, dims, array.shape)
    if array.shape[core[0]] != array.shape[core[1]]:
        raise SourceError(
            f"the core dimensions {names[core[0]]!r} and {names[core[1]]!r} of {place.name} are not equally long: "
            f"shape {array.shape}. Name others with --dims row,column"
        )
    _check_not_packed(node, place)
    sizes = dict(zip(names, array.shape, strict=True))
    coordinates = () if group is None else _coordinates(group, node, sizes, name)
    if taken := sorted({*names, *coordinates} & set(RESERVED)):
        raise SourceError(
            f"{', '.join(taken)} of {place.name} are names of dimensions or coordinates that the target needs itself: "
            "rename those first"
        )
    canonical = json.dumps([node.meta, coordinates], sort_keys=True)
    return Source(
        place=place,
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
        checksummed=any(_is_checksum(codec) for codec in _codecs(node.meta)),
        digest=hashlib.sha256(canonical.encode()).hexdigest(),
    )


@dataclass(frozen=True)
class _Node:
    """The raw metadata of one Zarr node."""

    zarr_format: Literal[2, 3]
    is_array: bool
    meta: dict[str, Any]
    attributes: dict[str, Any]


def _read_node(place: Place) -> _Node | None:
    if (meta := place.read_json("zarr.json")) is not None:
        return _Node(3, meta.get("node_type") == "array", meta, meta.get("attributes") or {})
    attributes = place.read_json(".zattrs") or {}
    if (meta := place.read_json(".zarray")) is not None:
        return _Node(2, True, meta, attributes)
    if place.read_json(".zgroup") is not None:
        return _Node(2, False, {}, attributes)
    return None


def _known_variable(group: Place, variable: str | None, dims: Sequence[str] | None) -> str:
    if variable is not None:
        if not variable or {"..", "."} & set(variable.split("/")) or variable.startswith("/"):
            raise SourceError(f"variable {variable!r} is not a name inside the group")
        return variable
    if dims is None:
        stacks = [name for name, shape in array_names(group).items() if len(shape) >= 2 and shape[-1] == shape[-2]]
    else:
        stacks = [name for name, node in _array_nodes(group) if set(dims) <= set(_stored_names(node) or ())]
    if len(stacks) == 1:
        return stacks[0]
    raise SourceError(f"{group.name} is a group: name the stack with --variable; it has {_listed(group)}")


def array_names(group: Place) -> dict[str, tuple[int, ...]]:
    """Return the arrays of a group with their shapes, by name."""
    return {name: tuple(node.meta["shape"]) for name, node in _array_nodes(group)}


def _array_nodes(group: Place) -> Iterator[tuple[str, _Node]]:
    fs, path = group.filesystem()
    for child in sorted(fs.ls(path, detail=False)):
        name = child.rstrip("/").rpartition("/")[2]
        node = _read_node(group / name)
        if node is not None and node.is_array:
            yield name, node


def _listed(group: Place) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in array_names(group).items()) or "no arrays"


def _checked_dtype(meta: dict[str, Any]) -> np.dtype[Any]:
    """Return the dtype, judged by the metadata alone: object and string dtypes must not reach a codec."""
    declared = meta["dtype"] if meta["zarr_format"] == 2 else meta["data_type"]
    if isinstance(declared, str) and (declared in _DTYPES or re.fullmatch(r"[<>|][bifcu]\d{1,2}", declared)):
        dtype: np.dtype[Any] = np.dtype(declared)
        if dtype.name in _DTYPES:
            return dtype
    raise SourceError(
        f"dtype {json.dumps(declared)} has no inverse here: expected float32, float64, complex64 or complex128, "
        "or bool, an integer or float16, which are converted"
    )


def _codecs(meta: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, configuration) of every codec that would decode a chunk, inner ones of shards included."""
    if meta["zarr_format"] == 2:
        for codec in [*(meta.get("filters") or []), meta.get("compressor")]:
            if codec is not None:
                yield str(codec.get("id")), codec
        return
    todo = list(meta.get("codecs") or [])
    while todo:
        codec = todo.pop(0)
        if isinstance(codec, str):
            codec = {"name": codec}
        configuration = codec.get("configuration") or {}
        yield str(codec.get("name")), configuration
        todo += [*configuration.get("codecs", ()), *configuration.get("index_codecs", ())]


def _check_codecs(meta: dict[str, Any], place: Place) -> None:
    allowed = _ALLOWED_V2 if meta["zarr_format"] == 2 else _ALLOWED_V3
    if refused := [name for name, _ in _codecs(meta) if name not in allowed]:
        raise SourceError(
            f"codec {', '.join(map(repr, refused))} of {place.name} is not among those that are safe to run: "
            f"{', '.join(sorted(allowed))}. Write the source anew with one of these"
        )


def _is_checksum(codec: tuple[str, dict[str, Any]]) -> bool:
    name, configuration = codec
    return name.removeprefix("numcodecs.") in _CHECKSUMS or bool(configuration.get("checksum"))


def _name_dims(
    node: _Node, ndim: int, dims: Sequence[str] | None, shape: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Return the names of all dimensions and the axes of the core ones."""
    if ndim < 2:
        raise SourceError(f"expected a stack of matrices with at least two dimensions, got shape {shape}")
    known = list(_stored_names(node) or [None] * ndim)
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


def _check_not_packed(node: _Node, place: Place) -> None:
    """Refuse numbers that are not what they stand for: Xarray would decode them, and we would not."""
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
            f"{place.name} is packed, its metadata have {', '.join(sorted(packed))}: store it as plain numbers first, "
            "with xarray.open_zarr and then drop_encoding().to_zarr"
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


def _coordinates(group: Place, node: _Node, sizes: dict[str, int], variable: str) -> tuple[str, ...]:
    """Return the arrays of the group that are coordinates of the variable, by CF's and Xarray's rules."""
    root = _read_node(group)
    listed = [node.attributes.get("coordinates"), root.attributes.get("coordinates") if root else None]
    wanted = {*sizes, *(name for text in listed if isinstance(text, str) for name in text.split())} - {variable}
    found = []
    for name in sorted(wanted):
        coordinate = _read_node(group / name)
        if coordinate is None or not coordinate.is_array:
            continue
        along = _stored_names(coordinate) or ()
        if set(along) <= set(sizes):
            lengths = tuple(sizes[str(dim)] for dim in along)
            if len(along) and lengths != tuple(coordinate.meta["shape"]):
                raise SourceError(f"the coordinate {(group / name).name} is not as long as its dimensions")
            _check_coordinate(coordinate, group / name)
            found.append(name)
    return tuple(found)


def _stored_names(node: _Node) -> list[str | None] | None:
    if node.zarr_format == 3:
        return node.meta.get("dimension_names")
    return node.attributes.get("_ARRAY_DIMENSIONS")


def _check_coordinate(node: _Node, place: Place) -> None:
    """Labels may be text, which the stack may not."""
    allowed = (_ALLOWED_V2 if node.zarr_format == 2 else _ALLOWED_V3) | {"vlen-utf8"}
    if refused := [name for name, _ in _codecs(node.meta) if name not in allowed]:
        raise SourceError(f"codec {', '.join(map(repr, refused))} of the coordinate {place.name} is not safe to run")
