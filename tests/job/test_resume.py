"""A job that is done again: left alone, finished, or begun anew, and never at the cost of anybody's data."""

import json
import os
import shutil

import dask
import pytest
import xarray as xr

from dask_batchinv import TargetError, invert_store, verify_store
from dask_batchinv.job.driver import run as driver
from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.driver.executor import Serial
from dask_batchinv.job.driver.run_job import run_job
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.report.account import account_of
from dask_batchinv.job.target import ledger
from dask_batchinv.job.target.lock import locked
from dask_batchinv.job.worker.invert_tiles import invert_tiles
from tests.support.stacks import conditioned
from tests.support.targets import recorded as recorded_in
from tests.support.targets import spoilt, tree


def data_of(path):
    """The chunks of the three arrays, byte for byte."""
    return {name: content for name, content in tree(path).items() if "/c" in name and not name.startswith("ledger")}


def test_a_complete_target_is_left_alone(tmp_path, make_source, client):
    source = make_source(conditioned(40, 3, 10))
    invert_store(source, tmp_path / "t", client=client)
    before = tree(tmp_path / "t")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").rglob("*")}
    # Not even a cluster is needed where nothing has changed.
    for trusting in (False, True):
        report = invert_store(source, tmp_path / "t", trust_ledger=trusting, scheduler="tcp://127.0.0.1:9")
        assert report.complete
        assert report.exit_code == 0
        assert (report.tiles_now, report.tiles_proven, report.matrices_done) == (0, 0, 40)
        assert tree(tmp_path / "t") == before
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "t").rglob("*")} == stamps


@pytest.mark.parametrize("name", ["inverse/c.1.0.0", "info/c.1", "rcond/c.1"])
@pytest.mark.parametrize("damage", ["flipped", "missing", "cut", "another tile's"])
def test_a_damaged_target_is_repaired_by_the_same_call(done, client, name, damage):
    source, path = done
    before = tree(path)
    content = bytearray((path / name).read_bytes())
    content[5] ^= 8
    if damage == "missing":
        (path / name).unlink()
    else:
        another = (path / name.replace("1", "0", 1)).read_bytes()
        (path / name).write_bytes({"flipped": content, "cut": content[:7], "another tile's": another}[damage])
    report = invert_store(source, path, client=client, tile_size=720, max_failed=None)
    # Two tiles may have the same info: then nothing is damaged.
    damaged = [] if before[name] == tree(path)[name] and "info" in name and damage.startswith("another") else [1]
    assert [tile.number for tile in report.damaged_tiles] in ([1], damaged)
    assert data_of(path) == {key: value for key, value in before.items() if key in data_of(path)}
    assert account_of(path).complete
    assert verify_store(path, source=source, client=client).ok


def test_a_resumed_job_reads_back_what_is_recorded(tmp_path, make_source, client):
    source = make_source(conditioned(100, 3, 10), chunks=(10, 3, 3))
    options = {"client": client, "tile_size": 720}
    invert_store(source, tmp_path / "whole", **options)

    def stop(progress):
        if progress.matrices_done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert_store(source, tmp_path / "t", on_progress=stop, **options)
    recorded = recorded_in(tmp_path / "t")
    bad = tmp_path / "t" / f"inverse/c.{recorded[1]}.0.0"
    bad.write_bytes(bad.read_bytes()[:-1])
    report = invert_store(source, tmp_path / "t", **options)
    assert [tile.number for tile in report.damaged_tiles] == [recorded[1]]
    assert report.tiles_proven == len(recorded) - 1
    assert data_of(tmp_path / "t") == data_of(tmp_path / "whole")


def test_a_link_out_of_the_target_is_refused(done, client, tmp_path):
    source, path = done
    (path / "inverse").rename(tmp_path / "elsewhere")
    (path / "inverse").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match=r"inverse in .* is a link to elsewhere"):
        invert_store(source, path, client=client)


def test_a_target_that_is_replaced_meanwhile_gets_no_tile_of_the_old_job(tmp_path, make_source, client, monkeypatch):
    """A worker that was cut off while the target was replaced must not write to the new one."""
    source = make_source(conditioned(40, 3, 10, structure="symmetric"), chunks=(10, 3, 3))
    options = {"client": client, "tile_size": 720}
    invert_store(source, tmp_path / "t", **options)
    job = prepare(source, tmp_path / "t", JobOptions(tile_size=720))
    plan = plan_for(job, Workers(1, 1, None))
    with locked(job.target) as lock:
        zombie = driver.Run(job, plan, Workers(1, 1, None), Serial()).task(lock.run)
        assert invert_tiles(zombie, range(1, 2))[0].error is None
    invert_store(source, tmp_path / "t", assume_a="symmetric", overwrite=True, **options)
    before = tree(tmp_path / "t")
    (result,) = invert_tiles(zombie, range(1, 2))
    assert "was removed, replaced, or is another place on this worker" in result.error
    assert result.is_workers
    assert tree(tmp_path / "t") == before
    shutil.rmtree(tmp_path / "t")
    assert invert_tiles(zombie, range(1, 2))[0].is_workers
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("after", [0, 1, 3, 9])
def test_an_interrupted_job_is_finished_by_the_same_call(tmp_path, make_source, client, after):
    a, _ = spoilt(100)
    source = make_source(a, chunks=(10, 3, 3))
    options = {"client": client, "tile_size": 720, "max_failed": None}
    invert_store(source, tmp_path / "whole", **options)

    def stop(progress):
        if progress.matrices_done >= 10 * after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert_store(source, tmp_path / "t", on_progress=stop, **options)
    found = account_of(tmp_path / "t")
    assert not found.complete
    assert found.tiles_done >= after
    recorded = recorded_in(tmp_path / "t")
    assert len(recorded) == found.tiles_done

    def stamps():
        return [(tmp_path / "t" / f"inverse/c.{number}.0.0").stat().st_mtime_ns for number in recorded]

    before = stamps()
    report = invert_store(source, tmp_path / "t", **options)
    assert report.tiles_now == 10 - len(recorded)
    assert stamps() == before  # what was recorded is not computed twice
    assert data_of(tmp_path / "t") == data_of(tmp_path / "whole")
    assert report.failed == account_of(tmp_path / "whole").failed


def test_a_creation_that_was_interrupted_starts_again(tmp_path, make_source, client, monkeypatch):
    source = make_source(conditioned(40, 3, 10))
    for step in ("zarr.consolidate_metadata", "dask_batchinv.job.target.ledger.create"):
        with monkeypatch.context() as patch:

            def die(*args, **options):
                raise KeyboardInterrupt

            patch.setattr(step, die)
            with pytest.raises(KeyboardInterrupt):
                invert_store(source, tmp_path / "t", client=client)
        with pytest.raises(TargetError, match=r"there is nothing at|there is no target"):
            account_of(tmp_path / "t")
    assert invert_store(source, tmp_path / "t", client=client).complete


def test_what_killed_workers_left_is_swept_up(tmp_path, make_source, client):
    source = make_source(conditioned(40, 3, 10))

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert_store(source, tmp_path / "t", client=client, on_progress=stop)
    left = tmp_path / "t" / "inverse" / f"c.0.0.0.{'5d9f' * 8}.partial"
    mine = left.with_name("notes.partial")
    left.write_text("half a chunk")
    mine.write_text("keep")
    invert_store(source, tmp_path / "t", client=client)
    assert not left.exists()
    assert mine.exists()


def test_an_empty_directory_is_a_fine_target(tmp_path, make_source, client):
    (tmp_path / "t").mkdir()
    assert invert_store(make_source(conditioned(4, 3, 10)), tmp_path / "t", client=client).complete


def test_overwrite_replaces_a_target_of_ours(tmp_path, make_source, client):
    source = make_source(conditioned(40, 3, 10, structure="symmetric"))
    invert_store(source, tmp_path / "t", client=client)
    invert_store(source, tmp_path / "t", client=client, assume_a="symmetric", overwrite=True)
    fresh = tmp_path / "fresh"
    invert_store(source, fresh, client=client, assume_a="symmetric")
    assert data_of(tmp_path / "t") == data_of(fresh)


def test_a_target_of_another_format_is_refused(tmp_path, make_source, client):
    source = make_source(conditioned(4, 3, 10))
    invert_store(source, tmp_path / "t", client=client)
    meta = json.loads((tmp_path / "t" / "zarr.json").read_text())
    mark = json.loads(meta["attributes"]["dask_batchinv"])
    meta["attributes"]["dask_batchinv"] = mark | {"format": 0}  # older versions wrote no text
    (tmp_path / "t" / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(
        TargetError,
        match=r"another version \(format 0, this one writes 9\): use that version, or pass `overwrite=True`",
    ):
        invert_store(source, tmp_path / "t", client=client)
    assert invert_store(source, tmp_path / "t", client=client, overwrite=True).complete


def test_a_damaged_ledger_means_doing_it_again(tmp_path, make_source, client):
    source = make_source(conditioned(40, 3, 10))

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert_store(source, tmp_path / "t", client=client, on_progress=stop)
    chunk = tmp_path / "t" / "ledger" / "tiles" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    assert account_of(tmp_path / "t").tiles_done == 0
    assert invert_store(source, tmp_path / "t", client=client).complete
    assert verify_store(tmp_path / "t", source=source, client=client).ok


def test_a_complete_target_whose_ledger_was_lost_is_done_again(done, client):
    source, path = done
    (path / "ledger" / "tiles" / "c" / "0" / "0").unlink()
    report = invert_store(source, path, client=client, tile_size=720, max_failed=None)
    assert report.complete
    assert report.tiles_now == 4
    assert verify_store(path, source=source, client=client).ok


@pytest.mark.parametrize("in_place", [True, False])
def test_a_break_while_overwriting_leaves_nothing_that_looks_finished(done, client, monkeypatch, in_place):
    source, path = done
    if in_place:  # as on a mount
        monkeypatch.setattr("dask_batchinv.job.plan.prepare.place_beside", lambda target: None)

    def die(self, keys):
        if len(keys := [*keys]) == 1:  # what a run notes of itself
            return
        for key in keys[:3]:
            os.unlink(os.path.join(self.url, key))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dask_batchinv.location.Location.delete_all", die)
        with pytest.raises(KeyboardInterrupt):
            invert_store(source, path, client=client, assume_a="diagonal", overwrite=True, max_failed=None)
    if not in_place:  # the new one is there already
        assert account_of(path).complete
        assert verify_store(path, source=source, client=client).ok
        assert invert_store(source, path, client=client, assume_a="diagonal", max_failed=None).tiles_now == 0
        return
    with pytest.raises(TargetError, match="no target"):
        account_of(path)
    with pytest.raises(TargetError, match="left when a target was being replaced: pass `overwrite=True` again"):
        invert_store(source, path, client=client)
    assert invert_store(source, path, client=client, assume_a="diagonal", overwrite=True, max_failed=None).complete


def test_overwrite_takes_nothing_that_is_not_ours(done, client, tmp_path):
    source, path = done
    overwrite = {"client": client, "assume_a": "diagonal", "overwrite": True, "max_failed": None}
    (path / "thesis.tex").write_text("dear")
    before = tree(path)
    with pytest.raises(TargetError, match=r"did not put there \(thesis.tex\)"):
        invert_store(source, path, **overwrite)
    assert tree(path) == before
    (path / "thesis.tex").unlink()
    # Attributes travel with data made from a target.
    with dask.config.set(scheduler="sync"):
        xr.open_zarr(path).assign(mine=3).drop_encoding().to_zarr(tmp_path / "made", consolidated=False)
    before = tree(tmp_path / "made")
    with pytest.raises(TargetError, match="dask_batchinv did not make it"):
        invert_store(source, tmp_path / "made", **overwrite)
    assert tree(tmp_path / "made") == before


def test_what_appears_at_the_target_after_the_job_was_prepared_is_not_touched(tmp_path, make_source, client):
    job = prepare(make_source(conditioned(4, 3, 10)), tmp_path / "t", JobOptions())
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "precious").write_text("x")
    with pytest.raises(TargetError, match="dask_batchinv did not make it"):
        run_job(job, ClusterOptions(client=client))
    assert (tmp_path / "t" / "precious").read_text() == "x"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_another_run_has_begun_meanwhile_is_not_touched(tmp_path, make_source, client, overwrite):
    source = make_source(conditioned(4, 3, 10))
    job = prepare(source, tmp_path / "t", JobOptions(overwrite=overwrite))
    invert_store(source, tmp_path / "t", client=client)
    before = tree(tmp_path / "t")
    with pytest.raises(TargetError, match="another run has begun"):
        run_job(job, ClusterOptions(client=client))
    assert tree(tmp_path / "t") == before


def test_the_ledger_needs_less_than_200_bytes_per_tile():
    assert 8 * len(ledger.COLUMNS) <= 200
