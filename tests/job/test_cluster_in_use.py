"""Clusters that are there already: found as everything in Dask finds them, waited for, made to grow, used in part."""

import contextlib
import threading
import time
from types import SimpleNamespace

import dask
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster, Worker, get_worker, worker_client

from dask_batchinv import ClusterError, RefusedError, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.driver.placing import plan_for_unlike
from dask_batchinv.job.driver.roster import Worker as Known
from dask_batchinv.job.driver.roster import _has_room
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import prepare
from dask_batchinv.job.worker import invert_tiles
from tests.support.stacks import conditioned


@pytest.fixture
def source(make_source, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.plan.plan.LARGEST_SPAN", 1)
    return make_source(conditioned(400, 3, 10), chunks=(10, 3, 3))


@pytest.fixture
def cluster():
    """A cluster of one thread, in this process."""
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, host="127.0.0.1", dashboard_address="127.0.0.1:0",
        protocol="tcp",
    ) as cluster:  # fmt: skip
        yield cluster


@pytest.fixture
def slow(monkeypatch):
    """Tiles that take a while, on workers of this process."""
    original = invert_tiles.do_span

    def do_span(*arguments):
        time.sleep(0.2)
        return original(*arguments)

    monkeypatch.setattr(invert_tiles, "do_span", do_span)


# --- found ------------------------------------------------------------------------------------------------------


def test_the_active_client_is_used(tmp_path, source, cluster):
    with Client(cluster):
        report = invert_store(source, tmp_path / "t", tile_size=720)
        assert report.complete
        assert "tiles" in cluster.scheduler.task_prefixes
        assert verify_store(tmp_path / "t", source=source).ok
    with Client(cluster, set_as_default=False) as client, client.as_current():
        assert ClusterOptions().resolved().client is client
    assert ClusterOptions().resolved().is_local


def test_what_is_said_of_a_cluster_of_its_own_comes_before_the_active_client(cluster):
    with Client(cluster):
        assert ClusterOptions(workers=1).resolved().is_local


def test_the_scheduler_of_the_configuration_is_used(tmp_path, source, cluster):
    with dask.config.set({"scheduler-address": cluster.scheduler_address}):
        assert invert_store(source, tmp_path / "t", tile_size=720).complete
    assert "tiles" in cluster.scheduler.task_prefixes


def test_a_scheduler_is_found_by_its_file(tmp_path, source, cluster):
    file = tmp_path / "scheduler.json"
    file.write_text(f'{{"address": "{cluster.scheduler_address}"}}')
    assert invert_store(source, tmp_path / "t", scheduler_file=file, tile_size=720).complete
    assert "tiles" in cluster.scheduler.task_prefixes


def test_the_file_of_a_scheduler_that_starts_is_waited_for(tmp_path, source, cluster):
    file = tmp_path / "scheduler.json"
    file.touch()
    writer = threading.Timer(1, file.write_text, [f'{{"address": "{cluster.scheduler_address}"}}'])
    writer.start()
    assert invert_store(source, tmp_path / "t", scheduler_file=file, tile_size=720).complete
    writer.join()


def test_a_plan_says_on_which_cluster_a_job_would_run(tmp_path, source, cluster):
    arguments = ["plan", str(source), str(tmp_path / "t"), "--scheduler", cluster.scheduler_address]
    assert f"workers of {cluster.scheduler_address}" in CliRunner().invoke(main, arguments).output


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"address": 1', "\0" * 100])
def test_a_scheduler_file_that_says_nothing(tmp_path, source, content):
    file = tmp_path / "scheduler.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ClusterError, match=r"no address of a scheduler in .*scheduler.json"):
        invert_store(source, tmp_path / "t", scheduler_file=file, wait=0.1)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"client": SimpleNamespace(asynchronous=False), "scheduler": "tcp://127.0.0.1:1"}, "not several of them"),
        ({"scheduler_file": "f", "scheduler": "tcp://127.0.0.1:1"}, "not several of them"),
        ({"scheduler_file": "f", "workers": 2}, "`workers=`: only for the local cluster"),
        ({"wait_for_workers": 2}, "`wait_for_workers=`: only for a running cluster"),
        ({"only_workers": ["a"]}, "`only_workers=`: only for a running cluster"),
        ({"only_workers": "a"}, "takes a list"),
        ({"scheduler": "a", "only_workers": ["resource:"]}, "a pattern that is empty"),
        ({"client": "tcp://127.0.0.1:1"}, "got a str: pass scheduler="),
        ({"client": object()}, "got a object: pass Client"),
        ({"scheduler": "a", "wait_for_workers": 0}, "from 1 on"),
        ({"scheduler": "a", "wait": "two hours"}, "not a time"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, source, options, match):
    with pytest.raises(RefusedError, match=match):
        invert_store(source, tmp_path / "t", **options)


def job_in_a_task(source, target, *, seceded=False):
    """Do a job that is too large to stay in a task."""
    with dask.config.set({"batchinv.job.in-process": 0}), worker_client() if seceded else contextlib.nullcontext():
        report = invert_store(source, target, tile_size=720)
        assert report.where.startswith("workers of tcp://")
        return report.complete


@pytest.fixture
def one_thread():
    """A client of a worker with one thread, in a process of its own: a client in a task becomes its default."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.mark.parametrize("seceded", [False, True])
def test_a_job_in_a_task_of_a_cluster_with_one_thread(tmp_path, source, one_thread, seceded):
    """Its worker takes tiles meanwhile, and others' tasks after it."""
    assert one_thread.submit(job_in_a_task, source, tmp_path / "t", seceded=seceded).result(timeout=60)
    assert one_thread.submit(sum, [1], pure=False).result(timeout=10) == 1


def test_small_jobs_in_tasks_stay_there(tmp_path, make_source, one_thread):
    """Many may be mapped at once; each has the thread of its task."""
    source = make_source(conditioned(8, 3, 10))
    report = one_thread.submit(invert_store, source, tmp_path / "t").result(timeout=60)
    assert (report.threads_per_worker, report.where) == (1, "this process, because it is small")


def test_what_is_in_the_memory_of_this_process_goes_to_workers_in_it_alone(source, cluster):
    with Client(cluster):
        assert ClusterOptions().resolved(is_here=True).is_local
    with Client(processes=False, n_workers=1, dashboard_address="127.0.0.1:0") as client:
        assert ClusterOptions().resolved(is_here=True).client is client
        assert invert_store(source, "memory://in-use/t", tile_size=720).complete


def test_a_small_target_is_verified_here(tmp_path, make_source, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.driver.own_cluster.subprocess", None)
    source, seen = make_source(conditioned(8, 3, 10)), []
    invert_store(source, tmp_path / "t")
    assert verify_store(tmp_path / "t", source=source, on_progress=seen.append).ok
    assert (seen[-1].activity, seen[-1].matrices_done) == ("verifying", 8)


# --- waited for -------------------------------------------------------------------------------------------------


def test_workers_are_waited_for(tmp_path, source, cluster):
    with Client(cluster, set_as_default=False) as client:
        with pytest.raises(ClusterError, match=r"has 1 of 2 workers after 1 s"):
            invert_store(source, tmp_path / "t", client=client, wait_for_workers=2, wait="1s")
        assert not (tmp_path / "t").exists()
        client.loop.add_callback(start_later, cluster, 1.0)
        start = time.monotonic()
        report = invert_store(source, tmp_path / "t", client=client, wait_for_workers=2, wait="1m", tile_size=720)
        assert time.monotonic() - start > 1
        assert (report.complete, report.workers) == (True, 2)


async def start_later(cluster, seconds):
    import asyncio

    await asyncio.sleep(seconds)
    cluster.scale(2)


@pytest.mark.parametrize("minimum", [0, 1])
def test_an_adaptive_cluster_grows(tmp_path, source, slow, minimum):
    with (
        dask.config.set({"distributed.adaptive.target-duration": "1s"}),
        LocalCluster(
            n_workers=0,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.adapt(minimum=minimum, maximum=3, interval="200ms", wait_count=3)
        most = []
        report = invert_store(
            source,
            tmp_path / "t",
            client=client,
            tile_size=720,
            on_progress=lambda _: most.append(len(cluster.workers)),
        )
        assert (report.complete, report.deaths, report.workers) == (True, 0, 3)
        assert max(most) == 3
        # Nothing is left that waits for a worker that never comes.
        deadline = time.monotonic() + 10
        while cluster.scheduler.unrunnable or cluster.scheduler.tasks:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# --- used in part -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unlike_workers(specs):
    """A cluster of workers in this process, of the given names and what else they have."""
    with LocalCluster(
        n_workers=0, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster, Client(cluster, set_as_default=False) as client:  # fmt: skip
        for name, options in specs.items():
            cluster.worker_spec[name] = {"cls": Worker, "options": {"host": "127.0.0.1", "nthreads": 1} | options}
        client.sync(cluster._correct_state)
        client.wait_for_workers(len(specs), timeout=30)
        yield client


@pytest.mark.parametrize(
    ("only", "used"),
    [
        (["left"], {"left"}),
        (["le*", "resource:fast"], {"left", "right"}),
        (["resource:fast"], {"right"}),
        ((), {"left", "middle", "right"}),
    ],
)
def test_only_some_workers_are_used(tmp_path, source, monkeypatch, only, used):
    original, seen = invert_tiles.do_span, set()

    def do_span(*arguments):
        seen.add(get_worker().name)
        time.sleep(0.02)
        return original(*arguments)

    monkeypatch.setattr(invert_tiles, "do_span", do_span)
    with unlike_workers({"left": {}, "middle": {}, "right": {"resources": {"fast": 1}}}) as client:
        report = invert_store(source, tmp_path / "t", client=client, only_workers=only, tile_size=720)
        assert (report.complete, report.workers, seen) == (True, len(used), used)


def test_no_worker_matches(tmp_path, source, cluster):
    with (
        Client(cluster, set_as_default=False) as client,
        pytest.raises(ClusterError, match=r"has 0 of 1 worker that are 'gpu-\*' .* There are: 0"),
    ):
        invert_store(source, tmp_path / "t", client=client, only_workers=["gpu-*"], wait=0.5)


def test_unlike_workers_are_planned_for_one_by_one(tmp_path, source):
    """The plan fits the one with the least memory for each thread; one that is too small for any is left out."""
    job = prepare(source, tmp_path / "t", JobOptions())
    kinds = [Workers(1, 16, 2**37), Workers(2, 1, 2**30), Workers(1, 4, 2**20)]
    plan, like = plan_for_unlike(job, kinds)
    assert (like.count, like.threads, like.memory) == (4, 1, 2**30)
    assert [plan.room(kind.threads, kind.memory) for kind in kinds] == [16, 1, 0]
    need = plan.projected_nbytes / 0.8
    assert plan.room(1, int(need) + 1) == 1
    assert plan.room(1, int(need) - 1000) == 0
    assert plan.room(7, None) == 7


def test_a_worker_gets_no_more_than_its_memory_holds():
    roomy, tight = Known(4, 4, 0.0), Known(4, 2, 0.0)
    for spans in range(10):
        roomy.spans = tight.spans = spans
        assert _has_room(roomy, all_busy=False) == (spans < 8)
        assert _has_room(tight, all_busy=False) == (spans < 2)


def test_a_worker_too_small_for_a_tile_is_left_out(tmp_path, source):
    # The large one has no limit: Dask would compare it with what all tests before have left in this process.
    with unlike_workers({"large": {"memory_limit": 0}, "small": {"memory_limit": 2**20}}) as client:
        report = invert_store(source, tmp_path / "t", client=client, tile_size=720)
        assert report.complete
        assert any("its memory does not hold a tile" in event for event in report.worker_events)


# --- restarted --------------------------------------------------------------------------------------------------


def test_a_cluster_that_somebody_restarts(tmp_path, source):
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as owner,
        Client(cluster.scheduler_address, set_as_default=False) as guest,
    ):
        done = []

        def restart(progress):
            if not done and progress.matrices_done:
                done.append(progress.matrices_done)
                owner.restart()
            time.sleep(0.02)

        report = invert_store(source, tmp_path / "t", client=guest, tile_size=720, on_progress=restart)
        assert report.complete
        assert done
        assert done[0] < 400
    assert verify_store(tmp_path / "t", source=source, workers=1).ok
