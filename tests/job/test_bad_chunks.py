"""A chunk of the source that cannot be read costs its own matrices, and no others; each is named."""

import asyncio
import json
import re

import numcodecs
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from zarr.codecs import BytesCodec, Crc32cCodec

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.cli import main
from dask_batchinv.job.api import JobFailedError
from dask_batchinv.job.report.account import account_of
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target

N = 120
A = conditioned(N, 3, 10)
LAYOUTS = {
    "chunks": {"chunks": (10, 3, 3), "compressors": [Crc32cCodec()]},
    "gzip": {"chunks": (10, 3, 3), "zarr_format": 2, "compressors": numcodecs.GZip()},
    "rows apart": {"chunks": (10, 1, 3), "compressors": [Crc32cCodec()]},
    "shards": {"chunks": (10, 3, 3), "shards": (40, 3, 3), "compressors": [Crc32cCodec()]},
    "through Zarr": {"chunks": (10, 3, 3), "compressors": [Crc32cCodec()], "serializer": BytesCodec(endian="big")},
}  # fmt: skip


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.driver.retry.BACK_OFF_SECONDS", 0.0)


def write(path, layout="chunks"):
    array = zarr.create_array(path, shape=A.shape, dtype=A.dtype, **LAYOUTS[layout])
    array[:] = A
    return array


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def check(target, unreadable):
    """Check that all matrices are inverted but those."""
    x, info, rcond = read_target(target)
    expected = np.zeros(N, np.int32)
    expected[unreadable] = -4
    assert info.tolist() == expected.tolist()
    assert np.isnan(x[expected != 0]).all()
    assert np.isnan(rcond[expected != 0]).all()
    assert_same_bits(x[expected == 0], inverse(A)[expected == 0])


@pytest.mark.parametrize(
    ("layout", "keys", "unreadable"),
    [
        ("chunks", ["c/3/0/0"], slice(30, 40)),
        ("gzip", ["3.0.0"], slice(30, 40)),
        ("rows apart", ["c/3/1/0", "c/3/2/0"], slice(30, 40)),
        ("shards", ["c/1/0/0"], slice(40, 50)),
        ("through Zarr", ["c/3/0/0"], slice(30, 40)),
    ],
)
def test_one_flipped_bit(tmp_path, layout, keys, unreadable):
    write(tmp_path / "s", layout)
    for key in keys:
        flip(tmp_path / "s" / key, 20)
    with pytest.raises(JobFailedError, match="cannot be read") as raised:
        invert_store(tmp_path / "s", tmp_path / "t")
    report = raised.value.report
    named = [f"{key} [0, 0, 0]" if layout == "shards" else key for key in keys]
    assert [chunk.key for chunk in report.bad_chunks] == named
    assert report.exit_code == 1
    assert (report.matrices_done, report.failed["unreadable"]) == (N, 10)
    assert not account_of(tmp_path / "t").complete
    check(tmp_path / "t", unreadable)

    # The same again, but now it may be complete.
    report = invert_store(tmp_path / "s", tmp_path / "t", bad_chunks="nan", max_failed="unreadable=10")
    assert (report.complete, report.exit_code, report.tiles_now) == (True, 0, 0)  # all was done before
    check(tmp_path / "t", unreadable)
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok
    assert verify_store(tmp_path / "t").ok
    # Nothing is left to do; but where it is an error, it still is one.
    assert invert_store(tmp_path / "s", tmp_path / "t", bad_chunks="nan", max_failed=None).tiles_now == 0
    with pytest.raises(JobFailedError, match="1 of 1 tile failed"):
        invert_store(tmp_path / "s", tmp_path / "t", max_failed=None)

    # Once it is repaired, its matrices come.
    invert_store(tmp_path / "s", tmp_path / "t", bad_chunks="nan", max_failed=None)
    for key in keys:
        flip(tmp_path / "s" / key, 20)
    assert invert_store(tmp_path / "s", tmp_path / "t", bad_chunks="nan").changed_tiles == 1
    check(tmp_path / "t", slice(0))


def test_every_bad_chunk_is_named_whatever_is_wrong_with_it(tmp_path):
    write(tmp_path / "s")
    flip(tmp_path / "s/c/0/0/0", 5)
    (tmp_path / "s/c/4/0/0").unlink()
    (tmp_path / "s/c/7/0/0").write_bytes(b"short")
    ran = CliRunner().invoke(main, ["run", str(tmp_path / "s"), str(tmp_path / "t"), "--quiet"])
    assert ran.exit_code == 1
    for key, cause in {"c/0/0/0": "CRC-32C", "c/4/0/0": "not in the store", "c/7/0/0": "cut short"}.items():
        assert re.search(f"{key}: .*({cause})", ran.output), ran.output
    places = [str(tmp_path / "s"), str(tmp_path / "t")]
    ran = CliRunner().invoke(main, ["run", *places, "--overwrite", "--bad-chunks", "nan", "--json", "--quiet"])
    assert ran.exit_code == 3  # they have no inverse, and nobody has allowed that
    report = json.loads(ran.stdout)
    assert len(report["bad_chunks"]) == 3
    assert report["failed"]["unreadable"] == 30
    assert report["first_failed"]["unreadable"][:2] == [[0], [1]]
    check(tmp_path / "t", np.r_[0:10, 40:50, 70:80])


def test_a_whole_shard_is_named_once(tmp_path):
    write(tmp_path / "s", "shards")
    flip(tmp_path / "s/c/1/0/0", -30)  # its index
    with pytest.raises(JobFailedError) as raised:
        invert_store(tmp_path / "s", tmp_path / "t")
    assert [chunk.key for chunk in raised.value.report.bad_chunks] == ["c/1/0/0"]
    check(tmp_path / "t", slice(40, 80))


def test_a_store_that_cannot_be_reached_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path / "s", "through Zarr")
    get = BoundedStore.get

    async def unreachable(self, key, prototype, byte_range=None):
        await asyncio.sleep(0)
        if key.startswith("c/3"):
            raise RuntimeError("Session is closed")
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(BoundedStore, "get", unreachable)
    with pytest.raises(JobFailedError, match="Session is closed") as raised:
        invert_store(tmp_path / "s", tmp_path / "t", bad_chunks="nan")
    assert not raised.value.report.bad_chunks
    assert raised.value.report.matrices_done == 0


def test_of_nothing_at_all_nothing_is_written(tmp_path):
    zarr.create_array(tmp_path / "s", shape=A.shape, dtype=A.dtype, **LAYOUTS["chunks"])
    with pytest.raises(JobFailedError, match=r"not one chunk of .* was found"):
        invert_store(tmp_path / "s", tmp_path / "t")
    assert account_of(tmp_path / "t").matrices_done == 0


def test_a_repaired_source_does_not_refute_what_was_made_of_it(tmp_path):
    write(tmp_path / "s")
    flip(tmp_path / "s/c/3/0/0", 20)
    invert_store(tmp_path / "s", tmp_path / "t", bad_chunks="nan", max_failed=None)
    flip(tmp_path / "s/c/3/0/0", 20)
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok
