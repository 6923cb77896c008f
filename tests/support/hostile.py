"""Arrays written by hand, as an attacker would."""

import json
import os

import numcodecs
import numpy as np

V2 = {
    "zarr_format": 2, "shape": [4, 2, 2], "chunks": [4, 2, 2], "dtype": "<f8", "order": "C", "fill_value": 0,
    "filters": None, "compressor": None,
}  # fmt: skip
V3 = {
    "zarr_format": 3, "node_type": "array", "shape": [4, 2, 2], "data_type": "float64", "fill_value": 0,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 2, 2]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}], "attributes": {},
}  # fmt: skip
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
PICKLE = {"id": "pickle", "protocol": 5}


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def shard(codecs=(BYTES,), index=(BYTES, {"name": "crc32c"}), chunk=(1, 2, 2), **more):
    configuration = {"chunk_shape": list(chunk), "codecs": list(codecs), "index_codecs": list(index), **more}
    return {"name": "sharding_indexed", "configuration": configuration}


def nested(depth, innermost):
    return innermost if depth == 0 else [shard(nested(depth - 1, innermost), chunk=(4, 2, 2))]


def grid(*shape):
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}}}


def keys(name, **configuration):
    return {"chunk_key_encoding": {"name": name, "configuration": configuration}}


def numcodec(name, **configuration):
    return {"name": f"numcodecs.{name}", "configuration": configuration}


def write_array(path, meta, attributes=None):
    """Write an array by hand, as an attacker would, with a pickle for every chunk."""
    path.mkdir(parents=True, exist_ok=True)
    name = ".zarray" if "chunks" in meta or "compressor" in meta else "zarr.json"
    (path / name).write_text(json.dumps(meta))
    if attributes is not None:
        (path / ".zattrs").write_text(json.dumps(attributes))
    bomb = numcodecs.Pickle().encode(np.array([Bomb(path.parent / "exploded")], object))
    for chunk in ("0.0.0", "0", "0/0/0", "c/0/0/0", "c/0"):
        where = path / chunk
        if not where.exists() and not any(parent.is_file() for parent in where.parents):
            where.parent.mkdir(parents=True, exist_ok=True)
            where.write_bytes(bomb)
    return path
