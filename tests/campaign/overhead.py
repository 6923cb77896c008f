"""What checksums and the ledger cost: their share of the time of undisturbed jobs on real processes."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zarr
from distributed import Client, LocalCluster

from dask_batchinv import invert_store
from dask_batchinv.chunks.sealed import Chunk
from dask_batchinv.job.target.ledger import Ledger
from tests.campaign.work import Row, check

#: n, dtype, matrices, compression of the source: each a GiB or so, in chunks of 16 MiB. The first three read and write
#: the page cache as fast as memory is; the last one has to decode what Zarr stores by default.
CASES = ((3, "f4", 2**25, None), (8, "f8", 2**21, None), (64, "f8", 2**15, None), (8, "f8", 2**21, "auto"))
CHUNK_NBYTES = 2**24
WORKERS = 2

_seal = Chunk.seal
_sealing = [0.0]


def overhead(folder: Path, times: int, _: random.Random) -> Iterator[Row]:
    """Run jobs with everything timed that computes checksums or writes the ledger."""
    row = Row("no fault: what checksums and ledger cost")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(watch_seals)
        for n, dtype, matrices, compressors in CASES:
            source, target = folder / "overhead-source.zarr", folder / "overhead-target.zarr"
            _make(source, n, dtype, matrices, compressors)
            shares = []
            for number in range(times + 1):
                shutil.rmtree(target, ignore_errors=True)
                with row.run(f"n = {n}, {dtype}", faults=0):
                    share = _share(client, source, target)
                    if number:  # the first one compiles kernels
                        shares.append(share)
            how = "not compressed" if compressors is None else "compressed"
            share_of_all = round(100 * statistics.median(shares), 1)
            row.remarks[f"share of the time at n = {n}, {dtype}, source {how}, %"] = share_of_all
    yield row


def _make(source: Path, n: int, dtype: str, matrices: int, compressors: Any) -> None:
    shutil.rmtree(source, ignore_errors=True)
    chunk = CHUNK_NBYTES // (n * n * np.dtype(dtype).itemsize)
    layout: dict[str, Any] = {"shape": (matrices, n, n), "chunks": (chunk, n, n), "dtype": dtype}
    array = zarr.create_array(source, **layout, compressors=compressors)
    for start in range(0, matrices, chunk):
        part = (min(chunk, matrices - start), n, n)
        array[start : start + chunk] = np.random.default_rng(start).normal(size=part).round(3)


def _share(client: Client, source: Path, target: Path) -> float:
    flushing, flush = 0.0, Ledger.flush

    def timed_flush(ledger: Ledger) -> None:
        nonlocal flushing
        start = time.perf_counter()
        flush(ledger)
        flushing += time.perf_counter() - start

    before = sum(client.run(seconds_of_seals).values())
    with mock.patch.object(Ledger, "flush", timed_flush):
        report = invert_store(source, target, client=client, max_failed=None)
    check(report.complete, "the job is not complete")
    sealing = sum(client.run(seconds_of_seals).values()) - before
    # The driver is a process of its own, but has to share the cores with the workers.
    return (sealing / WORKERS + flushing) / report.seconds


def watch_seals() -> None:
    """Have a worker time its checksums."""
    Chunk.seal = timed_seal


def timed_seal(chunk: Chunk) -> int:
    """Compute a checksum."""
    start = time.perf_counter()
    try:
        return _seal(chunk)
    finally:
        _sealing[0] += time.perf_counter() - start


def seconds_of_seals() -> float:
    """Return how long this worker has been computing checksums."""
    return _sealing[0]
