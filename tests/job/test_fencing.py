"""Only one driver speaks for a target: one that was stopped, and wakes when it is another's, writes nothing more."""

import json
import os
import shutil
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr

from dask_batchinv import SourceError, TargetError, invert_store, verify_store
from dask_batchinv.job.driver.executor import Serial
from dask_batchinv.job.driver.run import Run
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.target import lock
from dask_batchinv.job.target.holder import LOCK
from dask_batchinv.job.target.lock import locked
from dask_batchinv.job.versions import versions
from dask_batchinv.job.worker.introduction import Introduction, introduce, place_of
from dask_batchinv.location import Location
from tests.support.stacks import conditioned
from tests.support.targets import tree

ONE = Workers(1, 1, None)


def serially(source, target, on_progress=None, **options):
    job = prepare(source, target, JobOptions(tile_size=720, max_failed=None, **options))
    return Run(job, plan_for(job, ONE), ONE, Serial(), *([on_progress] if on_progress else []))()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Tiles one by one, and a ledger that is written after each."""
    monkeypatch.setattr("dask_batchinv.job.plan.plan.LARGEST_SPAN", 1)
    monkeypatch.setattr("dask_batchinv.job.driver.run.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(lock, "RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_SETTLING_SECONDS", 0.02)


@pytest.fixture
def source(make_source):
    return make_source(conditioned(60, 3, 10), chunks=(10, 3, 3))


def without_times(files):
    return {name: content for name, content in files.items() if not name.startswith("ledger/") and LOCK not in name}


def remove(target):
    shutil.rmtree(target)


def empty(target):
    """Remove what is inside, as `rm -r target/*` would, and the lock."""
    for path in target.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("vanish", [remove, empty])
@pytest.mark.parametrize("other", [{}, {"assume_a": "diagonal"}], ids=["the same job", "another job"])
@pytest.mark.parametrize("after", [0, 10, 30, 60])
def test_a_driver_whose_target_was_made_anew_writes_nothing(tmp_path, source, vanish, other, after):
    """It sleeps at any point; meanwhile its target is removed, and another run begins it, and is interrupted."""
    target, seen = tmp_path / "t", []

    def stop(progress):
        if progress.matrices_done >= 20:
            raise KeyboardInterrupt

    def sleep(progress):
        if progress.matrices_done >= after and not seen:
            vanish(target)
            with pytest.raises(KeyboardInterrupt):
                serially(source, target, stop, **other)
            seen.append(tree(target))

    report = serially(source, target, sleep)
    assert report.exit_code == 1
    assert "was removed, replaced or taken over by another run" in report.stopped
    assert tree(target) == seen[0]
    serially(source, target, **other)
    serially(source, tmp_path / "whole", **other)
    ours, whole = without_times(tree(target)), without_times(tree(tmp_path / "whole"))
    assert {n: c for n, c in ours.items() if "zarr.json" not in n} == {
        n: c for n, c in whole.items() if "zarr.json" not in n
    }


@pytest.mark.parametrize("vanish", [remove, empty])
def test_a_driver_whose_target_was_removed_does_not_make_it_again(tmp_path, source, vanish):
    target = tmp_path / "t"
    report = serially(source, target, lambda progress: target.exists() and progress.matrices_done and vanish(target))
    assert "was removed, replaced or taken over" in report.stopped
    assert not target.exists() or not [*target.iterdir()]


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    if fs.exists("/fenced"):
        fs.rm("/fenced", recursive=True)


def test_a_driver_whose_lease_was_taken_over_writes_nothing(source, memory, monkeypatch):
    """Its lease is renewed by a thread that slept, too."""
    monkeypatch.setattr("dask_batchinv.job.target.lock._Lease._renew", lambda self: None)
    target, seen = "memory://fenced/t", []

    def sleep(progress):
        if progress.matrices_done >= 20 and not seen:
            assert serially(source, target).complete
            seen.append({path: memory.cat(path) for path in memory.find("/fenced")})

    report = serially(source, target, sleep)
    assert "taken over" in report.stopped
    assert {path: memory.cat(path) for path in memory.find("/fenced")} == seen[0]
    assert serially(source, target).tiles_now == 0


@pytest.mark.parametrize("name", ["inverse", "info"])
def test_an_array_that_is_removed_stops_the_run_at_once(tmp_path, source, name):
    target = tmp_path / "t"
    report = serially(source, target, lambda at: at.matrices_done == 20 and shutil.rmtree(target / name))
    assert f"{name} of {target} was removed while the job ran" in report.stopped
    assert (report.tiles_now, len(report.failed_tiles), report.retries) == (2, 1, 0)
    assert serially(source, target).complete


def test_what_this_run_wrote_last_must_still_be_there(tmp_path, source):
    """Even with the lock: what somebody has put into the ledger is not written over."""
    chunk = tmp_path / "t" / "ledger" / "tiles" / "c" / "0" / "0"

    def meddle(progress):
        if progress.matrices_done == 30:
            chunk.write_bytes(chunk.read_bytes())

    report = serially(source, tmp_path / "t", meddle)
    assert "was removed or replaced by somebody else" in report.stopped
    assert serially(source, tmp_path / "t").complete


def test_a_source_whose_files_lie_in_the_target_by_links(tmp_path, source, make_source):
    """To replace the target would remove what the links lead to."""
    target, array = tmp_path / "t", tmp_path / "linked"
    serially(source, target)
    before = tree(target)
    array.mkdir()
    shutil.copy(target / "inverse" / "zarr.json", array)
    for chunk in (target / "inverse").glob("c.*"):
        (array / chunk.name).symlink_to(chunk)
    chunked = make_source(conditioned(60, 3, 10), chunks=(10, 3, 3), name="chunked")
    shutil.rmtree(chunked / "c")
    (chunked / "c").symlink_to(target / "inverse")
    for linked in (array, chunked, f"simplecache::file://{array}"):
        for overwrite in (False, True):
            with pytest.raises(TargetError, match=r"lie inside the target .* by links"):
                serially(linked, target, overwrite=overwrite)
    assert tree(target) == before


def test_what_others_keep_in_a_target_stays(tmp_path, source):
    """Also where it is called as what we write half, or as what the ledger has."""
    target = tmp_path / "t"
    serially(source, target)
    partial = f"c.0.{'0123456789abcdef' * 2}.partial"
    kept = [target / "mine" / partial, target / "inverse" / "tiles" / "zarr.json", target / "rcond" / "c" / "0" / "0"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (target / "info" / partial).touch()
    (target / "rcond" / "c.1").unlink()
    assert serially(source, target).complete
    assert not (target / "info" / partial).exists()
    for _ in kept:
        with pytest.raises(TargetError, match="contains what dask_batchinv did not put there"):
            serially(source, target, overwrite=True)
        path = kept.pop()
        assert path.read_text() == "{}"
        shutil.rmtree(path.parent)


def test_rows_of_another_creation_of_a_target_do_not_count(tmp_path, source, make_source, client):
    """A ledger that was copied from another target, with all its chunks, proves nothing here."""
    other = make_source(conditioned(60, 3, 10, seed=1), "other.zarr", chunks=(10, 3, 3))
    options = {"client": client, "tile_size": 720}
    invert_store(source, tmp_path / "t", **options)
    invert_store(other, tmp_path / "o", **options)
    for name in ("inverse", "info", "rcond", "ledger/tiles"):
        shutil.rmtree(tmp_path / "t" / name)
        shutil.copytree(tmp_path / "o" / name, tmp_path / "t" / name)
    report = invert_store(source, tmp_path / "t", **options)
    assert report.tiles_now == 6
    assert verify_store(tmp_path / "t", source=source, client=client).ok


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "folder", "pipe", "text"])
def test_what_has_the_name_of_the_lock_and_is_not_ours_is_left_alone(tmp_path, source, kind):
    target, victim = tmp_path / "t", tmp_path / "thesis.tex"
    victim.write_text("years of work\n" * 10)
    for begun in (False, True):
        if begun:
            serially(source, target)
        else:
            target.mkdir()
        path = target / LOCK
        if kind == "link":
            path.symlink_to(victim)
        elif kind == "hard link":
            path.hardlink_to(victim)
        elif kind == "dangling link":
            path.symlink_to(tmp_path / "made")
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_text("a poem")
        (target / "inverse" / "c.0.0.0").unlink(missing_ok=True)
        with pytest.raises(TargetError, match=r"\.dask_batchinv\.lock in .* was not made by dask_batchinv"):
            serially(source, target)
        assert victim.read_text() == "years of work\n" * 10
        assert not (tmp_path / "made").exists()
        assert os.path.lexists(path)
        path.rmdir() if kind == "folder" else path.unlink()
        if not begun:
            target.rmdir()
    assert serially(source, target).complete


@pytest.mark.parametrize("name", ["zarr.json", "ledger/runs.json", "ledger/zarr.json", "ledger/tiles/c/0/0"])
def test_nothing_that_has_a_fixed_name_is_written_through_a_link(tmp_path, source, name):
    target, victim = tmp_path / "t", tmp_path / "victim"
    serially(source, target)
    (target / name).rename(victim)
    (target / name).symlink_to(victim)
    before = victim.read_bytes()
    (target / "inverse" / "c.0.0.0").unlink()
    assert serially(source, target).complete
    assert victim.read_bytes() == before


@pytest.mark.parametrize("name", ["inverse", "ledger", "ledger/tiles", "ledger/tiles/c", "t"])
def test_no_folder_of_a_target_may_be_a_link(tmp_path, name):
    rng = np.random.default_rng(0)
    ds = xr.Dataset({"cov": (("t", "i", "j"), rng.normal(size=(20, 3, 3)))}, coords={"t": np.arange(20)})
    ds.to_zarr(tmp_path / "s", consolidated=False)
    target, elsewhere = tmp_path / "x", tmp_path / "elsewhere"
    serially(tmp_path / "s", target, variable="cov")
    (target / name).rename(elsewhere)
    (target / name).symlink_to(elsewhere)
    before = tree(elsewhere)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(TargetError, match=f"{name} in .* is a link to elsewhere"):
            serially(tmp_path / "s", target, variable="cov", **options)
    assert tree(elsewhere) == before


def test_a_worker_that_sees_another_place_is_of_no_use(tmp_path, source):
    """A copy of the target, on a disk of its own, has all but what this run has written."""
    target, copy = Location.parse(tmp_path / "t"), Location.parse(tmp_path / "copy")
    serially(source, tmp_path / "t")
    shutil.copytree(tmp_path / "t", tmp_path / "copy", copy_function=shutil.copy2)
    here = Introduction(versions(), None, target)
    with locked(target) as held:
        assert introduce(replace(here, holder=held.run)) is None
        assert "is another place there" in introduce(replace(here, target=copy, holder=held.run))
    # Where nothing is written, a copy is known by its file.
    place = place_of(target)
    assert introduce(replace(here, place=place)) is None
    assert "is another place there" in introduce(replace(here, target=copy, place=place))


def test_the_source_is_not_removed_with_a_target_that_it_lies_in_by_another_name(tmp_path, source):
    """The array that a target is made from is another folder of that target's, by a link that was set meanwhile."""
    serially(source, tmp_path / "t")
    before = tree(tmp_path / "t")
    (tmp_path / "name").symlink_to(tmp_path / "t" / "inverse")
    for name in ("t/inverse", "name"):
        with pytest.raises(TargetError, match="lies inside"):
            serially(tmp_path / name, tmp_path / "t", overwrite=True)
    assert tree(tmp_path / "t") == before
    # And a file deep in it that is not ours is found before anything is removed.
    (tmp_path / "t" / "rcond" / "notes").write_text("mine")
    with pytest.raises(TargetError, match=r"did not put there \(rcond/notes\)"):
        serially(source, tmp_path / "t", assume_a="diagonal", overwrite=True)
    assert (tmp_path / "t" / "inverse" / "c.0.0.0").exists()


def test_the_lock_of_a_killed_run_that_a_snapshot_has_too(tmp_path, source):
    """Snapshots of hard links, as rsnapshot makes them: that of the lock is not written to, and not in the way."""
    target, kept = tmp_path / "t", tmp_path / "kept"
    serially(source, target)
    content = json.dumps({"run": "x", "holder": "process 1 on elsewhere"})
    (target / LOCK).write_text(content)
    os.link(target / LOCK, kept)
    (target / "rcond" / "c.2").unlink()
    assert serially(source, target).complete
    assert kept.read_text() == content
    assert not (target / LOCK).exists()
    with locked(Location.parse(target)):
        os.link(target / LOCK, tmp_path / "of one that is at work")
        with pytest.raises(TargetError, match="another run is writing"), locked(Location.parse(target)):
            pass
    for text in ("", "mine"):  # nobody knows whose
        (target / LOCK).write_text(text)
        os.link(target / LOCK, tmp_path / f"other {text}")
        with pytest.raises(TargetError, match="was not made by dask_batchinv"), locked(Location.parse(target)):
            pass
        (target / LOCK).unlink()


def test_members_that_are_files_or_links_are_named(tmp_path, source):
    target = tmp_path / "t"
    serially(source, target)
    shutil.move(target / "info", tmp_path / "moved")
    for name, make, match in (
        ("a file", lambda path: path.write_text("x"), "not a folder: move it"),
        ("a link inside", lambda path: path.symlink_to("rcond"), "a link to elsewhere"),
        ("a link to nothing", lambda path: path.symlink_to("nowhere"), "a link to elsewhere"),
    ):
        make(target / "info")
        before = tree(target / "rcond")
        for overwrite in (False, True):
            with pytest.raises(TargetError, match=rf"info .* is {match}"):
                serially(source, target, overwrite=overwrite)
        assert tree(target / "rcond") == before, name
        (target / "info").unlink()
    assert serially(source, target).complete


def test_attributes_that_would_make_metadata_too_long(tmp_path, source):
    """They are refused before anything is written, not written and never read again."""
    path = source / "zarr.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"attributes": {"flags": [1] * 1_200_000}}, separators=(",", ":")))
    for overwrite in (False, True):
        with pytest.raises(SourceError, match=r"the metadata of the target would have 1[67] MiB"):
            serially(source, tmp_path / "t", overwrite=overwrite)
    assert not (tmp_path / "t").exists()


def test_overwrite_always_does_it_again(tmp_path, source):
    first = serially(source, tmp_path / "t")
    a = zarr.open_array(source, mode="r+")
    a[...] = conditioned(60, 3, 10, seed=5)
    again = serially(source, tmp_path / "t", overwrite=True)
    assert (first.tiles_now, again.tiles_now) == (6, 6)
    mark = json.loads(json.loads((tmp_path / "t" / "zarr.json").read_text())["attributes"]["dask_batchinv"])
    assert mark["ready"]
