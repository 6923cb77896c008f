"""Stores to read, and places to write to."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr

#: Bytes of a chunk, and of a tile.
CHUNK_NBYTES = 2**25
CODECS = ("zstd", "none")


def make(folder: Path, n: int, codec: str, nbytes: int, chunk_nbytes: int = CHUNK_NBYTES) -> Path:
    """Write a stack of about so many bytes of well-conditioned float64 matrices, as Zarr does by default or plainly."""
    path = folder / f"source-{n}-{codec}-{nbytes}-{chunk_nbytes}"
    each = max(1, chunk_nbytes // (8 * n * n))
    count = max(1, nbytes // (each * 8 * n * n))
    if (path / "made").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    array: zarr.Array[Any] = zarr.create_array(
        path, shape=(each * count, n, n), chunks=(each, n, n), dtype="f8",
        compressors="auto" if codec == "zstd" else None,
    )  # fmt: skip
    rng = np.random.default_rng(n)
    for start in range(0, array.shape[0], each):
        array[start : start + each] = rng.standard_normal((each, n, n)) + 2 * n**0.5 * np.eye(n)
    (path / "made").touch()
    return path


@contextmanager
def place(folder: Path) -> Iterator[str]:
    """Yield a path at which nothing is, and clear it."""
    path = folder / f"target-{uuid.uuid4().hex}"
    try:
        yield str(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
