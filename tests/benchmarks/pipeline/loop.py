"""The floor: a loop that reads, decodes, inverts, seals and writes, and does nothing else.

Nothing is recorded, nothing can be resumed, a damaged chunk ends it. What a job moves is measured against it.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import numpy as np
import zarr
from crc32c import crc32c

from dask_batchinv.kernels import choose_kernel


def run(source: str, target: str, threads: int) -> None:
    """Invert a store of float64 matrices that lies in files, zstd or not compressed, on some threads."""
    array: zarr.Array[Any] = zarr.open_array(source, mode="r")
    for name in ("inverse", "info", "rcond"):
        os.makedirs(f"{target}/{name}")
    workers = [threading.Thread(target=_work, args=(array, source, target, k, threads)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _work(array: zarr.Array[Any], source: str, target: str, first: int, step: int) -> None:
    (each, n, _), invert = array.chunks, choose_kernel("general").invert
    nbytes = each * n * n * 8
    encoded, block = memoryview(bytearray(nbytes + nbytes // 8 + 4096)), np.empty((each, n, n))
    plain = block.reshape(-1).view(np.uint8)
    stored = {"inverse": np.empty(nbytes + 4, np.uint8)}
    stored |= {"info": np.empty(4 * each + 4, np.uint8), "rcond": np.empty(8 * each + 4, np.uint8)}
    inverse, info, rcond = (
        content[:-4].view(dtype) for content, dtype in zip(stored.values(), ("f8", "i4", "f8"), strict=True)
    )
    zstd = numcodecs.Zstd() if array.compressors else None
    for number in range(first, array.shape[0] // each, step):
        handle = os.open(f"{source}/c/{number}/0/0", os.O_RDONLY)
        if zstd is None:
            os.readv(handle, [plain])
        else:
            zstd.decode(encoded[: os.readv(handle, [encoded])], plain)
        os.close(handle)
        invert(block, inverse.reshape(block.shape), info, rcond)
        for name, content in stored.items():
            content[-4:] = np.frombuffer(crc32c(content[:-4].data).to_bytes(4, "little"), np.uint8)
            path = f"{target}/{name}/c.{number}"
            handle = os.open(f"{path}.partial", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(handle, content.data)
            os.close(handle)
            os.rename(f"{path}.partial", path)
