"""What is lost or damaged in a target is found, and mended by the same command, whatever it is."""

import json
import os
import shutil
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
import zarr

from dask_batchinv import TargetError, invert_store, verify_store
from dask_batchinv.job.report.account import account_of
from tests.support.clusters import wait_until_idle
from tests.support.stacks import conditioned
from tests.support.targets import tree

# Zarr warns of text, which is not in its specification yet.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
OPTIONS = {"variable": "cov", "tile_size": 720, "max_failed": None}


@pytest.fixture
def source(tmp_path):
    """A group with coordinates of several kinds, attributes, and 6 tiles."""
    ds = xr.Dataset(
        {"cov": (("time", "i", "j"), conditioned(60, 3, 10), {"units": "m2"})},
        coords={
            "time": np.datetime64("2026-01-01", "ns") + np.arange(60).astype("m8[D]"),
            "name": ("time", [f"n{k}" for k in range(60)]),
        },
        attrs={"title": "of a test"},
    )
    ds.to_zarr(tmp_path / "s", encoding={"cov": {"chunks": (10, 3, 3)}}, consolidated=False)
    return tmp_path / "s"


def data_of(path):
    """All but what has times, and what says of them the same with other words."""
    return {name: content for name, content in tree(path).items() if "ledger" not in name and "zarr.json" not in name}


def read(path):
    with xr.open_zarr(path, chunks=None) as opened:
        return opened.load()


def documents(path):
    """The names of all that a target has beside data, and the record of its runs."""
    data = ("ledger/runs", "info/c", "rcond/c", "inverse/c")
    return sorted(name for name in tree(path) if not name.startswith(data))


WAYS = {
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "other bytes": lambda content: bytes(255 - byte for byte in content),
    "nested deeply": lambda content: b"[" * 200_000,
    "no attributes": lambda content: b'{"zarr_format": 3, "node_type": "group", "attributes": 5}',
    "other members": lambda content: content.replace(b'"attributes"', b'"consolidated_metadata": 7, "attributes"'),
    "a list": lambda content: b"[1]",
}


@pytest.mark.parametrize("how", ["removed", "a broken link", "an empty folder", *WAYS])
def test_any_document_that_is_lost_is_written_again(tmp_path, source, client, how):
    target = tmp_path / "t"
    invert_store(source, target, client=client, **OPTIONS)
    whole, opened, found = data_of(target), read(target), documents(target)
    assert {
        "zarr.json",
        "inverse/zarr.json",
        "ledger/zarr.json",
        "ledger/tiles/c/0/0",
        "time/c/0",
        "name/zarr.json",
    } <= {*found}
    of_json = how in ("nested deeply", "no attributes", "other members", "a list")  # to what is none it is other bytes
    for name in [name for name in found if name.endswith("json")] if of_json else found:
        path = target / name
        content = path.read_bytes()
        path.unlink()
        if how == "a broken link":
            path.symlink_to(tmp_path / "nowhere")
        elif how == "an empty folder":
            path.mkdir()
        elif how != "removed":
            path.write_bytes(WAYS[how](content))
        is_whole = path.is_file() and path.read_bytes() == content  # chunks have no members
        report = invert_store(source, target, client=client, **OPTIONS)
        assert report.exit_code == 0, name
        assert report.mended or is_whole or "ledger/tiles/c" in name, name
        assert data_of(target) == whole, name
        xr.testing.assert_identical(read(target), opened)
        verified = verify_store(target, client=client)
        assert verified.ok, (name, str(verified))
        assert not [left for left in tree(target) if "partial" in left]


def test_all_documents_but_one_that_says_whose_it_is(tmp_path, source, client):
    target = tmp_path / "t"
    invert_store(source, target, client=client, **OPTIONS)
    opened = read(target)
    for kept in ("zarr.json", "ledger/zarr.json"):
        for name in documents(target):
            if name != kept:
                (target / name).write_bytes(b"")
        assert not verify_ok(target, client)
        assert invert_store(source, target, client=client, **OPTIONS).complete
        xr.testing.assert_identical(read(target), opened)
        assert verify_ok(target, client)


def verify_ok(target, client):
    try:
        return verify_store(target, client=client).ok
    except TargetError:
        return False


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta | {"data_type": "float32"},
        lambda meta: meta | {"dimension_names": meta["dimension_names"][::-1]},
        lambda meta: meta | {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
        lambda meta: meta | {"codecs": [*meta["codecs"], {"name": "gzip", "configuration": {"level": 1}}]},
        lambda meta: meta | {"shape": [70, *meta["shape"][1:]]},
        lambda meta: meta | {"fill_value": 7},
    ],
    ids=["dtype", "names", "byte order", "codec", "shape", "fill value"],
)
def test_metadata_that_say_something_else_are_put_right(tmp_path, source, client, change):
    target = tmp_path / "t"
    invert_store(source, target, client=client, **OPTIONS)
    path = target / "inverse" / "zarr.json"
    before = path.read_text()
    path.write_text(json.dumps(change(json.loads(before))))
    assert invert_store(source, target, client=client, **OPTIONS).mended == ("inverse/zarr.json",)
    assert json.loads(path.read_text()) == json.loads(before)


def test_attributes_of_users_are_left_to_them(tmp_path, source, client):
    target = tmp_path / "t"
    invert_store(source, target, client=client, **OPTIONS)
    group = zarr.open_group(target, mode="r+")
    group.update_attributes({"title": "mine", "doi": "10"})
    group["inverse"].update_attributes({"note": "mine, too"})
    zarr.consolidate_metadata(str(target))
    before = tree(target)
    report = invert_store(source, target, client=client, **OPTIONS)
    assert not report.mended
    assert tree(target) == before


def test_consolidated_metadata_that_are_lost(tmp_path, source, client):
    target = tmp_path / "t"
    invert_store(source, target, client=client, **OPTIONS)
    path = target / "zarr.json"
    meta = json.loads(path.read_text())
    del meta["consolidated_metadata"]["metadata"]["rcond"]
    meta["attributes"]["doi"] = "10"
    path.write_text(json.dumps(meta))
    assert invert_store(source, target, client=client, **OPTIONS).mended == ("zarr.json",)
    after = json.loads(path.read_text())
    assert "rcond" in after["consolidated_metadata"]["metadata"]
    assert after["attributes"]["doi"] == "10"
    assert after["attributes"]["complete"] == 1


@pytest.mark.parametrize(
    "part",
    ["inverse", "info", "ledger/tiles", "time", "inverse/c.0.0.0", "rcond/c.2", "rcond/c.2 emptied", "zarr.json"],
)
def test_what_is_removed_while_a_job_runs_is_seen_at_its_end(tmp_path, source, client, part, monkeypatch):
    monkeypatch.setattr("dask_batchinv.job.plan.plan.LARGEST_SPAN", 1)
    target, gone = tmp_path / "t", []

    def lose(progress):
        name, _, how = part.partition(" ")
        path = target / name
        if progress.matrices_done >= 40 and not gone and path.exists():
            gone.append(path.write_bytes(b"") if how else shutil.rmtree(path) if path.is_dir() else path.unlink())

    try:
        report = invert_store(source, target, client=client, on_progress=lose, **OPTIONS)
    except Exception as error:
        report = getattr(error, "report", None)
        assert report is None or report.exit_code == 1
    else:
        raise AssertionError(f"the job says that all is well: {report}")
    again = invert_store(source, target, client=client, **OPTIONS)
    assert again.complete
    assert verify_store(target, source=source, client=client).ok
    invert_store(source, tmp_path / "whole", client=client, **OPTIONS)
    assert data_of(target) == data_of(tmp_path / "whole")


def test_a_target_that_cannot_be_opened_is_not_called_verified(tmp_path, source, client):
    target = tmp_path / "t"
    invert_store(source, target, client=client, **OPTIONS)
    (target / "rcond" / "zarr.json").write_text("{}")
    report = verify_store(target, client=client)
    assert not report.ok
    (target / "inverse" / "zarr.json").write_text("{}")
    report = verify_store(target, client=client)
    assert not report.ok
    assert "metadata of" in report.bad_tiles[0].cause
    assert account_of(target).tiles_done == report.tiles  # that is in the ledger


def test_damage_that_shows_without_the_source_is_not_called_verified(tmp_path, source, client):
    target = tmp_path / "t"
    invert_store(source, target, client=client, **OPTIONS)
    whole = shutil.copytree(target, tmp_path / "whole")
    for name in ("time/c/0", "name/zarr.json", "ledger/zarr.json", "ledger/tiles/zarr.json"):
        for how in ("removed", "a pipe", "an endless link", *WAYS):
            path = target / name
            content = path.read_bytes()
            if how in ("no attributes", "other members"):  # users may change attributes
                continue
            path.unlink()
            if how == "a pipe":
                os.mkfifo(path)
            elif how == "an endless link":
                path.symlink_to("/dev/zero")
            elif how != "removed":
                path.write_bytes(WAYS[how](content))
            report = verify_store(target, client=client)
            assert report.problems == (f"{name} of {target} are lost or damaged: run the job again that made it",)
            shutil.rmtree(target)
            shutil.copytree(whole, target)
    meta = json.loads((target / "zarr.json").read_text())
    (target / "zarr.json").write_text(json.dumps({**meta, "consolidated_metadata": None}))
    assert "cannot be opened" in verify_store(target, client=client).problems[0]
    (target / "ledger" / "tiles" / "c" / "0" / "0").unlink()
    assert "complete, but its ledger is damaged" in str(account_of(target))
    assert account_of(tmp_path / "whole").tiles_done == 6


# --- power failures -------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """What the disk has for sure: files as of their last fsync, and the names in folders as of theirs."""
    files, names = {}, {}
    fsync = os.fsync

    def watched(handle):
        fsync(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isdir(path):
            names[path] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            files[os.fstat(handle).st_ino] = Path(path).read_bytes()

    monkeypatch.setattr(os, "fsync", watched)

    def fail(root, *, remove):
        """Have the power fail: what was not synced is empty, and names that were not are gone or still there."""
        for top, folders, found in os.walk(root, topdown=True):
            for name in [*folders]:
                if name not in names.get(top, {}) and remove:
                    shutil.rmtree(os.path.join(top, name))
                    folders.remove(name)
            for name in found:
                path = os.path.join(top, name)
                inode = os.stat(path).st_ino
                if names.get(top, {}).get(name) != inode and remove:
                    os.unlink(path)
                elif files.get(inode) != Path(path).read_bytes():
                    Path(path).write_bytes(b"")

    return fail


@pytest.mark.parametrize("remove", [False, True], ids=["emptied", "removed"])
@pytest.mark.parametrize("durable", [False, True], ids=["not durable", "durable"])
@pytest.mark.parametrize("after", [0, 30, 60])
def test_a_power_failure_loses_nothing_that_cannot_be_done_again(
    tmp_path, source, client, disk, durable, remove, after, monkeypatch
):
    monkeypatch.setattr("dask_batchinv.job.plan.plan.LARGEST_SPAN", 1)
    monkeypatch.setattr("dask_batchinv.job.driver.run.FLUSH_SECONDS", 0.0)
    target, options = tmp_path / "deep" / "er" / "t", OPTIONS | {"durable": durable}

    def stop(progress):
        if progress.matrices_done >= after < 60:
            raise KeyboardInterrupt

    with dask.config.set(scheduler="sync"):
        try:
            invert_store(source, target, client=client, on_progress=stop, **options)
            finished = True
        except KeyboardInterrupt:
            finished = False
        wait_until_idle(client)  # a tile that was begun before the interruption is still being written
        recorded = account_of(target).tiles_done
        disk(tmp_path / "deep", remove=remove)
        if durable:
            assert account_of(target).tiles_done == recorded
            assert verify_store(target, client=client).ok == finished
        report = invert_store(source, target, client=client, **options)
    assert report.complete
    # A finished target of which nothing was lost is not read.
    assert report.tiles_proven == (0 if finished else recorded) or not durable
    assert report.tiles_now == report.tiles - recorded or not durable
    assert verify_store(target, source=source, client=client).ok
    invert_store(source, tmp_path / "whole", client=client, **OPTIONS)
    assert data_of(target) == data_of(tmp_path / "whole")
    ours, whole = (read(path).drop_attrs(deep=False) for path in (target, tmp_path / "whole"))
    xr.testing.assert_identical(ours, whole)
