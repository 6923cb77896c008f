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

from dask_batchinv.job.guard import COMPRESSORS, open_guarded
from dask_batchinv.outcome import SourceError
from dask_batchinv.place import Place, redact
from dask_batchinv.stack import KEPT
from dask_batchinv.storage import StrictStore

Missing = Literal["error", "fill"]

# Codecs that turn bytes into numbers and do nothing else. Above all not pickle, nor any codec of objects; and codecs
# are looked at one by one, for one that must not run can stand behind one that may.
_NUMCODECS = (
    *("adler32", "astype", "bitround", "blosc", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32"),
    *("gzip", "jenkins_lookup3", "lz4", "lzma", "packbits", "quantize", "shuffle", "zlib", "zstd"),
)
_ALLOWED_V2 = frozenset(_NUMCODECS)
_ALLOWED_V3 = frozenset(
    ["blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "zstd"]
    + [f"numcodecs.{name}" for name in _NUMCODECS]
)
#: What the target holds; dimensions and coordinates cannot have these names.
RESERVED = ("inverse", "info", "rcond", "ledger")
_INDEX_CODECS = frozenset(["bytes", "crc32c"])
_CHECKSUMS = frozenset(["adler32", "crc32", "crc32c", "fletcher32", "gzip", "jenkins_lookup3", "zlib"])
#: What a codec's configuration calls the dtypes that it makes.
_CODEC_DTYPES = ("dtype", "astype", "encode_dtype", "decode_dtype")
#: Labels may be text and times, which the stack may not.
_LABELS_V2 = re.compile(r"[<>|]([bifcu]\d{1,2}|[SU]\d{1,5}|[mM]8(\[\d{0,9}[a-zA-Z]{0,2}\])?)")
_LABELS_V3 = frozenset(
    (
        *("string", "variable_length_utf8", "fixed_length_utf32", "null_terminated_bytes"),
        *("numpy.datetime64", "numpy.timedelta64"),
    )
)
_TEXTS = ("|O", "string", "variable_length_utf8")
#: A metadata document may be so long, a label so wide, a shard have so many chunks, a codec stand so deep, and an
#: error say so much.
_DOCUMENT_NBYTES = 16 * 2**20
_LABEL_NBYTES = 2**20
_CHUNKS_PER_SHARD = 2**20
_NESTED = 4
_TEXT_LENGTH = 1500
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
        node = _read_node(self.place, self.zarr_format)
        # What is opened must be what was checked, also on a worker hours later.
        if node is None or _digest(node, self.coordinates) != self.digest:
            raise SourceError(f"the metadata of {self.place.name} have changed since the job began: start it anew")
        store = self.place.store(read_only=True)
        if missing == "error":
            store = StrictStore(store)
        return open_guarded(store, node.meta)


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
    except Exception as error:  # whatever a file system may raise
        if isinstance(error, SourceError) and len(str(error)) <= _TEXT_LENGTH:
            raise
        text = f"the source {os.fspath(location)} cannot be opened: {type(error).__name__}: {error}"
        raise SourceError(_shortened(redact(text if not isinstance(error, SourceError) else str(error)))) from error


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
    dtype = _checked_dtype(node)
    _check_codecs(node, _allowed(node), f"{place.name} is not among those that are safe to run")
    _check_layout(node, dtype.itemsize)
    _stored_names(node)
    array = open_guarded(place.store(read_only=True), node.meta)
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
        checksummed=any(_is_checksum(codec) for codec in _codecs(node)),
        digest=_digest(node, coordinates),
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]} ..."


@dataclass(frozen=True)
class _Node:
    """The raw metadata of one Zarr node."""

    place: Place
    zarr_format: Literal[2, 3]
    is_array: bool
    meta: dict[str, Any]
    attributes: dict[str, Any]

    def expect(self, ok: bool, expected: str, got: Any) -> None:
        """Raise SourceError unless `ok`."""
        if not ok:
            raise SourceError(
                f"the metadata of {self.place.name} make no sense, it cannot be opened: expected {expected}, "
                f"got {_shown(got)}. Write the source anew"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an array."""
        shape = self.meta.get("shape")
        self.expect(_are_sizes(shape, 0), "a shape of integers from 0 on", shape)
        return tuple(shape)  # type: ignore[arg-type]  # it is a list

    def size(self, name: str, value: Any) -> tuple[int, ...]:
        """Return a chunk shape, or raise SourceError."""
        ok = _are_sizes(value, 1) and len(value) == len(self.shape)
        self.expect(ok, f"{name} of {len(self.shape)} integers from 1 on", value)
        return tuple(value)


def _shown(value: Any) -> str:
    return ascii(value) if len(ascii(value)) <= 200 else f"{ascii(value)[:200]} ..."


def _are_sizes(value: Any, least: int) -> bool:
    return isinstance(value, list) and all(type(size) is int and least <= size < 2**63 for size in value)


def _read_node(place: Place, zarr_format: Literal[2, 3] | None = None) -> _Node | None:
    """Return what is at a place, of one Zarr format or of either, as Zarr would look for it; None if nothing is."""
    if zarr_format != 2 and (meta := _read_json(place, "zarr.json")) is not None:
        node = _Node(place, 3, meta.get("node_type") == "array", meta, meta.get("attributes") or {})
    elif zarr_format != 3 and (meta := _read_json(place, ".zarray")) is not None:
        node = _Node(place, 2, True, meta, _read_json(place, ".zattrs") or {})
    elif zarr_format != 3 and (meta := _read_json(place, ".zgroup")) is not None:
        node = _Node(place, 2, False, meta, _read_json(place, ".zattrs") or {})
    else:
        return None
    found = meta.get("zarr_format")
    node.expect(type(found) is int and found == node.zarr_format, f"zarr_format {node.zarr_format}", found)
    if node.zarr_format == 3:
        node.expect(meta.get("node_type") in ("array", "group"), "node_type array or group", meta.get("node_type"))
    node.expect(isinstance(node.attributes, dict), "attributes in an object", node.attributes)
    return node


def _read_json(place: Place, key: str) -> dict[str, Any] | None:
    """Return a JSON object as `Place.read_json` does, but nothing that is too long for metadata, or no file."""
    fs, path = place.filesystem()
    if place.is_local and os.path.exists(f"{path}/{key}") and not os.path.isfile(f"{path}/{key}"):
        if os.path.isdir(f"{path}/{key}"):
            return None
        raise SourceError(f"{key} of {place.name} is not a file: it cannot be opened")
    try:
        text = fs.cat_file(f"{path}/{key}", start=0, end=_DOCUMENT_NBYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    if len(text) > _DOCUMENT_NBYTES:
        raise SourceError(
            f"{key} of {place.name} is longer than {_DOCUMENT_NBYTES >> 20} MiB, which metadata never are: it cannot "
            "be opened. Write the source anew"
        )
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {key}, got {type(content).__name__}")
    return content


def _digest(node: _Node, coordinates: tuple[str, ...]) -> str:
    canonical = json.dumps([node.meta, coordinates], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


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
    return {name: node.shape for name, node in _array_nodes(group)}


def _array_nodes(group: Place) -> Iterator[tuple[str, _Node]]:
    fs, path = group.filesystem()
    for child in sorted(fs.ls(path, detail=False)):
        name = child.rstrip("/").rpartition("/")[2]
        node = _read_node(group / name)
        if node is not None and node.is_array:
            yield name, node


def _listed(group: Place) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in array_names(group).items()) or "no arrays"


def _checked_dtype(node: _Node) -> np.dtype[Any]:
    """Return the dtype, judged by the metadata alone: object and string dtypes must not reach a codec."""
    declared = _declared(node)
    node.expect(declared is not None, "a dtype", declared)
    if _is_number(declared):
        dtype: np.dtype[Any] = np.dtype(declared)
        return dtype
    raise SourceError(
        f"dtype {_shown(declared)} has no inverse here: expected float32, float64, complex64 or complex128, "
        "or bool, an integer or float16, which are converted"
    )


def _declared(node: _Node) -> Any:
    return node.meta.get("dtype" if node.zarr_format == 2 else "data_type")


def _is_number(declared: Any) -> bool:
    if not isinstance(declared, str):
        return False
    if declared in _DTYPES:
        return True
    try:
        return bool(re.fullmatch(r"[<>|][bifcu]\d{1,2}", declared)) and np.dtype(declared).name in _DTYPES
    except TypeError:
        return False


def _codecs(node: _Node) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, configuration) of every codec that would decode a chunk, inner ones of shards included."""
    for chain in _chains(node):
        yield from chain


def _chains(node: _Node) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yield the codecs that run one after the other, as (name, configuration); for shards, also those inside."""
    if node.zarr_format == 2:
        filters, compressor = node.meta.get("filters"), node.meta.get("compressor")
        node.expect(filters is None or isinstance(filters, list), "filters in a list", filters)
        chain = [*(filters or []), *([] if compressor is None else [compressor])]
        node.expect(all(isinstance(codec, dict) for codec in chain), "codecs that are objects", chain)
        yield [(str(codec.get("id")), codec) for codec in chain]
        return
    todo = [(node.meta.get("codecs"), 0)]
    while todo:
        codecs, depth = todo.pop(0)
        node.expect(isinstance(codecs, list), "codecs in a list", codecs)
        chain = [_codec_v3(node, codec) for codec in codecs or ()]
        node.expect(depth <= _NESTED, f"codecs not more than {_NESTED} deep in each other", depth)
        yield chain
        for _, configuration in chain:
            todo += [(configuration[key], depth + 1) for key in ("codecs", "index_codecs") if key in configuration]


def _codec_v3(node: _Node, codec: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(codec, str):
        codec = {"name": codec}
    ok = isinstance(codec, dict) and isinstance(codec.get("configuration") or {}, dict)
    node.expect(ok, "a codec with a name and a configuration", codec)
    return str(codec.get("name")), codec.get("configuration") or {}


def _allowed(node: _Node) -> frozenset[str]:
    return _ALLOWED_V2 if node.zarr_format == 2 else _ALLOWED_V3


def _check_codecs(node: _Node, allowed: frozenset[str], where: str) -> None:
    chains = list(_chains(node))
    if refused := [name for chain in chains for name, _ in chain if name not in allowed]:
        raise SourceError(
            f"codec {', '.join(map(_shown, refused[:5]))} of {where}: "
            f"{', '.join(sorted(allowed))}. Write the source anew with one of these"
        )
    outer = _compressors(chains[0])
    for chain in chains:
        if len(found := (outer if chain is chains[0] else outer + _compressors(chain))) > 1:
            raise SourceError(
                f"{node.place.name} is compressed more than once, with {', '.join(found)}, which no reader can keep "
                "within bounds: write it anew with one compressor"
            )
        if _compressors(chain) and any(name == "sharding_indexed" for name, _ in chain):
            raise SourceError(f"whole shards of {node.place.name} are compressed: write it anew with compressed chunks")
        for name, configuration in chain:
            _check_configuration(node, name, configuration)


def _compressors(chain: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [name for name, _ in chain if name.removeprefix("numcodecs.") in COMPRESSORS]


def _check_configuration(node: _Node, name: str, configuration: dict[str, Any]) -> None:
    if node.zarr_format == 3:
        node.expect("id" not in configuration, f"no id in the configuration of {name}", configuration.get("id"))
    for key in _CODEC_DTYPES:
        if configuration.get(key) is not None:
            ok = _is_number(configuration[key])
            node.expect(ok, f"a dtype of numbers for {key} of the codec {name}", configuration[key])
    if name == "sharding_indexed":
        for codec in configuration.get("index_codecs", ()):
            inner, _ = _codec_v3(node, codec)
            node.expect(inner in _INDEX_CODECS, "an index of shards that is not compressed", inner)


def _check_layout(node: _Node, itemsize: int) -> None:
    """Check what says where the chunks are and how large, as strictly here as in any version of Zarr."""
    meta = node.meta
    node.expect(math.prod(node.shape) * itemsize < 2**63, "less than 2**63 bytes in all", list(node.shape))
    if node.zarr_format == 2:
        node.size("chunks", meta.get("chunks"))
        separator = meta.get("dimension_separator", ".")
    else:
        node.expect(not meta.get("storage_transformers"), "no storage_transformers", meta.get("storage_transformers"))
        name, configuration = _codec_v3(node, meta.get("chunk_grid"))
        node.expect(name == "regular", "a regular chunk_grid", name)
        _check_shards(node, node.size("chunk_shape", configuration.get("chunk_shape")))
        name, configuration = _codec_v3(node, meta.get("chunk_key_encoding"))
        node.expect(name in ("default", "v2"), "chunk_key_encoding default or v2", name)
        separator = configuration.get("separator", "/")
    node.expect(separator in (".", "/"), "a separator '.' or '/' in the names of chunks", separator)


def _check_shards(node: _Node, shape: tuple[int, ...]) -> None:
    chain = next(_chains(node))
    while inner := [configuration for name, configuration in chain if name == "sharding_indexed"]:
        chunk = node.size("chunk_shape of shards", inner[0].get("chunk_shape"))
        fits = sorted(chunk) == sorted(shape) or all(
            whole % part == 0 for whole, part in zip(shape, chunk, strict=True)
        )
        # A transpose before the shards turns their axes.
        turned = any(name == "transpose" for name, _ in chain)
        node.expect(fits or turned, f"chunks that divide a shard {shape}", list(chunk))
        count = math.prod(shape) // max(1, math.prod(chunk))
        node.expect(count <= _CHUNKS_PER_SHARD, f"at most {_CHUNKS_PER_SHARD} chunks in a shard", count)
        shape, chain = chunk, [_codec_v3(node, codec) for codec in inner[0].get("codecs", ())]


def _is_checksum(codec: tuple[str, dict[str, Any]]) -> bool:
    name, configuration = codec
    return name.removeprefix("numcodecs.") in _CHECKSUMS or bool(configuration.get("checksum"))


def _name_dims(
    node: _Node, ndim: int, dims: Sequence[str] | None, shape: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Return the names of all dimensions and the axes of the core ones."""
    if ndim < 2:
        raise SourceError(f"expected a stack of matrices with at least two dimensions, got shape {shape}")
    known = _stored_names(node) or [None] * ndim
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
    if root is None:
        return ()
    listed = [node.attributes.get("coordinates"), root.attributes.get("coordinates")]
    wanted = {*sizes, *(name for text in listed if isinstance(text, str) for name in text.split())} - {variable}
    found = []
    for name in sorted(filter(_is_name, wanted)):  # others would lead out of the group
        # In the format of the group, for in that Xarray will read it.
        coordinate = _read_node(group / name, root.zarr_format)
        if coordinate is None or not coordinate.is_array:
            continue
        along = _stored_names(coordinate) or ()
        if set(along) <= set(sizes):
            lengths = tuple(sizes[str(dim)] for dim in along)
            if len(along) and lengths != coordinate.shape:
                raise SourceError(f"the coordinate {(group / name).name} is not as long as its dimensions")
            _check_coordinate(coordinate)
            found.append(name)
    return tuple(found)


def _is_name(name: str) -> bool:
    """Tell whether a name is one of something directly inside a group."""
    return name.isprintable() and "/" not in name and "\\" not in name and name not in ("", ".", "..")


def _stored_names(node: _Node) -> list[str | None] | None:
    names: Any = node.meta.get("dimension_names") if node.zarr_format == 3 else node.attributes.get("_ARRAY_DIMENSIONS")
    if names is None:
        return None
    ok = isinstance(names, list) and all(
        name in (None, "") or (isinstance(name, str) and _is_name(name)) for name in names
    )
    node.expect(ok, "dimension names that are text without '/' or control characters, or null", names)
    node.expect(len(names) == len(node.shape), f"{len(node.shape)} dimension names", names)
    return list(names)


def _check_coordinate(node: _Node) -> None:
    where = f"the coordinate {node.place.name} is not safe to run, as these are"
    _check_codecs(node, _allowed(node) | {"vlen-utf8"}, where)
    declared = _declared(node)
    ok, nbytes = _is_label(node, declared), 0
    if isinstance(declared, dict):
        nbytes = (declared.get("configuration") or {}).get("length_bytes", 0)
    node.expect(ok, "labels that are numbers, text or times", declared)
    node.expect(type(nbytes) is int and 0 <= nbytes <= _LABEL_NBYTES, "labels that are not so long", nbytes)
    names = [name for name, _ in _codecs(node)]
    node.expect(
        ("vlen-utf8" in names[:1] or node.zarr_format == 3) if declared in _TEXTS else "vlen-utf8" not in names,
        "vlen-utf8 first for text and for nothing else",
        names,
    )
    _check_layout(node, 1)


def _is_label(node: _Node, declared: Any) -> bool:
    if node.zarr_format == 2:
        return isinstance(declared, str) and (declared == "|O" or bool(_LABELS_V2.fullmatch(declared)))
    name = declared.get("name") if isinstance(declared, dict) else declared
    return _is_number(declared) or (isinstance(name, str) and name in _LABELS_V3)
