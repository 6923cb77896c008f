"""A snapshot of Icechunk as a source: it is read as it is, whatever is committed meanwhile."""

import numpy as np
import pytest
import zarr
from distributed import Client

from dask_batchinv import SourceError, TargetError, inverse, invert_store, verify_store
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target

icechunk = pytest.importorskip("icechunk", reason="Icechunk is not installed: it needs Python 3.12")
A = conditioned(40, 3, 10)


@pytest.fixture
def repo(tmp_path):
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))
    session = repo.writable_session("main")
    group = zarr.create_group(session.store, attributes={"title": "tests"})
    group = group.create_group("inner")
    names = ("t", "i", "j")
    group.create_array("cov", shape=A.shape, chunks=(10, 3, 3), dtype="f8", dimension_names=names)[...] = A
    group.create_array("t", shape=(40,), dtype="i8", dimension_names=("t",))[...] = np.arange(40)
    session.commit("first")
    return repo


def write(repo, numbers, values):
    session = repo.writable_session("main")
    zarr.open_group(session.store)["inner/cov"][numbers] = values
    return session.commit("more")


def test_a_snapshot_is_a_source(tmp_path, repo):
    store = repo.readonly_session("main").store
    report = invert_store(store, tmp_path / "t", variable="inner/cov", tile_size=720)
    assert report.source.startswith("icechunk://")
    assert_same_bits(read_target(tmp_path / "t")[0], inverse(A))
    assert zarr.open_group(tmp_path / "t")["t"][...].tolist() == list(range(40))
    assert verify_store(tmp_path / "t", source=store).ok
    write(repo, slice(0, 5), np.eye(3)[None].repeat(5, 0))
    # The snapshot is still what it was, and another one is another source.
    assert invert_store(store, tmp_path / "t", variable="inner/cov", tile_size=720).tiles_now == 0
    with pytest.raises(TargetError, match="source was 'icechunk://"):
        invert_store(repo.readonly_session("main").store, tmp_path / "t", variable="inner/cov", tile_size=720)


def test_a_repository_is_followed_by_its_token(tmp_path, repo):
    options = {"variable": "inner/cov", "tile_size": 720, "token": "archive"}
    invert_store(repo.readonly_session("main").store, tmp_path / "t", **options)
    assert invert_store(repo.readonly_session("main").store, tmp_path / "t", **options).tiles_now == 0
    write(repo, slice(12, 14), np.eye(3)[None].repeat(2, 0))
    report = invert_store(repo.readonly_session("main").store, tmp_path / "t", **options)
    assert (report.changed_tiles, report.tiles_now) == (1, 1)  # all are read, and one is done again
    assert_same_bits(read_target(tmp_path / "t")[0][12], np.eye(3))


def test_on_worker_processes(tmp_path, repo):
    with Client(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", set_as_default=False) as client:
        session = repo.readonly_session("main")
        report = invert_store(session, tmp_path / "t", variable="inner/cov", tile_size=720, client=client)
    assert report.complete
    assert_same_bits(read_target(tmp_path / "t")[0], inverse(A))


def test_what_could_change_is_refused(tmp_path, repo):
    for place in (repo.writable_session("main").store, repo.writable_session("main")):
        with pytest.raises(SourceError, match="a session that cannot change"):
            invert_store(place, tmp_path / "t", variable="inner/cov")
    assert not (tmp_path / "t").exists()
