"""No chunk of a source fills the memory, and ordinary ones are read as ever."""

import bz2
import gzip
import lzma
import os
import struct
import tracemalloc
import zlib
from functools import partial

import numcodecs
import numpy as np
import pytest
import zarr

from dask_batchinv.chunks.decompression import COMPRESSORS, Size, decompress, zstd_nbytes
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.prepare import prepare
from dask_batchinv.job.source.bounded_decoding import BoundedCodec, BoundedCompressor
from dask_batchinv.storage import ChunkSizeError
from tests.support.hostile import BYTES, V2, V3, shard, write_array
from tests.support.stacks import conditioned

# Zarr warns of what is not in its specification; that is no concern here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# --- chunks that fill the memory ------------------------------------------------------------------------------

LARGE = bytes(8 * 2**20)
LARGEST_PEAK = 2**20


def zstd_frame(blocks, header=b"\x00\x58"):
    """A frame whose header does not say how large it is, of (kind, size, bytes)."""
    frame = struct.pack("<I", 0xFD2FB528) + header
    for i, (kind, size, content) in enumerate(blocks):
        frame += (size << 3 | kind << 1 | (i == len(blocks) - 1)).to_bytes(3, "little") + content
    return frame


def zstd_of_unknown_size(data):
    return zstd_frame([(0, len(data), data)])


SILENT_BOMB = zstd_frame([(1, 2**17, b"\0")] * 256)
SMALL = bytes(128)
BOMBS = {
    "zlib": [zlib.compress(LARGE)],
    "gzip": [gzip.compress(LARGE), gzip.compress(SMALL) + gzip.compress(LARGE)],
    "bz2": [bz2.compress(LARGE), bz2.compress(SMALL) + bz2.compress(LARGE)],
    "lzma": [lzma.compress(LARGE, preset=0), lzma.compress(SMALL, preset=0) + lzma.compress(LARGE, preset=0)],
    "lz4": [numcodecs.LZ4().encode(LARGE)],
    "blosc": [numcodecs.Blosc().encode(LARGE)],
    "zstd": [
        numcodecs.Zstd().encode(LARGE),
        numcodecs.Zstd().encode(SMALL) + numcodecs.Zstd().encode(LARGE),
        numcodecs.Zstd().encode(SMALL) + SILENT_BOMB,
        SILENT_BOMB,
        b"\x50\x2a\x4d\x18\x04\0\0\0junk" + SILENT_BOMB,
    ],
}
EACH_BOMB = [
    pytest.param(kind, bomb, id=f"{kind}-{i}") for kind, bombs in BOMBS.items() for i, bomb in enumerate(bombs)
]


def v3_names(kind):
    return [kind, f"numcodecs.{kind}"] if kind in ("blosc", "gzip", "zstd") else [f"numcodecs.{kind}"]


def explode(tmp_path, meta, chunk, content):
    """Read a chunk that is a bomb."""
    path = write_array(tmp_path / "evil", meta)
    (path / chunk).write_bytes(content)
    array = prepare(path, tmp_path / "target", JobOptions()).source.open()
    tracemalloc.start()
    try:
        with pytest.raises(ChunkSizeError, match="a decompression bomb"):
            array[...]
        assert tracemalloc.get_traced_memory()[1] < LARGEST_PEAK + len(content)
    finally:
        tracemalloc.stop()


def test_bombs_of_every_compressor():
    assert set(BOMBS) == COMPRESSORS


@pytest.mark.parametrize(("kind", "bomb"), EACH_BOMB)
def test_bombs(kind, bomb):
    """Not one byte more comes out than is asked for, however long the chunk may be in the store."""
    tracemalloc.start()
    try:
        with pytest.raises(ChunkSizeError, match="a decompression bomb"):
            decompress(kind, {}, bomb, Size(128))
        assert tracemalloc.get_traced_memory()[1] < LARGEST_PEAK + len(bomb)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("kind", "bomb"), EACH_BOMB)
def test_bombs_of_format_2(tmp_path, kind, bomb):
    explode(tmp_path, V2 | {"compressor": {"id": kind}}, "0.0.0", bomb)


@pytest.mark.parametrize(("kind", "bomb"), EACH_BOMB)
def test_bombs_among_filters(tmp_path, kind, bomb):
    filters = [{"id": "delta", "dtype": "<f8"}, {"id": kind}]
    explode(tmp_path, V2 | {"filters": filters}, "0.0.0", bomb)


@pytest.mark.parametrize(("kind", "bomb"), EACH_BOMB)
def test_bombs_of_format_3(tmp_path, kind, bomb):
    for number, name in enumerate(v3_names(kind)):
        explode(tmp_path / str(number), V3 | {"codecs": [BYTES, {"name": name, "configuration": {}}]}, "c/0/0/0", bomb)


@pytest.mark.parametrize(("kind", "bomb"), EACH_BOMB)
def test_bombs_in_shards(tmp_path, kind, bomb):
    codecs = [BYTES, {"name": v3_names(kind)[0], "configuration": {}}]
    content = bomb
    for _ in range(2 if kind == "zstd" else 1):
        codecs = [shard(codecs, index=[BYTES], chunk=(4, 2, 2))]
        content += struct.pack("<QQ", 0, len(content))
    explode(tmp_path, V3 | {"codecs": codecs}, "c/0/0/0", content)


@pytest.mark.parametrize("kind", sorted(COMPRESSORS - {"bz2", "lzma"}))
def test_chunks_that_lie_about_their_size(tmp_path, kind):
    """The header says what is expected, the rest is a bomb."""
    bomb = bytearray(BOMBS[kind][0])
    if kind == "blosc":
        bomb[4:8] = (128).to_bytes(4, "little")
    elif kind == "lz4":
        bomb[:4] = (128).to_bytes(4, "little")
    elif kind == "zstd":
        bomb = bytearray(zstd_frame([(1, 2**17, b"\0")] * 256, header=b"\x20\x80"))
    elif kind == "gzip":
        bomb[-4:] = (128).to_bytes(4, "little")
    path = write_array(tmp_path / "evil", V2 | {"compressor": {"id": kind}})
    (path / "0.0.0").write_bytes(bomb)
    with pytest.raises((RuntimeError, ValueError)):
        prepare(path, tmp_path / "target", JobOptions()).source.open()[...]


@pytest.mark.parametrize("kind", sorted(COMPRESSORS))
def test_chunks_that_end_too_early(tmp_path, kind):
    whole = bytes(numcodecs.get_codec({"id": kind}).encode(np.random.default_rng(1).bytes(128)))
    path = write_array(tmp_path / "evil", V2 | {"compressor": {"id": kind}})
    array = prepare(path, tmp_path / "target", JobOptions()).source.open()
    for length in (0, 1, 5, len(whole) // 2, len(whole) - 1):
        (path / "0.0.0").write_bytes(whole[:length])
        with pytest.raises((RuntimeError, ValueError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)):
            array[...]


GZIP = {"name": "gzip", "configuration": {"level": 1}}


@pytest.mark.parametrize(
    ("meta", "chunk"),
    [
        (V2, "0.0.0"),
        (V2 | {"compressor": {"id": "gzip"}}, "0.0.0"),
        (V2 | {"filters": [{"id": "delta", "dtype": "<f8"}]}, "0.0.0"),
        (V3, "c/0/0/0"),
        (V3 | {"codecs": [BYTES, GZIP]}, "c/0/0/0"),
        (V3 | {"codecs": [shard([BYTES, GZIP])]}, "c/0/0/0"),
    ],
    ids=["2", "2-gzip", "2-delta", "3", "3-gzip", "3-shards"],
)
@pytest.mark.parametrize("missing", ["error", "fill"])
def test_chunks_that_no_chunk_can_be(tmp_path, meta, chunk, missing):
    """Files with a hole take no space, devices never end, and a pipe is waited for."""
    path = write_array(tmp_path / "evil", meta)
    array = prepare(path, tmp_path / "target", JobOptions()).source.open(missing)
    with open(path / chunk, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ChunkSizeError, match="has 1099511627776 bytes where by its metadata it cannot have more"):
        array[:2]
    for make in (os.mkfifo, partial(os.symlink, "/dev/zero")):
        (path / chunk).unlink()
        make(path / chunk)
        with pytest.raises(ChunkSizeError, match="is not a file"):
            array[...]


@pytest.mark.parametrize(
    "codec",
    [
        {"id": "packbits"},
        {"id": "delta", "dtype": "|u1", "astype": "|u1"},
        {"id": "astype", "encode_dtype": "|u1", "decode_dtype": "|u1"},
    ],
    ids=lambda codec: codec["id"],
)
def test_filters_that_multiply(tmp_path, codec):
    path = write_array(tmp_path / "evil", V2 | {"dtype": "|u1", "filters": [codec] * 8})
    (path / "0.0.0").write_bytes(bytes(100))  # eight times packed bits would become a GiB
    array = prepare(path, tmp_path / "target", JobOptions()).source.open()
    with pytest.raises(ChunkSizeError, match="has 100 bytes"):
        array[...]


@pytest.mark.parametrize("reach", [(0, 2**40), (0, 2**62), (2**63, 2**63), (8, 10_000)], ids=str)
def test_indices_of_shards_that_lie(tmp_path, reach):
    """Each chunk of a shard may say that it is all of it, and more."""
    path = write_array(tmp_path / "evil", V3 | {"codecs": [shard(index=[BYTES])]})
    (path / "c/0/0/0").write_bytes(bytes(20_000) + struct.pack("<QQ", *reach) * 4)
    array = prepare(path, tmp_path / "target", JobOptions()).source.open()
    with pytest.raises((ValueError, OverflowError)):
        array[:2]


@pytest.mark.parametrize("kind", sorted(COMPRESSORS))
@pytest.mark.parametrize("shards", [None, (64, 2, 2)])
def test_chunks_that_cannot_be_compressed(tmp_path, kind, shards):
    """Noise becomes longer by compression; that is no bomb."""
    for chunk in (1, 64):
        a = np.frombuffer(np.random.default_rng(1).bytes(64 * 32)).reshape(64, 2, 2)
        name = v3_names(kind)[0]
        codec = zarr.registry.get_codec_class(name).from_dict({"name": name, "configuration": {}})
        path = tmp_path / f"s{chunk}"
        array = zarr.create_array(
            path, shape=a.shape, chunks=(chunk, 2, 2), shards=shards, dtype="f8", compressors=[codec]
        )
        array[...] = a
        assert_reads(path, a)


# --- ordinary sources -----------------------------------------------------------------------------------------


def assert_reads(path, a, bounded=1):
    source = prepare(path, path.parent / "target", JobOptions()).source
    array = source.open()
    assert array.shape == a.shape
    np.testing.assert_array_equal(array[...], a)
    assert array[...].dtype == a.dtype
    assert bounds(array) == bounded, "Zarr decodes with a codec of its own"
    return array


def bounds(array):
    """Count the bounded codecs that a chunk passes."""
    if array.metadata.zarr_format == 2:
        codecs = [*(array.metadata.filters or ()), array.metadata.compressor]
        return sum(isinstance(codec, BoundedCompressor) for codec in codecs)
    todo, found = list(array.metadata.codecs), 0
    while todo:
        codec = todo.pop()
        found += isinstance(codec, BoundedCodec)
        todo += getattr(codec, "codecs", ())
    return found


FILTERS_2 = {
    "none": None,
    "delta": [{"id": "delta", "dtype": "<f8"}],
    "astype": [{"id": "astype", "encode_dtype": "<f4", "decode_dtype": "<f8"}],
    "fixedscaleoffset": [{"id": "fixedscaleoffset", "scale": 2, "offset": 0, "dtype": "<f8", "astype": "<f8"}],
    "quantize": [{"id": "quantize", "digits": 9, "dtype": "<f8"}],
    "bitround": [{"id": "bitround", "keepbits": 52}],
    "shuffle": [{"id": "shuffle", "elementsize": 8}],
    "checksums": [{"id": "shuffle", "elementsize": 4}, {"id": "crc32"}, {"id": "fletcher32"}],
    "delta-checksum": [{"id": "delta", "dtype": "<f8"}, {"id": "adler32"}],
}


@pytest.mark.parametrize(
    ("kind", "filters"),
    [*((kind, "none") for kind in sorted(COMPRESSORS)), *(("zstd", name) for name in FILTERS_2), ("lzma", "delta")],
)
def test_ordinary_sources_of_format_2(tmp_path, kind, filters):
    a = np.round(conditioned(10, 3, 10) * 8)
    array = zarr.create_array(
        tmp_path / "s", shape=a.shape, chunks=(4, 3, 3), dtype="f8", zarr_format=2,
        filters=FILTERS_2[filters] and [numcodecs.get_codec(dict(codec)) for codec in FILTERS_2[filters]],
        compressors=numcodecs.get_codec({"id": kind}),
    )  # fmt: skip
    array[...] = a
    assert_reads(tmp_path / "s", np.asarray(array[...]))


def test_packed_bits_of_format_2(tmp_path):
    for count in (2, 3, 5):
        a = np.random.default_rng(1).random((7, 3, 3)) < 0.5
        array = zarr.create_array(
            tmp_path / f"s{count}", shape=a.shape, chunks=(count, 3, 3), dtype="bool", zarr_format=2,
            filters=[numcodecs.PackBits()], compressors=numcodecs.Zstd(),
        )  # fmt: skip
        array[...] = a
        assert_reads(tmp_path / f"s{count}", a)


@pytest.mark.parametrize("kind", sorted(COMPRESSORS))
@pytest.mark.parametrize(("shards", "dtype"), [(None, "f4"), ((4, 3, 3), "c16")])
def test_ordinary_sources_of_format_3(tmp_path, kind, shards, dtype):
    a = np.round(conditioned(10, 3, 10) * 8).astype(dtype)
    for number, name in enumerate(v3_names(kind)):
        codec = zarr.registry.get_codec_class(name).from_dict({"name": name, "configuration": {}})
        array = zarr.create_array(
            tmp_path / f"s{number}", shape=a.shape, chunks=(2, 3, 3), shards=shards, dtype=dtype, compressors=[codec]
        )
        array[...] = a
        assert_reads(tmp_path / f"s{number}", a)


def test_checksums_before_a_compressor(tmp_path):
    a = conditioned(10, 3, 10)
    compressors = [zarr.codecs.Crc32cCodec(), zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]
    array = zarr.create_array(
        tmp_path / "s", shape=a.shape, chunks=(2, 3, 3), shards=(4, 3, 3), dtype="f8", compressors=compressors
    )
    array[...] = a
    assert_reads(tmp_path / "s", a)


@pytest.mark.parametrize("configuration", [{}, {"format": 2}, {"preset": 9}], ids=str)
def test_lzma(tmp_path, configuration):
    a = conditioned(10, 3, 10)
    array = zarr.create_array(
        tmp_path / "s", shape=a.shape, chunks=(2, 3, 3), dtype="f8", zarr_format=2,
        compressors=numcodecs.get_codec({"id": "lzma", **configuration}),
    )  # fmt: skip
    array[...] = a
    assert_reads(tmp_path / "s", a)
    raw = [{"id": lzma.FILTER_LZMA2, "preset": 1}]
    array = zarr.create_array(
        tmp_path / "raw", shape=a.shape, chunks=(2, 3, 3), dtype="f8", zarr_format=2,
        compressors=numcodecs.LZMA(format=lzma.FORMAT_RAW, filters=raw),
    )  # fmt: skip
    array[...] = a
    assert_reads(tmp_path / "raw", a)


@pytest.mark.parametrize("frames", [1, 2])
def test_zstd_that_does_not_say_its_size(tmp_path, frames):
    """Other writers than Zarr's own stream into a chunk."""
    a = conditioned(4, 2, 3)
    data = a.tobytes()
    parts = [data] if frames == 1 else [data[:40], data[40:]]
    path = write_array(tmp_path / "s", V2 | {"compressor": {"id": "zstd"}})
    (path / "0.0.0").write_bytes(b"".join(map(zstd_of_unknown_size, parts)))
    assert_reads(path, a)
    (path / "0.0.0").write_bytes(zstd_of_unknown_size(data[:-8]))
    with pytest.raises(ChunkSizeError, match="does not decompress to the 128 bytes"):
        prepare(path, tmp_path / "target", JobOptions()).source.open()[...]


def test_zstd_of_several_frames(tmp_path):
    a = conditioned(4, 2, 3)
    path = write_array(tmp_path / "s", V3 | {"codecs": [BYTES, {"name": "zstd", "configuration": {}}]})
    (path / "c" / "0" / "0" / "0").write_bytes(
        b"".join(
            bytes(numcodecs.Zstd(checksum=check).encode(part))
            for check, part in zip((True, False), a.reshape(2, -1), strict=True)
        )
    )
    assert_reads(path, a)


@pytest.mark.parametrize("size", [1, 200, 255, 256, 70_000, 300_000])
@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("random", [True, False])
def test_zstd_nbytes(size, checksum, random):
    data = np.random.default_rng(1).bytes(size) if random else bytes(size)
    frame = bytes(numcodecs.Zstd(checksum=checksum).encode(data))
    assert zstd_nbytes(memoryview(frame)) == size
    assert zstd_nbytes(memoryview(frame * 3)) == 3 * size
    assert zstd_nbytes(memoryview(frame + zstd_of_unknown_size(data[:100]))) is None
    assert zstd_nbytes(memoryview(zstd_of_unknown_size(b"x") + frame)) is None


def test_no_codec_is_registered(tmp_path):
    import numcodecs.registry

    before = dict(numcodecs.registry.codec_registry)
    write_array(tmp_path / "s", V2 | {"compressor": {"id": "zstd"}})
    prepare(tmp_path / "s", tmp_path / "target", JobOptions()).source.open()
    assert dict(numcodecs.registry.codec_registry) == before
    assert numcodecs.get_codec({"id": "zstd"}).__class__ is numcodecs.Zstd
    assert zarr.registry.get_codec_class("zstd") is zarr.codecs.ZstdCodec
