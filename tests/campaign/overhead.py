"""What checksums and the ledger cost: their share of the time of undisturbed jobs on real processes."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zarr
from distributed import Client, LocalCluster

from dask_batchinv import invert_store, storage
from dask_batchinv.job.ledger import Ledger
from tests.campaign.work import Row, check

#: n, dtype, matrices, compression of the source: each a GiB or so, in chunks of 16 MiB. The first three read and write
#: the page cache as fast as memory is; the last one has to decode what Zarr stores by default.
CASES = ((3, "f4", 2**24, None), (8, "f8", 2**21, None), (64, "f8", 2**15, None), (8, "f8", 2**21, "auto"))
CHUNK_NBYTES = 2**24


def overhead(folder: Path, times: int, _: random.Random) -> Iterator[Row]:
    """Run jobs with everything timed that computes checksums or writes the ledger."""
    row = Row("no fault: what checksums and ledger cost")
    folder.mkdir(parents=True, exist_ok=True)
    for n, dtype, matrices, compressors in CASES:
        source, target = folder / "overhead-source.zarr", folder / "overhead-target.zarr"
        shutil.rmtree(source, ignore_errors=True)
        chunk = CHUNK_NBYTES // (n * n * np.dtype(dtype).itemsize)
        layout: dict[str, Any] = {"shape": (matrices, n, n), "chunks": (chunk, n, n), "dtype": dtype}
        array = zarr.create_array(source, **layout, compressors=compressors)
        for start in range(0, matrices, chunk):
            part = (min(chunk, matrices - start), n, n)
            array[start : start + chunk] = np.random.default_rng(start).normal(size=part).round(3)
        shares = []
        with (
            LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as local,
            Client(local, set_as_default=False) as client,
        ):
            for number in range(times + 1):
                shutil.rmtree(target, ignore_errors=True)
                with row.run(f"n = {n}, {dtype}", faults=0), timed() as spent:
                    start_of_run = time.perf_counter()
                    report = invert_store(source, target, client=client, max_failed=None)
                    seconds = time.perf_counter() - start_of_run
                    check(report.complete, "the job is not complete")
                    if number:  # the first one compiles kernels
                        shares.append((sum(spent["seal"]) / 2 + sum(spent["flush"])) / seconds)
        how = "not compressed" if compressors is None else "compressed"
        row.remarks[f"share of the time at n = {n}, {dtype}, source {how}, %"] = round(
            100 * statistics.median(shares), 1
        )
    yield row


@contextmanager
def timed() -> Iterator[dict[str, list[float]]]:
    """Collect the seconds of each checksum (by either of two threads) and of each writing of the ledger."""
    spent: dict[str, list[float]] = {"seal": [], "flush": []}

    def spy(original: Callable[..., Any], seconds: list[float], *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments)
        finally:
            seconds.append(time.perf_counter() - start)

    seal = partial(spy, storage.Chunk.seal, spent["seal"])
    flush = partial(spy, Ledger.flush, spent["flush"])
    with (
        mock.patch.object(storage.Chunk, "seal", lambda chunk: seal(chunk)),
        mock.patch.object(Ledger, "flush", lambda ledger: flush(ledger)),
    ):
        yield spent
