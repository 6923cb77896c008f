"""The metadata of a Zarr node, read raw and judged before Zarr may see them: dtypes, codecs, where chunks lie."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dask_batchinv.attributes import packing_of
from dask_batchinv.chunks.decompression import CHECKSUMS, COMPRESSORS
from dask_batchinv.job.seen import ChunkGrid
from dask_batchinv.location import Location
from dask_batchinv.outcome import SourceError
from dask_batchinv.stack import KEPT

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
_INDEX_CODECS = frozenset(["bytes", "crc32c"])
_CHECKSUMS = CHECKSUMS | {"gzip", "zlib"}
#: What a codec's configuration calls the dtypes that it makes.
CODEC_DTYPES = ("dtype", "astype", "encode_dtype", "decode_dtype")
#: A shard may have so many chunks, and a codec stand so deep.
_CHUNKS_PER_SHARD = 2**20
_NESTED = 4
_DTYPES = frozenset([*KEPT, "bool", "float16", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))])


@dataclass(frozen=True)
class Node:
    """The raw metadata of one Zarr node."""

    location: Location
    zarr_format: Literal[2, 3]
    is_array: bool
    meta: dict[str, Any]
    attributes: dict[str, Any]

    def expect(self, ok: bool, expected: str, got: Any) -> None:
        """Raise SourceError unless `ok`."""
        if not ok:
            raise SourceError(
                f"invalid metadata in {self.location.name}: expected {expected}, got {_shown(got)}. Rewrite the source"
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


def read_node(location: Location, zarr_format: Literal[2, 3] | None = None) -> Node | None:
    """Return what is at a location, of one Zarr format or of either, as Zarr would look for it; None if nothing is."""
    if zarr_format != 2 and (meta := location.read_json("zarr.json")) is not None:
        node = Node(location, 3, meta.get("node_type") == "array", meta, meta.get("attributes") or {})
    elif zarr_format != 3 and (meta := location.read_json(".zarray")) is not None:
        node = Node(location, 2, True, meta, location.read_json(".zattrs") or {})
    elif zarr_format != 3 and (meta := location.read_json(".zgroup")) is not None:
        node = Node(location, 2, False, meta, location.read_json(".zattrs") or {})
    else:
        return None
    if (fields := _fields_of(meta)) is not None:
        node = replace(node, meta=_as_complex(meta, fields))
    found = meta.get("zarr_format")
    node.expect(type(found) is int and found == node.zarr_format, f"zarr_format {node.zarr_format}", found)
    if node.zarr_format == 3:
        node.expect(meta.get("node_type") in ("array", "group"), "node_type array or group", meta.get("node_type"))
    node.expect(isinstance(node.attributes, dict), "attributes in an object", node.attributes)
    return node


def member_names(group: Location) -> list[str]:
    """Return the names of what is directly in a group; as they are consolidated, where a web server lists nothing."""
    if names := group.known_children():
        return names
    found: set[str] = set()
    with suppress(ValueError, AttributeError, TypeError):  # what makes no sense names nothing
        inner = ((group.read_json("zarr.json") or {}).get("consolidated_metadata") or {}).get("metadata") or {}
        found |= {name for name in inner if "/" not in name}
        keys = (group.read_json(".zmetadata") or {}).get("metadata") or {}
        found |= {key.removesuffix("/.zarray") for key in keys if key.count("/") == 1 and key.endswith("/.zarray")}
    return sorted(filter(is_name, found))


#: What real and imaginary parts are called as fields of a record.
_FIELDS = ({"r", "i"}, {"re", "im"}, {"real", "imag"}, {"real", "imaginary"})
_COMPLEX = {"float32": "complex64", "float64": "complex128", "<f4": "<c8", "<f8": "<c16", ">f4": ">c8", ">f8": ">c16"}


def _fields_of(meta: dict[str, Any]) -> list[Any] | None:
    """Return the fields of an array of records that are complex numbers, in the order of their bytes; else None."""
    declared = meta.get("dtype", meta.get("data_type"))
    if isinstance(declared, dict):
        configuration = declared.get("configuration")
        declared = configuration.get("fields") if isinstance(configuration, dict) else None
        if isinstance(declared, list):  # as versions of Zarr from 3.4 on write it
            declared = [[*field.values()] if isinstance(field, dict) else field for field in declared]
    if (
        not isinstance(declared, list)
        or len(declared) != 2
        or not all(
            isinstance(field, list) and len(field) == 2 and all(isinstance(part, str) for part in field)
            for field in declared
        )
    ):
        return None
    (first, kind), (second, other) = declared
    pairs = [{first.lower(), second.lower()} == names for names in _FIELDS]
    is_complex = any(pairs) and kind == other in _COMPLEX and first.lower().startswith("r")
    return declared if is_complex else None


def _as_complex(meta: dict[str, Any], fields: list[Any]) -> dict[str, Any]:
    """Return metadata by which records of a real and an imaginary part are complex numbers, whose bytes they are."""
    key, kind = ("dtype" if "dtype" in meta else "data_type"), fields[0][1]
    fill: Any = [0.0, 0.0]
    with suppress(ValueError, TypeError):  # in base64, as Zarr writes that of a record
        order = ">" if kind.startswith(">") else "<"
        width = "f" if kind.endswith(("4", "32")) else "d"
        fill = [*struct.unpack(f"{order}2{width}", base64.b64decode(meta["fill_value"], validate=True))]
    fill = ["NaN" if part != part else part for part in fill]  # NaN alone is not itself
    return meta | {key: _COMPLEX[kind], "fill_value": fill}


#: What the metadata of an array say of its numbers, and where each stands in a store, by format: a name for people,
#: and the keys. Not its shape, which grows, nor its attributes.
_DECIDING: dict[int, dict[str, tuple[str, ...]]] = {
    2: {"dtype": ("dtype",), "chunks": ("chunks", "order"), "codecs": ("filters", "compressor"),
        "fill value": ("fill_value",), "names of chunks": ("dimension_separator",)},
    3: {"dtype": ("data_type",), "chunks": ("chunk_grid",), "codecs": ("codecs",), "fill value": ("fill_value",),
        "names of chunks": ("chunk_key_encoding",)},
}  # fmt: skip


def facts_of(node: Node) -> dict[str, str]:
    """Return what decides on the numbers of an array but its shape, by names for people: each a text, or as JSON."""
    facts = {name: [node.meta.get(key) for key in keys] for name, keys in _DECIDING[node.zarr_format].items()}
    facts |= {"Zarr format": [node.zarr_format], "packing": [packing_of(node.attributes)]}
    return {name: _fact(each[0] if len(each) == 1 else each) for name, each in facts.items()}


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def chunk_grid_of(node: Node) -> ChunkGrid:
    """Return where the stored chunks of an array are whose metadata were checked."""
    if node.zarr_format == 2:
        return ChunkGrid(node.shape, tuple(node.meta["chunks"]), "", node.meta.get("dimension_separator", "."))
    _, grid = _codec_v3(node, node.meta["chunk_grid"])
    name, encoding = _codec_v3(node, node.meta["chunk_key_encoding"])
    separator = encoding.get("separator", "/" if name == "default" else ".")
    return ChunkGrid(node.shape, tuple(grid["chunk_shape"]), f"c{separator}" if name == "default" else "", separator)


def checked_dtype(node: Node) -> np.dtype[Any]:
    """Return the dtype, judged by the metadata alone: object and string dtypes must not reach a codec."""
    declared = declared_dtype(node)
    node.expect(declared is not None, "a dtype", declared)
    if is_number(declared):
        dtype: np.dtype[Any] = np.dtype(declared)
        return dtype
    raise SourceError(
        f"dtype {_shown(declared)} has no inverse here: expected float32, float64, complex64 or complex128, "
        "or bool, an integer or float16, which are converted"
    )


def declared_dtype(node: Node) -> Any:
    """Return what the metadata say of the dtype, whatever it is."""
    return node.meta.get("dtype" if node.zarr_format == 2 else "data_type")


def is_number(declared: Any) -> bool:
    """Tell whether a dtype is one of numbers that can be converted to a kept one."""
    if not isinstance(declared, str):
        return False
    if declared in _DTYPES:
        return True
    try:
        return bool(re.fullmatch(r"[<>|][bifcu]\d{1,2}", declared)) and np.dtype(declared).name in _DTYPES
    except TypeError:
        return False


def is_floating(node: Node) -> bool:
    """Tell whether an array is of floating or complex numbers, as far as its metadata can be read."""
    declared = declared_dtype(node)
    return is_number(declared) and np.dtype(declared).kind in "fc"


def codecs_of(node: Node) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, configuration) of every codec that would decode a chunk, inner ones of shards included."""
    for chain in _chains(node):
        yield from chain


def data_codecs(node: Node) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, configuration) of every codec that would decode numbers, as they encode: not those of an index."""
    chain = next(_chains(node))
    while chain:
        inner: list[Any] = []
        for codec in chain:
            yield codec
            if codec[0] == "sharding_indexed":
                inner = codec[1].get("codecs", ["bytes"])
        chain = [_codec_v3(node, codec) for codec in inner]


def wholly_decoded(node: Node) -> bool:
    """Tell whether Zarr decodes whole shards, whatever is asked for: where anything stands beside them in the chain."""
    chain = next(_chains(node))
    return len(chain) > 1 and any(name == "sharding_indexed" for name, _ in chain)


def _chains(node: Node) -> Iterator[list[tuple[str, dict[str, Any]]]]:
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


def _codec_v3(node: Node, codec: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(codec, str):
        codec = {"name": codec}
    ok = isinstance(codec, dict) and isinstance(codec.get("configuration") or {}, dict)
    node.expect(ok, "a codec with a name and a configuration", codec)
    return str(codec.get("name")), codec.get("configuration") or {}


def is_checksummed(node: Node) -> bool:
    """Tell whether every byte of the data is covered by a checksum.

    Of shards it takes one over the chunks in them *and* one over the index, by which one chunk would else be taken for
    another; or one over all of the shard.
    """
    return _is_covered(node, next(_chains(node)))


def _is_covered(node: Node, chain: list[tuple[str, dict[str, Any]]]) -> bool:
    if any(map(_is_checksum, chain)):
        return True
    for name, configuration in chain:
        if name == "sharding_indexed":
            # Those are Zarr's own where nothing is said.
            chains = [configuration.get("codecs", ["bytes"]), configuration.get("index_codecs", ["bytes", "crc32c"])]
            return all(_is_covered(node, [_codec_v3(node, codec) for codec in codecs]) for codecs in chains)
    return False


def _is_checksum(codec: tuple[str, dict[str, Any]]) -> bool:
    """Tell whether a codec notices that what it decodes is damaged."""
    name, configuration = codec
    kind = name.removeprefix("numcodecs.")
    return kind in _CHECKSUMS or (kind == "zstd" and bool(configuration.get("checksum")))


def allowed_codecs(node: Node) -> frozenset[str]:
    """Return the names of the codecs that may run."""
    return _ALLOWED_V2 if node.zarr_format == 2 else _ALLOWED_V3


def check_codecs(node: Node, allowed: frozenset[str], where: str) -> None:
    """Raise SourceError if a codec may not run, or could decode a chunk to any size."""
    chains = list(_chains(node))
    if refused := [name for chain in chains for name, _ in chain if name not in allowed]:
        raise SourceError(
            f"codec {', '.join(map(_shown, refused[:5]))} of {where}: "
            f"{', '.join(sorted(allowed))}. Rewrite the source with one of these"
        )
    outer = _compressors(chains[0])
    for chain in chains:
        if len(found := (outer if chain is chains[0] else outer + _compressors(chain))) > 1:
            raise SourceError(
                f"{node.location.name} is compressed more than once, with {', '.join(found)}: the decoded size "
                "cannot be bounded. Rewrite it with one compressor"
            )
        if _compressors(chain) and any(name == "sharding_indexed" for name, _ in chain):
            raise SourceError(f"whole shards of {node.location.name} are compressed: rewrite it with compressed chunks")
        for name, configuration in chain:
            _check_configuration(node, name, configuration)


def _compressors(chain: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [name for name, _ in chain if name.removeprefix("numcodecs.") in COMPRESSORS]


def _check_configuration(node: Node, name: str, configuration: dict[str, Any]) -> None:
    if node.zarr_format == 3:
        node.expect("id" not in configuration, f"no id in the configuration of {name}", configuration.get("id"))
    for key in CODEC_DTYPES:
        if configuration.get(key) is not None:
            ok = is_number(configuration[key])
            node.expect(ok, f"a dtype of numbers for {key} of the codec {name}", configuration[key])
    if name == "sharding_indexed":
        for codec in configuration.get("index_codecs", ()):
            inner, _ = _codec_v3(node, codec)
            node.expect(inner in _INDEX_CODECS, "an index of shards that is not compressed", inner)


def check_layout(node: Node, itemsize: int) -> None:
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
        separator = configuration.get("separator", "/" if name == "default" else ".")
    node.expect(separator in (".", "/"), "a separator '.' or '/' in the names of chunks", separator)


def _check_shards(node: Node, shape: tuple[int, ...]) -> None:
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


def stored_names(node: Node) -> list[str | None] | None:
    """Return the dimension names of an array, or None; SourceError if they make no sense."""
    names: Any = node.meta.get("dimension_names") if node.zarr_format == 3 else node.attributes.get("_ARRAY_DIMENSIONS")
    if names is None:
        return None
    ok = isinstance(names, list) and all(
        name in (None, "") or (isinstance(name, str) and is_name(name)) for name in names
    )
    node.expect(ok, "dimension names that are text other than '..', without '/' or what cannot be seen, or null", names)
    node.expect(len(names) == len(node.shape), f"{len(node.shape)} dimension names", names)
    return list(names)


def is_name(name: str) -> bool:
    """Tell whether a name is one of something directly inside a group."""
    return name.isprintable() and "/" not in name and "\\" not in name and name not in ("", ".", "..")
