"""Reports of what is damaged, odd or hostile, and of users whose settings are their own."""

import json
import os
import threading
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_batchinv import JobFailedError, RefusedError, invert_store, report_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.job.report.page import target_report
from dask_batchinv.job.report.page.maps import MOST_TILES
from dask_batchinv.job.worker import metrics
from tests.report.test_page import _Page, stored
from tests.support.stacks import conditioned


@pytest.fixture
def target(tmp_path):
    stored(tmp_path)
    invert_store(tmp_path / "s", tmp_path / "t", variable="a", max_failed=None, tile_size=8000)
    return tmp_path / "t"


@pytest.mark.parametrize(
    "place", ["t/zarr.json", "t/inverse/c.0.0.0.0", "t/report.html", "s/zarr.json", "s/r.html", "link"]
)
def test_a_page_is_never_written_into_a_store(target, tmp_path, place):
    (tmp_path / "link").symlink_to(target / "ledger" / "zarr.json")
    for arguments in (
        ["report", str(target), "-o"],
        ["run", str(tmp_path / "s"), str(target), "--variable", "a", "--report"],
    ):
        ran = CliRunner().invoke(main, [*arguments, str(tmp_path / place)])
        assert ran.exit_code == 2, ran.output
        assert "which it would damage" in ran.output
    with pytest.raises(RefusedError, match="which it would damage"):
        report_store(target).to_html(tmp_path / place)
    assert verify_store(target, workers=1).ok


def test_what_cannot_be_written_is_an_error(target, tmp_path):
    ran = CliRunner().invoke(main, ["report", str(target), "-o", "/dev/full"])
    assert ran.exit_code == 1
    assert "No space left" in ran.output
    for bad in ("", str(tmp_path), str(tmp_path / "none" / "r.html")):
        assert CliRunner().invoke(main, ["report", str(target), "-o", bad]).exit_code == 2
    told = CliRunner().invoke(main, ["report", str(target), "-o", "-"])
    assert told.stdout.startswith("<!DOCTYPE html>")
    assert CliRunner().invoke(main, ["report", str(target), "-o", "-", "--json"]).exit_code == 2


def test_the_users_settings_do_not_reach_the_page_nor_ours_the_user(target):
    report = report_store(target)
    want = report.to_html()
    theirs = {
        "image.origin": "lower",
        "svg.image_inline": False,
        "axes.grid": True,
        "savefig.dpi": 30,
        "text.usetex": True,
    }
    with mpl.rc_context(theirs):
        before = dict(mpl.rcParams)
        pages = []
        threads = [threading.Thread(target=lambda: pages.append(report.to_html())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert dict(mpl.rcParams) == before
    assert pages == [want] * 3


def test_dimensions_with_signs_that_are_formulas_elsewhere(tmp_path):
    a = conditioned(12, 2, 10).reshape(3, 4, 2, 2)
    xr.Dataset({"a": (("a$^^$", "$_$", "i", "j"), a)}).to_zarr(tmp_path / "s", consolidated=False)
    invert_store(tmp_path / "s", tmp_path / "t", variable="a")
    with warnings.catch_warnings(action="error"):
        assert "a$^^$" in "".join(_Page(report_store(tmp_path / "t").to_html()).text)


def test_an_empty_stack(tmp_path):
    zarr.create_array(tmp_path / "s", shape=(5, 0, 3, 3), dtype=float, chunks=(5, 1, 3, 3))
    invert_store(tmp_path / "s", tmp_path / "t")
    report = report_store(tmp_path / "t")
    assert (report.map, report.histogram) == (None, None)
    assert "<h1>" in report.to_html()


def test_a_damaged_coordinate_costs_no_report(target):
    (target / "y" / "c" / "0").write_bytes(b"damaged")
    report = report_store(target)
    assert any("coordinate y cannot be read" in note for note in report.notes)
    assert report.failed[0].coordinates["x"] == 50
    assert "y" not in report.failed[0].coordinates
    assert "cannot be read" in report.to_html()


@pytest.mark.parametrize(
    "run",
    [
        "x",
        {"per_worker": 5},
        {"per_worker": {"a": None}},
        {"versions": ["a"]},
        {"timeline": [[], []]},
        {"timeline": [1, 2]},
        {"timeline": [[0, 0], ["a", 5]]},
        {"timeline": [[0, 0], [1, 10**400]]},
        {"timeline": [[0, 0], [float("nan"), 1]]},
        {"seconds": float("nan"), "notes": 5, "failed_tiles": "x", "bad_chunks": [5]},
        {"stopped": {"a": [1]}},
    ],
)
def test_records_that_are_none(target, run):
    (target / "ledger" / "runs.json").write_text(json.dumps({"runs": [run]}))
    report = report_store(target)
    json.dumps(report.to_json(), allow_nan=False)
    assert "<h1>" in report.to_html()
    assert "1,200" in str(report)


def test_arrays_that_do_not_belong_together(target):
    path = target / "info" / "zarr.json"
    document = json.loads(path.read_text())
    document["shape"] = [40, 29]
    path.write_text(json.dumps(document))
    report = report_store(target)
    assert any("cannot be read" in note for note in report.notes)
    assert "<h1>" in report.to_html()


def test_many_small_tiles_are_not_read_one_by_one(tmp_path, monkeypatch):
    a = conditioned(300, 2, 10)
    zarr.create_array(tmp_path / "s", shape=a.shape, dtype=a.dtype, chunks=(300, 2, 2))[...] = a
    invert_store(tmp_path / "s", tmp_path / "t", tile_size=32, chunks={"dim_0": 1})
    monkeypatch.setattr(target_report, "_MOST_TILES", 100)
    report = report_store(tmp_path / "t")
    assert report.account.tiles == 300
    assert report.histogram.tiles == report.histogram.matrices == MOST_TILES


def test_what_keeps_a_target_from_being_complete_is_told(tmp_path):
    stored(tmp_path)
    os.remove(tmp_path / "s" / "a" / "c" / "3" / "0" / "0" / "0")
    with pytest.raises(JobFailedError):
        invert_store(tmp_path / "s", tmp_path / "t", variable="a", max_failed=None, tile_size=8000)
    report = report_store(tmp_path / "t")
    for text in (str(report), report.to_html(), json.dumps(report.to_json())):
        assert "c/3/0/0/0" in text


def test_counting_costs_no_tile(monkeypatch):
    monkeypatch.setitem(metrics.sys.modules, "prometheus_client", object())
    metrics._metrics.cache_clear()
    metrics.count([])
    metrics._metrics.cache_clear()


def test_coordinates_of_every_kind_are_such_that_sel_finds_them(tmp_path):
    a = conditioned(6, 2, 10).reshape(2, 3, 2, 2)
    a[1, 2] = 0
    northing, days = np.array([5234557.5, 5234567.5]), np.array(["2026-01-01", "2026-01-02", "2026-01-03"], "M8[ns]")
    dataset = xr.Dataset({"a": (("north", "day", "i", "j"), a)}, {"north": northing, "day": days})
    dataset.to_zarr(tmp_path / "s", consolidated=False)
    invert_store(tmp_path / "s", tmp_path / "t", variable="a", max_failed=None)
    report = report_store(tmp_path / "t")
    (matrix,) = report.failed
    assert matrix.coordinates == {"north": 5234567.5, "day": "2026-01-03"}
    found = xr.open_zarr(tmp_path / "t", consolidated=False)
    assert int(found["info"].sel(matrix.coordinates)) == 1
    assert report.ticks["day"][-1] == (2, "2026-01-03")
