"""Measures what reading takes of the memory, over what the plan says, for every codec and for odd layouts.

    python -m tests.benchmarks.memory [--only gzip] [--threads 1,4]

Each case is read in a process of its own, from chunks of 12 MiB, by tiles that are smaller than a chunk and by tiles of
several. Of both figures, the peak of the resident memory and the plan, what the process has before it reads is left
out: a ratio over 1 is memory that was not planned for.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr

from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import IDLE_WORKER_NBYTES, Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare

N, CHUNK = 16, 12 * 2**20
COMPRESSORS = ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd")
CHECKSUMS = ("adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3")
FAST = {"bz2": {"level": 1}, "gzip": {"level": 1}, "lzma": {"preset": 0}, "zlib": {"level": 1}}
DELTA = {"id": "delta", "dtype": "<f8"}
FILTERS: dict[str, list[dict[str, Any]]] = {
    "delta": [DELTA],
    "delta, delta": [DELTA, DELTA],
    "delta to f4": [{"id": "delta", "dtype": "<f8", "astype": "<f4"}],
    "astype f4": [{"id": "astype", "encode_dtype": "<f4", "decode_dtype": "<f8"}],
    "astype c16": [{"id": "astype", "encode_dtype": "<c16", "decode_dtype": "<f8"}],
    "fixedscaleoffset": [{"id": "fixedscaleoffset", "scale": 2, "offset": 0, "dtype": "<f8", "astype": "<i4"}],
    "quantize": [{"id": "quantize", "digits": 9, "dtype": "<f8"}],
    "bitround": [{"id": "bitround", "keepbits": 52}],
    "shuffle": [{"id": "shuffle", "elementsize": 8}],
    "shuffle, crc32, delta": [DELTA, {"id": "shuffle", "elementsize": 8}, {"id": "crc32"}],
}
#: Filters that in format 3 stand among the compressors.
OF_BYTES = ("shuffle", "crc32")
#: Where tiles are a share of a chunk, and where they are of several.
TILES = {"1/16 chunk": CHUNK // 64, "4 chunks": 4 * CHUNK}

Case = dict[str, Any]


def cases() -> Iterator[tuple[str, Case]]:
    """Yield a name of each, and what its array is created with."""
    for kind in ("none", *COMPRESSORS):
        codec = None if kind == "none" else numcodecs.get_codec({"id": kind} | FAST.get(kind, {}))
        yield f"2 {kind}", {"zarr_format": 2, "compressors": codec}
        yield f"3 {kind}", {"compressors": in_format_3(kind)}
        yield f"3 {kind}, shards", {"compressors": in_format_3(kind), "shards": True}
    for kind in CHECKSUMS:
        yield f"2 {kind}", {"zarr_format": 2, "filters": [numcodecs.get_codec({"id": kind})], "compressors": None}
        yield f"3 {kind}", {"compressors": in_format_3(kind)}
    for name, filters in FILTERS.items():
        for kind in ("none", "gzip"):
            codec = None if kind == "none" else numcodecs.get_codec({"id": kind} | FAST[kind])
            made = [numcodecs.get_codec(dict(own)) for own in filters]
            yield f"2 {name}, {kind}", {"zarr_format": 2, "filters": made, "compressors": codec}
            turning, of_bytes = (
                [named(own) for own in filters if (own["id"] in OF_BYTES) is is_so] for is_so in (False, True)
            )
            yield f"3 {name}, {kind}", {"filters": turning, "compressors": [*of_bytes, *in_format_3(kind)]}
    yield "2 packbits, zlib", {
        "zarr_format": 2, "dtype": "bool", "filters": [numcodecs.PackBits()], "compressors": numcodecs.Zlib(1)
    }  # fmt: skip
    yield "2 F order, gzip", {"zarr_format": 2, "order": "F", "compressors": numcodecs.GZip(1)}
    yield "2 F order", {"zarr_format": 2, "order": "F", "compressors": None}
    yield "2 big-endian, gzip", {"zarr_format": 2, "dtype": ">f8", "compressors": numcodecs.GZip(1)}
    yield "3 complex64, zstd", {"dtype": "c8", "compressors": in_format_3("zstd")}
    turned = zarr.codecs.TransposeCodec(order=(2, 0, 1))
    yield "3 transpose, gzip", {"filters": [turned], "compressors": in_format_3("gzip")}
    yield "3 transpose, shards", {"filters": [turned], "compressors": in_format_3("gzip"), "shards": True}
    yield "3 zstd, crc32c", {"compressors": [*in_format_3("zstd"), zarr.codecs.Crc32cCodec()]}
    yield "3 crc32c over shards", {"shards": True, "over": True, "compressors": None}


def in_format_3(kind: str) -> list[Any]:
    if kind == "none":
        return []
    name = kind if kind in ("blosc", "crc32c", "gzip", "zstd") else f"numcodecs.{kind}"
    document = {"name": name, "configuration": FAST.get(kind, {})}
    return [zarr.registry.get_codec_class(name).from_dict(document)]


def named(codec: dict[str, Any]) -> Any:
    name = f"numcodecs.{codec['id']}"
    document = {"name": name, "configuration": {key: value for key, value in codec.items() if key != "id"}}
    return zarr.registry.get_codec_class(name).from_dict(document)


def write(path: Path, case: Case) -> None:
    """Write eight chunks, or shards of so many bytes, of numbers that hardly compress."""
    options = {"dtype": "f8"} | case
    each = CHUNK // (N * N * np.dtype(options["dtype"]).itemsize)
    shape, chunks = (8 * each, N, N), (each, N, N)
    if options.pop("shards", False) and options.pop("over", False):
        inner = zarr.codecs.ShardingCodec(chunk_shape=(each // 8, N, N))
        options |= {"serializer": inner, "compressors": zarr.codecs.Crc32cCodec()}
    elif case.get("shards"):
        options |= {"shards": chunks}
        chunks = (each // 8, N, N)
    array = zarr.create_array(path, shape=shape, chunks=chunks, fill_value=0, **options)
    block = np.random.default_rng(0).normal(size=(each, N, N))
    block = block > 0 if options["dtype"] == "bool" else block.astype(options["dtype"])
    for start in range(0, shape[0], each):
        array[start : start + each] = block


def read(path: str, threads: int, tile_nbytes: int) -> dict[str, int]:
    """Read a tile in each of some threads at a time, and return what it took and what was planned."""
    job = prepare(path, f"{path}-target", JobOptions(tile_size=tile_nbytes))
    plan = plan_for(job, Workers(1, threads, None))
    array = job.source.open()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    kept: dict[int, Any] = {}

    def work(thread: int) -> None:
        for turn in range(2):
            number = (thread + turn * threads) % plan.tiling.n_tiles
            kept[thread] = None
            kept[thread] = job.source.read_block(array, plan.tiling.region(number, "matrix"))

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"took": resident("VmHWM") - before, "planned": plan.projected_nbytes - IDLE_WORKER_NBYTES}


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of cases")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4])
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.read:
        path, threads, tile_nbytes = options.read
        print(json.dumps(read(path, int(threads), int(tile_nbytes))))
        return
    columns = [(tile, threads) for tile in TILES for threads in options.threads]
    print(f"{'case':34}" + "".join(f"{f'{tile}, {threads} thread(s)':>26}" for tile, threads in columns))
    worst = (0.0, "")
    for name, case in cases():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "s", case)
            ratios = []
            for tile, threads in columns:
                command = [sys.executable, "-m", "tests.benchmarks.memory", "--read"]
                arguments = [f"{folder}/s", str(threads), str(TILES[tile])]
                found = json.loads(subprocess.run([*command, *arguments], check=True, capture_output=True).stdout)
                ratios.append(found["took"] / found["planned"])
                worst = max(worst, (ratios[-1], f"{name}, tiles of {tile}, {threads} thread(s)"))
        print(f"{name:34}" + "".join(f"{ratio:26.2f}" for ratio in ratios), flush=True)
    print(f"worst: {worst[0]:.2f}, {worst[1]}")


if __name__ == "__main__":
    main()
