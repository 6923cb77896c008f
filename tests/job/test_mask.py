"""A mask leaves matrices out: they get an info of their own, cost nothing, and are no failures."""

import json

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.job.report.account import account_of
from dask_batchinv.outcome import SourceError, TargetError
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import spoilt

A = conditioned(12 * 10, 3, 10).reshape(12, 10, 3, 3)
LAND = np.add.outer(np.arange(12), np.arange(10)) % 3 == 0
LAND[4:8] = True


@pytest.fixture
def source(tmp_path):
    a = A.copy()
    a[LAND] = 0  # as what is masked often is
    ds = xr.Dataset(
        {
            "cov": (("y", "x", "row", "col"), a),
            "land": (("y", "x"), LAND),
            "sea": (("x", "y"), (~LAND).T.astype("i1")),
            "depth": (("y", "x"), np.where(LAND, np.nan, 3.0)),
            "rows": (("y",), np.arange(12) > 8),
            "everything": ((), True),
            "other": (("t",), np.zeros(3)),
            "matrix": (("row", "col"), np.zeros((3, 3))),
        }
    )
    ds = ds.chunk(y=4, x=5)
    ds["land"] = ds.land.chunk(y=3, x=10)
    ds.to_zarr(tmp_path / "s", consolidated=False)
    return tmp_path / "s"


def check(target, masked):
    found = xr.open_zarr(target).load()
    assert found["info"].values.tolist() == np.where(masked, -5, 0).tolist()
    assert np.isnan(found.inverse.values[masked]).all()
    assert np.isnan(found.rcond.values[masked]).all()
    assert_same_bits(found.inverse.values[~masked], inverse(A[~masked]))


@pytest.mark.parametrize("mask", ["land", "~sea", "depth"])
@pytest.mark.parametrize("tile_size", [None, 1440, 72])
def test_masks(tmp_path, source, mask, tile_size):
    if mask == "depth":  # missing is masked, and so is what is not 0
        depth = zarr.open_group(source)["depth"]
        depth[...] = np.where(LAND, np.nan, 0.0)
    report = invert_store(source, tmp_path / "t", variable="cov", mask=mask, tile_size=tile_size)
    assert (report.complete, report.exit_code, report.masked, report.n_failed) == (True, 0, LAND.sum(), 0)
    assert f"{LAND.sum()} by the mask" in str(report)
    check(tmp_path / "t", LAND)
    assert verify_store(tmp_path / "t", source=source).ok
    assert account_of(tmp_path / "t").masked == LAND.sum()
    assert invert_store(source, tmp_path / "t", variable="cov", mask=mask, tile_size=tile_size).tiles_now == 0


def test_a_mask_of_fewer_dimensions(tmp_path, source):
    invert_store(source, tmp_path / "t", variable="cov", mask="rows", max_failed=None)
    info = xr.open_zarr(tmp_path / "t")["info"].values
    assert (info[9:] == -5).all()
    assert (info[:9] != -5).all()
    report = invert_store(source, tmp_path / "u", variable="cov", mask="everything")
    assert report.masked == LAND.size
    assert verify_store(tmp_path / "u", source=source).ok


def test_what_is_masked_whole_is_not_read(tmp_path, source):
    for column in "01":  # of rows 4 to 8, which are all masked
        (source / f"cov/c/1/{column}/0/0").write_bytes(b"damaged")
    invert_store(source, tmp_path / "t", variable="cov", mask="land", tile_size=1440)
    check(tmp_path / "t", LAND)
    # What is masked in a tile that is read is left out whatever is there.
    (source / "cov/c/0/0/0/0").write_bytes(b"damaged")
    invert_store(source, tmp_path / "u", variable="cov", mask="land", max_failed=None, bad_chunks="nan")
    info = xr.open_zarr(tmp_path / "u")["info"].values
    assert (info[:4, :5] == np.where(LAND[:4, :5], -5, -4)).all()


def test_when_the_mask_changes_its_tiles_are_done_again(tmp_path, source):
    options = {"variable": "cov", "mask": "land", "tile_size": 1440}
    invert_store(source, tmp_path / "t", **options)
    zarr.open_group(source)["land"][:3] = True
    report = invert_store(source, tmp_path / "t", **options)
    assert 0 < report.changed_tiles == report.tiles_now < report.tiles
    now = LAND.copy()
    now[:3] = True
    check(tmp_path / "t", now)
    assert not verify_store(tmp_path / "t", source=source).bad_tiles
    # Verification sees it, too.
    zarr.open_group(source)["land"][8:] = True
    verified = verify_store(tmp_path / "t", source=source)
    assert any("not masked as the source has it" in tile.cause for tile in verified.bad_tiles)


def test_failures_beside_it_are_failures(tmp_path):
    a, info = spoilt()
    mask = np.zeros(60, bool)
    mask[[0, 5, 20]] = True
    xr.Dataset({"cov": (("t", "row", "col"), a), "mask": (("t",), mask)}).to_zarr(tmp_path / "s", consolidated=False)
    report = invert_store(tmp_path / "s", tmp_path / "t", variable="cov", mask="mask", max_failed=None)
    expected = np.where(mask, -5, info)
    assert xr.open_zarr(tmp_path / "t")["info"].values.tolist() == expected.tolist()
    assert report.n_failed == np.count_nonzero(info[~mask])
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ("nothing", "there is no array 'nothing' for a mask"),
        ("other", r"has the dimensions \(t\), which are not among those of the matrices, y, x"),
        ("matrix", r"has the dimensions \(row, col\), which"),
        ("../s/land", "is not a name inside the group"),
        ("~", "is not a name inside the group"),
    ],
)
def test_refused(tmp_path, source, mask, why):
    with pytest.raises(SourceError, match=why):
        invert_store(source, tmp_path / "t", variable="cov", mask=mask)
    assert not (tmp_path / "t").exists()


def test_another_mask_is_another_job_and_an_array_alone_has_none(tmp_path, source):
    with pytest.raises(SourceError, match="a mask stands beside the stack in a group"):
        invert_store(source / "cov", tmp_path / "t", mask="land")
    invert_store(source, tmp_path / "t", variable="cov", mask="land")
    with pytest.raises(TargetError, match="mask was 'land', is '~sea'"):
        invert_store(source, tmp_path / "t", variable="cov", mask="~sea")


def test_status_and_the_command_line(tmp_path, source):
    run = [
        "run",
        str(source),
        str(tmp_path / "t"),
        "--variable",
        "cov",
        "--mask",
        "~sea",
        "--quiet",
        "--keep",
        "diagonal",
    ]
    assert CliRunner().invoke(main, run).exit_code == 0
    ran = CliRunner().invoke(main, ["status", str(tmp_path / "t"), "--json"])
    assert ran.exit_code == 0, ran.output
    status = json.loads(ran.stdout)
    assert status["masked"] == LAND.sum()
    assert "by the mask" in CliRunner().invoke(main, ["status", str(tmp_path / "t")]).output
