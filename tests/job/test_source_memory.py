"""Reading takes no more memory than the plan says: of a few codecs here, of all in tests/benchmarks/memory.py."""

import tracemalloc

import numcodecs
import numpy as np
import pytest
import zarr

from dask_batchinv.chunks.decompression import Size, decompress
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import IDLE_WORKER_NBYTES, Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.source.source import open_source
from tests.support.hostile import BYTES, V3, grid, numcodec, shard, write_array

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

DELTA = numcodecs.Delta("<f8")
NBYTES = 2**21


def options_of(kind, zarr_format):
    codec = {"id": kind} | ({} if kind in ("blosc", "lz4") else {"preset": 0} if kind == "lzma" else {"level": 1})
    if zarr_format == 2:
        return {"zarr_format": 2, "compressors": numcodecs.get_codec(codec)}
    name = kind if kind in ("blosc", "gzip", "zstd") else f"numcodecs.{kind}"
    configuration = {key: value for key, value in codec.items() if key != "id"}
    return {
        "compressors": zarr.registry.get_codec_class(name).from_dict({"name": name, "configuration": configuration})
    }


TURNED = zarr.codecs.TransposeCodec(order=(2, 0, 1))
CASES = {
    **{f"{kind} {fmt}": (kind, fmt, {}) for kind in ("gzip", "zlib", "zstd", "bz2") for fmt in (2, 3)},
    "delta, gzip": ("gzip", 2, {"filters": [DELTA]}),
    "delta, zlib": ("zlib", 2, {"filters": [DELTA]}),
    "delta to f4": ("zlib", 2, {"filters": [numcodecs.Delta("<f8", "<f4")]}),
    "astype f4": ("zlib", 2, {"filters": [numcodecs.AsType("<f4", "<f8")]}),
    "F order": ("gzip", 2, {"order": "F"}),
    "transpose": ("gzip", 3, {"filters": [TURNED]}),
    "shards": ("gzip", 3, {"shards": True}),
    "transposed shards": ("gzip", 3, {"shards": True, "filters": [TURNED]}),
}


@pytest.mark.parametrize("tile", [NBYTES // 64, 2 * NBYTES], ids=["part", "several"])
@pytest.mark.parametrize("case", CASES)
def test_reading_takes_what_is_planned(tmp_path, case, tile):
    n = 16
    each, (kind, zarr_format, more) = NBYTES // (n * n * 8), CASES[case]
    options = options_of(kind, zarr_format) | more
    if options.pop("shards", False):
        options |= {"shards": (each, n, n), "chunks": (each // 4, n, n)}
    a = np.random.default_rng(0).normal(size=(4 * each, n, n))
    zarr.create_array(tmp_path / "s", shape=a.shape, dtype="f8", **{"chunks": (each, n, n)} | options)[...] = a
    job = prepare(tmp_path / "s", tmp_path / "t", JobOptions(tile_size=tile))
    plan = plan_for(job, Workers(1, 1, None))
    array = job.source.open()
    job.source.read_block(array, plan.tiling.region(0, "matrix"))  # Zarr's own threads and caches
    tracemalloc.start()
    try:
        job.source.read_block(array, plan.tiling.region(1, "matrix"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= plan.projected_nbytes - IDLE_WORKER_NBYTES


@pytest.mark.parametrize("kind", ["gzip", "zlib", "bz2", "lzma"])
def test_there_is_no_second_copy_of_what_comes_out(kind):
    data = np.random.default_rng(0).bytes(8 * 2**20)
    packed = bytes(numcodecs.get_codec({"id": kind} | ({"preset": 0} if kind == "lzma" else {})).encode(data))
    tracemalloc.start()
    try:
        got = decompress(kind, {}, packed, Size(len(data)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bytes(got) == data
    assert peak < len(data) + 2**20


@pytest.mark.parametrize(
    ("codecs", "unit"),
    [
        ([shard(chunk=(1, 2, 2))], (1, 2, 2)),
        ([shard(chunk=(1, 2, 2)), {"name": "crc32c"}], (4, 2, 2)),
        ([{"name": "transpose", "configuration": {"order": [0, 2, 1]}}, shard(chunk=(1, 2, 2))], (4, 2, 2)),
        ([BYTES, {"name": "crc32c"}], (4, 2, 2)),
    ],
)
def test_shards_that_must_be_decoded_whole_are_what_is_read(tmp_path, codecs, unit):
    path = write_array(tmp_path / "s", V3 | {"shape": [8, 2, 2], **grid(4, 2, 2), "codecs": codecs})
    assert open_source(path).read_unit == unit


def test_filters_of_every_kind_are_counted(tmp_path):
    filters = [numcodec("astype", encode_dtype="<c16", decode_dtype="<f8"), numcodec("delta", dtype="<c16")]
    path = write_array(tmp_path / "s", V3 | {"codecs": [*filters, BYTES, {"name": "zstd", "configuration": {}}]})
    assert open_source(path).itemsize_held == 16 + 32
    path = write_array(tmp_path / "x", V3 | {"codecs": [shard([*filters, BYTES])]})
    assert open_source(path).itemsize_held == 16 + 32 + 8
