"""One coordinate: its metadata judged, its values read as the stack's are, and given as Xarray would give them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from dask_batchinv.chunks.decompression import CHECKSUMS, COMPRESSORS
from dask_batchinv.job.source.bounded_decoding import TEXTS, TextAllowance, element_nbytes, is_text, open_bounded
from dask_batchinv.job.source.decoding import attributes_in_xarray
from dask_batchinv.job.source.metadata import (
    CODEC_DTYPES,
    Node,
    allowed_codecs,
    check_codecs,
    check_layout,
    codecs_of,
    declared_dtype,
    is_number,
    stored_names,
)
from dask_batchinv.storage import unspecified

if TYPE_CHECKING:
    import xarray as xr

#: Labels may be text and times, which the stack may not.
_LABELS_V2 = re.compile(r"[<>|]([bifcu]\d{1,2}|[SU]\d{1,5}|[mM]8(\[\d{0,9}[a-zA-Z]{0,2}\])?)")
_LABELS_V3 = frozenset(
    (
        *("string", "variable_length_utf8", "fixed_length_utf32", "null_terminated_bytes"),
        *("numpy.datetime64", "numpy.timedelta64"),
    )
)
#: A label may be so wide.
_LABEL_NBYTES = 2**20
#: What a text takes beside its letters, and a chunk beside its values: measured 57 and 1.7 KiB.
_TEXT_NBYTES, _CHUNK_NBYTES = 64, 2048


@dataclass(frozen=True)
class Coordinate:
    """An array that says where the matrices are, whose metadata were judged."""

    name: str
    """Its name."""
    node: Node = field(compare=False)
    """Its metadata: what was judged is what is read."""

    @classmethod
    def judged(cls, name: str, node: Node) -> Coordinate:
        """Return a coordinate, or raise SourceError, or what Zarr raises of its metadata."""
        check_coordinate(node)
        found = cls(name, node)
        found._open(TextAllowance())
        return found

    @property
    def group(self) -> str:
        """Where it is, for people."""
        return self.node.location.name.rpartition("/")[0]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of its dimensions."""
        return tuple(map(str, stored_names(self.node) or ()))

    @property
    def nbytes(self) -> int:
        """Bytes that it may take, all of its chunks decoded; without the letters of texts."""
        meta, declared = self.node.meta, declared_dtype(self.node)
        chunks = meta["chunks"] if self.node.zarr_format == 2 else meta["chunk_grid"]["configuration"]["chunk_shape"]
        counts = [-(-size // chunk) for size, chunk in zip(self.node.shape, chunks, strict=True)]
        widths = [_TEXT_NBYTES if is_text(meta) else element_nbytes(declared)]
        widths += [
            np.dtype(own[key]).itemsize for _, own in codecs_of(self.node) for key in CODEC_DTYPES if own.get(key)
        ]
        nbytes: int = math.prod(counts) * (math.prod(chunks) * max(widths) + _CHUNK_NBYTES)
        return nbytes

    def read(self, allowance: TextAllowance) -> xr.Variable:
        """Read it, undecoded, into memory, with no more text than is allowed."""
        import xarray as xr  # not before it is needed: that takes longer than a small job

        array = self._open(allowance)
        # One chunk after the other, so that each finds what those before have left of the allowance.
        with zarr.config.set({"async.concurrency": 1} if is_text(self.node.meta) else {}):
            values = np.asarray(array[...], array.dtype)
        # By this Xarray knows that text shall remain what it is in Zarr.
        encoding = {"dtype": array.dtype} if array.dtype.kind == "T" else {}
        return xr.Variable(self.dims, values, attributes_in_xarray(self.node, array), encoding)

    def _open(self, allowance: TextAllowance) -> zarr.Array[Any]:
        with unspecified():
            return open_bounded(self.node.location.store(read_only=True), self.node.meta, allowance)


def check_coordinate(node: Node) -> None:
    """Raise SourceError unless an array can be labels: text is allowed, too."""
    where = f"the coordinate {node.location.name} is not safe to run, as these are"
    check_codecs(node, allowed_codecs(node) | {"vlen-utf8"}, where)
    declared = declared_dtype(node)
    ok, nbytes = _is_label(node, declared), 0
    if isinstance(declared, dict):
        nbytes = (declared.get("configuration") or {}).get("length_bytes", 0)
    node.expect(ok, "labels that are numbers, text or times", declared)
    node.expect(type(nbytes) is int and 0 <= nbytes <= _LABEL_NBYTES, "labels that are not so long", nbytes)
    names = [name for name, _ in codecs_of(node)]
    if (declared.get("name") if isinstance(declared, dict) else declared) in TEXTS:
        # Nothing else knows a text, and nothing that multiplies may follow where no size is known beforehand.
        chain = [name.removeprefix("numcodecs.") for name in names if name not in ("sharding_indexed", "bytes")]
        ok = chain[:1] == ["vlen-utf8"] and set(chain[1:]) <= COMPRESSORS | CHECKSUMS
        node.expect(ok, "vlen-utf8 for text, and behind it nothing but compressors and checksums", names)
    else:
        node.expect("vlen-utf8" not in names, "vlen-utf8 for nothing but text", names)
    check_layout(node, 1)


def _is_label(node: Node, declared: Any) -> bool:
    if node.zarr_format == 2:
        return isinstance(declared, str) and (declared == "|O" or bool(_LABELS_V2.fullmatch(declared)))
    name = declared.get("name") if isinstance(declared, dict) else declared
    return is_number(declared) or (isinstance(name, str) and name in _LABELS_V3)
