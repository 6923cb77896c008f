"""Maps and histograms: what they say is what is there, from every matrix and from the ledger alone."""

import numpy as np
import pytest

from dask_batchinv import invert_store, report_store
from dask_batchinv.job.report.page import maps, target_report
from dask_batchinv.job.report.page.maps import GOOD, MASKED, PENDING, axes_of_map, map_of_matrices
from dask_batchinv.outcome import FAILURE_KINDS, Info
from tests.report.test_page import stored

SINGULAR, NOT_FINITE = (FAILURE_KINDS.index(kind) for kind in ("singular", "not_finite"))


def test_a_pixel_is_a_matrix_where_there_are_few():
    info = np.zeros((3, 4), np.int32)
    info[0, 1], info[1, 2], info[2, 3], info[2, 0] = 2, Info.NOT_FINITE, Info.MASKED, Info.PENDING
    rcond = np.where(info == 0, 0.01, np.nan)
    seen = map_of_matrices(info, rcond, ("y", "x"))
    want = np.full((3, 4), GOOD)
    want[0, 1], want[1, 2], want[2, 3], want[2, 0] = SINGULAR, NOT_FINITE, MASKED, PENDING
    assert np.array_equal(seen.kinds, want)
    assert np.array_equal(np.isnan(seen.log_rcond), info != 0)
    np.testing.assert_allclose(seen.log_rcond[info == 0], -2)
    assert (seen.dims, seen.extent, seen.by_tile) == (("y", "x"), (0, 4, 0, 3), False)


def test_one_failure_in_many_matrices_is_seen():
    shape = (5, 1000, 700)
    info, rcond = np.zeros(shape, np.int32), np.full(shape, 0.1)
    info[3, 999, 0], rcond[2, 10, 20] = -1, 1e-9
    seen = map_of_matrices(info, rcond, ("time", "y", "x"))
    assert seen.dims == ("y", "x")
    assert max(seen.kinds.shape) <= maps.MOST_PIXELS
    assert np.argwhere(seen.kinds != GOOD).tolist() == [[999 // 4, 0]]
    assert np.argwhere(seen.log_rcond < -8).tolist() == [[10 // 4, 20 // 3]]
    # The last pixels may reach beyond the stack.
    assert (seen.extent, seen.lengths, seen.matrices) == ((0, 702, 0, 1000), (700, 1000), 5 * 4 * 3)
    assert seen.share.max() == pytest.approx(1 / 60)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_what_has_no_dimension_has_no_map(shape):
    assert map_of_matrices(np.zeros(shape, np.int32), np.ones(shape), ("a", "b")[: len(shape)]) is None


def test_a_stack_of_one_dimension_is_a_strip():
    seen = map_of_matrices(np.array([0, 1, 0]), np.array([1.0, np.nan, 0.1]), ("pixel",))
    assert seen.kinds.tolist() == [[GOOD, SINGULAR, GOOD]]
    assert axes_of_map((2, 9, 3, 9)) == (1, 3)


def test_the_ledger_alone_tells_the_same_by_tile(tmp_path, monkeypatch):
    a, _ = stored(tmp_path)
    invert_store(tmp_path / "s", tmp_path / "t", max_failed=None, tile_size=2000, mask="mask", variable="a")
    whole = report_store(tmp_path / "t")
    monkeypatch.setattr(target_report, "_MOST_TILES", 1)
    monkeypatch.setattr(maps, "MOST_MATRICES", 200)
    some = report_store(tmp_path / "t")
    assert (whole.map.by_tile, some.map.by_tile) == (False, True)
    assert whole.histogram.tiles is None
    assert 1 <= some.histogram.tiles < whole.account.tiles
    assert 0 < some.histogram.matrices < whole.histogram.matrices
    tile = [size for size, core in zip(whole.tile, (False, False, True, True), strict=True) if not core]
    # Every failure of the one is in a pixel of the other that has one, and no pixel is without.
    of_tile = {(y // tile[0], x // tile[1]) for y, x in np.argwhere(whole.map.kinds < GOOD)}
    assert {tuple(place) for place in np.argwhere(some.map.kinds < GOOD)} == of_tile
    assert np.nanmin(some.map.log_rcond) == pytest.approx(np.nanmin(whole.map.log_rcond))
    assert sum(whole.histogram.counts) == whole.histogram.matrices == a.shape[0] * a.shape[1] - 2 - whole.account.masked


def test_the_histogram_counts_what_numpy_counts(tmp_path):
    stored(tmp_path)
    invert_store(tmp_path / "s", tmp_path / "t", max_failed=None, variable="a")
    import zarr

    group = zarr.open_group(tmp_path / "t", mode="r")
    info, rcond = group["info"][...], group["rcond"][...]
    found = report_store(tmp_path / "t").histogram
    want, _ = np.histogram(np.log10(rcond[info == 0]), found.edges)
    assert list(found.counts) == want.tolist()
