"""`overwrite=True`: what is replaced stays whole for its readers until the new target takes its place."""

import os
import subprocess
import sys
import threading
import time

import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.disk import exchange
from dask_batchinv.job.api import JobFailedError
from dask_batchinv.job.target import swap
from dask_batchinv.outcome import TargetError
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target, tree

A = conditioned(100, 3, 10)


@pytest.fixture
def source(tmp_path):
    array = zarr.create_array(tmp_path / "s", shape=A.shape, dtype=A.dtype, chunks=(10, 3, 3))
    array[...] = A
    return tmp_path / "s"


@pytest.fixture(params=["disk", "memory"])
def place(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "t")
    return f"memory://{tmp_path.name}/folder/t"


def inverses(place):
    return xr.open_zarr(place).inverse.values


def beside(place):
    above, _, name = place.rpartition("/")
    return f"{above}/.{name}.dask_batchinv-new"


def exists(place):
    return bool(fsspec.filesystem("memory" if "memory" in place else "file").find(place))


def test_readers_see_the_old_one_until_the_new_one_is_complete(source, place):
    invert_store(source, place)
    old = inverses(place)
    zarr.open_array(source)[...] = 2 * A
    seen = []

    def look(progress):
        seen.append((inverses(place) == old).all())
        assert xr.open_zarr(place).attrs["complete"] == 1

    report = invert_store(source, place, overwrite=True, tile_size=1000, on_progress=look)
    assert len(seen) > 3
    assert all(seen)
    assert report.complete
    assert report.target == place
    assert_same_bits(inverses(place), inverse(2 * A))
    assert not exists(beside(place))
    assert verify_store(place, source=source).ok
    assert invert_store(source, place, tile_size=1000).tiles_now == 0
    assert ".dask_batchinv.lock" not in [
        *map(os.path.basename, fsspec.core.url_to_fs(place)[0].ls(place, detail=False))
    ]


def test_an_interrupted_one_goes_on_and_the_old_one_stays(source, place):
    invert_store(source, place)
    old = inverses(place)

    def stop(progress):
        if progress.matrices_done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert_store(source, place, overwrite=True, assume_a="sym", tile_size=720, on_progress=stop)
    assert_same_bits(inverses(place), old)
    assert exists(beside(place))
    # Without --overwrite the old one is there, and knows nothing of it.
    assert invert_store(source, place).tiles_now == 0
    report = invert_store(source, place, overwrite=True, assume_a="sym", tile_size=720)
    assert 0 < report.tiles_now < 10
    assert_same_bits(inverses(place), inverse(A, assume_a="sym"))
    assert not exists(beside(place))


def test_one_that_is_interrupted_when_all_is_done_is_done(source, tmp_path, monkeypatch):
    invert_store(source, tmp_path / "t")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(swap, "_remove", interrupted)
    arguments = ["run", str(source), str(tmp_path / "t"), "--overwrite", "--assume-a", "sym"]
    ran = CliRunner().invoke(main, arguments)
    assert (ran.exit_code, "has a part of what was replaced" in ran.stdout) == (0, True)
    with pytest.raises(KeyboardInterrupt):  # a script does not go on
        invert_store(source, tmp_path / "t", overwrite=True, assume_a="sym")
    monkeypatch.undo()
    assert invert_store(source, tmp_path / "t", assume_a="sym").tiles_now == 0


def test_one_that_cannot_be_finished_leaves_the_old_one(source, place):
    invert_store(source, place)
    old = inverses(place)
    (source / "c/3/0/0").unlink()
    with pytest.raises(JobFailedError, match="is what it was"):
        invert_store(source, place, overwrite=True)
    assert_same_bits(inverses(place), old)


def test_another_job_beside_is_replaced_and_what_is_not_ours_is_not(source, tmp_path):
    target, new = tmp_path / "t", tmp_path / ".t.dask_batchinv-new"
    invert_store(source, target)
    invert_store(source, new, assume_a="pos", max_failed=None)
    invert_store(source, target, overwrite=True, assume_a="sym")
    assert not new.exists()
    assert_same_bits(inverses(target), inverse(A, assume_a="sym"))
    new.mkdir()
    (new / "mine").write_text("mine")
    before = tree(target)
    with pytest.raises(TargetError, match="dask_batchinv did not make it"):
        invert_store(source, target, overwrite=True)
    assert tree(target) == before
    assert (new / "mine").exists()


def test_what_others_put_into_the_old_one_refuses(source, tmp_path):
    invert_store(source, tmp_path / "t")
    (tmp_path / "t/notes.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"contains what dask_batchinv did not put there \(notes.txt\)"):
        invert_store(source, tmp_path / "t", overwrite=True)
    assert not (tmp_path / ".t.dask_batchinv-new").exists()

    def put(progress):
        (tmp_path / "u/late.txt").write_text("mine")

    invert_store(source, tmp_path / "u")
    report = invert_store(source, tmp_path / "u", overwrite=True, on_progress=put)
    assert any("late.txt" in note for note in report.notes)
    assert (tmp_path / ".u.dask_batchinv-new/late.txt").exists()


def test_it_is_held_meanwhile(source, tmp_path):  # as a lease is, which takes a quarter of a minute to find out
    place = tmp_path / "t"
    invert_store(source, place)
    refused = []

    def another(progress):
        if not refused:
            try:
                invert_store(source, place, overwrite=True)
            except TargetError as error:
                refused.append(str(error))

    invert_store(source, place, overwrite=True, on_progress=another)
    assert "another run is writing" in refused[0]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_folders_change_places(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr("dask_batchinv.disk._EXCHANGE", 1 << 20)  # which no system knows
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "a/b").exists()
    assert (tmp_path / "b/a").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_kill_between_the_steps_of_a_swap_is_mended(source, tmp_path, monkeypatch, steps):
    """Where folders do not change places in one step: all is done, but not in its place yet."""
    target = tmp_path / "t"
    invert_store(source, target, tile_size=720)
    zarr.open_array(source)[...] = 2 * A
    rename, renamed = os.rename, []

    def dying(a, b):
        if "dask_batchinv-new" in f"{a}{b}":
            renamed.append(b)
            if len(renamed) > steps:
                raise KeyboardInterrupt
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr("dask_batchinv.disk._EXCHANGE", 1 << 20)
        patch.setattr("os.rename", dying)
        with pytest.raises(KeyboardInterrupt):
            invert_store(source, target, tile_size=720, overwrite=True)
    assert target.exists() == (steps != 1)
    if steps == 1:
        with pytest.raises(TargetError, match="moved aside when its replacement was interrupted"):
            invert_store(source, target, tile_size=720, overwrite=True)
    if steps < 2:
        assert_same_bits(inverses(target), inverse(A))  # its readers have it still, or again
        assert invert_store(source, target, tile_size=720, overwrite=True).tiles_now == 0
    else:
        report = invert_store(source, target, tile_size=720)
        assert any("left by an interrupted replacement" in note for note in report.notes)
    assert_same_bits(inverses(target), inverse(2 * A))
    invert_store(source, target, tile_size=720, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, "t"])


def test_a_reader_on_a_disk_never_meets_a_gap(source, tmp_path):
    """A process that opens the target all the time finds one or the other, whole."""
    target = tmp_path / "t"
    invert_store(source, target, tile_size=720)
    zarr.open_array(source)[...] = 2 * A
    code = f"""if True:
        import sys, zarr
        print("begun", flush=True)
        count = 0
        while True:
            group = zarr.open_group({str(target)!r}, mode="r")
            assert group.attrs["complete"] == 1
            float(group["inverse"][0, 0, 0])
            count += 1
            print(count, flush=True)
    """
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    thread = threading.Thread(target=lambda: lines.extend(reader.stdout), daemon=True)
    thread.start()
    while not lines:
        time.sleep(0.05)
    for _ in range(5):
        invert_store(source, target, tile_size=720, overwrite=True)
    assert reader.poll() is None, reader.stderr.read()
    reader.kill()
    reader.communicate()
    thread.join()
    assert len(lines) > 3
    assert not np.isnan(read_target(target)[0]).any()
