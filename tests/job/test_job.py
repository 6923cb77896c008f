"""Jobs, from Zarr to Zarr."""

import json
import os
import pickle
import re
import shutil

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec

from dask_batchinv import JobFailedError, RefusedError, inverse_ex, invert_store, verify_store
from dask_batchinv.disk import PARTIAL
from dask_batchinv.job.allowed import Allowed
from dask_batchinv.job.driver import run as driver
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.report.account import account_of
from dask_batchinv.job.results import TileResult
from dask_batchinv.job.worker import invert_tiles
from dask_batchinv.outcome import FAILURE_KINDS
from tests.support.stacks import DTYPES, assert_same_bits, conditioned
from tests.support.targets import read_target, spoilt, tree


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("chunks", "shards"),
    [((7, 3, 3), None), ((60, 3, 3), None), ((7, 2, 1), None), ((5, 3, 3), (15, 3, 3)), ((5, 1, 3), (10, 3, 3))],
    ids=["plain", "one chunk", "core split", "sharded", "sharded, core split"],
)
def test_every_kind_of_source(tmp_path, make_source, client, zarr_format, chunks, shards):
    if shards and zarr_format == 2:
        pytest.skip("Zarr format 2 has no shards")
    a, info = spoilt()
    source = make_source(a, chunks=chunks, shards=shards, zarr_format=zarr_format)
    before = tree(source)
    report = invert_store(source, tmp_path / "t", client=client, tile_size=15 * 72, max_failed=5)
    assert tree(source) == before
    want = inverse_ex(a)
    for got, part in zip(read_target(tmp_path / "t"), want, strict=True):
        assert_same_bits(got, part)
    assert_same_bits(want.info, info)
    assert report.exit_code == 0
    assert report.complete
    assert report.matrices == report.matrices_done == 60
    assert report.failed == {"singular": 2, "not_finite": 2, "overflow": 1, "below_min_rcond": 0, "unreadable": 0}
    assert report.first_failed["singular"] == [(5,), (11,)]
    assert report.first_failed["overflow"] == [(41,)]
    assert report.smallest_rcond == want.rcond[info == 0].min()
    assert verify_store(tmp_path / "t", source=source, client=client).ok


@pytest.mark.parametrize("dtype", [*DTYPES, ">f8", "i2", "f2", "?"])
def test_dtypes(tmp_path, make_source, client, dtype):
    a = conditioned(20, 2, 3, "float64")
    a = (a * 100).round().astype(dtype) if dtype in ("i2", "?") else a.astype(dtype)
    source = make_source(a, zarr_format=2 if dtype == ">f8" else 3)
    invert_store(source, tmp_path / "t", client=client, max_failed=None)
    for got, part in zip(read_target(tmp_path / "t"), inverse_ex(a), strict=True):
        assert_same_bits(got, part)


@pytest.mark.parametrize("shape", [(0, 3, 3), (4, 0, 3, 3), (3, 3), (5, 0, 0), (4, 1, 1)])
def test_empty_and_smallest(tmp_path, client, shape):
    source = zarr.create_array(tmp_path / "s", shape=shape, chunks=tuple(max(1, k) for k in shape), dtype="f8")
    if shape[-1]:
        source[...] = np.broadcast_to(np.eye(shape[-1]), shape)
    report = invert_store(tmp_path / "s", tmp_path / "t", client=client)
    assert report.complete
    assert zarr.open_group(tmp_path / "t").attrs["complete"] == 1
    for got, part in zip(
        read_target(tmp_path / "t"), inverse_ex(np.broadcast_to(np.eye(shape[-1]), shape)), strict=True
    ):
        assert_same_bits(got, part)
    assert verify_store(tmp_path / "t", client=client).ok


@pytest.mark.parametrize("structure", ["positive definite", "upper triangular"])
def test_structure_is_passed_on(tmp_path, make_source, client, structure):
    a = conditioned(20, 4, 10, structure=structure)
    a[:, 3, 0] = np.nan  # not read
    source = make_source(a)
    invert_store(source, tmp_path / "t", client=client, assume_a=structure)
    assert_same_bits(read_target(tmp_path / "t")[0], inverse_ex(a, assume_a=structure).inverse)
    assert verify_store(tmp_path / "t", source=source, client=client).ok


def test_tiles_do_not_show(tmp_path, make_source, client):
    source = make_source(conditioned(60, 3, 1e6), chunks=(7, 3, 3))
    for size in (72, 500, 10**6):
        invert_store(source, tmp_path / str(size), client=client, tile_size=size)
    a, b, c = (read_target(tmp_path / str(size)) for size in (72, 500, 10**6))
    for parts in zip(a, b, c, strict=True):
        assert_same_bits(parts[0], parts[1])
        assert_same_bits(parts[0], parts[2])


# --- Xarray ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset():
    return xr.Dataset(
        {
            "cov": (("y", "x", "p", "q"), conditioned(12, 2, 10).reshape(3, 4, 2, 2), {"units": "m2"}),
            "mask": (("y", "x"), np.ones((3, 4), bool)),
        },
        coords={
            "x": [1.0, 2.0, 4.0, 8.0],
            "time": ("y", np.array(["2001-01-01", "2002-01-01", "2003-01-01"], "M8[ns]")),
            "lat": (("y", "x"), np.arange(12.0).reshape(3, 4)),
            "p": ["rate", "delay"],
            "q": ["rate", "delay"],
        },
    )


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore:The data type:FutureWarning", "ignore:Consolidated metadata:UserWarning")
def test_a_target_opens_in_xarray_with_the_coordinates_of_the_source(tmp_path, dataset, client, zarr_format):
    dataset.to_zarr(tmp_path / "s", zarr_format=zarr_format)
    invert_store(tmp_path / "s", tmp_path / "t", variable="cov", client=client)
    with dask.config.set(scheduler="sync"):
        opened = xr.open_zarr(tmp_path / "t")  # a warning is an error here
        xr.testing.assert_equal(opened.coords.to_dataset(), dataset.coords.to_dataset())
        assert opened["inverse"].dims == dataset["cov"].dims
        assert opened["info"].dims == opened["rcond"].dims == ("y", "x")
        assert_same_bits(opened["inverse"].values, dataset.cov.linalg.inv().values)
        assert opened["info"].dtype == np.int32
        assert opened.attrs["complete"] == 1
        assert set(opened.data_vars) == {"inverse", "info", "rcond"}


@pytest.mark.filterwarnings("ignore:The data type:FutureWarning", "ignore:Consolidated metadata:UserWarning")
def test_a_job_with_coordinates_is_resumed(tmp_path, dataset, client):
    dataset.to_zarr(tmp_path / "s", zarr_format=2, encoding={"cov": {"chunks": (1, 4, 2, 2)}})
    chunk = tmp_path / "s" / "cov" / "1.0.0.0"
    shutil.move(chunk, tmp_path / "kept")
    with pytest.raises(JobFailedError, match="`missing='fill'`"):
        invert_store(tmp_path / "s", tmp_path / "t", variable="cov", client=client, tile_size=128)
    assert not account_of(tmp_path / "t").complete
    shutil.move(tmp_path / "kept", chunk)
    assert invert_store(tmp_path / "s", tmp_path / "t", variable="cov", client=client, tile_size=128).tiles_now == 1
    invert_store(
        tmp_path / "s", tmp_path / "t", variable="cov", client=client, assume_a="symmetric", overwrite=True,
        max_failed=None,
    )  # fmt: skip
    with dask.config.set(scheduler="sync"):
        xr.testing.assert_equal(xr.open_zarr(tmp_path / "t").coords.to_dataset(), dataset.coords.to_dataset())


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_complex_numbers_from_xarray(tmp_path, client, zarr_format):
    a = conditioned(8, 2, 3, "complex128")
    xr.Dataset({"A": (("t", "i", "j"), a)}).to_zarr(tmp_path / "s", zarr_format=zarr_format, consolidated=False)
    invert_store(tmp_path / "s", tmp_path / "t", client=client)
    assert_same_bits(read_target(tmp_path / "t")[0], inverse_ex(a).inverse)


def test_a_variable_of_a_group_within_a_group(tmp_path, client):
    a = conditioned(8, 2, 3)
    xr.Dataset(coords={"x": np.arange(3)}).to_zarr(tmp_path / "s", consolidated=False)
    inner = xr.Dataset({"A": (("x", "i", "j"), a)}, coords={"x": np.arange(8) + 5})
    inner.to_zarr(tmp_path / "s", group="sub", consolidated=False, mode="a")
    invert_store(tmp_path / "s", tmp_path / "t", variable="sub/A", client=client)
    with dask.config.set(scheduler="sync"):
        assert list(xr.open_zarr(tmp_path / "t").x.values) == list(range(5, 13))
    assert verify_store(tmp_path / "t", source=tmp_path / "s", client=client).ok


def test_a_path_may_have_any_characters(tmp_path, make_source, client):
    source = make_source(conditioned(8, 2, 3), name="a?b=1 #ü.zarr")
    invert_store(source, tmp_path / "t?1 &c.zarr", client=client)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a?b=1 #ü.zarr", "t?1 &c.zarr"]
    assert verify_store(tmp_path / "t?1 &c.zarr", source=source, client=client).ok


def test_core_dimensions_anywhere(tmp_path, dataset, client):
    moved = dataset[["cov"]].transpose("p", "y", "q", "x").drop_vars(["p", "q"])
    moved.to_zarr(tmp_path / "s", consolidated=False)
    invert_store(tmp_path / "s", tmp_path / "t", dims=("p", "q"), client=client, tile_size=100)
    with dask.config.set(scheduler="sync"):
        opened = xr.open_zarr(tmp_path / "t")
        assert opened["inverse"].dims == ("p", "y", "q", "x")
        want = dataset.cov.linalg.inv().transpose(*opened["inverse"].dims)
        assert_same_bits(opened["inverse"].values, want.values)
    assert verify_store(tmp_path / "t", source=tmp_path / "s", client=client).ok


def test_the_only_stack_of_a_group_needs_no_name(tmp_path, dataset, client):
    dataset.drop_vars(["p", "q"]).to_zarr(tmp_path / "s", consolidated=False)
    assert invert_store(tmp_path / "s", tmp_path / "t", client=client).complete


def test_one_name_for_both_core_dimensions(tmp_path, make_source, client):
    source = make_source(conditioned(8, 2, 3), dimension_names=("x", "p", "p"))
    invert_store(source, tmp_path / "t", client=client)
    with dask.config.set(scheduler="sync"):
        assert xr.open_zarr(tmp_path / "t")["inverse"].dims == ("x", "p", "p_2")
    assert verify_store(tmp_path / "t", source=source, client=client).ok


# --- what goes wrong ------------------------------------------------------------------------------------------


def damaged(path, kind):
    """Spoil one chunk of a source."""
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "flipped"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_damaged_chunk_is_named_and_the_rest_is_done(tmp_path, make_source, client, kind, zarr_format):
    a = conditioned(40, 3, 10)
    if zarr_format == 3:
        source = make_source(a, chunks=(10, 3, 3), compressors=[Crc32cCodec()])
        chunk = source / "c" / "2" / "0" / "0"
    else:
        source = make_source(a, chunks=(10, 3, 3), zarr_format=2, compressors={"id": "gzip"})
        chunk = source / "2.0.0"
    whole = shutil.copytree(source, tmp_path / "whole")
    damaged(chunk, kind)
    with pytest.raises(JobFailedError, match=r"1 of 4 tiles failed, first cause") as caught:
        invert_store(source, tmp_path / "t", client=client, tile_size=720)
    report = pickle.loads(pickle.dumps(caught.value)).report
    assert report.exit_code == 1
    assert [(tile.number, tile.region) for tile in report.failed_tiles] == [(2, ((20, 30),))]
    if kind == "missing":
        assert "is not in the store" in report.failed_tiles[0].cause
    assert report.matrices_done == 30
    assert not report.complete
    assert zarr.open_group(tmp_path / "t").attrs["complete"] == 0
    x, info, _ = read_target(tmp_path / "t")  # Zarr gives the fill value where nothing was written
    assert_same_bits(x[:20], inverse_ex(a).inverse[:20])
    assert_same_bits(x[30:], inverse_ex(a).inverse[30:])
    assert (info[20:30] == -(2**31)).all()
    # Mended, the same call does the rest.
    shutil.copy(whole / chunk.relative_to(source), chunk)
    report = invert_store(source, tmp_path / "t", client=client, tile_size=720)
    assert report.complete
    assert report.tiles_now == 1
    assert_same_bits(read_target(tmp_path / "t")[0], inverse_ex(a).inverse)


def test_a_missing_chunk_may_stand_for_the_fill_value(tmp_path, client):
    source = zarr.create_array(tmp_path / "s", shape=(30, 2, 2), chunks=(10, 2, 2), dtype="f8", fill_value=0)
    source[:10] = source[20:] = np.broadcast_to(np.eye(2), (10, 2, 2))
    with pytest.raises(JobFailedError, match="is not in the store"):
        invert_store(tmp_path / "s", tmp_path / "t", client=client, tile_size=720)
    report = invert_store(tmp_path / "s", tmp_path / "u", client=client, missing="fill", max_failed=10)
    assert report.failed["singular"] == 10
    assert verify_store(tmp_path / "u", source=tmp_path / "s", client=client).ok


@pytest.mark.parametrize(
    ("allowed", "failed", "words"),
    [
        (0, {}, None),
        (0, {"singular": 1}, "1 matrix has no inverse, 0 allowed"),
        (None, {"singular": 10**9}, None),
        ("any", {"overflow": 10**9}, None),
        ("3", {"singular": 2, "overflow": 1}, None),
        ("1%", {"singular": 10}, None),
        ("1%", {"singular": 11}, "11 matrices have no inverse, 10 allowed"),
        ("not-finite=any", {"not_finite": 900}, None),
        ("not-finite=any,singular=0", {"not_finite": 900, "singular": 1}, "1 matrix failed as singular, 0 allowed"),
        ("not_finite=50%", {"not_finite": 501}, "501 matrices failed as not finite, 500 allowed"),
        (
            "not-finite=any",
            {"not_finite": 1, "overflow": 2},
            "2 matrices failed as singular or overflow or below min rcond or unreadable, 0 allowed",
        ),
        ("not-finite=any,2", {"not_finite": 1, "overflow": 2}, None),
    ],
)
def test_how_many_may_fail(allowed, failed, words):
    assert Allowed.parse(allowed).exceeded(dict.fromkeys(FAILURE_KINDS, 0) | failed, 1000) == words


@pytest.mark.parametrize(
    "allowed", [-1, "-1", "x", "1.5", "200%", "-1%", "", "singular", "singular=", "odd=1", "1,2", "nan%"]
)
def test_how_many_may_fail_is_refused(allowed):
    with pytest.raises(RefusedError, match="`max_failed=` takes a number, a share"):
        JobOptions(max_failed=allowed)


def test_max_failed_and_min_rcond(tmp_path, make_source, client):
    a = conditioned(40, 2, 1)
    a[[3, 4]] = np.diag([1, 1e-8])
    source = make_source(a)
    assert invert_store(source, tmp_path / "t", client=client).n_failed == 0
    with pytest.raises(JobFailedError, match=r"2 matrices have no inverse, 1 allowed.*complete") as caught:
        invert_store(source, tmp_path / "u", client=client, min_rcond=1e-6, max_failed=1)
    report = caught.value.report
    assert report.exit_code == 3
    assert report.complete
    assert report.failed["below_min_rcond"] == 2
    assert report.first_failed["below_min_rcond"] == [(3,), (4,)]
    assert zarr.open_group(tmp_path / "u").attrs["complete"] == 1
    # Done already, but that does not make it good.
    with pytest.raises(JobFailedError):
        invert_store(source, tmp_path / "u", client=client, min_rcond=1e-6, max_failed=1)
    assert invert_store(source, tmp_path / "u", client=client, min_rcond=1e-6, max_failed=2).exit_code == 0


def test_tiles_that_fail_at_first_are_tried_again(tmp_path, make_source, client, monkeypatch):
    source = make_source(conditioned(40, 3, 10))
    invert_tiles, log = driver.invert_tiles, tmp_path / "log"

    def flaky(task, numbers):
        with log.open("a") as file:
            file.write("".join(map(str, numbers)))
        if 2 in numbers and log.read_text().count("2") < 3:
            return [
                TileResult(2, None, "OSError: try again") if result.number == 2 else result
                for result in invert_tiles(task, numbers)
            ]
        return invert_tiles(task, numbers)

    monkeypatch.setattr(driver, "invert_tiles", flaky)
    report = invert_store(source, tmp_path / "t", client=client, tile_size=720)
    assert report.complete
    assert report.retries == 2
    assert sorted(log.read_text()) == list("012223")


@pytest.mark.parametrize("allowed", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_tile_that_kills_its_workers_is_left_out_by_name_and_all_others_are_done(
    tmp_path, make_source, processes, monkeypatch, allowed
):
    source = make_source(conditioned(40, 3, 10), chunks=(10, 3, 3))
    monkeypatch.setattr(driver, "invert_tiles", deadly)
    processes.run_on_scheduler(set_allowed_failures, allowed)
    report = driver_report(source, tmp_path / "t", processes)
    assert [tile.number for tile in report.failed_tiles] == [2]
    assert re.search("the worker died with this tile alone on it", report.failed_tiles[0].cause)
    assert report.tiles_done == 3
    monkeypatch.undo()
    assert invert_store(source, tmp_path / "t", client=processes, tile_size=720).complete
    assert_same_bits(read_target(tmp_path / "t")[0], inverse_ex(conditioned(40, 3, 10)).inverse)


def set_allowed_failures(allowed, dask_scheduler):
    dask_scheduler.allowed_failures = allowed


def deadly(task, numbers):
    if 2 in numbers:
        os._exit(1)
    from dask_batchinv.job.worker.invert_tiles import invert_tiles

    return invert_tiles(task, numbers)


def driver_report(source, target, client):
    with pytest.raises(JobFailedError) as caught:
        invert_store(source, target, client=client, tile_size=720)
    return caught.value.report


def test_a_tile_of_nothing_but_nan_is_stored(tmp_path, make_source, client):
    a = conditioned(40, 3, 10)
    a[10:20] = 0
    source = make_source(a, chunks=(10, 3, 3))
    invert_store(source, tmp_path / "t", client=client, tile_size=720, max_failed=None)
    assert (tmp_path / "t/inverse/c.1.0.0").exists()
    assert (tmp_path / "t/rcond/c.1").exists()
    assert verify_store(tmp_path / "t", source=source, client=client).ok


def test_durable_gives_the_same(tmp_path, make_source, client, monkeypatch):
    synced, fsync = [], os.fsync

    def spy(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        synced.append(PARTIAL.sub("", path))  # a file is synced before it gets its name
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    source = make_source(conditioned(40, 3, 10), chunks=(10, 3, 3))
    invert_store(source, tmp_path / "t", client=client, tile_size=720, durable=True)
    invert_store(source, tmp_path / "u", client=client, tile_size=720)
    assert_same_bits(read_target(tmp_path / "t")[0], read_target(tmp_path / "u")[0])
    for name in ("inverse/c.3.0.0", "inverse", "info/c.1", "rcond/c.2", "ledger/tiles/c/0/0", "zarr.json", ""):
        assert str(tmp_path / "t" / name).rstrip("/") in synced
    # What is no chunk always is on the disk.
    chunks = [name for name in synced if name.startswith(str(tmp_path / "u")) and "/c" in name]
    assert not chunks
    assert {str(tmp_path / name) for name in ("u", "u/zarr.json", "u/ledger", "u/ledger/zarr.json")} <= {*synced}


def test_credentials_are_in_no_output(tmp_path, make_source, client):
    """A source whose URL has a password: it must not stand in the target nor in the report."""
    import fsspec

    memory = fsspec.filesystem("memory")
    source = make_source(conditioned(4, 3, 10))
    for name, content in tree(source).items():
        memory.pipe(f"/CANARY@host/{name}", content)
    try:
        report = invert_store("memory://CANARY@host", tmp_path / "t", client=client)
    finally:
        memory.rm("/CANARY@host", recursive=True)
    assert report.complete
    assert "CANARY" not in str(report) + json.dumps(report.to_json())
    assert not [name for name, content in tree(tmp_path / "t").items() if b"CANARY" in content]


def test_a_run_in_which_all_fails_for_one_cause_stops(tmp_path, make_source, client, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.driver.retry.BACK_OFF_SECONDS", 0.0)
    monkeypatch.setattr("dask_batchinv.job.plan.plan.LARGEST_SPAN", 1)
    source = make_source(conditioned(400, 3, 10), chunks=(1, 3, 3))
    options = {"client": client, "tile_size": 72}
    with monkeypatch.context() as broken:
        broken.setattr(invert_tiles, "do_span", lambda *_: 1 / 0)
        with pytest.raises(JobFailedError, match=r"the first 50 tiles failed, all for one cause: ZeroDivisionError"):
            invert_store(source, tmp_path / "t", **options)
    # What is wrong with single chunks says nothing of others.
    for number in range(100):
        (source / "c" / str(number) / "0" / "0").unlink()
    with pytest.raises(JobFailedError) as caught:
        invert_store(source, tmp_path / "t", **options)
    assert (caught.value.report.tiles_done, len(caught.value.report.failed_tiles)) == (300, 100)
