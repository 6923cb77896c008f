"""A target that follows its source: rewritten, appended to, with other coordinates, while it is read, and untouched."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec

from dask_batchinv import JobFailedError, SourceError, TargetError, inverse_ex, invert_store, verify_store
from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.cli import main
from dask_batchinv.job.plan import prepare as preparing
from dask_batchinv.job.report.account import account_of
from dask_batchinv.job.target.found import inspect
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.kernels import GENERATION
from dask_batchinv.known import Known
from dask_batchinv.location import Location
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target, tree
from tests.support.web import silent_server

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata")
TILE = {"tile_size": 720}  # ten 3 x 3 matrices of float64
#: The chunks of the arrays: what must not be touched where nothing has changed.
OURS = ("inverse", "info", "rcond")


@pytest.fixture
def job(tmp_path, client):
    """Runs the same job each time."""

    def run(source, **options):
        return invert_store(source, tmp_path / "t", client=client, **TILE, **options)

    return run


@pytest.fixture
def read(monkeypatch):
    """Every chunk that is read of any store on a disk."""
    seen = []
    get, opened = zarr.storage.LocalStore.get, BoundedStore.opened

    async def noted(self, key, *args, **kwargs):
        seen.append(key)
        return await get(self, key, *args, **kwargs)

    def noted_directly(self, key):
        seen.append(key)
        return opened(self, key)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", noted)
    monkeypatch.setattr(BoundedStore, "opened", noted_directly)
    return seen


@pytest.fixture
def stack(make_source):
    return make_source(conditioned(60, 3, 10), chunks=(10, 3, 3))


def stamps(path):
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for name in OURS for p in (path / name).glob("c*")}


def assert_inverse_of(source, target):
    """All outputs are those of the source as it is now, bit for bit."""
    a = zarr.open_array(source, mode="r")[...]
    for got, want in zip(read_target(target), (lambda r: (r.inverse, r.info, r.rcond))(inverse_ex(a)), strict=True):
        assert_same_bits(got, np.asarray(want))


def test_one_chunk_that_was_written_to_is_done_again_and_nothing_else(tmp_path, stack, job):
    job(stack)
    before = stamps(tmp_path / "t")
    zarr.open_array(stack)[30:40] = conditioned(10, 3, 50)
    report = job(stack)
    assert (report.changed_tiles, report.tiles_now, report.exit_code) == (1, 1, 0)
    assert "source changed   1 of 6 tiles done again" in str(report)
    touched = [name for name, stamp in stamps(tmp_path / "t").items() if stamp != before[name]]
    assert sorted(touched) == ["info/c.3", "inverse/c.3.0.0", "rcond/c.3"]
    assert_inverse_of(stack, tmp_path / "t")
    assert "nothing was left to do" in str(job(stack))


def test_a_source_written_anew_in_the_same_shape(tmp_path, make_source, job):
    source = make_source(conditioned(60, 3, 10), chunks=(10, 3, 3))
    job(source)
    shutil.rmtree(source)
    make_source(conditioned(60, 3, 50), chunks=(10, 3, 3))
    assert job(source).changed_tiles == 6
    assert_inverse_of(source, tmp_path / "t")


def test_what_was_written_again_with_the_same_numbers_is_read_and_not_computed(tmp_path, stack, job, read):
    job(stack)
    before = tree(tmp_path / "t" / "inverse")
    array = zarr.open_array(stack)
    array[20:30] = array[20:30]
    read.clear()
    report = job(stack)
    assert (report.changed_tiles, report.tiles_now) == (0, 0)
    assert [key for key in read if key.startswith("c/")] == ["c/2/0/0"]
    assert tree(tmp_path / "t" / "inverse") == before
    read.clear()
    job(stack)  # and now it is known
    assert not [key for key in read if key.startswith("c/")]


def test_times_that_were_set_back_deceive_nobody(tmp_path, stack, job):
    job(stack)
    path = stack / "c/4/0/0"
    found = path.stat()
    zarr.open_array(stack)[40:50] = conditioned(10, 3, 50)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_mtime_ns == found.st_mtime_ns
    assert job(stack).changed_tiles == 1
    assert_inverse_of(stack, tmp_path / "t")


def test_what_is_written_while_the_clock_stands_still_is_compared_by_its_content(tmp_path, stack, client, monkeypatch):
    """A file system whose times tick once a second: the same size, the same time, other numbers."""
    looks = Location.look

    def coarse(self, keys):
        for key, about, says in looks(self, keys):
            young = time.time_ns() // 10**9 * 10**9 if key == "c/2/0/0" else 0
            yield key, about, says._replace(version="1700000000000000000", changed=young)

    monkeypatch.setattr(Location, "look", coarse)
    options = {"client": client, "tile_size": 1440}  # two chunks each
    invert_store(stack, tmp_path / "t", **options)
    zarr.open_array(stack)[20:30] = conditioned(10, 3, 50)
    assert invert_store(stack, tmp_path / "t", **options).changed_tiles == 1
    assert_inverse_of(stack, tmp_path / "t")


def test_attributes_are_none_of_its_business(tmp_path, stack, job):
    job(stack)
    zarr.open_array(stack).attrs["history"] = "seen"
    report = job(stack)
    assert (report.tiles_now, report.changed_tiles, report.exit_code) == (0, 0, 0)
    assert "nothing was left to do" in str(report)


@pytest.mark.parametrize("chunks", [(10, 3, 3), (4, 3, 3), (25, 3, 3)])
def test_a_source_that_has_grown(tmp_path, make_source, client, chunks):
    a = conditioned(75, 3, 10)
    source = make_source(a[:33], chunks=chunks)
    invert_store(source, tmp_path / "t", client=client, **TILE)
    before = stamps(tmp_path / "t")
    array = zarr.open_array(source)
    array.resize((75, 3, 3))
    array[33:] = a[33:]
    report = invert_store(source, tmp_path / "t", client=client, **TILE)
    assert report.grown_from == (33, 3, 3)
    assert "it had the shape (33, 3, 3)" in str(report)
    assert_inverse_of(source, tmp_path / "t")
    after = stamps(tmp_path / "t")
    whole = report.tiles - report.tiles_now
    assert sum(before[name] == after[name] for name in before) >= 3 * whole
    assert report.tiles_now < report.tiles
    assert verify_store(tmp_path / "t", source=source, client=client).ok
    assert xr.open_zarr(tmp_path / "t").inverse.shape == (75, 3, 3)
    again = make_source(a, name="again.zarr", chunks=chunks)
    once = invert_store(again, tmp_path / "once", client=client, **TILE)
    assert once.tiles == report.tiles
    for name in OURS:
        assert tree(tmp_path / "once" / name) == tree(tmp_path / "t" / name)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_it_may_grow_along_any_batch_dimension(tmp_path, client, axis):
    """Tiles keep their places and get other numbers, and their rows go with them."""
    shape, chunk = (4, 6, 5), (2, 2, 2)
    a = conditioned(8 * 12 * 10, 3, 10).reshape(8, 12, 10, 3, 3)
    source = zarr.create_array(tmp_path / "s", shape=(*shape, 3, 3), chunks=(*chunk, 3, 3), dtype=float)
    source[...] = a[:4, :6, :5]
    options = {"client": client, "tile_size": 8 * 72}
    invert_store(tmp_path / "s", tmp_path / "t", **options)
    before = stamps(tmp_path / "t")
    larger = [*shape]
    larger[axis] *= 2
    source.resize((*larger, 3, 3))
    source[...] = a[: larger[0], : larger[1], : larger[2]]
    report = invert_store(tmp_path / "s", tmp_path / "t", **options)
    assert report.exit_code == 0
    after = stamps(tmp_path / "t")
    same = sum(before[name] == after[name] for name in before)
    assert same == (3 * 12 if axis == 2 else 3 * 18)  # along the last, the last tiles were not full
    assert_inverse_of(tmp_path / "s", tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t/ledger").glob("tiles*")) == ["tiles" if axis == 0 else "tiles-1"]
    assert "nothing was left to do" in str(invert_store(tmp_path / "s", tmp_path / "t", **options))
    assert verify_store(tmp_path / "t", source=tmp_path / "s", client=client).ok
    # Once more, and then anew: all of it is ours.
    source.resize((*(2 * size for size in larger), 3, 3))
    with pytest.raises(JobFailedError, match="MissingChunkError"):
        invert_store(tmp_path / "s", tmp_path / "t", **options)
    invert_store(tmp_path / "s", tmp_path / "t", missing="fill", overwrite=True, max_failed=None, **options)


def test_an_empty_source_that_has_grown_gets_tiles_that_fit(tmp_path, client):
    source = zarr.create_array(tmp_path / "s", shape=(0, 3, 3), chunks=(10, 3, 3), dtype=float)
    assert invert_store(tmp_path / "s", tmp_path / "t", client=client).tiles == 0
    source.resize((40, 3, 3))
    source[...] = conditioned(40, 3, 10)
    assert invert_store(tmp_path / "s", tmp_path / "t", client=client).tiles == 1
    assert_inverse_of(tmp_path / "s", tmp_path / "t")


def test_one_that_has_shrunk_or_is_another_is_refused_in_words(tmp_path, make_source, job):
    a = conditioned(60, 3, 10)
    source = make_source(a, chunks=(10, 3, 3))
    job(source)
    before = tree(tmp_path / "t")
    others = {
        "the source has shrunk: dim_0 was 60 long, is 40": (a[:40], (10, 3, 3), {}),
        "dtype was 'float64', is 'float32'": (a.astype("f4"), (10, 3, 3), {}),
        "packing was '{}', is .*scale_factor": (a, (10, 3, 3), {"attributes": {"scale_factor": 2.0}}),
        "n was 3, is 2": (a[:, :2, :2], (10, 2, 2), {}),
        "dimensions was": (a[None], (1, 10, 3, 3), {}),
    }
    for message, (other, chunks, options) in others.items():
        shutil.rmtree(source)
        make_source(other, chunks=chunks, **options)
        with pytest.raises(TargetError, match=message):
            job(source)
        assert tree(tmp_path / "t") == before


@pytest.mark.parametrize(
    "options",
    [{"chunks": (25, 3, 3)}, {"compressors": None}, {"compressors": [Crc32cCodec()]}, {"fill_value": 1},
     {"zarr_format": 2}, {"shards": (20, 3, 3), "chunks": (10, 3, 3)}, {"chunk_key_encoding": {"name": "v2"}}],
    ids=str,
)  # fmt: skip
def test_how_the_numbers_are_stored_does_not_matter(tmp_path, make_source, job, options):
    a = conditioned(60, 3, 10)
    source = make_source(a, chunks=(10, 3, 3))
    job(source)
    before = stamps(tmp_path / "t")
    shutil.rmtree(source)
    a[7] = conditioned(1, 3, 50)[0]
    make_source(a, **{"chunks": (10, 3, 3)} | options)
    report = job(source)
    assert (report.changed_tiles, report.tiles_now) == (1, 1)
    assert sum(before[name] != stamp for name, stamp in stamps(tmp_path / "t").items()) == 3
    assert_inverse_of(source, tmp_path / "t")


def dataset(times, **more):
    times = np.asarray(times)
    return xr.Dataset(
        {"cov": (("time", "row", "col"), conditioned(len(times), 3, 10))}, {"time": times, **more}
    )  # fmt: skip


def test_coordinates_follow(tmp_path, client):
    source, target = tmp_path / "s", tmp_path / "t"

    def run():
        report = invert_store(source, target, variable="cov", client=client, **TILE)
        assert not report.mended
        return report

    dataset(range(20), height=2.0).chunk(time=10).to_zarr(source)
    run()
    dataset(range(20, 25), height=2.0).to_zarr(source, append_dim="time")
    run()
    found = xr.open_zarr(target)
    np.testing.assert_array_equal(found.time, range(25))
    assert float(found.height) == 2
    np.testing.assert_array_equal(found.inverse, inverse_ex(xr.open_zarr(source).cov.values).inverse)
    # A label that was put right, without a change of the data.
    zarr.open_array(source / "time")[3] = 33
    report = run()
    assert report.tiles_now == 0
    assert report.exit_code == 0
    assert xr.open_zarr(target).time[3] == 33
    # One that comes, and one that goes.
    shutil.rmtree(source / "height")
    group = zarr.open_group(source)
    group.create_array("quality", data=np.arange(25), dimension_names=["time"])
    del group["cov"].attrs["coordinates"]
    group["cov"].attrs["coordinates"] = "quality"
    zarr.consolidate_metadata(source)
    run()
    found = xr.open_zarr(target)
    assert set(found.coords) == {"time", "quality"}
    assert not (target / "height").exists()
    assert "nothing was left to do" in str(run())
    assert verify_store(target, source=source, client=client).ok
    # What somebody else has put there stays.
    group.create_array("weight", data=np.arange(25), dimension_names=["time"])
    group["cov"].attrs["coordinates"] = "quality weight"
    zarr.consolidate_metadata(source)
    zarr.create_array(target / "weight", data=np.ones(3))
    with pytest.raises(TargetError, match=r"weight in .* is not ours"):
        run()
    assert zarr.open_array(target / "weight")[0] == 1


def test_what_users_wrote_on_a_target_stays_when_it_follows(tmp_path, stack, job):
    job(stack)
    group = zarr.open_group(tmp_path / "t")
    group.attrs["title"] = "mine"
    zarr.open_array(tmp_path / "t" / "inverse").attrs["comment"] = "mine too"
    array = zarr.open_array(stack)
    array.resize((70, 3, 3))
    array[60:] = conditioned(10, 3, 10)
    job(stack)
    group = zarr.open_group(tmp_path / "t")
    assert group.attrs["title"] == "mine"
    assert zarr.open_array(tmp_path / "t" / "inverse").attrs["comment"] == "mine too"
    assert group.attrs["complete"] == 1


def test_a_shard_that_was_written_to_costs_what_has_changed_in_it(tmp_path, client, job):
    a = conditioned(60, 3, 10)
    source = zarr.create_array(
        tmp_path / "s", shape=a.shape, chunks=(10, 3, 3), shards=(30, 3, 3), dtype=float, compressors=[Crc32cCodec()]
    )
    source[...] = a
    assert job(tmp_path / "s").tiles == 6
    before = stamps(tmp_path / "t")
    source[40:50] = conditioned(10, 3, 50)
    report = job(tmp_path / "s")
    assert report.changed_tiles == 1  # the other two of the shard were read, and are what they were
    assert sum(before[name] != stamp for name, stamp in stamps(tmp_path / "t").items()) == 3
    assert_inverse_of(tmp_path / "s", tmp_path / "t")


def test_a_chunk_that_was_deleted_is_an_error_and_comes_back(tmp_path, stack, job):
    job(stack)
    shutil.move(stack / "c/2/0/0", tmp_path / "kept")
    with pytest.raises(JobFailedError, match="chunk c/2/0/0 is not in the store"):
        job(stack)
    shutil.move(tmp_path / "kept", stack / "c/2/0/0")
    assert job(stack).tiles_now == 0  # it is what it was
    assert account_of(tmp_path / "t").complete
    assert_inverse_of(stack, tmp_path / "t")
    # Where a chunk that is not there stands for something, it is that now.
    (stack / "c/2/0/0").unlink()
    assert job(stack, missing="fill", max_failed=None).changed_tiles == 1
    assert (read_target(tmp_path / "t")[1][20:30] == 1).all()
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(stack)[20:30] = 0
    assert (stack / "c/2/0/0").exists()
    assert job(stack, missing="fill", max_failed=None).changed_tiles == 1  # it is there now, and not filled
    assert "nothing was left to do" in str(job(stack, max_failed=None))


def test_regions_and_appends_by_xarray(tmp_path, client):
    source, target = tmp_path / "s", tmp_path / "t"
    dataset(range(40)).chunk(time=10).to_zarr(source)
    options = {"variable": "cov", "client": client, **TILE}
    invert_store(source, target, **options)
    dataset(range(10, 20)).drop_vars("time").to_zarr(source, region={"time": slice(10, 20)})
    report = invert_store(source, target, **options)
    assert report.changed_tiles <= 1
    dataset(range(40, 55)).to_zarr(source, append_dim="time")
    invert_store(source, target, **options)
    assert_inverse_of(source / "cov", target)


@pytest.mark.parametrize("times", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_appended_many_times_it_is_what_one_run_gives(tmp_path, client, times):
    source, target = tmp_path / "s", tmp_path / "t"
    a = conditioned(12 + times * 3, 2, 10)
    options = {"client": client, "tile_size": 8 * 32}
    array = zarr.create_array(source, shape=(12, 2, 2), chunks=(8, 2, 2), dtype=float)
    array[...] = a[:12]
    invert_store(source, target, **options)
    for stop in range(15, len(a) + 1, 3):
        array.resize((stop, 2, 2))
        array[stop - 3 :] = a[stop - 3 : stop]
        report = invert_store(source, target, **options)
        assert report.tiles_now <= 2
    invert_store(source, tmp_path / "once", **options)
    for name in OURS:
        assert tree(target / name) == tree(tmp_path / "once" / name)


# --- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "assume_a", "logdet", "stranger"),
    [
        ("dask_batchinv", "general", False, False), ("numpy", "general", False, False),
        ("llvmlite", "symmetric", False, False),
        ("numpy", "symmetric", True, True), ("scipy", "symmetric", True, True), ("llvmlite", "symmetric", True, False),
        ("numpy", "general", True, True),
    ],
)  # fmt: skip
def test_versions_count_where_they_decide_on_bits(monkeypatch, stack, job, package, assume_a, logdet, stranger):
    job(stack, assume_a=assume_a, max_failed=None, logdet=logdet)
    real = preparing.versions
    monkeypatch.setattr(preparing, "versions", lambda: real() | {package: "99"})
    if stranger:
        with pytest.raises(TargetError, match=f"version of {package} was .*, is '99'"):
            job(stack, assume_a=assume_a, max_failed=None, logdet=logdet)
    else:
        assert "nothing was left to do" in str(job(stack, assume_a=assume_a, max_failed=None, logdet=logdet))


def test_so_does_the_generation_of_our_own_kernels(monkeypatch, stack, job):
    job(stack)
    monkeypatch.setattr(preparing, "GENERATION", 99)
    with pytest.raises(TargetError, match=f"generation of the kernel was {GENERATION}, is 99"):
        job(stack)


# --- while a job runs --------------------------------------------------------------------------------------------


def test_a_source_that_changes_while_it_is_read_is_done_again_once(tmp_path, stack, job):
    written = []

    def write_once(progress):
        if progress.activity == "inverting" and progress.matrices_done == 60 and not written:
            written.append(True)
            zarr.open_array(stack)[10:20] = conditioned(10, 3, 50)

    report = job(stack, on_progress=write_once)
    assert written
    assert (report.changed_meanwhile, report.changed_tiles, report.tiles_now, report.exit_code) == (1, 0, 6, 0)
    assert "1 tile while it was read: done again" in str(report)
    assert_inverse_of(stack, tmp_path / "t")
    assert "nothing was left to do" in str(job(stack))


def test_one_that_never_rests_is_named_and_its_target_not_called_complete(tmp_path, stack, job):
    def write_always(progress):
        if progress.activity == "inverting":
            zarr.open_array(stack)[10:20] = np.random.default_rng().normal(size=(10, 3, 3))

    with pytest.raises(JobFailedError, match=r"1 tile changed again.*tile 1 \[10:20\]"):
        job(stack, on_progress=write_always)
    assert zarr.open_group(tmp_path / "t").attrs["complete"] == 0
    assert job(stack).exit_code == 0
    assert_inverse_of(stack, tmp_path / "t")


def test_one_that_grows_while_it_is_read_does_not_stop_the_job(tmp_path, stack, job):
    def grow(progress):
        array = zarr.open_array(stack)
        if array.shape[0] == 60:
            array.resize((70, 3, 3))
            array[60:] = conditioned(10, 3, 10)

    report = job(stack, on_progress=grow)
    assert report.exit_code == 0
    assert "the source has grown since this run began" in str(report)
    assert job(stack).tiles_now == 1
    assert_inverse_of(stack, tmp_path / "t")


@pytest.mark.parametrize("grown", [0, 1])
def test_an_update_that_is_broken_off_at_any_write_is_ended_by_the_same_command(tmp_path, client, monkeypatch, grown):
    a = conditioned(12 * 12, 2, 10).reshape(12, 12, 2, 2)
    options = {"client": client, "tile_size": 4 * 32}

    def prepare(folder):
        source = zarr.create_array(folder / "s", shape=(6, 6, 2, 2), chunks=(2, 2, 2, 2), dtype=float)
        source[...] = a[:6, :6]
        invert_store(folder / "s", folder / "t", **options)
        size = [6, 6]
        size[grown] = 11
        source.resize((*size, 2, 2))
        source[...] = a[: size[0], : size[1]]
        source[:2, :2] = a[5:7, 5:7]

    writes = {name: getattr(Writer, name) for name in ("create", "change", "replace", "delete_all")}
    count = limit = 0

    def counted(name):
        def write(self, *arguments, **more):
            nonlocal count
            count += 1
            if count > limit:
                raise KeyboardInterrupt
            return writes[name](self, *arguments, **more)

        return write

    for name in writes:
        monkeypatch.setattr(Writer, name, counted(name))
    for stop in range(1, 100):
        folder = tmp_path / str(stop)
        folder.mkdir()
        limit = 10**9
        prepare(folder)
        before = stamps(folder / "t")
        count, limit = 0, stop
        try:
            invert_store(folder / "s", folder / "t", **options)
        except KeyboardInterrupt:
            limit = 10**9
            report = invert_store(folder / "s", folder / "t", **options)
            assert report.exit_code == 0
            after = stamps(folder / "t")
            assert sum(before[name] == after[name] for name in before) == 3 * 8, stop
            assert_inverse_of(folder / "s", folder / "t")
            assert "nothing was left to do" in str(invert_store(folder / "s", folder / "t", **options))
        else:
            break
        shutil.rmtree(folder)
    assert 10 < stop < 99


# --- what is told ------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys):
    def run(*arguments, code):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, out + err
        return out

    return run


def test_status_and_check_tell_whether_a_target_is_up_to_date(tmp_path, stack, job, cli):
    target = tmp_path / "t"
    check = ("run", stack, target, "--tile-size", 720, "--check")
    assert "no: there is no target yet" in cli(*check, code=4)
    job(stack)
    assert "up to date       yes" in cli("status", target, code=0)
    assert "up to date       yes" in cli(*check, code=0)
    assert json.loads(cli(*check, "--json", code=0))["up_to_date"] is True
    array = zarr.open_array(stack)
    array[10:20] = conditioned(10, 3, 50)
    before = tree(target)
    for command in (("status", target), check):
        assert "no: the source of 1 tile was written to since" in cli(*command, code=4)
        found = json.loads(cli(*command, "--json", code=4))
        found = found.get("freshness", found)
        assert (found["up_to_date"], found["tiles_changed"], found["tiles_missing"]) == (False, 1, 0)
    array.resize((65, 3, 3))
    array[60:] = conditioned(5, 3, 10)
    assert "the source has grown from (60, 3, 3) to (65, 3, 3); 1 of 7 tiles not done" in cli(*check, code=4)
    assert tree(target) == before
    job(stack)
    assert "yes" in cli(*check, code=0)
    array.resize((50, 3, 3))
    assert "the source has shrunk: dim_0 was 65 long, is 50" in cli("status", target, code=4)
    shutil.move(stack, tmp_path / "elsewhere")
    assert "not known: the source cannot be compared: there is nothing at" in cli("status", target, code=5)


def test_a_store_that_tells_neither_times_nor_versions(tmp_path, stack, job, cli, monkeypatch):
    looks = Location.look

    def mute(self, keys):
        return ((key, about, Known(says.size, "", None)) for key, about, says in looks(self, keys))

    monkeypatch.setattr(Location, "look", mute)
    assert "tells neither versions nor times" in str(job(stack))
    report = job(stack)
    assert report.tiles_now == 0
    assert "tells neither versions nor times" in str(report)
    assert "not known: the store of the source tells neither" in cli("status", tmp_path / "t", code=5)


def test_a_source_on_a_web_server(tmp_path, stack, job):
    """One that lists nothing, and tells when a file was written to the second."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    with silent_server(tmp_path) as (root, asked):
        url = f"{root}/{stack.name}"
        job(url)
        zarr.open_array(stack)[30:40] = conditioned(10, 3, 50)  # in the same second
        assert job(url).changed_tiles == 1
        time.sleep(2.1)
        job(url)
        asked.clear()
        assert "nothing was left to do" in str(job(url))
        assert len([path for path in asked if "/c/" in path]) == 6
    assert_inverse_of(stack, tmp_path / "t")


def test_a_notebook_whose_cells_are_run_twice_with_other_data(tmp_path, client):
    for seed in (1, 2):
        a = np.random.default_rng(seed).normal(size=(50, 3, 3))
        xr.Dataset({"cov": (("pixel", "i", "j"), a)}).to_zarr(tmp_path / "s.zarr", mode="w")
        invert_store(tmp_path / "s.zarr", tmp_path / "t.zarr", variable="cov", client=client)
        np.testing.assert_array_equal(xr.open_zarr(tmp_path / "t.zarr").inverse, inverse_ex(a).inverse)


def test_nothing_is_read_and_no_cluster_started_where_nothing_has_changed(tmp_path, stack, job, monkeypatch, read):
    job(stack)
    monkeypatch.setattr("dask_batchinv.job.driver.cluster.connect", None)
    read.clear()
    assert job(stack).exit_code == 0
    assert not [key for key in read if "c/" in key or "c." in key]
    assert inspect(Location.parse(tmp_path / "t")).shape == (60, 3, 3)


@pytest.mark.parametrize(
    "damage",
    [{"shape": [10**15, 3, 3]}, {"shape": [60, 3]}, {"core": [0, 7]}, {"tile": [0, 3, 3]}, {"shape": [-1, 3, 3]},
     {"ledger": "../tiles"}, {"ledger": 7}],
    ids=str,
)  # fmt: skip
def test_a_mark_that_makes_no_sense_is_refused_at_once(tmp_path, stack, job, damage):
    job(stack)
    meta = json.loads((tmp_path / "t" / "zarr.json").read_text())
    meta["attributes"]["dask_batchinv"] = json.dumps(json.loads(meta["attributes"]["dask_batchinv"]) | damage)
    (tmp_path / "t" / "zarr.json").write_text(json.dumps(meta))
    before = tree(tmp_path / "t")
    for call in (lambda: job(stack), lambda: account_of(tmp_path / "t"), lambda: job(stack, overwrite=True)):
        with pytest.raises(TargetError, match="its mark is damaged"):
            call()
    assert tree(tmp_path / "t") == before


# --- what was found by those who tried to break it ---------------------------------------------------------------


def is_complete(path):
    return json.loads((path / "zarr.json").read_text())["attributes"]["complete"] == 1


def test_a_run_that_fails_while_it_compares_leaves_no_complete_target(tmp_path, stack, job):
    job(stack)
    os.utime(stack / "c/1/0/0")

    def write(progress):
        zarr.open_array(stack)[10:20] = np.random.default_rng().normal(size=(10, 3, 3))

    with pytest.raises(JobFailedError, match="the source is being written to: 1 tile changed again"):
        job(stack, on_progress=write)
    assert not is_complete(tmp_path / "t")
    assert job(stack).exit_code == 0
    assert_inverse_of(stack, tmp_path / "t")


def test_what_others_wrote_over_a_chunk_while_the_job_ran_is_read_back(tmp_path, stack, job):
    path = tmp_path / "t" / "inverse" / "c.0.0.0"

    def spoil(progress):
        if progress.activity == "inverting" and path.exists():
            path.write_bytes(b"x" * path.stat().st_size)

    job(stack, on_progress=spoil)
    assert len(job(stack).damaged_tiles) == 1
    assert_inverse_of(stack, tmp_path / "t")


def test_the_array_of_a_user_is_not_taken_for_a_coordinate_where_the_ledger_lost_its_document(tmp_path, client):
    source, target = tmp_path / "s", tmp_path / "t"
    options = {"variable": "cov", "client": client}
    dataset(range(5)).to_zarr(source)
    invert_store(source, target, **options)
    zarr.create_array(target / "area", data=np.full(5, 7))
    dataset(range(5), area=("time", np.arange(5.0))).to_zarr(source, mode="w")
    (target / "ledger" / "zarr.json").unlink()
    with pytest.raises(TargetError, match=r"area in .* is not ours"):
        invert_store(source, target, **options)
    assert (zarr.open_array(target / "area")[...] == 7).all()


@pytest.mark.parametrize("how", ["damaged", "half appended"])
def test_a_coordinate_that_is_broken_for_a_while_stays_in_the_target(tmp_path, client, how):
    source, target = tmp_path / "s", tmp_path / "t"
    options = {"variable": "cov", "client": client}
    dataset(range(5)).to_zarr(source)
    invert_store(source, target, **options)
    before = tree(target)
    if how == "damaged":
        (source / "time/c/0").write_bytes(b"")
    else:
        zarr.open_array(source / "cov").resize((7, 3, 3))
    with pytest.raises(SourceError, match=r"time of .* cannot be read, and the target has it"):
        invert_store(source, target, **options)
    assert tree(target) == before


@pytest.mark.filterwarnings("ignore:Object at runs.json")
def test_what_users_put_beside_and_on_what_is_ours_stays_for_readers_too(tmp_path, client):
    source, target = tmp_path / "s", tmp_path / "t"
    options = {"variable": "cov", "client": client}
    dataset(range(5), lat=("row", np.arange(3.0))).to_zarr(source)
    invert_store(source, target, **options)
    xr.Dataset({"mask": ("time", np.ones(5))}).to_zarr(target / "more", consolidated=False)
    zarr.create_array(target / "mask", data=np.ones(5), dimension_names=["time"])
    for name in ("inverse", "lat"):
        zarr.open_array(target / name).attrs["comment"] = "mine"
    zarr.consolidate_metadata(target)
    assert "nothing was left to do" in str(invert_store(source, target, **options))
    dataset(range(5, 8)).to_zarr(source, append_dim="time")
    invert_store(source, target, **options)
    zarr.open_array(target / "mask").resize(8)
    found = xr.open_zarr(target, consolidated=False)
    assert (found.inverse.attrs["comment"], found.lat.attrs["comment"]) == ("mine", "mine")
    group = zarr.open_group(target)
    assert group["inverse"].attrs["comment"] == "mine"
    assert set(group) >= {"mask", "more", "inverse", "time"}


def test_units_follow_and_a_corrected_label_is_told(tmp_path, client, cli):
    source, target = tmp_path / "s", tmp_path / "t"
    options = {"variable": "cov", "client": client}
    found = dataset(range(5))
    found.cov.attrs["units"] = "km"
    found.to_zarr(source)
    invert_store(source, target, **options)
    check = ("run", source, target, "--variable", "cov", "--check")
    assert "yes" in cli(*check, code=0)
    zarr.open_array(source / "time")[3] = 33
    for command in (check, ("status", target)):
        assert "no: coordinates or units of the source have changed" in cli(*command, code=4)
    assert "coordinates and units were brought up to date" in str(invert_store(source, target, **options))
    for command in (check, ("status", target)):
        assert "yes" in cli(*command, code=0)
    zarr.open_group(target).attrs["title"] = "mine"
    found.cov.attrs["units"] = "m"
    found["time"] = found.time * 10
    found.to_zarr(source, mode="w")
    invert_store(source, target, **options)
    back = xr.open_zarr(target)
    assert back.inverse.attrs["units"] == "1/(m)"
    assert back.attrs["title"] == "mine"
    assert back.time[4] == 40


def test_status_and_check_see_what_a_run_would_do(tmp_path, stack, job, cli):
    target = tmp_path / "t"
    job(stack)
    meta = json.loads((target / "zarr.json").read_text())
    (target / "zarr.json").write_text(json.dumps(meta | {"attributes": meta["attributes"] | {"complete": 0}}))
    assert "no: the last run did not come to its end" in cli("status", target, code=4)
    job(stack)
    shutil.rmtree(target / "inverse")
    assert "no: inverse/zarr.json of the target are lost or damaged" in cli("status", target, code=4)
    job(stack)
    (stack / "c/2/0/0").unlink()
    job(stack, missing="fill", max_failed=None)
    assert "yes" in cli("status", target, code=0)
    assert "no: 1 of 6 tiles not done" in cli("run", stack, target, "--check", code=4)
    shutil.move(stack, tmp_path / "elsewhere")
    assert "not known" in cli("status", target, code=5)
    shutil.move(tmp_path / "elsewhere", tmp_path / "else")
    assert "yes" in cli("status", target, "--source", tmp_path / "else", code=0)


def test_a_source_that_becomes_another_while_it_is_read_ends_the_run(tmp_path, stack, job):
    def scale(progress):
        zarr.open_array(stack).attrs["scale_factor"] = 2.0

    with pytest.raises(JobFailedError, match="have changed since the job began"):
        job(stack, on_progress=scale)
    assert not is_complete(tmp_path / "t")


def test_one_that_grows_past_the_length_of_its_matrices(tmp_path, client):
    """Of three equal lengths none could be told to be that of the rows: but the target knows."""
    source, target = tmp_path / "s", tmp_path / "t"
    for stop in (2, 3, 4):
        found = dataset(range(stop)).drop_vars("time")
        found.to_zarr(source, mode="w")
        invert_store(source, target, variable="cov", client=client)
        assert_inverse_of(source / "cov", target)


def test_copies_that_a_chain_keeps_are_not_trusted(tmp_path, stack, job):
    url = f"simplecache::file://{stack}"
    assert "tells neither versions nor times" in str(job(url))
