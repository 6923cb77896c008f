"""`verify --source` is the judge: what it refutes is forgotten, and the next run does it again."""

import shutil

import numpy as np
import pytest
import zarr

from dask_batchinv import JobFailedError, invert_store, verify_store
from tests.support.stacks import conditioned
from tests.support.targets import tree

OPTIONS = {"tile_size": 720, "max_failed": None}


@pytest.fixture
def source(make_source):
    return make_source(conditioned(40, 3, 10), chunks=(10, 3, 3))


def bad_tiles(target, source, client):
    return [tile.number for tile in verify_store(target, source=source, client=client).bad_tiles]


@pytest.mark.parametrize("before", [np.nan, 0.0], ids=["not finite", "singular"])
def test_a_matrix_that_was_called_failed_and_is_not(tmp_path, source, client, before):
    a = zarr.open_array(source, mode="r+")
    good = a[13]
    a[13] = np.full((3, 3), before)
    assert invert_store(source, tmp_path / "t", client=client, **OPTIONS).n_failed == 1
    a[13] = good
    report = verify_store(tmp_path / "t", source=source, client=client)
    assert [tile.number for tile in report.bad_tiles] == [1]
    assert "called failed, but are not, or for another reason (1 of them, first (13,))" in report.bad_tiles[0].cause
    again = invert_store(source, tmp_path / "t", client=client, **OPTIONS)
    assert (again.tiles_now, again.n_failed) == (1, 0)
    assert verify_store(tmp_path / "t", source=source, client=client).ok


def test_inverses_of_what_is_not_in_the_source_any_more(tmp_path, source, client):
    invert_store(source, tmp_path / "t", client=client, **OPTIONS)
    a = zarr.open_array(source, mode="r+")
    a[25] = conditioned(1, 3, 10, seed=9)[0]
    a[35] = np.full((3, 3), np.nan)
    assert verify_store(tmp_path / "t", client=client).ok  # as far as the target itself tells
    assert bad_tiles(tmp_path / "t", source, client) == [2, 3]
    assert not verify_store(tmp_path / "t", client=client).complete
    again = invert_store(source, tmp_path / "t", client=client, **OPTIONS)
    assert (again.tiles_now, again.n_failed) == (2, 1)
    assert verify_store(tmp_path / "t", source=source, client=client).ok


def test_min_rcond_is_judged_too(tmp_path, source, client):
    """Chunks and rows of a run with another minimum: each is right by itself."""
    invert_store(source, tmp_path / "all", client=client, **OPTIONS)
    rcond = zarr.open_array(tmp_path / "all" / "rcond")[...]
    minimum = float(np.median(rcond))
    invert_store(source, tmp_path / "some", client=client, min_rcond=minimum, **OPTIONS)
    assert verify_store(tmp_path / "some", source=source, client=client).ok
    # What was good becomes good again, as a wrong program would have it, with checksum and row.
    for name, key in ("inverse", "c.1.0.0"), ("info", "c.1"), ("rcond", "c.1"):
        shutil.copy(tmp_path / "all" / name / key, tmp_path / "some" / name / key)
    report = verify_store(tmp_path / "some", source=source, client=client)
    assert [tile.number for tile in report.bad_tiles] == [1]
    assert "good, but their rcond is below" in report.bad_tiles[0].cause
    assert invert_store(source, tmp_path / "some", client=client, min_rcond=minimum, **OPTIONS).tiles_now == 1
    assert verify_store(tmp_path / "some", source=source, client=client).ok


def test_a_target_that_cannot_be_written_is_judged_all_the_same(tmp_path, source, client, monkeypatch):
    invert_store(source, tmp_path / "t", client=client, **OPTIONS)
    zarr.open_array(source, mode="r+")[25] = np.eye(3)

    def refused(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr("dask_batchinv.job.driver.verify.locked", refused)
    report = verify_store(tmp_path / "t", source=source, client=client)
    assert [tile.number for tile in report.bad_tiles] == [2]
    assert report.problems == ("what is not right could not be noted in the ledger, for the next run: read-only",)


def test_chunks_that_were_not_there_are_part_of_what_a_tile_was_made_from(tmp_path, source, client):
    chunk = source / "c" / "1" / "0" / "0"
    content = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(JobFailedError) as caught:
        invert_store(source, tmp_path / "t", client=client, **OPTIONS)
    assert [tile.number for tile in caught.value.report.failed_tiles] == [1]
    assert caught.value.report.retries == 0  # it would not be there the second time either
    assert any("`missing='fill'`" in note for note in caught.value.report.notes)
    filled = invert_store(source, tmp_path / "t", client=client, missing="fill", **OPTIONS)
    assert (filled.exit_code, filled.tiles_now, filled.n_failed) == (0, 1, 10)
    assert invert_store(source, tmp_path / "t", client=client, missing="fill", **OPTIONS).tiles_now == 0
    for trust_ledger in (True, False):
        with pytest.raises(JobFailedError) as caught:  # an earlier run had made it up
            invert_store(source, tmp_path / "t", client=client, trust_ledger=trust_ledger, **OPTIONS)
        assert caught.value.report.tiles_done == 3
        if trust_ledger:
            invert_store(source, tmp_path / "t", client=client, missing="fill", **OPTIONS)
    assert invert_store(source, tmp_path / "t", client=client, missing="fill", **OPTIONS).n_failed == 10
    chunk.write_bytes(content)
    for missing in ("fill", "error"):
        report = invert_store(source, tmp_path / "t", client=client, missing=missing, **OPTIONS)
        assert (report.exit_code, report.n_failed) == (0, 0)
    assert verify_store(tmp_path / "t", source=source, client=client).ok


def test_a_chunk_of_the_source_that_has_gone_refutes_nothing(tmp_path, source, client):
    """What is read in its place is the fill value: the tile that was made of it is still right."""
    target, chunk = tmp_path / "t", source / "c" / "1" / "0" / "0"
    invert_store(source, target, client=client, **OPTIONS)
    content, before = chunk.read_bytes(), tree(target)
    chunk.unlink()
    report = verify_store(target, source=source, client=client)
    assert [(tile.number, tile.cause) for tile in report.bad_tiles] == [
        (1, "the source has changed: chunk c/1/0/0 is not in the store")
    ]
    chunk.write_bytes(content[:-9])
    report = verify_store(target, source=source, client=client)
    assert [tile.number for tile in report.bad_tiles] == [1]
    assert "the source cannot be read" in report.bad_tiles[0].cause
    assert tree(target) == before
    chunk.write_bytes(content)
    assert verify_store(target, source=source, client=client).ok


def test_no_advice_to_fill_where_nothing_is_there(tmp_path, source, client):
    for chunk in (source / "c").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    with pytest.raises(JobFailedError) as caught:
        invert_store(source, tmp_path / "t", client=client, **OPTIONS)
    notes = " ".join(caught.value.report.notes)
    assert "not one chunk of" in notes
    assert "`missing='fill'`" not in notes


def test_many_missing_chunks_are_not_waited_for(tmp_path, make_source, client):
    """Each was tried three times, with pauses."""
    source = make_source(conditioned(2000, 2, 10), chunks=(1, 2, 2))
    for chunk in [*(source / "c").rglob("*")]:
        if chunk.is_file() and chunk.parts[-3] != "7":
            chunk.unlink()
    with pytest.raises(JobFailedError) as caught:
        invert_store(source, tmp_path / "t", client=client, tile_size=32, max_failed=None)
    report = caught.value.report
    assert (len(report.failed_tiles), report.retries, report.tiles_done) == (1999, 0, 1)
