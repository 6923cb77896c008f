"""A repository of Icechunk as a target: what is written lasts commit by commit, and nobody is locked out."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner
from distributed import Client

from dask_batchinv import (
    ClusterError,
    JobFailedError,
    RefusedError,
    TargetError,
    TargetInUseError,
    inverse,
    invert_store,
    verify_store,
)
from dask_batchinv.cli import main
from dask_batchinv.job.driver import batches, run
from dask_batchinv.repositories import branches
from tests.support.stacks import assert_same_bits, conditioned

icechunk = pytest.importorskip("icechunk", reason="Icechunk is not installed: it needs Python 3.12")
A = conditioned(400, 3, 10)
GROUP = {"group": "results/inv"}
BEGUN, DONE = "dask_batchinv, results/inv: begun, 400 matrices", "dask_batchinv, results/inv: complete"


@pytest.fixture
def storage(tmp_path):
    return icechunk.local_filesystem_storage(str(tmp_path / "repo"))


@pytest.fixture
def repo(storage):
    return icechunk.Repository.create(storage)


@pytest.fixture
def source(tmp_path):
    names = ("t", "i", "j")
    group = zarr.create_group(tmp_path / "s", attributes={"title": "tests"})
    group.create_array("cov", shape=A.shape, chunks=(10, 3, 3), dtype="f8", dimension_names=names)[...] = A
    group.create_array("t", shape=(400,), dtype="i8", dimension_names=("t",))[...] = np.arange(400)
    return tmp_path / "s"


invert = partial(invert_store, variable="cov", tile_size=720, target_options=GROUP)


def opened(repo):
    return xr.open_zarr(repo.readonly_session("main").store, group=GROUP["group"], consolidated=False, chunks=None)


def messages(repo):
    return [commit.message for commit in repo.ancestry(branch="main")][-2::-1]


def commit(repo, change, message="theirs"):
    session = repo.writable_session("main")
    change(zarr.open_group(session.store))
    return session.commit(message)


def small_batches(monkeypatch):
    monkeypatch.setattr(run, "tasks_of", lambda numbers, plan, threads: (range(k, k + 1) for k in map(int, numbers)))
    monkeypatch.setattr(batches, "LARGEST_GROWTH", 1.0)


def once(do):
    """Return what calls a function when the first tiles of a run are done, and never again."""
    left = [do]

    def on_progress(progress):
        if progress.activity == "inverting" and 0 < progress.matrices_done < progress.matrices and left:
            left.pop()()

    return on_progress


def test_a_repository_is_a_target(source, repo):
    report = invert(source, repo)
    assert (report.complete, report.tiles_now) == (True, 40)
    found = opened(repo)
    assert_same_bits(found["inverse"].values, inverse(A))
    assert found["t"].values.tolist() == list(range(400))
    assert (found.attrs["complete"], found.attrs["title"]) == (1, "tests")
    assert (messages(repo)[1], messages(repo)[-1]) == (BEGUN, DONE)
    assert verify_store(repo, target_options=GROUP, source=source).ok
    assert invert(source, repo).tiles_now == 0
    assert len(messages(repo)) == 5  # nothing was written


def test_on_worker_processes(source, repo):
    with Client(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", set_as_default=False) as client:
        assert invert(source, repo, client=client).complete
        commit(repo, lambda root: root["results/inv/inverse"].__setitem__(slice(5, 7), 0))
        report = invert(source, repo, client=client)
        assert ([tile.number for tile in report.damaged_tiles], report.tiles_now) == ([0], 1)
        assert verify_store(repo, target_options=GROUP, client=client).ok
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))


@pytest.mark.parametrize(
    "options",
    [
        {"keep": "diagonal", "logdet": True, "compress": "zstd"},
        {"shards": {"t": 40}, "chunks": {"t": 10}, "names": {"inverse": "precision"}},
        {"dtype": "float32", "assume_a": "lower triangular"},
    ],
)
def test_other_outputs_and_encodings(source, repo, options):
    assert invert(source, repo, **options).complete
    assert invert(source, repo, **options).tiles_now == 0
    found, name = opened(repo), next(iter(options.get("names", {}).values()), options.get("keep", "inverse"))
    expected = np.linalg.inv(np.tril(A) if "assume_a" in options else A)
    expected = np.diagonal(expected, axis1=1, axis2=2) if name == "diagonal" else expected
    np.testing.assert_allclose(found[name].values, expected, rtol=1e-3, atol=1e-9)
    assert verify_store(repo, target_options=GROUP).ok


def test_a_batch_is_committed_at_a_time_and_what_others_commit_stays(source, repo, monkeypatch):
    small_batches(monkeypatch)
    theirs = partial(commit, repo, lambda root: root.create_group("theirs"))
    assert invert(source, repo, on_progress=once(theirs)).complete
    assert sum("of 40 tiles" in message for message in messages(repo)) > 4
    assert "theirs" in messages(repo)
    assert "theirs" in zarr.open_group(repo.readonly_session("main").store, mode="r")
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))


def test_who_changes_the_same_meanwhile_is_named(source, repo, monkeypatch):
    small_batches(monkeypatch)
    theirs = partial(commit, repo, lambda root: root["results/inv/inverse"].__setitem__(slice(None), 0))
    with pytest.raises(JobFailedError, match="changed by another commit to branch main as well"):
        invert(source, repo, on_progress=once(theirs))
    assert not opened(repo).attrs["complete"]
    assert invert(source, repo).complete
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))


def test_status_knows_of_a_run(source, repo, tmp_path, monkeypatch):
    small_batches(monkeypatch)
    url, codes = f"icechunk+file://{tmp_path / 'repo'}?group=results/inv", []
    invert(source, repo, on_progress=once(lambda: codes.append(command("status", url, "--json"))))
    (code, text) = codes[0]
    assert (code, json.loads(text)["at_work"]["holder"].split()[:2]) == (6, ["process", str(os.getpid())])
    assert command("status", url)[0] == 0


def test_a_killed_run_is_continued_from_its_last_commit(source, repo, tmp_path):
    script = """
import os, sys
import icechunk
from dask_batchinv import invert_store
from dask_batchinv.job.driver import batches, run
batches.LARGEST_GROWTH = 1.0
run.tasks_of = lambda numbers, plan, threads: (range(k, k + 1) for k in map(int, numbers))
repo = icechunk.Repository.open(icechunk.local_filesystem_storage(sys.argv[2]))
def die(progress):
    if sum("of 40" in commit.message for commit in repo.ancestry(branch="main")) > 2:
        os._exit(9)
invert_store(sys.argv[1], repo, variable="cov", tile_size=720, target_options={"group": "results/inv"}, on_progress=die)
"""
    killed = subprocess.run([sys.executable, "-c", script, source, tmp_path / "repo"], timeout=100)
    assert killed.returncode == 9
    report = invert(source, repo)
    assert 0 < report.tiles_now < 40
    assert report.complete
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))


def test_it_follows_a_source_that_grows(source, repo):
    invert(source, repo)
    more = conditioned(55, 3, 10)
    for name, new in (("cov", more), ("t", np.arange(400, 455))):
        zarr.open_group(source)[name].append(new)
    report = invert(source, repo)
    assert (report.grown_from, report.tiles_now) == ((400, 3, 3), 6)
    assert [message.rpartition(": ")[2] for message in messages(repo)].count("complete") == 2
    assert_same_bits(opened(repo)["inverse"].values, inverse(np.concatenate([A, more])))
    assert opened(repo)["t"].values.tolist() == list(range(455))


def test_readers_have_the_old_one_until_the_new_one_is_complete(source, repo):
    invert(source, repo)
    old, seen = opened(repo)["inverse"].values, set()

    def look(progress):
        found = opened(repo)
        seen.add((found.attrs["complete"], np.array_equal(found["inverse"].values, old)))

    invert(source, repo, min_rcond=0.1, overwrite=True, max_failed=None, on_progress=look)
    assert seen == {(1, True)}
    assert np.isnan(opened(repo)["inverse"].values).any()
    root = zarr.open_group(repo.readonly_session("main").store, mode="r")
    assert [*root["results"]] == ["inv"]
    assert invert(source, repo, min_rcond=0.1, max_failed=None).tiles_now == 0


def test_what_is_not_ours_stays(source, repo):
    commit(repo, lambda root: root.create_group("results/inv").create_array("x", shape=(3,), dtype="f8"))
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="dask_batchinv did not make it"):
            invert(source, repo, overwrite=overwrite)
    assert messages(repo) == ["theirs"]


def test_source_and_target_in_one_repository(repo):
    commit(repo, lambda root: root.create_array("cov", data=A, chunks=(10, 3, 3)))
    source = partial(invert, repo, repo, source_options={"group": ""})
    assert source().complete
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))
    again = source()
    assert (again.tiles_now, again.changed_tiles) == (0, 0)
    commit(repo, lambda root: root["cov"].__setitem__(slice(12, 14), np.stack([np.eye(3)] * 2)))
    report = source()
    assert (report.tiles_now, report.changed_tiles) == (1, 1)
    assert_same_bits(opened(repo)["inverse"].values[12], np.eye(3))


def test_one_in_memory_stays_in_its_process(source):
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    with (
        Client(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", set_as_default=False) as client,
        pytest.raises(ClusterError, match="lives in the memory of this process"),
    ):
        invert(source, repo, client=client)
    assert invert(source, repo).complete
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))


def command(*arguments):
    ran = CliRunner().invoke(main, [*map(str, arguments)])
    return ran.exit_code, ran.stdout


def test_commands(source, repo, tmp_path):
    url = f"icechunk+file://{tmp_path / 'repo'}?group=results/inv"
    arguments = (source, url, "--variable", "cov", "--tile-size", "720B")
    assert command("plan", *arguments)[0] == 0
    assert not messages(repo)
    code, text = command("run", *arguments, "--json")
    assert (code, json.loads(text)["complete"]) == (0, True)
    assert json.loads(text)["target"] == f"icechunk+file://{tmp_path / 'repo'}?branch=main&group=results/inv"
    assert command("status", url)[0] == 0
    assert command("status", tmp_path / "back")[0] == 2
    assert command("verify", url, "--source", source)[0] == 0
    # And back, from a tag.
    repo.create_tag("v1", snapshot_id=repo.lookup_branch("main"))
    back = f"icechunk+file://{tmp_path / 'repo'}?tag=v1"
    assert command("run", back, tmp_path / "t", "--variable", "results/inv/inverse")[0] == 0
    assert command("status", tmp_path / "t")[0] == 0  # it finds the source again
    np.testing.assert_allclose(zarr.open_group(tmp_path / "t")["inverse"][...], A, rtol=1e-9)


def test_what_is_refused(source, repo, tmp_path):
    for place, options, text in (
        (repo, {"group": "g", "branch": "nope"}, "cannot be opened: RefNotFoundError"),
        (repo, {"grup": "g"}, "not grup"),
        (repo, {"group": "g", "tag": "nope"}, "cannot be opened"),
        (f"icechunk+file://{tmp_path}/nowhere?group=g", None, "create one first"),
        ("icechunk+ftp://host/x?group=g", None, "expected icechunk"),
        (repo.writable_session("main").store, None, "pass the repository"),
    ):
        with pytest.raises(TargetError, match=text):
            invert_store(source, place, variable="cov", target_options=options)
    with pytest.raises(RefusedError, match="stores format 3 alone"):
        invert(source, repo, zarr_format=2)
    repo.create_tag("v0", snapshot_id=repo.lookup_branch("main"))
    with pytest.raises(TargetError, match="cannot be written"):
        invert_store(source, repo, variable="cov", target_options={"group": "g", "tag": "v0"})
    assert not messages(repo)
    assert not os.path.exists(tmp_path / "nowhere")


# --- what was found by those who tried to break it ---------------------------------------------------------------


def test_what_others_change_of_an_earlier_batch_is_done_again(source, repo, monkeypatch):
    small_batches(monkeypatch)
    theirs = partial(commit, repo, lambda root: root["results/inv/inverse"].__setitem__(slice(0, 5), 0))
    left = [theirs]

    def late(progress):
        if progress.matrices_done >= 150 and left:
            left.pop()()

    with pytest.raises(JobFailedError, match=r"1 tile of .* changed by other commits meanwhile"):
        invert(source, repo, on_progress=late)
    assert not opened(repo).attrs["complete"]
    assert invert(source, repo).tiles_now == 1
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))


def test_what_others_put_in_the_place_of_the_old_one_is_not_replaced(source, repo):
    invert(source, repo)

    def theirs():
        session = repo.writable_session("main")
        made = xr.Dataset({"inverse": ("q", np.arange(7.0))}, attrs={"owner": "theirs"})
        made.to_zarr(session.store, group="results/inv", mode="w", consolidated=False, zarr_format=3)
        session.commit("theirs")

    with pytest.raises(ConnectionError, match="was changed by others meanwhile; what was built lies in"):
        invert(source, repo, min_rcond=1e-9, overwrite=True, on_progress=once(theirs))
    assert opened(repo).attrs["owner"] == "theirs"
    assert opened(repo)["inverse"].values.tolist() == list(range(7))


@pytest.mark.parametrize(("shape", "more", "axis"), [((200, 3, 3), 100, 0), ((3, 4, 3, 3), 3, 1)])
def test_it_grows_where_that_moves_the_rows_of_its_ledger(tmp_path, repo, shape, more, axis):
    rng = np.random.default_rng(0)
    array = zarr.create_array(tmp_path / "a", shape=shape, chunks=(1,) * (len(shape) - 2) + (3, 3), dtype="f8")
    array[...] = rng.normal(size=shape)
    invert_store(tmp_path / "a", repo, tile_size=72, target_options=GROUP)
    array.append(rng.normal(size=(*shape[:axis], more, *shape[axis + 1 :])), axis=axis)
    assert invert_store(tmp_path / "a", repo, tile_size=72, target_options=GROUP).complete
    assert_same_bits(opened(repo)["inverse"].values, inverse(array[...]))
    assert invert_store(tmp_path / "a", repo, tile_size=72, target_options=GROUP).tiles_now == 0


def test_one_in_memory_gets_all_batches(source, monkeypatch):
    small_batches(monkeypatch)
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    assert invert(source, repo).complete
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))


def test_two_groups_are_begun_at_the_same_time(source, repo, storage, monkeypatch):
    real, left = branches.Branch.make_groups, ["once"]

    def late(self, paths):
        if left:
            left.pop()
            invert(source, icechunk.Repository.open(storage), target_options={"group": "results/other"})
        real(self, paths)

    monkeypatch.setattr(branches.Branch, "make_groups", late)
    assert invert(source, repo).complete
    assert {*zarr.open_group(repo.readonly_session("main").store, mode="r")["results"]} == {"inv", "other"}


def test_two_runs_at_a_new_group(source, repo, storage, monkeypatch):
    real, left = branches.Branch.commit, ["once"]

    def late(self, message):
        if "begun" in message and left:
            left.pop()
            invert(source, icechunk.Repository.open(storage))
        real(self, message)

    monkeypatch.setattr(branches.Branch, "commit", late)
    with pytest.raises(TargetInUseError, match="changed by another run meanwhile"):
        invert(source, repo)
    assert invert(source, repo).tiles_now == 0


@pytest.mark.parametrize("error", [icechunk.IcechunkError("passes"), KeyboardInterrupt()])
def test_an_exchange_that_was_committed_is_done_whatever_comes_then(source, repo, monkeypatch, error):
    invert(source, repo)
    real = branches.Branch.exchange

    def broken(self, one, other):
        real(self, one, other)
        raise error

    monkeypatch.setattr(branches.Branch, "exchange", broken)
    assert invert(source, repo, min_rcond=1e-9, overwrite=True).complete
    monkeypatch.undo()
    assert [*zarr.open_group(repo.readonly_session("main").store, mode="r")["results"]] == ["inv"]
    assert invert(source, repo, min_rcond=1e-9).tiles_now == 0


@pytest.mark.parametrize("which", [2, 4, 6, 9])
def test_a_session_that_cannot_be_opened_once_loses_nothing(source, repo, monkeypatch, which):
    small_batches(monkeypatch)
    real, asked = branches.Branch._open, []

    def fails_once(self):
        asked.append(1)
        if len(asked) == which:
            raise icechunk.IcechunkError("passes")
        return real(self)

    monkeypatch.setattr(branches.Branch, "_open", fails_once)
    with suppress(OSError, JobFailedError, TargetError):  # all that a run may end with
        invert(source, repo)
    assert len(asked) >= which
    monkeypatch.undo()
    assert invert(source, repo).complete
    assert_same_bits(opened(repo)["inverse"].values, inverse(A))


def test_a_target_is_not_replaced_by_its_own_inverse(source, repo, tmp_path):
    invert(source, repo)
    os.symlink(tmp_path / "repo", tmp_path / "link")
    for place, options, variable in (
        (repo, {"group": ""}, "results/inv/inverse"),
        (f"icechunk+file://{tmp_path / 'link'}?group=results/inv", None, "inverse"),
    ):
        with pytest.raises(TargetError, match="source"):
            invert(place, repo, variable=variable, source_options=options, overwrite=True)
    with pytest.raises(OSError, match="is an array: nothing can lie in it"):
        invert(source, repo, target_options={"group": "results/inv/inverse/deep"})


def test_arrays_may_have_any_name_and_groups_are_texts(source, repo):
    options = {"names": {"inverse": "x.json"}, "target_options": {"group": "a b/c&d"}}
    for overwrite in (False, True):
        assert invert(source, repo, overwrite=overwrite, **options).complete
    root = zarr.open_group(repo.readonly_session("main").store, mode="r")
    assert_same_bits(root["a b/c&d/x.json"][...], inverse(A))
    assert [*root["a b"]] == ["c&d"]
    for wrong in ({"group": None}, {"group": 5}, ["group", "x"]):
        with pytest.raises(TargetError, match=r"is a text|are a mapping"):
            invert(source, repo, target_options=wrong)
