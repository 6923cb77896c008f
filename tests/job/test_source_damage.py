"""Damage to chunks of a source is noticed and named, and only what is checked is said to be."""

import asyncio

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.codecs import Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from dask_batchinv.chunks.bounded_store import BoundedStore, Stored
from dask_batchinv.job.source.source import open_source
from dask_batchinv.storage import ChunkSizeError, DamagedChunkError, MissingChunkError, StrictStore
from tests.support.hostile import BYTES, V3, numcodec, shard, write_array
from tests.support.stacks import conditioned

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

A = conditioned(64, 3, 10)
EVERYWHERE = (slice(None),) * 3

# --- which sources are checked --------------------------------------------------------------------------------

CRC, GZIP = {"name": "crc32c"}, {"name": "gzip", "configuration": {"level": 1}}
ZSTD, CHECKED_ZSTD = ({"name": "zstd", "configuration": {"level": 0, "checksum": c}} for c in (False, True))
BARE = (BYTES,)


@pytest.mark.parametrize(
    ("codecs", "checked"),
    [
        ([BYTES], False),
        ([BYTES, CRC], True),
        ([BYTES, GZIP], True),
        ([BYTES, ZSTD], False),
        ([BYTES, CHECKED_ZSTD], True),
        ([BYTES, numcodec("fletcher32")], True),
        ([BYTES, numcodec("lz4", checksum=True)], False),
        ([shard()], False),
        ([shard([BYTES, ZSTD])], False),
        ([shard([BYTES, CRC])], True),
        ([shard([BYTES, GZIP], index=BARE)], False),
        ([shard(), CRC], True),
        ([shard(index=BARE), CRC], True),
        ([shard([shard(chunk=(1, 2, 2))], chunk=(2, 2, 2))], False),
        ([shard([shard([BYTES, CRC])], chunk=(2, 2, 2))], True),
        ([shard([shard([BYTES, CRC], index=BARE)], chunk=(2, 2, 2))], False),
        ([shard([shard([BYTES, CRC])], index=BARE, chunk=(2, 2, 2))], False),
        ([shard([shard(), CRC], chunk=(2, 2, 2))], True),
        ([shard([shard()], chunk=(2, 2, 2)), CRC], True),
    ],
)
def test_checksummed(tmp_path, codecs, checked):
    path = write_array(tmp_path / "s", V3 | {"codecs": codecs})
    assert open_source(path).checksummed is checked


LAYOUTS = {
    "shards": {"shards": (16, 3, 3), "compressors": [Crc32cCodec()]},
    "gzip in shards": {"shards": (16, 3, 3), "compressors": [GzipCodec()]},
    "zstd in shards": {"shards": (16, 3, 3), "compressors": [ZstdCodec(checksum=True)]},
    "index first": {
        "chunks": (16, 3, 3), "compressors": None,
        "serializer": ShardingCodec(chunk_shape=(4, 3, 3), codecs=[BYTES, CRC], index_location="start"),
    },
    "shards in shards": {
        "chunks": (16, 3, 3), "compressors": None,
        "serializer": ShardingCodec(chunk_shape=(8, 3, 3), codecs=[shard([BYTES, CRC], chunk=(4, 3, 3))]),
    },
    "inner index first": {
        "chunks": (16, 3, 3), "compressors": None,
        "serializer": ShardingCodec(
            chunk_shape=(8, 3, 3), codecs=[shard([BYTES, CRC], chunk=(4, 3, 3), index_location="start")],
        ),
    },
    "a checksum of shards": {
        "chunks": (16, 3, 3), "compressors": [Crc32cCodec()],
        "serializer": ShardingCodec(chunk_shape=(4, 3, 3), codecs=[BYTES]),
    },
    "no shards": {"chunks": (16, 3, 3), "compressors": [Crc32cCodec()]},
    "format 2": {"chunks": (16, 3, 3), "compressors": numcodecs.GZip(), "zarr_format": 2},
}  # fmt: skip


def make(path, layout, **more):
    options = {"chunks": (4, 3, 3), "fill_value": 0.0, "config": {"write_empty_chunks": True}} | layout | more
    zarr.create_array(path, shape=A.shape, dtype="f8", **options)[...] = A
    source = open_source(path)
    first = path / ("0.0.0" if source.zarr_format == 2 else "c/0/0/0")
    return source, first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_flipped_bit_passes_in_a_source_that_is_checked(tmp_path, layout):
    source, chunk = make(tmp_path / "s", LAYOUTS[layout])
    assert source.checksummed
    whole = chunk.read_bytes()
    for at in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        chunk.write_bytes(damaged)
        for region in (EVERYWHERE, (slice(0, 4), slice(None), slice(None))):
            try:
                got = source.read_block(source.open(), region)
            except Exception:  # whatever a codec makes of it
                continue
            np.testing.assert_array_equal(got, A[region])  # headers have bytes that mean nothing


@pytest.mark.parametrize("missing", ["error", "fill"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("url", [False, True])
def test_no_chunk_that_was_cut_short_is_taken_for_the_fill_value(tmp_path, layout, missing, url):
    source, chunk = make(tmp_path / "s", LAYOUTS[layout])
    if url:
        source = in_memory(tmp_path / "s")
    whole = chunk.read_bytes()
    array = source.open(missing)
    for length in sorted({0, 1, 3, 4, 15, 20, 100, 300, len(whole) // 2, len(whole) - 70, len(whole) - 1}):
        replace_first_chunk(source, chunk, whole[:length])
        for region in (EVERYWHERE, (slice(0, 4), slice(None), slice(None)), (slice(10, 20), slice(None), slice(None))):
            try:
                got = source.read_block(array, region)
            except Exception:  # whatever a codec makes of it
                continue
            np.testing.assert_array_equal(got, A[region])  # where the rest is not needed


def in_memory(path):
    import fsspec

    fs = fsspec.filesystem("memory")
    if fs.exists("/damage"):
        fs.rm("/damage", recursive=True)
    fs.put(str(path), "/damage", recursive=True)
    return open_source("memory://damage")


def replace_first_chunk(source, chunk, content):
    if source.location.is_memory:
        key = "0.0.0" if source.zarr_format == 2 else "c/0/0/0"
        source.location.write(key, content)
    else:
        chunk.write_bytes(content)


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("region", [EVERYWHERE, (slice(0, 4), slice(None), slice(None))], ids=["whole", "part"])
def test_an_emptied_chunk_is_named(tmp_path, layout, region, url):
    source, chunk = make(tmp_path / "s", LAYOUTS[layout])
    if url:
        source = in_memory(tmp_path / "s")
    replace_first_chunk(source, chunk, b"")
    with pytest.raises(
        ChunkSizeError, match=r"the chunk \S*0.0.0 of the source ends too early: expected \d+ bytes, got 0"
    ):
        source.read_block(source.open(), region)


def test_a_shard_whose_end_is_lost_is_named(tmp_path):
    source, chunk = make(tmp_path / "s", LAYOUTS["index first"])
    chunk.write_bytes(chunk.read_bytes()[:600])

    def read(start):
        return source.read_block(source.open(), (slice(start, start + 4), slice(None), slice(None)))

    np.testing.assert_array_equal(read(0), A[:4])
    for start in (4, 8, 12):
        with pytest.raises(ChunkSizeError, match="the chunk c/0/0/0 of the source ends too early: expected 292 bytes"):
            read(start)


def test_an_inner_shard_that_is_empty(tmp_path):
    """Its place in the outer index is of no length."""
    source, chunk = make(tmp_path / "s", LAYOUTS["shards in shards"] | {
        "serializer": ShardingCodec(
            chunk_shape=(8, 3, 3), codecs=[shard([BYTES, CRC], chunk=(4, 3, 3))], index_codecs=[BYTES]
        )
    })  # fmt: skip
    content = bytearray(chunk.read_bytes())
    content[-24:-16] = bytes(8)  # the length of the first of two
    content[-8:] = bytes(8)
    chunk.write_bytes(content)
    for region in (EVERYWHERE, (slice(0, 4), slice(None), slice(None)), (slice(4, 12), slice(None), slice(None))):
        with pytest.raises(DamagedChunkError, match="ends too early"):
            source.read_block(source.open("fill"), region)


# --- what a store gives ---------------------------------------------------------------------------------------


class Short(zarr.storage.WrapperStore):
    """A store, or a web server, that gives what it has where it is asked for more."""

    async def get(self, key, prototype, byte_range=None):
        value = await super().get(key, prototype)
        return value if byte_range is None or value is None else value[:2]


@pytest.mark.parametrize("how", ["get", "get_partial_values", "get_ranges", "_get_many"])
@pytest.mark.parametrize("part", [RangeByteRequest(0, 4), SuffixByteRequest(4)])
def test_no_way_leads_around_the_store(how, part):
    """Newer versions of Zarr read parts by other methods."""
    prototype = zarr.core.buffer.default_buffer_prototype()

    async def read(store):
        if how == "get":
            return await store.get("c/0", prototype, part)
        if how == "get_partial_values":
            return await store.get_partial_values(prototype, [("c/0", part)])
        if how == "get_ranges":
            return [found async for found in store.get_ranges("c/0", [part], prototype=prototype)]
        return [found async for found in store._get_many([("c/0", prototype, part)])]

    async def check():
        inner = zarr.storage.MemoryStore()
        with pytest.raises(MissingChunkError):
            await read(StrictStore(inner))
        await inner.set("c/0", prototype.buffer.from_bytes(b"12345678"))
        await read(BoundedStore(inner, Stored(8, 4)))
        with pytest.raises(ChunkSizeError, match="ends too early: expected 4 bytes, got 2"):
            await read(BoundedStore(Short(inner), Stored(8, 4)))
        assert not getattr(BoundedStore(inner, Stored(8, 4)), "_supports_sync_io", False)

    asyncio.run(check())


# --- chunks that are not there --------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Every key that a store is asked for without being read."""
    seen = []
    original = zarr.storage.LocalStore.exists

    async def exists(self, key):
        seen.append(key)
        return await original(self, key)

    monkeypatch.setattr(zarr.storage.LocalStore, "exists", exists)
    return seen


@pytest.mark.parametrize("layout", ["shards", "no shards", "format 2"])
@pytest.mark.parametrize("order", [("t", "i", "j"), ("i", "t", "j")])
def test_what_was_filled_is_counted(tmp_path, layout, order, asked):
    axis = order.index("t")
    a = np.moveaxis(A, 0, axis)
    size = [16 if name == "t" else 3 for name in order]
    options = dict(LAYOUTS[layout])
    if "shards" in options:
        options |= {"shards": size, "chunks": [4 if name == "t" else 3 for name in order]}
    else:
        options["chunks"] = size
    zarr.create_array(tmp_path / "s", shape=a.shape, dtype="f8", fill_value=7.0, **options)[...] = a
    names = {"v2": "0.1.0" if axis else "1.0.0", "v3": "c/0/1/0" if axis else "c/1/0/0"}
    (tmp_path / "s" / names["v2" if options.get("zarr_format") == 2 else "v3"]).unlink()
    source = open_source(tmp_path / "s", dims=("dim_0" if axis else "row", "col"))
    array = source.open("fill")
    asked.clear()

    def region(start, stop):
        return tuple(slice(start, stop) if name == "t" else slice(None) for name in order)

    for start, stop, count in ((0, 64, 1), (0, 16, 0), (15, 17, 1), (16, 32, 1), (31, 33, 1), (32, 64, 0), (20, 20, 0)):
        source.read_block(array, region(start, stop))
        assert source.count_missing(array, region(start, stop)) == count
    assert asked == []  # all were read
    assert (np.moveaxis(array[...], axis, 0)[16:32] == 7).all()
    fresh = source.open("fill")
    assert source.count_missing(fresh, region(0, 40)) == 1
    assert len(asked) == 3


def test_a_chunk_that_arrives_is_counted_as_it_was_read(tmp_path):
    source, chunk = make(tmp_path / "s", LAYOUTS["no shards"])
    content = chunk.read_bytes()
    chunk.unlink()
    array = source.open("fill")
    assert (source.read_block(array, EVERYWHERE)[:16] == 0).all()
    chunk.write_bytes(content)
    assert source.count_missing(array, EVERYWHERE) == 1
    source.read_block(array, EVERYWHERE)
    assert source.count_missing(array, EVERYWHERE) == 0


def test_what_was_read_long_ago_is_looked_for(tmp_path, monkeypatch, asked):
    source, chunk = make(tmp_path / "s", LAYOUTS["no shards"])
    chunk.unlink()
    monkeypatch.setattr("dask_batchinv.chunks.bounded_store._REMEMBERED", 2)
    array = source.open("fill")
    source.read_block(array, EVERYWHERE)
    asked.clear()
    assert source.count_missing(array, EVERYWHERE) == 1
    assert len(asked) == 2


def test_nothing_is_missing_of_an_empty_stack(tmp_path):
    zarr.create_array(tmp_path / "s", shape=(0, 3, 3), dtype="f8")
    source = open_source(tmp_path / "s")
    assert source.count_missing(source.open("fill"), EVERYWHERE) == 0


@pytest.mark.parametrize("missing", ["error", "fill"])
@pytest.mark.parametrize("what", ["dangling link", "dangling folder", "endless link", "a file in the way", "folder"])
def test_damage_is_never_called_missing(tmp_path, missing, what):
    source, chunk = make(tmp_path / "s", LAYOUTS["no shards"])
    if what in ("dangling folder", "a file in the way"):
        chunk.unlink()
        chunk.parent.rmdir()
        chunk.parent.symlink_to("/nowhere") if what == "dangling folder" else chunk.parent.write_text("")
    else:
        chunk.unlink()
        if what == "folder":
            chunk.mkdir()
        else:
            chunk.symlink_to("/nowhere" if what == "dangling link" else chunk)
    array = source.open(missing)
    for read in (source.read_block, source.count_missing):
        with pytest.raises(ChunkSizeError, match=r"/s/c/0.*(is a link to nothing|is not a f)"):
            read(array, EVERYWHERE)


def test_a_source_that_is_gone_is_not_filled(tmp_path):
    """A disk may be mounted again: that is worth another try."""
    source, _ = make(tmp_path / "s", LAYOUTS["no shards"])
    for missing in ("error", "fill"):
        array = source.open(missing)
        (tmp_path / "s").rename(tmp_path / "elsewhere")
        with pytest.raises(OSError, match=r"the source .* is gone") as caught:
            array[...]
        assert not isinstance(caught.value, DamagedChunkError)
        (tmp_path / "elsewhere").rename(tmp_path / "s")


def test_what_would_fail_again_is_told_from_what_may_not(tmp_path):
    source, chunk = make(tmp_path / "s", LAYOUTS["no shards"])
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match="checksum") as caught:  # it may have been damaged on its way
        source.open()[...]
    assert not isinstance(caught.value, DamagedChunkError)
    chunk.unlink()
    with pytest.raises(MissingChunkError) as missing:
        source.open()[...]
    assert isinstance(missing.value, DamagedChunkError)
    assert isinstance(missing.value, FileNotFoundError)
    assert issubclass(ChunkSizeError, DamagedChunkError)
