"""What must not run is refused with a named error, before anything is written."""

import json
import os
import time
from types import SimpleNamespace

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client

from dask_batchinv import ClusterError, DeviceError, PlanError, RefusedError, SourceError, TargetError, invert_store
from tests.support.stacks import conditioned


@pytest.fixture
def source(make_source):
    return make_source(conditioned(40, 3, 10))


@pytest.fixture
def refused(tmp_path, source, monkeypatch):
    """Call invert_store, expect an error, and see that nothing was written and no cluster started."""

    def tree():
        return sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))

    def check(error, match, source=source, target=tmp_path / "target", cluster=False, **options):
        before = tree()
        if not cluster:
            monkeypatch.setattr("dask_batchinv.job.driver.own_cluster.subprocess", None)
        with pytest.raises(error, match=match) as caught:
            invert_store(source, target, **options)
        assert tree() == before
        return caught.value

    return check


# --- the source -----------------------------------------------------------------------------------------------


def test_missing_source(refused, tmp_path):
    error = refused(SourceError, r"there is nothing at .*nowhere", source=tmp_path / "nowhere")
    assert isinstance(error, RefusedError)
    assert isinstance(error, ValueError)
    (tmp_path / "file").write_text("x")
    refused(SourceError, r"file is a file, and no Zarr array or group", source=tmp_path / "file")
    refused(SourceError, r"(?i)protocol", source="nosuch://bucket/x")
    refused(SourceError, r"empty string", source="")


def test_missing_variable(refused, tmp_path, source):
    group = zarr.create_group(tmp_path / "group")
    refused(SourceError, r"group is a group without arrays", source=tmp_path / "group")
    group.create_array("A", shape=(4, 3, 3), dtype="f8")
    group.create_array("B", shape=(4, 3, 3), dtype="f8")
    refused(SourceError, r"it has A \(4, 3, 3\), B \(4, 3, 3\)", source=tmp_path / "group")
    refused(SourceError, r"no variable 'C'.*it has A", source=tmp_path / "group", variable="C")
    refused(SourceError, r"is not a name inside the group", source=tmp_path / "group", variable="../source.zarr")
    refused(SourceError, r"is an array, not a group", variable="A")


@pytest.mark.parametrize(
    ("shape", "match"),
    [((5, 3, 2), "are 3 and 2 long: these are no square matrices$"), ((5,), "at least two dimensions")],
)
def test_not_a_stack_of_squares(refused, make_source, shape, match):
    refused(SourceError, match, source=make_source(np.ones(shape), name="other"))


def test_dims(refused):
    refused(SourceError, r"there is no dimension time; the source has dim_0, row, col", dims=("row", "time"))
    refused(SourceError, r"two different names", dims=("row", "row"))
    refused(SourceError, r"not equally long", dims=("dim_0", "col"))


@pytest.mark.parametrize("dtype", ["U4", "S3", "M8[s]", [("a", "f8"), ("b", "i4")]])
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_dtypes(refused, tmp_path, dtype, zarr_format):
    zarr.create_array(tmp_path / "bad", shape=(4, 2, 2), chunks=(1, 2, 2), dtype=dtype, zarr_format=zarr_format)
    refused(SourceError, r"dtype .* has no inverse here", source=tmp_path / "bad")


def v2_array(path, **changes):
    """Write the metadata of a Zarr 2 array by hand, as an attacker would."""
    path.mkdir()
    meta = {
        "zarr_format": 2, "shape": [4, 2, 2], "chunks": [4, 2, 2], "dtype": "<f8", "order": "C", "fill_value": 0,
        "filters": None, "compressor": None,
    }  # fmt: skip
    (path / ".zarray").write_text(json.dumps(meta | changes))
    return path


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}]},
        {"filters": [{"id": "pickle", "protocol": 5}]},
        {"compressor": {"id": "pickle", "protocol": 5}},
        {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]},
        {"filters": [{"id": "delta", "dtype": "<f8"}, {"id": "pickle"}]},
        {"filters": [{"id": "json2"}]},
        {"filters": [{"id": "msgpack2"}]},
        {"filters": [{"id": "no-such-codec"}]},
        {"filters": [{"id": None}]},
        {"filters": [{}]},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_codecs_of_format_2_that_are_not_safe(refused, tmp_path, changes):
    path = v2_array(tmp_path / "evil", **changes)
    content = numcodecs.Pickle().encode(np.array([Bomb(tmp_path / "exploded")], object))
    (path / "0.0.0").write_bytes(content)
    refused(SourceError, r"not among those that are safe|has no inverse here", source=path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "numcodecs.pickle"}],
        ["evil"],
        [{"name": "sharding_indexed", "configuration": {"codecs": ["bytes", "vlen-utf8"], "index_codecs": ["bytes"]}}],
        [{"name": "sharding_indexed", "configuration": {"codecs": ["bytes"], "index_codecs": ["numcodecs.pickle"]}}],
    ],
    ids=str,
)
def test_codecs_of_format_3_that_are_not_safe(refused, source, codecs):
    meta = json.loads((source / "zarr.json").read_text())
    (source / "zarr.json").write_text(json.dumps(meta | {"codecs": codecs}))
    refused(SourceError, r"not among those that are safe to run: .*zstd")


def test_a_coordinate_with_a_codec_that_is_not_safe(refused, tmp_path):
    ds = xr.Dataset({"A": (("t", "i", "j"), np.ones((3, 2, 2)))}, coords={"i": [1, 2]})
    ds.to_zarr(tmp_path / "ds", zarr_format=2)
    v2_array(tmp_path / "evil", shape=[2], chunks=[2], dtype="|O", filters=[{"id": "pickle"}])
    (tmp_path / "evil" / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["i"]}')
    import shutil

    shutil.rmtree(tmp_path / "ds" / "i")
    shutil.move(tmp_path / "evil", tmp_path / "ds" / "i")
    refused(SourceError, r"of the coordinate .* is not safe to run", source=tmp_path / "ds", variable="A")


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null", '{"node_type": "array", "zarr_format": 3}'])
def test_metadata_that_make_no_sense(refused, source, content):
    (source / "zarr.json").write_text(content)
    refused(SourceError, r"cannot be opened|no Zarr array|invalid metadata")


@pytest.mark.parametrize("name", ["info", "inverse", "rcond", "ledger"])
def test_names_that_the_target_needs(refused, tmp_path, name):
    a = conditioned(4, 2, 3)
    xr.Dataset({"A": (("t", "i", "j"), a)}, coords={name: ("t", np.ones(4))}).to_zarr(
        tmp_path / "coordinate", consolidated=False
    )
    refused(SourceError, rf"{name} of .* are names", source=tmp_path / "coordinate", variable="A")
    xr.Dataset({"A": ((name, "i", "j"), a)}).to_zarr(tmp_path / "dimension", consolidated=False)
    refused(SourceError, rf"{name} of .* are names", source=tmp_path / "dimension")


def test_coordinates_that_cannot_be_read(refused, tmp_path, threads):
    ds = xr.Dataset({"A": (("t", "i", "j"), conditioned(4, 2, 3))}, coords={"i": [3, 4]})
    ds.to_zarr(tmp_path / "ds", consolidated=False)
    (tmp_path / "ds" / "i" / "c" / "0").write_bytes(b"junk")
    refused(SourceError, r"coordinates of .* cannot be read", source=tmp_path / "ds", client=threads, cluster=True)
    meta = tmp_path / "ds" / "i" / "zarr.json"
    meta.write_text(meta.read_text().replace('"shape": [\n    2', '"shape": [\n    3'))
    refused(SourceError, r"i is not as long as its dimensions", source=tmp_path / "ds")


# --- the target -----------------------------------------------------------------------------------------------


def test_source_and_target_in_each_other(refused, source, tmp_path):
    ds = xr.Dataset({"A": (("t", "i", "j"), np.ones((3, 2, 2)) + np.eye(2))})
    ds.to_zarr(tmp_path / "ds", consolidated=False)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "up").symlink_to(tmp_path)
    same = [source, f"{source}/", tmp_path / "link", tmp_path / "x" / ".." / source.name, f"file://{source}",
            tmp_path / "up" / source.name]  # fmt: skip
    for target in same:
        refused(TargetError, r"is, or lies inside, the source", target=target)
    refused(TargetError, r"is, or lies inside, the source", target=source / "inside")
    refused(TargetError, r"the source .* lies inside the target", target=tmp_path)
    for target in (tmp_path / "ds", tmp_path / "ds" / "A", tmp_path / "ds" / "new"):
        refused(TargetError, r"is, or lies inside, the source", source=tmp_path / "ds", target=target, overwrite=True)


def test_a_source_that_is_a_link_into_the_target(refused, source, tmp_path, threads):
    invert_store(source, tmp_path / "target", client=threads)
    zarr.create_group(tmp_path / "group")
    (tmp_path / "group" / "A").symlink_to(tmp_path / "target" / "inverse")
    refused(TargetError, r"lies inside the target", source=tmp_path / "group", variable="A", overwrite=True)


@pytest.mark.parametrize("target", ["", "nosuch://x/y"])
def test_a_target_that_makes_no_sense(refused, target):
    refused(TargetError, r"empty string|cannot be read", target=target)


def test_a_target_that_is_not_ours_is_never_touched(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    zarr.create_group(tmp_path / "group")
    zarr.create_array(tmp_path / "array", shape=(3,), dtype="f8")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "group", "array", "file"):
        for overwrite in (False, True):
            refused(
                TargetError, r"exists, and dask_batchinv did not make it", target=tmp_path / name, overwrite=overwrite
            )


def test_a_target_of_another_job_says_what_differs(refused, make_source, source, tmp_path, threads):
    invert_store(source, tmp_path / "target", client=threads)
    error = refused(TargetError, r"belongs to another job", assume_a="symmetric", min_rcond=1e-9)
    assert "assume_a was 'general', is 'symmetric'" in str(error)
    assert "min_rcond was 0.0, is 1e-09" in str(error)
    assert "`overwrite=True`" in str(error)
    other = make_source(conditioned(10, 3, 10), name="other")
    refused(TargetError, r"source was .*source.zarr', is .*other'", source=other)


# --- parameters, plan, cluster --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"assume_a": "positive"},
        {"missing": "zero"},
        {"min_rcond": -1.0},
        {"min_rcond": float("nan")},
        {"max_failed": -1},
        {"tile_size": "many"},
        {"tile_size": -5},
    ],
    ids=str,
)
def test_parameters(refused, wrong):
    refused(RefusedError, next(iter(wrong)), **wrong)


def test_device_without_one(refused):
    refused(DeviceError, "CuPy cannot be imported|CUDA finds no", device="gpu")


def test_a_plan_that_does_not_fit(refused, tmp_path):
    zarr.create_array(tmp_path / "huge", shape=(2, 9000, 9000), chunks=(1, 9000, 9000), dtype="f8")
    refused(
        PlanError, r"GiB are needed.*`memory_limit=` to", source=tmp_path / "huge", cluster=True, workers=1,
        memory_limit="1GiB",
    )  # fmt: skip


def test_cluster_options(refused):
    refused(ClusterError, r"only for the local cluster", scheduler="tcp://127.0.0.1:1", workers=3)
    refused(ClusterError, r"`memory_limit=` 'much' is not a number of bytes", memory_limit="much", cluster=True)
    refused(
        ClusterError, r"not several of them", scheduler="tcp://127.0.0.1:1", client=SimpleNamespace(asynchronous=False)
    )


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense", "udp://127.0.0.1:9", "tls://127.0.0.1:9"])
def test_unreachable_scheduler(refused, address):
    start = time.monotonic()
    refused(ClusterError, r"no scheduler at|needs certificates", scheduler=address)
    assert time.monotonic() - start < 8


def test_memory_store_with_workers_that_are_processes(processes, source, tmp_path):
    with pytest.raises(ClusterError, match=r"memory of this process.*processes=False"):
        invert_store(source, "memory://target", client=processes)


def test_memory_store_within_one_process(threads, source):
    report = invert_store(source, "memory://batchinv/target", client=threads)
    assert report.matrices_done == 40
    assert invert_store(source, "memory://batchinv/target", client=threads).tiles_now == 0


def test_a_target_that_workers_cannot_write(processes, source, tmp_path, monkeypatch):
    if os.geteuid() == 0:
        target = "/proc/target"
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        target = tmp_path / "locked" / "target"
    with pytest.raises(RefusedError, match=r"cannot (be written|be created|reach)"):
        invert_store(source, target, client=processes)


def test_a_cluster_without_workers(source, tmp_path, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.driver.cluster.WORKER_SECONDS", 0.5)
    with (
        Client(n_workers=0, processes=False, dashboard_address="127.0.0.1:0", set_as_default=False) as client,
        pytest.raises(ClusterError, match=r"has 0 of 1 worker after"),
    ):
        invert_store(source, tmp_path / "target", client=client)
    assert not (tmp_path / "target").exists()
