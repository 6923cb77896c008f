"""The documents of a target: its metadata and coordinates as bytes, made in memory, compared with what is there.

Creating a target, finding what of it was lost, and mending that are then one thing: writing documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from crc32c import crc32c
from zarr.abc.buffer import Buffer
from zarr.codecs import ZstdCodec

from dask_batchinv.job.outputs import LEDGER
from dask_batchinv.job.target import format_2, ledger
from dask_batchinv.job.target.at_once import for_each
from dask_batchinv.job.target.contents import OF_FORMAT_2, Contents
from dask_batchinv.job.target.mark import Mark, attributes_of, marked
from dask_batchinv.job.target.state import Target
from dask_batchinv.location import JSON_NBYTES, Location, json_object
from dask_batchinv.outcome import SourceError
from dask_batchinv.storage import METADATA_KEYS, unspecified

if TYPE_CHECKING:
    import xarray as xr

ROOT = "zarr.json"
#: The attribute of the ledger that has the length and the checksum of each key that coordinates are stored in.
CHECKSUMS = "coordinates_crc32c"
#: And the one for the digest of what each says, however that is encoded, and of the units of the inverse.
DIGESTS = "coordinates_sha256"
#: How the keys of metadata end, of either format.
_METADATA = METADATA_KEYS
#: What reading raises where there is no file.
_NOT_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

Documents = dict[str, bytes]


def make_documents(contents: Contents, mark: Mark) -> Documents:
    """Return all that a new target consists of, by key."""
    kept: dict[str, Buffer] = {}
    store = zarr.storage.MemoryStore(kept)
    # What was itself a target of ours is no more than a source here.
    group = zarr.create_group(store, zarr_format=3, attributes=contents.group_attributes | marked(False, mark))
    _create_outputs(group, contents)
    if contents.coordinates is not None:
        _write_coordinates(store, contents.coordinates, dict(group.attrs))
    documents = {key: value.to_bytes() for key, value in kept.items()}
    beside = format_2.documents_of(contents) if contents.encoding.zarr_format == 2 else {}
    documents |= beside
    of_coordinates = [key for key in documents if "/" in key and key.partition("/")[0] in contents.names]
    checksums = {key: _checksum(documents[key]) for key in of_coordinates}
    own = {CHECKSUMS: checksums, DIGESTS: digests_of(contents)}
    ledger.create(group, mark["ledger"], contents.tiling.n_tiles, marked(False, mark) | own)
    with unspecified():
        zarr.consolidate_metadata(store)
    documents = {key: value.to_bytes() for key, value in kept.items()} | beside
    refuse_long(max(len(value) for key, value in documents.items() if key.endswith(_METADATA)))
    return documents


def refuse_long(nbytes: int) -> None:
    """Raise SourceError if metadata would be longer than any that are read."""
    if nbytes > JSON_NBYTES:
        raise SourceError(
            f"with the attributes of the source the metadata of the target would have {nbytes >> 20} MiB, and none are "
            f"read that have more than {JSON_NBYTES >> 20}: shorten the attributes of the array, its coordinates and "
            "its group"
        )


def _checksum(content: bytes) -> list[int]:
    return [len(content), crc32c(content)]


def _create_outputs(group: zarr.Group, contents: Contents) -> None:
    tiling = contents.tiling
    for output in contents.outputs:
        group.create_array(
            output.name,
            shape=tiling.shape_of(output.extent),
            dimension_names=contents.dims_of(output),
            attributes=contents.attributes_of(output),
            **contents.encoding.options(tiling, output, contents.dtype),
        )


def _write_coordinates(store: Any, coordinates: xr.Dataset, attributes: dict[str, Any]) -> None:
    with unspecified():
        # Xarray replaces the attributes of the group: by those that it has already.
        coordinates.assign_attrs(attributes).to_zarr(
            store, mode="a", zarr_format=3, consolidated=False,
            encoding={str(name): {"compressors": [ZstdCodec(checksum=True)]} for name in coordinates.variables},
        )  # fmt: skip


def damaged_keys(location: Location, expected: Documents) -> list[str]:
    """Return the keys of those documents that are lost or damaged, the group's own last.

    What users may have changed, attributes, is left to them. Of a coordinate that is damaged, or another one now, all
    is returned that is not as it would be written now.
    """
    recorded = _recorded_checksums(location)
    now = attributes_of(json_object(expected[f"{LEDGER}/{ROOT}"], LEDGER))
    changed = changed_names(recorded_digests(location), now[DIGESTS])
    names = {key.partition("/")[0] for key in now[CHECKSUMS]}
    of_coordinates = [key for key in expected if "/" in key and key.partition("/")[0] in names]

    def is_right(key: str, found: bytes) -> bool:
        known = _checksum(found) == recorded[key] if key in recorded else found == expected[key]
        return known or (key.endswith(_METADATA) and _says_the_same(key, found, expected[key]))

    def is_damaged(key: str, is_right: Callable[[str, bytes], bool]) -> bool:
        return _is_damaged(location, key, len(expected[key]) + JSON_NBYTES, is_right)

    found = for_each(location, lambda key: is_damaged(key, is_right), expected)
    bad = [key for key, damaged in zip(expected, found, strict=True) if damaged]
    broken = {*changed, *(key.partition("/")[0] for key in bad if key in of_coordinates)}
    suspects = [key for key in of_coordinates if key.partition("/")[0] in broken]
    beside = [key for key in suspects if key not in bad]
    bad += [key for key in beside if is_damaged(key, lambda key, found: found == expected[key])]
    # The digest of the first output is that of its units.
    bad += [key for key in (f"{name}/{ROOT}" for name in sorted(changed)) if key in expected and key not in bad]
    return sorted(bad, key=lambda key: key == ROOT)


def visibly_damaged_keys(location: Location, target: Target) -> list[str]:
    """Return the keys of those documents whose damage is seen without the source: of coordinates, and of the ledger.

    And of Zarr format 2, if there are any.
    """
    recorded = _recorded_checksums(location)

    def is_right(key: str, found: bytes) -> bool:
        is_as_recorded = key in recorded and _checksum(found) == recorded[key]
        return is_as_recorded or (key.endswith(_METADATA) and bool(json_object(found, key)))

    beside: list[str] = []
    if target.encoding.zarr_format == 2:
        names = [output.name for output in target.outputs]
        beside = [*OF_FORMAT_2, *(f"{name}/{end}" for name in names for end in (".zarray", ".zattrs"))]
    keys = (f"{LEDGER}/{ROOT}", f"{LEDGER}/{target.ledger}/{ROOT}", *recorded, *beside)
    limits = {key: recorded[key][0] + 1 if key in recorded else JSON_NBYTES for key in keys}
    return [key for key in keys if _is_damaged(location, key, limits[key], is_right)]


def _attributes_of_ledger(location: Location) -> dict[str, Any]:
    try:
        return attributes_of((location / LEDGER).read_json(ROOT) or {})
    except ValueError:
        return {}


def recorded_digests(location: Location) -> dict[str, str] | None:
    """Return the digests of what a target was given beside its numbers, by name; None if they are lost."""
    found = _attributes_of_ledger(location).get(DIGESTS)
    return found if isinstance(found, dict) else None


def changed_names(old: dict[str, str] | None, new: dict[str, str]) -> set[str]:
    """Return the names of what is not what it was, as far as that is known."""
    return set() if old is None else {name for name in {*old, *new} if old.get(name) != new.get(name)}


def digests_of(contents: Contents) -> dict[str, str]:
    """Return the SHA-256 of what each coordinate says: dimensions, numbers or texts, attributes; and of the units."""
    first = contents.outputs[0]
    units = contents.attributes_of(first).get("units")
    found = {first.name: hashlib.sha256(json.dumps(units, default=str).encode()).hexdigest()}
    for name, variable in ({} if contents.coordinates is None else contents.coordinates.variables).items():
        values = np.asarray(variable.values)
        is_text = values.dtype.kind in "OUT"
        about = [variable.dims, variable.shape, "text" if is_text else values.dtype.str, variable.attrs]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        digest.update(json.dumps(list(map(str, values.flat))).encode() if is_text else values.tobytes())
        found[str(name)] = digest.hexdigest()
    return found


def _recorded_checksums(location: Location) -> dict[str, list[int]]:
    found = _attributes_of_ledger(location).get(CHECKSUMS)
    return found if isinstance(found, dict) and all(map(_is_checksum, found.values())) else {}


def _is_checksum(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)


def _is_damaged(location: Location, key: str, limit: int, is_right: Callable[[str, bytes], bool]) -> bool:
    try:
        return not is_right(key, location.read(key, limit))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not isinstance(error, _NOT_A_FILE):
            raise
        return True


def _says_the_same(key: str, found: bytes, expected: bytes) -> bool:
    if not key.endswith(ROOT):
        return format_2.says_the_same(key, found, expected)
    (mine, inner), (theirs, others) = (_structure(json_object(text, key), key) for text in (expected, found))
    # Users may have consolidated what they have put beside ours.
    return bool(mine == theirs and all(others.get(name) == meta for name, meta in inner.items()))


def _structure(meta: dict[str, Any], key: str) -> Any:
    """Return what a metadata document says of an array or a group, and of those that are consolidated in it."""
    own = {name: value for name, value in meta.items() if name not in ("attributes", "consolidated_metadata")}
    # Zarr writes them in a node of its own as in the consolidated metadata, but for the latter themselves.
    if key == f"{LEDGER}/{ROOT}":  # nobody's but ours
        own["attributes"] = {name: value for name, value in attributes_of(meta).items() if name != CHECKSUMS}
    inner = (meta.get("consolidated_metadata") or {}).get("metadata") or {}
    return own, dict(_structures(inner)) if key == ROOT else {}


def _structures(metadata: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, meta in metadata.items():
        yield name, _structure(meta, name)
