"""What attacks on options of sources and targets have found: wrong numbers in silence, and what could not be undone."""

import os
from datetime import datetime

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.cli import main
from dask_batchinv.job.api import JobFailedError
from dask_batchinv.job.report.freshness import status_of
from dask_batchinv.job.target import swap
from dask_batchinv.job.target.holder import LOCK
from dask_batchinv.location import Location
from dask_batchinv.outcome import RefusedError, SourceError
from tests.support.stacks import assert_same_bits, conditioned

A = conditioned(24, 3, 10)


def write(path, a=A, dims=("t", "row", "col"), chunks=(4, 3, 3), coords=None, **others):
    ds = xr.Dataset({"cov": (dims, a)} | others, coords).chunk(t=chunks[0])
    ds.to_zarr(path, consolidated=False)
    return path


def opened(path):
    return xr.open_zarr(path, consolidated=False).load()


# --- lazy sources -----------------------------------------------------------------------------------------------


def test_masked_integers_are_missing_numbers(tmp_path):
    ints = np.rint(10 * conditioned(6, 3, 10)).astype("i8")
    mask = np.zeros(ints.shape, bool)
    mask[1, 0, 1] = True
    masked = da.ma.masked_array(da.from_array(ints, chunks=(2, 3, 3)), mask=mask)
    report = invert_store(masked, tmp_path / "t", max_failed=None)
    assert report.failed["not_finite"] == 1
    others = np.delete(np.arange(6), 1)
    assert_same_bits(zarr.open_group(tmp_path / "t")["inverse"][...][others], inverse(ints[others]))


@pytest.mark.parametrize("declared", ["i8", "i1", "f4"])
def test_blocks_of_another_dtype_than_declared_are_an_error(tmp_path, declared):
    made = da.from_array(A, chunks=(4, 3, 3)).astype(declared).map_blocks(lambda x: x * 0.3 + 300.0, dtype=declared)
    made = made.map_blocks(lambda x: x.astype("f8"), dtype=declared)
    with pytest.raises(JobFailedError, match="were declared"):
        invert_store(made, tmp_path / "t", token="wrong")


def test_of_a_lazy_source_nothing_is_said_to_be_unchanged(tmp_path):
    write(tmp_path / "s")
    lazy = xr.open_zarr(tmp_path / "s", consolidated=False).cov
    invert_store(lazy, tmp_path / "t", token="x")
    zarr.open_group(tmp_path / "s")["cov"][0] *= 2
    report = invert_store(lazy, tmp_path / "t", token="x")
    assert any("is not looked at" in note for note in report.notes)
    assert invert_store(lazy, tmp_path / "t", token="x", overwrite=True).tiles_now > 0
    assert_same_bits(opened(tmp_path / "t").inverse[0], inverse(2 * A[0]))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: xr.DataArray(A, dims=("t", "i", "i")), "its name twice"),
        (lambda: xr.DataArray(A, dims=("t", "i", "j"), attrs={"at": datetime(2026, 1, 1)}), "attribute at cannot be"),
        (lambda: xr.DataArray(A, dims=("t", "i", "j"), coords={"a/b": ("t", np.arange(24))}), "'a/b' cannot be"),
        (lambda: xr.DataArray(A, dims=("t", "i", "j"), coords={"t": pd.period_range("2026", periods=24)}), "cannot be"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_stored_is_refused_before_anything_is(tmp_path, make, why):
    with pytest.raises(SourceError, match=why):
        invert_store(make(), tmp_path / "t")
    assert not (tmp_path / "t").exists()


# --- parts and masks --------------------------------------------------------------------------------------------


def test_labels_that_move_select_other_matrices(tmp_path):
    days = pd.date_range("2026-01-01", periods=24)
    write(tmp_path / "s", chunks=(24, 3, 3), coords={"t": days})
    options = {"variable": "cov", "select": {"t": "2026-01-02"}}
    invert_store(tmp_path / "s", tmp_path / "t", **options)
    zarr.open_group(tmp_path / "s")["t"][...] += 1  # they are corrected by a day
    invert_store(tmp_path / "s", tmp_path / "t", **options)
    assert_same_bits(opened(tmp_path / "t").inverse, inverse(A[0:1]))


def test_times_of_numpy_are_moments_and_texts_are_spans(tmp_path):
    hours = pd.date_range("2026-01-01", periods=24, freq="3h")
    write(tmp_path / "s", coords={"t": hours})
    first, last = np.datetime64("2026-01-01"), np.datetime64("2026-01-02")
    for select, count in ((last, 1), (slice(first, last), 9), ("2026-01-02", 8), (pd.Timestamp(last), 1)):
        target = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
        assert invert_store(tmp_path / "s", target, variable="cov", select={"t": select}).matrices == count


def test_a_label_with_two_dots_is_a_label(tmp_path):
    labels = np.array(["a", "a..b", "b"], dtype="U4")
    with pytest.warns(Warning, match="does not have a Zarr V3"):
        write(tmp_path / "s", A[:3], coords={"t": labels})
    report = invert_store(tmp_path / "s", tmp_path / "t", variable="cov", dims=("row", "col"), select={"t": "a..b"})
    assert report.matrices == 1


def test_what_is_named_twice_on_the_command_line_is_refused(tmp_path):
    write(tmp_path / "s")
    for twice in (["--select", "t=0", "--select", "t=1"], ["--names", "info=a,info=b"]):
        ran = CliRunner().invoke(main, ["run", str(tmp_path / "s"), str(tmp_path / "t"), "--variable", "cov", *twice])
        assert ran.exit_code == 2
        assert "names something twice" in ran.output


def test_a_mask_of_format_2_with_a_fill_value_of_0_is_a_mask(tmp_path):
    group = zarr.create_group(tmp_path / "s", zarr_format=2)
    cov = group.create_array("cov", shape=A.shape, dtype="f8", chunks=(4, 3, 3), compressors=None)
    cov[...], cov.attrs["_ARRAY_DIMENSIONS"] = A, ["t", "row", "col"]
    for name, dtype in {"m": "u1", "b": "bool"}.items():
        mask = group.create_array(name, shape=(24,), dtype=dtype, chunks=(24,), fill_value=0)
        mask[...], mask.attrs["_ARRAY_DIMENSIONS"] = np.arange(24) % 3 == 0, ["t"]
        assert invert_store(tmp_path / "s", tmp_path / f"t{name}", variable="cov", mask=name).masked == 8
    report = invert_store(tmp_path / "s", tmp_path / "all", variable="cov", mask="m", overwrite=True)
    mask = group["m"]
    mask[...] = 1
    report = invert_store(tmp_path / "s", tmp_path / "all", variable="cov", mask="m")
    assert any("all matrices are left out" in note for note in report.notes)
    # What the numbers of a mask mean may change, and no chunk of it.
    mask.attrs["_FillValue"] = 0
    mask[...] = np.arange(24) % 3 == 0
    before = invert_store(tmp_path / "s", tmp_path / "u", variable="cov", mask="m").masked
    mask.attrs["_FillValue"] = 1
    assert (before, invert_store(tmp_path / "s", tmp_path / "u", variable="cov", mask="m").masked) == (24, 8)


def test_damage_under_a_mask_is_no_failure(tmp_path):
    mask = np.zeros(24, bool)
    mask[4:8] = True
    write(tmp_path / "s", mask=(("t",), mask))
    (tmp_path / "s/cov/c/1/0/0").unlink()
    options = {"variable": "cov", "mask": "mask"}
    report = invert_store(tmp_path / "s", tmp_path / "t", **options)
    assert (report.complete, report.masked, report.bad_chunks) == (True, 4, ())
    assert invert_store(tmp_path / "s", tmp_path / "t", **options).tiles_now == 0
    verified = verify_store(tmp_path / "t", source=tmp_path / "s")
    assert verified.ok, str(verified)


# --- forms and results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assume_a", ["upper triangular", "diagonal"])
def test_a_triangle_that_the_matrices_do_not_have_is_refused(tmp_path, assume_a):
    write(tmp_path / "s", np.ones((4, 6)), ("t", "p"), (4, 6))
    with pytest.raises(SourceError, match=r"which .* matrices do not have"):
        invert_store(tmp_path / "s", tmp_path / "t", variable="cov", packed="lower by rows", assume_a=assume_a)


def test_parts_in_the_wrong_order_and_names_given_twice_are_refused(tmp_path):
    with pytest.warns(Warning, match="does not have a Zarr V3"):
        write(tmp_path / "s", np.ones((4, 3, 3, 2)), ("t", "i", "j", "ri"), (4,), {"ri": ["imag", "real"]})
    with pytest.raises(SourceError, match="imaginary parts come first"):
        invert_store(tmp_path / "s", tmp_path / "t", variable="cov", complex_dim="ri")
    write(tmp_path / "u", np.ones((4, 3, 3, 2)), ("t", "i", "j", "ri"), (4,))
    with pytest.raises(SourceError, match="`dims=` takes 2"):
        invert_store(tmp_path / "u", tmp_path / "t", variable="cov", complex_dim="ri", dims=("i", "i"))
    with pytest.raises(RefusedError, match="cannot be the name of an array"):
        invert_store(tmp_path / "u", tmp_path / "t", variable="cov", complex_dim="ri", names={"info": "zarr.json"})
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("keep", ["inverse", "diagonal"])
def test_what_is_too_small_for_the_dtype_has_no_room_in_it(tmp_path, keep):
    a = np.eye(3)[None].repeat(4, 0)
    a[1] *= 1e46
    write(tmp_path / "s", a)
    report = invert_store(tmp_path / "s", tmp_path / "t", variable="cov", dtype="float32", keep=keep, max_failed=None)
    assert report.failed["overflow"] == 1
    assert opened(tmp_path / "t")["info"].values.tolist() == [0, -2, 0, 0]
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok


# --- verification ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("diagonal", (2, 0), 1.001), ("diagonal", (2, 1), 1.001), ("logdet", (2,), 1 + 1e-6), ("sign", (2,), -1),
        ("logdet", (5,), 5.0), ("sign", (5,), 1.0),
    ],
)  # fmt: skip
def test_wrong_results_of_badly_scaled_matrices_are_found(tmp_path, monkeypatch, name, index, value):
    scale = np.array([1, 1e5, 1e-5])
    a = conditioned(24, 3, 10, structure="positive definite") * scale[:, None] * scale
    a[5] = 0
    write(tmp_path / "s", a, chunks=(24, 3, 3))
    invert_store(tmp_path / "s", tmp_path / "t", variable="cov", keep="diagonal", logdet=True, max_failed=None)
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok
    # As a processor may compute it: with checksums that are right.
    monkeypatch.setattr("dask_batchinv.job.driver.verify._unlike_ledger", lambda *_: None)
    array = zarr.open_group(tmp_path / "t")[name]
    array[index] = array[index] * value if index == (2,) or name == "diagonal" else value
    assert not verify_store(tmp_path / "t", source=tmp_path / "s").ok


def test_a_wrong_rcond_is_found(tmp_path, monkeypatch):
    write(tmp_path / "s")
    invert_store(tmp_path / "s", tmp_path / "t", variable="cov")
    monkeypatch.setattr("dask_batchinv.job.driver.verify._unlike_ledger", lambda *_: None)
    zarr.open_group(tmp_path / "t")["rcond"][3] *= 1.1
    verified = verify_store(tmp_path / "t", source=tmp_path / "s")
    assert any("another rcond" in tile.cause for tile in verified.bad_tiles)


@pytest.mark.filterwarnings("ignore:Both zarr.json", "ignore:Object at", "ignore:Consolidated metadata")
@pytest.mark.parametrize("key", [".zgroup", ".zmetadata", "inverse/.zattrs"])
def test_lost_documents_of_format_2_are_found(tmp_path, key):
    write(tmp_path / "s")
    invert_store(tmp_path / "s", tmp_path / "t", variable="cov", zarr_format=2)
    (tmp_path / "t" / key).unlink()
    assert not verify_store(tmp_path / "t").ok
    assert invert_store(tmp_path / "s", tmp_path / "t", variable="cov", zarr_format=2).mended
    (tmp_path / "t/inverse/.zattrs").write_text("{}")
    assert invert_store(tmp_path / "s", tmp_path / "t", variable="cov", zarr_format=2).mended
    assert xr.open_zarr(tmp_path / "t", zarr_format=2, consolidated=False).inverse.dims == ("t", "row", "col")


# --- damage ------------------------------------------------------------------------------------------------------


def test_a_bad_line_is_no_bad_chunk(tmp_path, monkeypatch):
    """What fails a few times, with errors of any kind, is read in the end."""
    url = f"memory://{tmp_path.name}/s"
    zarr.create_array(url, shape=A.shape, chunks=(4, 3, 3), dtype="f8", filters=None)[...] = A
    get, failures = BoundedStore.get, iter(range(5))

    async def failing(self, key, prototype, byte_range=None):
        if key == "c/2/0/0" and byte_range is None and next(failures, None) is not None:
            raise RuntimeError("the server says 503")
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(BoundedStore, "get", failing)
    monkeypatch.setattr("dask_batchinv.job.driver.retry.BACK_OFF_SECONDS", 0.0)
    report = invert_store(url, tmp_path / "t", bad_chunks="nan", tile_size=10_000)
    assert (report.complete, report.failed["unreadable"]) == (True, 0)


def test_a_source_that_rots_later_costs_nothing_that_is_done(tmp_path):
    checked = {"compressors": [zarr.codecs.Crc32cCodec()]}
    zarr.create_array(tmp_path / "s", shape=A.shape, chunks=(4, 3, 3), dtype="f8", **checked)[...] = A
    invert_store(tmp_path / "s", tmp_path / "t", bad_chunks="nan")
    chunk = tmp_path / "s/c/2/0/0"
    content = bytearray(chunk.read_bytes())
    content[9] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(JobFailedError) as raised:
        invert_store(tmp_path / "s", tmp_path / "t")
    assert "c/2/0/0" in str(raised.value)
    report = invert_store(tmp_path / "s", tmp_path / "t", bad_chunks="nan")
    assert report.complete
    assert [bad.key for bad in report.bad_chunks] == ["c/2/0/0"]
    assert_same_bits(opened(tmp_path / "t").inverse, inverse(A))


# --- replacing ---------------------------------------------------------------------------------------------------


def test_after_a_kill_in_the_middle_of_a_replacement_the_old_one_does_not_come_back(tmp_path, monkeypatch):
    write(tmp_path / "s")
    target, new = tmp_path / "t", tmp_path / ".t.dask_batchinv-new"
    invert_store(tmp_path / "s", target, variable="cov")
    zarr.open_group(tmp_path / "s")["cov"][...] = 2 * A
    for broken in (lambda location, old: None, lambda location, old: location.delete_all(location.keys()[:3])):
        with monkeypatch.context() as patch:
            # As if killed after the exchange, or while the old one was being removed.
            patch.setattr(swap, "_remove", broken)
            invert_store(tmp_path / "s", target, variable="cov", overwrite=True)
        assert new.exists()
        report = invert_store(tmp_path / "s", target, variable="cov")
        assert any("left by an interrupted replacement" in note for note in report.notes)
        report = invert_store(tmp_path / "s", target, variable="cov", overwrite=True)
        assert report.tiles_now > 0
        assert_same_bits(opened(target).inverse, inverse(2 * A))
        assert not new.exists()


def test_a_break_while_keys_are_copied_is_mended_by_the_same_command(tmp_path, monkeypatch):
    write(tmp_path / "s")
    target = f"memory://{tmp_path.name}/t"
    invert_store(tmp_path / "s", target, variable="cov")
    copied, copy_to = [], Location.copy_to

    def dying(self, other, key):
        copied.append(key)
        if len(copied) == 5:
            raise KeyboardInterrupt
        copy_to(self, other, key)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "copy_to", dying)
        with pytest.raises(KeyboardInterrupt):
            invert_store(tmp_path / "s", target, variable="cov", overwrite=True, assume_a="sym")
    report = invert_store(tmp_path / "s", target, variable="cov", overwrite=True, assume_a="sym")
    assert (report.complete, report.tiles_now) == (True, 0)
    for _ in range(2):  # and again, and again
        assert invert_store(tmp_path / "s", target, variable="cov", overwrite=True, assume_a="sym").complete


def test_what_is_replaced_in_place_is_said(tmp_path):
    write(tmp_path / "s")
    long = tmp_path / ("n" * 245)
    invert_store(tmp_path / "s", long, variable="cov")
    report = invert_store(tmp_path / "s", long, variable="cov", overwrite=True)
    assert any("nothing could be built beside it" in note for note in report.notes)


def test_a_mask_that_is_the_target_itself_is_refused(tmp_path):
    write(tmp_path / "s")
    invert_store(tmp_path / "s", tmp_path / "t", variable="cov")
    os.symlink(tmp_path / "t/info", tmp_path / "s/m")
    with pytest.raises(RefusedError, match="inside the target"):
        invert_store(tmp_path / "s", tmp_path / "t", variable="cov", mask="m", overwrite=True)


def test_a_lock_that_says_nothing_is_nobodys(tmp_path):
    write(tmp_path / "s")
    invert_store(tmp_path / "s", tmp_path / "t", variable="cov")
    (tmp_path / "t" / LOCK).touch()
    assert status_of(Location.parse(tmp_path / "t")).at_work is None
    url = f"memory://{tmp_path.name}/t"
    invert_store(tmp_path / "s", url, variable="cov")
    lease = b'{"run": "a", "holder": "process 1 on b", "at": "2020-01-01T00:00:00+00:00"}'
    Location.parse(url).write(LOCK, lease)
    assert status_of(Location.parse(url)).at_work is None


def test_a_lazy_source_that_reads_the_target_is_refused(tmp_path):
    write(tmp_path / "s")
    invert_store(tmp_path / "s", tmp_path / "t", variable="cov")
    before = (tmp_path / "t/inverse/c.0.0.0").read_bytes()
    lazy = xr.open_zarr(tmp_path / "t", consolidated=False).inverse
    with pytest.raises(RefusedError, match="inside the target"):
        invert_store(lazy, tmp_path / "t", overwrite=True, token="x")
    with pytest.raises(RefusedError, match="inside, the source"):
        invert_store(xr.open_zarr(tmp_path / "s", consolidated=False).cov, tmp_path / "s/cov/x", token="x")
    assert (tmp_path / "t/inverse/c.0.0.0").read_bytes() == before


def test_labels_of_triangles_come_back_with_them(tmp_path):
    i, j = np.tril_indices(3)
    packed = (A @ A.swapaxes(-2, -1))[:, i, j]
    write(tmp_path / "s", packed, ("t", "p"), (4, 6), {"p": np.arange(6) * 2})
    options = {"variable": "cov", "packed": "lower by rows", "assume_a": "pos"}
    invert_store(tmp_path / "s", tmp_path / "t", like_source=True, **options)
    assert opened(tmp_path / "t").p.values.tolist() == [0, 2, 4, 6, 8, 10]
    invert_store(tmp_path / "s", tmp_path / "u", **options)
    assert "p" not in opened(tmp_path / "u").coords
