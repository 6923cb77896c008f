"""Tiles are read ahead and written behind, read units decoded once, small jobs run here: and all comes out the same."""

import subprocess
import sys
from dataclasses import replace

import dask
import fsspec
import numpy as np
import pytest
import zarr

from dask_batchinv import JobFailedError, invert_store, verify_store
from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.driver.cutting import tasks_of
from dask_batchinv.job.driver.executor import InProcess
from dask_batchinv.job.driver.placing import plan_here, plan_locally
from dask_batchinv.job.events import Heartbeat
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.results import TileResult
from tests.chunks.test_direct_reading import opened  # noqa: F401  (a fixture)
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target, tree

# --- stores that make us wait -----------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "shards"])
def far(request):
    """A source in a store, 100 tiles of it, as Zarr reads it and as we do."""
    url = f"memory://far-{request.param}/s"
    a = conditioned(1000, 3, 10)
    shards = {"shards": (10, 3, 3)} if request.param == "shards" else {}
    zarr.create_array(url, shape=a.shape, chunks=(5, 3, 3), dtype="f8", overwrite=True, **shards)[...] = a
    return url, a


@pytest.mark.parametrize("to", ["memory", "disk"])
def test_what_is_read_ahead_and_written_behind_is_the_same(tmp_path, far, threads, to, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.plan.plan.SPAN_NBYTES", 2 * 720)
    url, a = far
    target = url.removesuffix("s") + "t" if to == "memory" else tmp_path / "t"
    plan = plan_for(prepare(url, target, JobOptions(tile_size=720)), Workers(1, 2, None))
    assert (plan.ahead, plan.together, plan.tiling.n_tiles) == (8, 2, 100)
    report = invert_store(url, target, client=threads, tile_size=720, overwrite=True)
    assert report.tiles_now == 100
    zarr.create_array(tmp_path / "s", data=a, chunks=(10, 3, 3))
    invert_store(tmp_path / "s", tmp_path / "whole", client=threads, tile_size=720)
    for got, whole in zip(read_target(target), read_target(tmp_path / "whole"), strict=True):
        assert_same_bits(got, whole)
    assert verify_store(target, source=url, client=threads).ok


def test_a_chunk_that_is_gone_is_named_and_all_others_are_done(tmp_path, far, threads, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.plan.plan.SPAN_NBYTES", 2 * 720)
    url, _ = far
    files = fsspec.filesystem("memory")
    key = sorted(key for key in files.find(url) if "/c/" in key)[17]
    files.rm(key)
    with pytest.raises(JobFailedError) as caught:
        invert_store(url, tmp_path / "t", client=threads, tile_size=720)
    failed = caught.value.report.failed_tiles
    assert [tile.number for tile in failed] in ([int(key.split("/c/")[1].split("/")[0]) // n] for n in (1, 2))
    assert caught.value.report.tiles_now in (99, 100)  # in the larger tiles of one, all else is done
    assert "not in the store" in failed[0].cause


def test_memory_decides_how_far_ahead(far, tmp_path):
    job = prepare(far[0], tmp_path / "t", JobOptions(tile_size="1MiB"))
    plans = [plan_for(job, Workers(1, 2, memory)) for memory in (None, 2**30, 400 * 2**20)]
    assert plans[0].ahead == 8
    assert [plan.ahead for plan in plans] == sorted((plan.ahead for plan in plans), reverse=True)
    assert all(plan.projected_nbytes <= 0.8 * (plan.limits.memory or 2**40) for plan in plans)
    assert plan_for(prepare_local(tmp_path), Workers(1, 2, None)).ahead == 0


def prepare_local(folder, chunk=(8, 3, 3), tile="1MiB", m=64, **options):
    zarr.create_array(folder / "local", data=conditioned(m, 3, 10), chunks=chunk, **options)
    return prepare(folder / "local", folder / "t", JobOptions(tile_size=tile))


# --- read units that are cut ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressors", [zarr.codecs.Crc32cCodec(), zarr.codecs.ZstdCodec()], ids=["crc32c", "zstd"])
def test_a_read_unit_that_is_cut_is_read_once(tmp_path, threads, opened, compressors):  # noqa: F811
    job = prepare_local(tmp_path, (80, 3, 3), 72, 240, compressors=compressors)
    plan = plan_for(job, Workers(1, 2, None))
    assert (plan.per_unit, plan.tiling.n_tiles, plan.read_amplification) == (80, 240, 1)
    assert [len(task) for task in tasks_of(np.arange(240), plan, 2)] == [80, 80, 80]
    invert_store(tmp_path / "local", tmp_path / "t", client=threads, tile_size=72)
    assert sorted(opened) == ["c/0/0/0", "c/1/0/0", "c/2/0/0"]
    assert verify_store(tmp_path / "t", source=tmp_path / "local", client=threads).ok


def test_a_read_unit_of_which_parts_can_be_read_is_no_reason_to_keep_tiles_together(tmp_path, threads):
    job = prepare_local(tmp_path, (80, 3, 3), 72, 240, compressors=None)
    plan = plan_for(job, Workers(1, 2, None))
    assert (plan.per_unit, plan.tiling.n_tiles, plan.read_amplification) == (1, 240, 1)
    invert_store(tmp_path / "local", tmp_path / "t", client=threads, tile_size=72)
    assert verify_store(tmp_path / "t", source=tmp_path / "local", client=threads).ok


def test_few_read_units_keep_many_threads_busy(tmp_path, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.plan.plan.SPAN_NBYTES", 72)
    plan = plan_for(prepare_local(tmp_path, (320, 3, 3), 72, 320), Workers(4, 1, None))
    assert [len(task) for task in tasks_of(np.arange(320), plan, 4)] == [80] * 4


def test_what_is_left_of_tiles_is_given_out_once(tmp_path):
    plan = plan_for(prepare_local(tmp_path, (320, 3, 3), 72, 960), Workers(1, 2, None))
    numbers = np.flatnonzero(np.random.default_rng(0).random(960) < 0.7)
    given = [number for task in tasks_of(numbers, plan, 2) for number in task]
    assert given == numbers.tolist()
    assert all(task.start // 320 == (task.stop - 1) // 320 for task in tasks_of(numbers, plan, 2))


def test_few_tiles_at_first_and_at_the_end_many_between(tmp_path):
    plan = plan_for(prepare_local(tmp_path), Workers(1, 2, None))
    plan = replace(plan, together=1, per_unit=1, nbytes_out=plan.tiling.n_tiles * 2**24)
    sizes = [len(task) for task in tasks_of(np.arange(1000), plan, 2)]
    assert sum(sizes) == 1000
    assert sizes[:5] == [8, 8, 8, 8, 16]
    assert sizes[-3:] == [1] * 3
    assert max(sizes) == 16


def test_tasks_that_read_ahead_are_long(far, tmp_path):
    plan = plan_for(prepare(far[0], tmp_path / "t", JobOptions(tile_size=720)), Workers(1, 2, None))
    assert [len(task) for task in tasks_of(np.arange(100), replace(plan, together=1), 2)] == [50, 50]


def test_rows_that_hold_no_whole_units_are_not_counted_by_them(tmp_path):
    zarr.create_array(tmp_path / "odd", shape=(3, 50, 2, 2), chunks=(1, 16, 2, 2), dtype="f8")
    plan = plan_for(prepare(tmp_path / "odd", tmp_path / "t", JobOptions(tile_size=32)), Workers(1, 2, None))
    assert plan.per_unit == 1


# --- small jobs -------------------------------------------------------------------------------------------------


def test_a_small_job_runs_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.driver.cluster.connect", None)
    job = prepare_local(tmp_path)
    assert plan_here(job, ClusterOptions()).where.startswith("this process")
    assert "this process, because it is small" in str(plan_locally(job, ClusterOptions()))
    assert plan_here(job, ClusterOptions(workers=1)) is None
    report = invert_store(tmp_path / "local", tmp_path / "t")
    assert (report.complete, report.tiles_now) == (True, 1)
    with dask.config.set({"batchinv.job.in-process": 100}):
        assert plan_here(job, ClusterOptions()) is None
        assert "worker processes" in str(plan_locally(job, ClusterOptions(memory_limit="1GiB")))


def test_where_a_job_runs_does_not_show(tmp_path, processes):
    prepare_local(tmp_path, (4, 3, 3), 288)
    invert_store(tmp_path / "local", tmp_path / "here", tile_size=288)
    invert_store(tmp_path / "local", tmp_path / "there", tile_size=288, client=processes)
    here, there = (
        {name: content for name, content in tree(tmp_path / name).items() if name.split("/")[0] in ("inverse", "info")}
        for name in ("here", "there")
    )
    assert here == there


def test_tiles_on_threads_are_each_done_once_and_tried_again():
    tried = []

    def work(task, span):
        tried.append(span)
        if span.start == 3 and tried.count(span) < 2:
            raise OSError("at first")
        if span.start == 5:
            return [TileResult(5, None, "never")]
        return [TileResult(number, number) for number in span]

    spans = [range(number, number + 1) for number in range(8)]
    found = [each for each in InProcess(2).run(work, None, spans, attempts=2) if not isinstance(each, Heartbeat)]
    assert sorted(result.number for result in found) == list(range(8))
    assert {result.number: result.error for result in found if result.error} == {5: "never"}
    assert {result.number for result in found if result.attempts == 2} == {3, 5}


def test_nothing_is_begun_after_a_result_that_stops_or_when_nobody_listens():
    begun = []

    def work(task, span):
        begun.append(span.start)
        return [TileResult(span.start, None, "full", stops=True)]

    spans = [range(number, number + 1) for number in range(100)]
    assert len([each for each in InProcess(1).run(work, None, spans, attempts=3) if isinstance(each, TileResult)]) < 5
    results = InProcess(1).run(work, None, spans, attempts=3)
    next(results)
    results.close()
    assert len(begun) < 10


# --- imports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "code", "absent"),
    [
        ("", "import dask_batchinv", "xarray zarr distributed dask.array llvmlite scipy tqdm"),
        ("import xarray, dask.array, zarr", "import dask_batchinv", "distributed llvmlite tqdm"),
        ("", "from dask_batchinv import inverse; inverse([[2.0]])", "distributed tqdm"),
        ("", "from dask_batchinv import invert_store; invert_store(*sys.argv[1:])",
         "distributed tqdm xarray dask.array"),
        ("", "from dask_batchinv.cli import main; main(['run', *sys.argv[1:]], standalone_mode=False)",
         "distributed tqdm xarray dask.array"),
    ],
)  # fmt: skip
def test_what_is_not_used_is_not_imported(tmp_path, theirs, code, absent):
    """Beyond what the user's own imports bring: with some packages installed, Xarray's bring Numba, say."""
    prepare_local(tmp_path)
    begin = f"import sys\n{theirs}\nbefore = set(sys.modules)"
    check = f"print([name for name in {absent!r}.split() if name in sys.modules and name not in before])"
    whole = f"{begin}\ntry:\n    {code}\nexcept SystemExit:\n    pass\nfinally:\n    {check}"
    command = [sys.executable, "-c", whole, tmp_path / "local", tmp_path / "t"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("code", [
    "import xarray, dask_batchinv",
    "import dask_batchinv, xarray",
    "import dask_batchinv; from xarray import Dataset; import xarray",
    "import dask_batchinv.labelled, xarray",
    "import dask_batchinv; dask_batchinv.inverse; import xarray",
    "from dask_batchinv import inverse; import importlib, xarray; importlib.reload(xarray)",
    "import dask_batchinv, importlib.util; assert importlib.util.find_spec('xarray').loader.is_package; import xarray",
])  # fmt: skip
def test_xarray_has_its_accessors_whatever_was_imported_first(code):
    check = "assert xarray.Dataset().linalg.inv; assert xarray.DataArray(1.0).linalg; assert xarray.__spec__.loader"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True)


def test_xarray_can_be_imported_where_the_accessors_cannot():
    code = (
        "import sys, dask_batchinv; sys.modules['dask_batchinv.accessor'] = None; import warnings; "
        "warnings.simplefilter('error'); import xarray; xarray.Dataset()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there_before_they_are_used():
    code = (
        "import dask_batchinv as d, pickle; assert set(d.__all__) <= set(dir(d)); "
        "assert all(getattr(d, name) for name in d.__all__); assert d.Info.__module__ == 'dask_batchinv'; "
        "assert pickle.loads(pickle.dumps(d.Info.OVERFLOW)) is d.Info.OVERFLOW; assert not hasattr(d, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
