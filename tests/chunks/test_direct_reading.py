"""Plain chunks are read without Zarr, and what comes is what Zarr gives; and what is not plain is left to Zarr."""

import os
import shutil
import threading
import time
from contextlib import ExitStack

import dask.array as da
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_batchinv
from dask_batchinv import buffers
from dask_batchinv.buffers import Buffers
from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.chunks.decompression import decompress_into
from dask_batchinv.chunks.direct_reading import KeptChunk
from dask_batchinv.chunks.plain import plain_chunks
from dask_batchinv.chunks.plain_array import PlainArray, plain_array, read_directly
from dask_batchinv.job.source.source import open_source
from dask_batchinv.storage import ChunkSizeError
from tests.support.stacks import assert_same_bits, conditioned

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


CRC = zarr.codecs.Crc32cCodec()
PLAIN = {
    "none": {"compressors": None},
    "crc32c": {"compressors": [CRC]},
    "zstd": {"compressors": zarr.codecs.ZstdCodec()},
    "zstd, checksum": {"compressors": zarr.codecs.ZstdCodec(checksum=True)},
    "zstd, crc32c": {"compressors": [zarr.codecs.ZstdCodec(), CRC]},
    "gzip": {"compressors": zarr.codecs.GzipCodec(level=1)},
    "blosc": {"compressors": zarr.codecs.BloscCodec(cname="lz4")},
    "lz4": {"compressors": {"name": "numcodecs.lz4", "configuration": {}}},
    "bz2": {"compressors": {"name": "numcodecs.bz2", "configuration": {"level": 1}}},
    "2, none": {"compressors": None, "zarr_format": 2},
    "2, zstd": {"compressors": numcodecs.Zstd(), "zarr_format": 2},
    "2, blosc": {"compressors": numcodecs.Blosc(), "zarr_format": 2},
    "2, zlib": {"compressors": numcodecs.Zlib(level=1), "zarr_format": 2},
}
NOT_PLAIN = {
    "shards": {"shards": (8, 4, 2, 2), "compressors": None},
    "transpose": {"filters": [zarr.codecs.TransposeCodec(order=(1, 0, 2, 3))], "compressors": None},
    "big endian": {"serializer": zarr.codecs.BytesCodec(endian="big"), "compressors": None},
    "2, F order": {"zarr_format": 2, "order": "F", "compressors": None},
    "2, delta": {"zarr_format": 2, "filters": [numcodecs.Delta("<f8")], "compressors": numcodecs.Zlib()},
    "2, big endian": {"zarr_format": 2, "dtype": ">f8", "compressors": None},
}
STACK = np.random.default_rng(0).normal(size=(11, 7, 2, 2))


@pytest.fixture(scope="module", params=[*PLAIN, *NOT_PLAIN])
def stored(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "s"
    options = {"dtype": "f8", "fill_value": 5, "chunks": (4, 2, 2, 2)} | (PLAIN | NOT_PLAIN)[request.param]
    array = zarr.create_array(path, shape=STACK.shape, **options)
    array[...] = STACK
    array[4:8, 2:4] = 5  # which Zarr does not write
    return path, request.param in PLAIN


@settings(max_examples=15)
@given(st.data())
def test_every_region_is_what_zarr_gives(stored, data):
    path, is_plain = stored
    source, array = open_source(path), zarr.open_array(path)
    assert (source.plain is not None) == is_plain
    spans = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in STACK.shape[:2]]
    region = tuple(slice(*span) for span in spans)
    got = source.read_stored(source.open("fill"), region)
    assert_same_bits(np.ascontiguousarray(got), np.ascontiguousarray(array[region]))


def test_a_store_gives_the_same_with_many_requests_at_a_time(tmp_path):
    url = "memory://direct/s"
    array = zarr.create_array(url, shape=(40, 2, 2), chunks=(3, 2, 2), dtype="f8", overwrite=True)
    array[...] = a = np.random.default_rng(0).normal(size=(40, 2, 2))
    source = open_source(url)
    assert source.plain is not None
    np.testing.assert_array_equal(source.read_block(source.open(), (slice(2, 31),)), a[2:31])


@pytest.mark.parametrize("extra", [-1, 1, -32, 32, 10**6])
def test_a_file_of_another_length_is_damage(tmp_path, extra):
    zarr.create_array(tmp_path / "s", data=STACK[:4, :2], chunks=(4, 2, 2, 2), compressors=None)
    path = tmp_path / "s" / "c" / "0" / "0" / "0" / "0"
    path.write_bytes((path.read_bytes() + bytes(10**6))[: 4 * 2 * 4 * 8 + extra])
    source = open_source(tmp_path / "s")
    with pytest.raises(ChunkSizeError, match="its metadata"):
        source.read_block(source.open(), (slice(None),))


@pytest.mark.parametrize("codec", [numcodecs.Zstd(), numcodecs.Blosc(), numcodecs.LZ4(), numcodecs.GZip()])
def test_what_decodes_to_another_length_is_damage_and_writes_no_byte_beyond(codec):
    for size in (0, 8, 120, 136, 10**5):
        out = np.zeros(128 + 64, np.uint8)
        data = bytes(codec.encode(np.full(size, 255, np.uint8)))
        with pytest.raises((ChunkSizeError, EOFError, ValueError, RuntimeError)):
            decompress_into(codec.codec_id, {}, data, out[:128])
        assert not out[128:].any()
    decompress_into(codec.codec_id, {}, bytes(codec.encode(np.full(128, 7, np.uint8))), out[:128])
    assert (out[:128] == 7).all()
    assert not out[128:].any()


def test_zstandard_in_several_frames(tmp_path):
    out, halves = np.zeros(256, np.uint8), [np.full(128, k, np.uint8) for k in (1, 2)]
    decompress_into("zstd", {}, b"".join(bytes(numcodecs.Zstd().encode(half)) for half in halves), out)
    np.testing.assert_array_equal(out, np.concatenate(halves))


def test_a_checksum_that_does_not_match(tmp_path):
    zarr.create_array(tmp_path / "s", data=STACK[:4, :2], chunks=(4, 2, 2, 2), compressors=[CRC])
    path = tmp_path / "s" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    source = open_source(tmp_path / "s")
    with pytest.raises(ValueError, match="CRC-32C"):
        source.read_block(source.open(), (slice(None),))


def test_a_pipe_is_not_waited_for(tmp_path):
    zarr.create_array(tmp_path / "s", data=STACK[:4, :2], chunks=(4, 2, 2, 2))
    path = tmp_path / "s" / "c" / "0" / "0" / "0" / "0"
    path.unlink()
    os.mkfifo(path)
    source = open_source(tmp_path / "s")
    with pytest.raises(ChunkSizeError, match="not a file"):
        source.read_block(source.open(), (slice(None),))


def test_metadata_that_say_no_more_than_that_there_is_an_array():
    meta = {"zarr_format": 3, "codecs": ["bytes"], "data_type": "float64"}
    assert plain_chunks(meta | {"chunk_grid": {"configuration": {"chunk_shape": [2]}}}).nbytes == 16


def test_a_file_that_cannot_be_opened_is_not_one_that_is_missing(tmp_path, monkeypatch):
    zarr.create_array(tmp_path / "s", data=STACK[:4, :2], chunks=(4, 2, 2, 2))
    source = open_source(tmp_path / "s")
    array, original = source.open("fill"), os.open

    def refuse(path, *more, **options):
        if str(path).endswith("/c/0/0/0/0"):
            raise PermissionError(13, "not yours")
        return original(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        source.read_block(array, (slice(None),))


def test_no_fill_value_is_zero_as_in_zarr(tmp_path):
    zarr.create_array(tmp_path / "s", shape=(8, 2, 2), chunks=(2, 2, 2), dtype="f8", zarr_format=2, fill_value=None)[
        :2
    ] = 1
    source = open_source(tmp_path / "s")
    got = source.read_stored(source.open("fill"), (slice(None),))
    np.testing.assert_array_equal(got, zarr.open_array(tmp_path / "s")[...])


@pytest.mark.parametrize("place", ["memory://kept/s", ""])
def test_what_is_kept_of_a_chunk_is_of_that_chunk_alone(tmp_path, place):
    a = np.random.default_rng(0).normal(size=(8, 4, 2, 2))
    url = place or str(tmp_path / "s")
    zarr.create_array(url, shape=a.shape, chunks=(4, 2, 2, 2), dtype="f8", overwrite=True)[...] = a
    source = open_source(url)
    array = source.open()
    with ExitStack() as lent:
        kept = KeptChunk(lent)
        for start in (0, 2, 2, 3, 6, 0):
            for stop in (start + 2, 8):
                got = source.read_stored(array, (slice(start, stop),), kept=kept)
                np.testing.assert_array_equal(got, a[start:stop])


# --- Dask arrays ------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """The keys that are read without Zarr."""
    seen, original = [], BoundedStore.opened

    def noted(self, key):
        seen.append(key)
        return original(self, key)

    monkeypatch.setattr(BoundedStore, "opened", noted)
    return seen


@pytest.mark.parametrize("of", ["path", "Zarr array", "array in a group", "sliced"])
def test_a_dask_array_of_a_store_is_read_directly(tmp_path, opened, of):
    a = conditioned(40, 3, 10)
    name = "g/s" if of == "array in a group" else ""
    array = zarr.create_array(tmp_path / "s", name=name or None, shape=a.shape, chunks=(10, 3, 3), dtype="f8")
    array[...] = a
    taken = {"path": lambda: da.from_zarr(str(tmp_path / "s")), "Zarr array": lambda: array}
    stack = taken.get(of, lambda: da.from_zarr(array))()
    stack, a = (stack[5:33], a[5:33]) if of == "sliced" else (stack, a)
    got = dask_batchinv.inverse(stack, out=tmp_path / "t")
    assert_same_bits(got[...], dask_batchinv.inverse(a))
    assert sorted(opened) == [f"c/{k}/0/0" for k in range(4)]


def test_what_is_no_array_of_plain_chunks_stays_as_it_is(tmp_path):
    in_memory = zarr.create_array({}, data=np.ones((4, 2, 2)))
    assert plain_array(in_memory) is in_memory
    a = da.ones((4, 2, 2))
    assert read_directly(a) is a
    sharded = zarr.create_array(tmp_path / "s", data=np.ones((4, 2, 2)), chunks=(2, 2, 2), shards=(4, 2, 2))
    assert plain_array(sharded) is sharded


class Turned(zarr.storage.WrapperStore):
    """A store that changes every byte."""

    async def get(self, key, prototype, byte_range=None):
        value = await self._store.get(key, prototype, byte_range)
        if value is None or key.endswith("zarr.json"):
            return value
        return prototype.buffer.from_bytes(bytes(255 - byte for byte in value.to_bytes()))


class Local(zarr.storage.LocalStore):
    """A store of somebody's own."""


@pytest.mark.parametrize("kind", [Turned, Local])
def test_a_store_that_may_give_other_bytes_is_asked(tmp_path, kind):
    zarr.create_array(tmp_path / "s", data=np.ones((4, 2, 2)), compressors=None)
    local = zarr.storage.LocalStore(tmp_path / "s", read_only=True)
    array = zarr.open_array(kind(local if kind is Turned else tmp_path / "s"), mode="r")
    assert plain_array(array) is array


def test_scalars_and_times_beside_the_stack_stay_with_zarr(tmp_path):
    a = conditioned(4, 3, 10)
    zarr.create_array(tmp_path / "s", data=a)
    factor = zarr.create_array(tmp_path / "factor", data=np.array(2.0))
    times = zarr.create_array(tmp_path / "times", data=np.arange(4).astype("M8[s]"))
    assert plain_array(factor) is factor
    assert plain_array(times) is times
    product = da.from_zarr(str(tmp_path / "s")) * da.from_zarr(str(tmp_path / "factor"))
    assert_same_bits(dask_batchinv.inverse(product).compute(), dask_batchinv.inverse(a * 2.0))


def test_where_zarr_is_asked_for_errors_zarr_reads(tmp_path):
    array = zarr.create_array(tmp_path / "s", data=np.ones((4, 2, 2)))
    assert plain_array(array) is not array
    with zarr.config.set({"array.read_missing_chunks": False}):  # an array keeps what held when it was opened
        array = zarr.open_array(tmp_path / "s")
        assert plain_array(array) is array


def test_what_is_read_directly_still_is_the_array(tmp_path):
    array = zarr.create_array(tmp_path / "s", data=np.arange(16.0).reshape(4, 2, 2), chunks=(2, 2, 2))
    plain = plain_array(array)
    assert isinstance(plain, PlainArray)
    assert (plain.shape, plain.dtype, plain.chunks) == (array.shape, array.dtype, array.chunks)
    for key in (np.s_[::2, :, :], np.s_[1], np.s_[1:3, 0, :], np.s_[-3:, :, 1:]):
        np.testing.assert_array_equal(plain[key], array[key])


def test_a_path_for_out_is_written_chunk_by_chunk_as_zarr_would(tmp_path):
    a = conditioned(45, 3, 10)  # the last chunk is not full
    written = dask_batchinv.inverse(da.from_array(a, chunks=(10, 3, 3)), out=tmp_path / "t")
    assert_same_bits(written[...], dask_batchinv.inverse(a))
    assert_same_bits(zarr.open_array(tmp_path / "t")[...], written[...])  # with the checksums of its chunks
    shutil.rmtree(tmp_path / "t" / "c" / "1")
    assert (zarr.open_array(tmp_path / "t")[10:20] != zarr.open_array(tmp_path / "t")[10:20]).all()  # NaN


# --- buffers ----------------------------------------------------------------------------------------------------


def test_a_buffer_is_used_again_and_never_by_two():
    lender = Buffers()
    with lender.borrow(2**20) as first, lender.borrow(2**20) as second:
        assert not np.shares_memory(first, second)
    with lender.borrow(2**20) as third, lender.borrow(2**20) as fourth:
        assert any(third is other for other in (first, second))
        assert not np.shares_memory(third, fourth)
        with lender.borrow(2**21) as other:
            assert other.nbytes == 2**21
    assert lender.nbytes == 2 * 2**20 + 2**21


def test_buffers_are_given_back_when_nobody_uses_them(monkeypatch):
    monkeypatch.setattr(buffers, "_IDLE_SECONDS", 0.05)
    lender = Buffers()
    with lender.borrow(2**20):
        pass
    assert lender.nbytes == 2**20
    deadline = time.monotonic() + 10
    while lender.nbytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with lender.borrow(2**20):  # and it begins anew
        pass
    while lender.nbytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_memory_of_an_array_comes_back_with_its_last_view():
    lender = Buffers()
    a = lender.array((64, 64, 64), np.float64)
    a[...] = 3
    view = a[5:].reshape(-1, 4)[7:]
    del a
    assert lender.nbytes == 0
    assert (view == 3).all()
    del view
    assert lender.nbytes == 64**3 * 8
    assert lender.array((3, 3), np.float32).shape == (3, 3)


def test_many_threads_borrow():
    lender, wrong = Buffers(), []

    def work(mine):
        for _ in range(200):
            with lender.borrow(2**18) as buffer:
                buffer[:] = mine
                if (buffer != mine).any():
                    wrong.append(mine)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert lender.nbytes <= 4 * 2**18


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_of_a_chunk_that_is_not_compressed_only_what_is_wanted_is_read(tmp_path, place, monkeypatch):
    """Rows along its first axis, by their bytes."""
    url = str(tmp_path / "s") if place == "disk" else f"memory://{tmp_path.name}/s"
    array = zarr.create_array(url, shape=(64, 6, 2, 2), chunks=(32, 3, 2, 2), dtype="f8", compressors=None)
    array[...] = a = np.random.default_rng(0).normal(size=(64, 6, 2, 2))
    source, read = open_source(url), []
    preadv, get = os.preadv, BoundedStore.get

    def counting(handle, into, offset):
        read.append(sum(map(len, into)))
        return preadv(handle, into, offset)

    async def asking(self, key, prototype, byte_range=None):
        found = await get(self, key, prototype, byte_range)
        read.append(len(found))
        return found

    monkeypatch.setattr(os, "preadv", counting)
    monkeypatch.setattr(BoundedStore, "get", asking)
    for region, chunks in (((slice(5, 9),), 2), ((slice(30, 34),), 2), (np.s_[5:9, 1:2], 1), (np.s_[0:32, 0:3], 1)):
        read.clear()
        got = source.read_stored(source.open(), region)
        assert_same_bits(np.ascontiguousarray(got), np.ascontiguousarray(a[region]))
        assert sum(read) == (region[0].stop - region[0].start) * 3 * 4 * 8 * chunks


def test_a_part_of_a_chunk_that_was_cut_short_is_damage(tmp_path):
    array = zarr.create_array(tmp_path / "s", shape=(32, 2, 2), chunks=(32, 2, 2), dtype="f8", compressors=None)
    array[...] = 1
    chunk = tmp_path / "s/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-8])
    source = open_source(tmp_path / "s")
    with pytest.raises(ChunkSizeError):
        source.read_stored(source.open(), (slice(0, 2),))
