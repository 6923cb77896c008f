"""The order of events of a run: by the serial executor, which is the specification, and what is left in the target."""

import json

import pytest

from dask_batchinv import invert_store, verify_store
from dask_batchinv.job.driver.executor import Serial
from dask_batchinv.job.driver.run import Run
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Limits, StackLayout, Workers, make_plan
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.report.account import Account, account_of
from dask_batchinv.job.report.run_record import RunTotals
from dask_batchinv.job.results import TileResult
from dask_batchinv.job.target.ledger import runs_of
from dask_batchinv.job.target.lock import Lock
from dask_batchinv.job.target.state import State, decide
from dask_batchinv.location import Location, TakenOverError
from tests.support.targets import spoilt, tree

ONE = Workers(1, 1, None)


def serially(source, target, on_progress=None, **options):
    job = prepare(source, target, JobOptions(tile_size=720, max_failed=None, **options))
    run = Run(job, plan_for(job, ONE), ONE, Serial(), *([on_progress] if on_progress else []))
    left_alone = run.nothing_to_do()
    return run() if left_alone is None else run.report(left_alone)


def chunks(target):
    """What is in a target but metadata, and the ledger, which has times."""
    return {name: c for name, c in tree(target).items() if not name.endswith("zarr.json") and "ledger" not in name}


@pytest.fixture
def source(make_source):
    return make_source(spoilt(60)[0], chunks=(10, 3, 3))


def test_a_cluster_does_what_the_serial_executor_does(tmp_path, source, client):
    report = serially(source, tmp_path / "serial")
    other = invert_store(source, tmp_path / "cluster", client=client, tile_size=720, max_failed=None)
    ours, theirs = chunks(tmp_path / "serial"), chunks(tmp_path / "cluster")
    assert ours == theirs
    times = {"started", "ended", "seconds", "cpu_seconds", "timeline"}
    own = times | {"target", "per_worker", "threads_per_worker", "where"}
    assert {key: value for key, value in report.to_json().items() if key not in own} == {
        key: value for key, value in other.to_json().items() if key not in own
    }


def test_an_interrupted_run_is_finished_and_a_damaged_target_repaired(tmp_path, source):
    def stop(progress):
        if progress.matrices_done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serially(source, tmp_path / "t", stop)
    report = serially(source, tmp_path / "t")
    assert (report.tiles_proven, report.tiles_now, report.complete) == (3, 3, True)
    whole = chunks(tmp_path / "t")
    (tmp_path / "t" / "info" / "c.2").write_bytes(b"")
    report = serially(source, tmp_path / "t")
    assert [tile.number for tile in report.damaged_tiles] == [2]
    assert chunks(tmp_path / "t") == whole


def test_each_run_that_writes_leaves_a_record(tmp_path, source):
    target = Location.parse(tmp_path / "t")
    report = serially(source, tmp_path / "t")
    (first,) = runs_of(target)
    assert {first[name] for name in ("tiles_now", "tiles_proven", "stopped")} == {6, 0, None}
    assert first["started"] == report.started
    before = tree(tmp_path / "t")
    serially(source, tmp_path / "t")  # nothing was left to do, so nothing is written
    assert tree(tmp_path / "t") == before
    (tmp_path / "t" / "inverse" / "c.3.0.0").unlink()
    serially(source, tmp_path / "t")
    assert [run["tiles_now"] for run in runs_of(target)] == [6, 1]
    assert runs_of(target)[1]["n_damaged_tiles"] == 1
    assert "inverse/c.3.0.0 cannot be read" in runs_of(target)[1]["damaged_tiles"][0]["cause"]


def test_a_run_that_was_stopped_reports_even_where_no_record_can_be_kept(tmp_path, source, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dask_batchinv.job.worker.invert_tiles.write_chunks", full)
    monkeypatch.setattr("dask_batchinv.job.driver.run.record_run", full)
    report = serially(source, tmp_path / "t")
    assert report.exit_code == 1
    assert "No space left" in report.stopped


def test_the_account_of_a_target_is_that_of_the_report(tmp_path, source):
    report = serially(source, tmp_path / "t")
    account = account_of(tmp_path / "t")
    assert account == Account(**{name: getattr(report, name) for name in vars(account)})


#: For the same job, without and with overwrite, and for another one. No job is of another format.
ACTIONS = {
    State.ABSENT: ("create", "create", "create", "create"),
    State.BEING_CREATED: ("create", "create", "refuse", "create"),
    State.BEGUN: ("continue", "create", "refuse", "create"),
    State.COMPLETE: ("check", "create", "refuse", "create"),
    State.OTHER_FORMAT: (None, None, "refuse", "create"),
}


@pytest.mark.parametrize("state", State)
def test_what_a_run_does_with_a_target(state):
    for (same_job, overwrite), action in zip(
        [(True, False), (True, True), (False, False), (False, True)], ACTIONS[state], strict=True
    ):
        if action is not None:
            assert decide(state, same_job=same_job, overwrite=overwrite) == action


def test_a_run_that_has_lost_its_lock_writes_nothing_more(tmp_path, source, monkeypatch):
    before = {}

    def lost(lock):
        if (tmp_path / "t" / "rcond" / "c.3").exists():
            before.setdefault("tree", tree(tmp_path / "t"))
            raise TakenOverError("another run has taken over")

    monkeypatch.setattr(Lock, "check", lost)
    report = serially(source, tmp_path / "t")
    assert report.stopped == "another run has taken over"
    assert report.exit_code == 1
    assert {n: c for n, c in before["tree"].items() if "lock" not in n} == tree(tmp_path / "t")


def test_damage_that_was_found_before_an_interruption_is_not_forgotten(tmp_path, source, client):
    def stop(activity, matrices, tiles):
        def on_progress(now):
            if now.activity == activity and now.matrices_done >= matrices and now.failed_tiles >= tiles:
                raise KeyboardInterrupt

        return on_progress

    target = tmp_path / "t"
    with pytest.raises(KeyboardInterrupt):
        serially(source, target, stop("inverting", 40, 0))
    for chunk in ("inverse/c.1.0.0", "rcond/c.2"):
        (target / chunk).write_bytes(b"damaged")
    with pytest.raises(KeyboardInterrupt):
        serially(source, target, stop("checking", 0, 2))
    assert serially(source, target, trust_ledger=True).complete
    assert verify_store(target, client=client).ok


def test_a_target_that_is_moved_away_meanwhile_is_not_begun_again(tmp_path, source, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.plan.plan.LARGEST_SPAN", 1)

    def move(now):
        if now.matrices_done and (tmp_path / "t").exists():
            (tmp_path / "t").rename(tmp_path / "moved")

    report = serially(source, tmp_path / "t", move)
    assert "was removed, replaced or taken over" in report.stopped
    assert not (tmp_path / "t").exists()


def test_the_record_of_a_run_stays_small(tmp_path, source):
    results = [TileResult(number, None, "broken " * 1000) for number in range(2000)]
    totals = RunTotals(failed=results, damaged=results)
    plan = make_plan(
        StackLayout((2000, 2, 2), (1, 2), (1, 2, 2), 8, 8, 44, 12, False), Limits(None, 1, 0, 10), tile_nbytes=32
    )
    record = totals.record(plan, ONE, prepare(source, tmp_path / "t", JobOptions()).source, [], {}).to_json()
    assert len(json.dumps(record)) < 20_000
    assert (record["n_failed_tiles"], record["n_damaged_tiles"]) == (2000, 2000)
