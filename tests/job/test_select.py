"""A part of the source: selected by labels, or by numbers where there are none; tiles, chunks and growth follow it."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.job.api import JobFailedError
from dask_batchinv.job.plan.plan import StackLayout, _read_amplification
from dask_batchinv.job.source.source import open_source
from dask_batchinv.outcome import SourceError, TargetError
from tests.support.stacks import assert_same_bits, conditioned

A = conditioned(10 * 12 * 6, 3, 10).reshape(10, 12, 6, 3, 3)
TIMES = pd.date_range("2026-01-01", periods=10, freq="6h")


@pytest.fixture
def source(tmp_path):
    xr.Dataset(
        {"cov": (("time", "y", "x", "row", "col"), A), "mask": (("x", "y"), np.arange(72).reshape(6, 12) % 5 == 0)},
        {"time": TIMES, "y": np.arange(12) * 10.0, "orbit": ("time", np.arange(10))},
    ).chunk(time=3, y=5, x=4).to_zarr(tmp_path / "s", consolidated=False)
    return tmp_path / "s"


SELECTIONS = {
    "a day": ({"time": "2026-01-02"}, np.s_[4:8]),
    "a moment": ({"time": "2026-01-02T06:00"}, np.s_[5:6]),
    "a slice of times": ({"time": slice("2026-01-01T12:00", "2026-01-02")}, np.s_[2:8]),
    "from a time on": ({"time": slice("2026-01-02T18", None)}, np.s_[7:]),
    "a number as label": ({"y": 30}, np.s_[:, 3:4]),
    "a slice of labels": ({"y": slice(15, 70.0)}, np.s_[:, 2:8]),
    "numbers": ({"x": 5}, np.s_[:, :, 5:6]),
    "the last": ({"x": -1}, np.s_[:, :, 5:]),
    "a slice of numbers": ({"x": slice(1, 3)}, np.s_[:, :, 1:3]),
    "several": ({"x": slice(None, -1), "y": slice(50, None), "time": "2026-01-03"}, np.s_[8:, 5:, :5]),
}


@pytest.mark.parametrize("which", SELECTIONS)
@pytest.mark.parametrize("tile_size", [None, 2000, 72])
def test_as_xarray_selects(tmp_path, source, which, tile_size):
    select, part = SELECTIONS[which]
    options = {"variable": "cov", "select": select, "tile_size": tile_size}
    report = invert_store(source, tmp_path / "t", **options)
    assert report.matrices == A[part].size // 9
    found = xr.open_zarr(tmp_path / "t", consolidated=False)
    assert_same_bits(found.inverse, inverse(A[part]))
    assert (found.time.values == TIMES[part[0] if isinstance(part, tuple) else part].values).all()
    assert found.orbit.dims == ("time",)
    assert verify_store(tmp_path / "t", source=source).ok
    assert invert_store(source, tmp_path / "t", **options).tiles_now == 0
    assert CliRunner().invoke(main, ["status", str(tmp_path / "t")]).exit_code == 0


def test_with_a_mask(tmp_path, source):
    select = {"x": slice(2, 5), "y": slice(20, 90)}
    invert_store(source, tmp_path / "t", variable="cov", select=select, mask="mask", tile_size=2000)
    mask = (np.arange(72).reshape(6, 12) % 5 == 0).T[2:10, 2:5]
    found = xr.open_zarr(tmp_path / "t", consolidated=False).load()
    assert (found["info"].values == np.where(mask, -5, 0)).all()
    assert_same_bits(found.inverse.values[:, ~mask], inverse(A[:, 2:10, 2:5][:, ~mask]))
    assert verify_store(tmp_path / "t", source=source).ok


def test_only_what_was_selected_is_read_and_looked_at(tmp_path, source):
    """Chunks elsewhere may be damaged or written to."""
    options = {"variable": "cov", "select": {"y": slice(60, 80), "time": "2026-01-02"}, "tile_size": 2000}
    for key in (source / "cov/c").rglob("*"):
        if key.is_file() and key.relative_to(source / "cov/c").parts[1] != "1":  # of y
            key.write_bytes(b"damaged")
    invert_store(source, tmp_path / "t", **options)
    assert_same_bits(xr.open_zarr(tmp_path / "t", consolidated=False).inverse, inverse(A[4:8, 6:9]))
    (source / "cov/c/0/0/0/0/0").write_bytes(b"otherwise")
    assert CliRunner().invoke(main, ["status", str(tmp_path / "t")]).exit_code == 0
    zarr.open_group(source)["cov"][4, 6, 0] = np.eye(3)
    report = invert_store(source, tmp_path / "t", **options)
    assert report.changed_tiles == report.tiles_now > 0
    assert_same_bits(xr.open_zarr(tmp_path / "t", consolidated=False).inverse[0, 0, 0], np.eye(3))


def test_a_bad_chunk_in_a_part(tmp_path, source):
    (source / "cov/c/1/1/0/0/0").write_bytes(b"damaged")
    with pytest.raises(JobFailedError) as raised:
        invert_store(source, tmp_path / "t", variable="cov", select={"time": "2026-01-02", "y": slice(40, None)})
    assert [chunk.key for chunk in raised.value.report.bad_chunks] == ["c/1/1/0/0/0"]
    info = xr.open_zarr(tmp_path / "t", consolidated=False)["info"].values
    expected = np.zeros((4, 8, 6), int)
    expected[:2, 1:6, :4] = -4
    assert (info == expected).all()


def test_what_is_open_at_its_end_grows(tmp_path, source):
    options = {"variable": "cov", "select": {"time": slice("2026-01-02", None)}, "tile_size": 2000}
    closed = {"variable": "cov", "select": {"time": "2026-01-03"}}
    invert_store(source, tmp_path / "t", **options)
    invert_store(source, tmp_path / "u", **closed)
    more = xr.open_zarr(source, consolidated=False).isel(time=slice(0, 3)).load()
    more = more.assign_coords(time=TIMES[:3] + pd.Timedelta("5D")).drop_vars(["mask", "y"])
    more.to_zarr(source, append_dim="time", consolidated=False)
    report = invert_store(source, tmp_path / "t", **options)
    assert report.grown_from is not None
    assert_same_bits(xr.open_zarr(tmp_path / "t", consolidated=False).inverse, inverse(np.concatenate([A[4:], A[:3]])))
    assert invert_store(source, tmp_path / "u", **closed).tiles_now == 0


@pytest.mark.parametrize(
    ("select", "why"),
    [
        ({"time": "2027"}, "time=2027 selects nothing, or not one piece: time is labelled 2026-01-01"),
        ({"y": 35}, "y=35 selects nothing"),
        ({"y": "north"}, "y=north selects nothing"),
        ({"x": 6}, "x=6 selects nothing, or not one piece: x is 6 long, without labels"),
        ({"x": slice(3, 3)}, "selects nothing"),
        ({"x": [1, 2]}, "one label or a slice of them"),
        ({"x": slice(0, 4, 2)}, "has no steps"),
        ({"row": 0}, "along time, y, x, not along row"),
        ({"z": 0}, "not along z"),
    ],
)
def test_refused(tmp_path, source, select, why):
    with pytest.raises(SourceError, match=why):
        invert_store(source, tmp_path / "t", variable="cov", select=select)
    assert not (tmp_path / "t").exists()


def test_another_part_is_another_job(tmp_path, source):
    invert_store(source, tmp_path / "t", variable="cov", select={"x": 1})
    with pytest.raises(TargetError, match=r"select was \{'x': '1'\}, is \{'x': '2'\}"):
        invert_store(source, tmp_path / "t", variable="cov", select={"x": 2})


def test_on_the_command_line(tmp_path, source):
    places = [str(source), str(tmp_path / "t"), "--variable", "cov"]
    select = ["--select", "time=2026-01-02T00:00..2026-01-02T12:00", "--select", "x=1..3"]
    ran = CliRunner().invoke(main, ["run", *places, *select, "--quiet"])
    assert ran.exit_code == 0, ran.output
    assert_same_bits(xr.open_zarr(tmp_path / "t", consolidated=False).inverse, inverse(A[4:7, :, 1:3]))
    ran = CliRunner().invoke(main, ["run", *places, "--select", "time", "--quiet"])
    assert ran.exit_code == 2
    assert "--select takes DIM=LABEL or DIM=FIRST..LAST" in ran.output


def test_numbers_without_names(tmp_path):
    a = conditioned(20, 3, 10)
    zarr.create_array(tmp_path / "s", shape=a.shape, dtype=a.dtype, chunks=(6, 3, 3))[...] = a
    assert open_source(tmp_path / "s", select={"dim_0": "3..17"}).start == (3, 0, 0)
    invert_store(tmp_path / "s", tmp_path / "t", select={"dim_0": slice(3, 17)}, tile_size=500)
    assert_same_bits(zarr.open_group(tmp_path / "t")["inverse"][...], inverse(a[3:17]))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 30))
def test_how_often_units_are_decoded(size, unit, step, start):
    layout = StackLayout((size, 1, 1), (1, 2), (unit, 1, 1), 8, 8, 8, 0, needs_copy=False, start=(start, 0, 0))
    parts = [range(start + at, start + min(at + step, size)) for at in range(0, size, step)]
    decoded = sum((part[-1] // unit) - (part[0] // unit) + 1 for part in parts)
    units = (start + size - 1) // unit - start // unit + 1
    assert _read_amplification(layout, (step, 1, 1)) == pytest.approx(decoded / units)
