"""Everybody who takes a stack from one store to another, each as a function of both paths and the threads to use.

All write without compression, which for inverses gains little and costs most of the time.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr
import zarr
from distributed import Client

import dask_batchinv
from tests.benchmarks.pipeline import loop
from tests.benchmarks.pipeline.stores import CHUNK_NBYTES

Pass = Callable[[str, str, int], None]


def copy(source: str, target: str, threads: int) -> None:
    """Copy the files: the system does it, and no byte passes through Python."""
    shutil.copytree(source, target)


def job(source: str, target: str, threads: int, client: Client) -> None:
    """Run our job on worker processes that are there, from plan to report."""
    dask_batchinv.invert_store(source, target, client=client, tile_size=CHUNK_NBYTES)


def job_on_threads(source: str, target: str, threads: int) -> None:
    """Run our job on threads of this process, as it does by itself where it is small."""
    with dask.config.set({"batchinv.job.in-process": "1TiB"}):
        dask_batchinv.invert_store(source, target, tile_size=CHUNK_NBYTES)


def call(source: str, target: str, threads: int) -> None:
    """Call `inverse` with ``out=``, on threads."""
    with dask.config.set(scheduler="threads", num_workers=threads):
        dask_batchinv.inverse(da.from_zarr(source), out=target)


def map_blocks(source: str, target: str, threads: int) -> None:
    """Write what comes to everybody's mind."""
    a = da.from_zarr(source)
    out = zarr.create_array(target, shape=a.shape, chunks=a.chunksize, dtype=a.dtype, compressors=None)
    with dask.config.set(scheduler="threads", num_workers=threads):
        da.store(a.map_blocks(np.linalg.inv, dtype=a.dtype), out, lock=False)


def map_blocks_on_workers(source: str, target: str, threads: int, client: Client) -> None:
    """Write the same, on the worker processes that the job has."""
    a = da.from_zarr(source)
    out = zarr.create_array(target, shape=a.shape, chunks=a.chunksize, dtype=a.dtype, compressors=None)
    client.compute(da.store(a.map_blocks(np.linalg.inv, dtype=a.dtype), out, lock=False, compute=False)).result()


def apply_ufunc(source: str, target: str, threads: int) -> None:
    """Write the same with labels."""
    a = xr.DataArray(da.from_zarr(source), dims=("m", "i", "j"), name="a")
    found = xr.apply_ufunc(
        np.linalg.inv, a, input_core_dims=[["i", "j"]], output_core_dims=[["i", "j"]], dask="parallelized",
        output_dtypes=[a.dtype],
    )  # fmt: skip
    with dask.config.set(scheduler="threads", num_workers=threads):
        found.to_dataset().to_zarr(target, encoding={"a": {"compressors": None}}, zarr_format=3, consolidated=False)


def cubed(source: str, target: str, threads: int) -> None:
    """Let cubed do it, which plans memory as we do."""
    import cubed as package

    spec = package.Spec(allowed_mem="4GB", executor_name="threads", executor_options={"max_workers": threads})
    a = package.from_zarr(source, spec=spec)
    package.to_zarr(package.map_blocks(np.linalg.inv, a, dtype=a.dtype), target)


def numpy(source: str, target: str, threads: int, invert: Callable[[Any], Any] = np.linalg.inv) -> None:
    """Loop over the chunks with Zarr and NumPy alone, on threads."""
    a: zarr.Array[Any] = zarr.open_array(source, mode="r")
    out = zarr.create_array(target, shape=a.shape, chunks=a.chunks, dtype=a.dtype, compressors=None)

    def work(first: int) -> None:
        for number in range(first, a.shape[0] // a.chunks[0], threads):
            region = slice(number * a.chunks[0], (number + 1) * a.chunks[0])
            out[region] = invert(np.asarray(a[region]))

    _on_threads(work, threads)


def tensorstore(source: str, target: str, threads: int, invert: Callable[[Any], Any] = np.linalg.inv) -> None:
    """Loop over the chunks with tensorstore, which reads and writes without Python, and NumPy."""
    import tensorstore as ts

    context = ts.Context({"data_copy_concurrency": {"limit": threads}})
    kvstore = {"driver": "file", "path": source}
    a = ts.open({"driver": "zarr3", "kvstore": kvstore}, context=context, read=True).result()
    each = a.chunk_layout.read_chunk.shape[0]
    out = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": target}}, context=context, create=True,
        dtype=a.dtype, shape=a.shape, codec=ts.CodecSpec({"driver": "zarr3", "codecs": ["bytes"]}),
        chunk_layout=ts.ChunkLayout(chunk_shape=(each, *a.shape[1:])),
    ).result()  # fmt: skip

    def work(first: int) -> None:
        for number in range(first, a.shape[0] // each, threads):
            region = slice(number * each, (number + 1) * each)
            out[region].write(invert(a[region].read().result())).result()

    _on_threads(work, threads)


def _on_threads(work: Callable[[int], None], threads: int) -> None:
    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def zarrs_copy(source: str, target: str, threads: int) -> None:
    """Copy chunk by chunk with Zarr, whose chunks zarrs reads and writes."""
    import zarrs  # type: ignore[import-not-found]  # noqa: F401  # which the configuration names

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        numpy(source, target, threads, _as_it_is)


def _as_it_is(block: Any) -> Any:
    return block


def passes(client: Client) -> dict[str, Pass]:
    """Return all of them by name: ours, what they are measured against, and what others would use."""
    return {
        "job": partial(job, client=client),
        "job on threads": job_on_threads,
        "inverse(out=)": call,
        "loop": loop.run,
        "copy of the files": copy,
        "zarrs, copy": zarrs_copy,
        "tensorstore, copy": partial(tensorstore, invert=_as_it_is),
        "map_blocks": map_blocks,
        "map_blocks on workers": partial(map_blocks_on_workers, client=client),
        "apply_ufunc": apply_ufunc,
        "cubed": cubed,
        "NumPy and Zarr": numpy,
        "NumPy and tensorstore": tensorstore,
    }


#: Those whom users would otherwise pick.
NAIVE = ("map_blocks", "map_blocks on workers", "apply_ufunc", "cubed", "NumPy and Zarr", "NumPy and tensorstore")
