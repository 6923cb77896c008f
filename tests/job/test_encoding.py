"""How a target is stored: compressed, in chunks and shards of a wished length; bits and checksums stay safe."""

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.job.api import JobFailedError
from dask_batchinv.outcome import PlanError, RefusedError, TargetError
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import tree

A = conditioned(30 * 20, 3, 10).reshape(30, 20, 3, 3)
WAYS = {
    "zstd": {"compress": "zstd"},
    "zstd, other chunks": {"compress": "zstd:1", "chunks": {"y": 7, "x": 6}},
    "blosc": {"compress": "blosc:9"},
    "chunks": {"chunks": {"x": 5}},
    "shards": {"shards": {"y": 10, "x": 10}, "chunks": {"y": 5, "x": 2}},
    "shards of any length": {"shards": {}, "chunks": {"y": 4, "x": 4}},
    "compressed shards": {"shards": {"y": 10, "x": 20}, "chunks": {"y": 2}, "compress": "zstd:1"},
}


@pytest.fixture
def source(tmp_path):
    group = zarr.create_group(tmp_path / "s")
    names = ("y", "x", "row", "col")
    array = group.create_array("cov", shape=A.shape, dtype=A.dtype, chunks=(10, 10, 3, 3), dimension_names=names)
    array[...] = A
    return tmp_path / "s"


def chunk_of(target):
    """Return a file that holds a part of the inverse."""
    return next(path for path in sorted((target / "inverse").iterdir()) if path.name != "zarr.json")


@pytest.mark.parametrize("way", WAYS)
def test_bits_are_kept_damage_is_found_and_mended(tmp_path, source, way):
    target = tmp_path / "t"
    report = invert_store(source, target, tile_size=10_000, **WAYS[way])
    assert report.complete
    found = xr.open_zarr(target)
    assert_same_bits(found.inverse, inverse(A))
    verified = verify_store(target, source=source)
    assert verified.ok, str(verified)
    assert invert_store(source, target, tile_size=10_000, **WAYS[way]).tiles_now == 0
    before = tree(target)
    # A bit is flipped in each of its chunks, one after the other: each is seen, and made again with the same bytes.
    for offset in (0, 40, -1):
        chunk = chunk_of(target)
        content = bytearray(chunk.read_bytes())
        content[offset] ^= 4
        chunk.write_bytes(content)
        assert not verify_store(target).ok
        assert invert_store(source, target, tile_size=10_000, **WAYS[way]).tiles_now == 1
        assert {key: value for key, value in tree(target).items() if "ledger" not in key} == {
            key: value for key, value in before.items() if "ledger" not in key
        }
    chunk_of(target).write_bytes(b"")
    assert not verify_store(target).ok
    assert invert_store(source, target, tile_size=10_000, **WAYS[way]).tiles_now == 1
    assert verify_store(target).ok


@pytest.mark.parametrize("way", WAYS)
def test_the_metadata_say_how(tmp_path, source, way):
    invert_store(source, tmp_path / "t", **WAYS[way])
    array = zarr.open_group(tmp_path / "t")["inverse"]
    wanted, given = WAYS[way], (array.shards or array.chunks)
    for axis, dim in enumerate(("y", "x")):
        for name, found in (("chunks", array.chunks), ("shards", given)):
            if dim in wanted.get(name, {}):
                assert found[axis] == wanted[name][dim]
    assert (array.shards is not None) == ("shards" in wanted)
    assert wanted.get("compress", "").partition(":")[0] in str(array.compressors).lower()


def test_what_is_equal_to_the_fill_value_is_stored_too(tmp_path):
    a = np.full((8, 3, 3), np.nan)
    zarr.create_array(tmp_path / "s", shape=a.shape, dtype=a.dtype)[...] = a
    invert_store(tmp_path / "s", tmp_path / "t", compress="zstd", max_failed=None)
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok
    chunk_of(tmp_path / "t").unlink()
    assert not verify_store(tmp_path / "t").ok


def test_a_target_goes_on_as_it_was_begun(tmp_path, source):
    invert_store(source, tmp_path / "t", compress="zstd")
    with pytest.raises(TargetError, match="compress was 'zstd:3', is 'no'"):
        invert_store(source, tmp_path / "t")
    assert invert_store(source, tmp_path / "t", compress="zstd:3").tiles_now == 0


def test_another_job_and_a_bomb(tmp_path, source):
    """The metadata of a target are judged before anything of it is decoded."""
    invert_store(source, tmp_path / "t", compress="zstd")
    meta = tmp_path / "t/inverse/zarr.json"
    meta.write_text(meta.read_text().replace('"zstd"', '"lz4"'))
    assert not verify_store(tmp_path / "t").ok
    assert invert_store(source, tmp_path / "t", compress="zstd").mended
    assert verify_store(tmp_path / "t").ok


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"compress": "lzw"}, "'lzw' is no compressor: take zstd"),
        ({"compress": "gzip"}, "'gzip' is no compressor"),  # it would write the time
        ({"compress": "zstd:99"}, "'zstd:99' is no compressor"),
        ({"chunks": {"row": 1}}, "`chunks=` takes lengths along y, x, and not along row: matrices are not cut"),
        ({"chunks": {"z": 1}}, "and not along z$"),
        ({"chunks": {"y": 0}}, "whole numbers from 1 on"),
        ({"shards": {"y": 10}, "chunks": {"y": 3}}, "shards have whole chunks: along y they do not"),
        ({"shards": {"y": 10}, "zarr_format": 2}, "no shards in Zarr format 2"),
    ],
)
def test_refused(tmp_path, source, options, why):
    with pytest.raises(RefusedError, match=why):
        invert_store(source, tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_chunks_that_do_not_fit_the_memory(tmp_path):
    zarr.create_array(tmp_path / "s", shape=(10**7, 8, 8), dtype="f8", chunks=(1000, 8, 8))
    with pytest.raises(PlanError, match="does not fit the memory"):
        invert_store(tmp_path / "s", tmp_path / "t", chunks={"dim_0": 10**7}, workers=1, memory_limit="1GiB")


def test_failed_tiles_and_growth(tmp_path, source):
    (source / "cov/c/1/0/0/0").rename(tmp_path / "kept")
    with pytest.raises(JobFailedError):
        invert_store(source, tmp_path / "t", **WAYS["compressed shards"])
    (tmp_path / "kept").rename(source / "cov/c/1/0/0/0")
    array = zarr.open_array(source / "cov")
    array.resize((35, 20, 3, 3))
    array[30:] = A[:5]
    report = invert_store(source, tmp_path / "t", **WAYS["compressed shards"])
    assert report.complete
    assert_same_bits(xr.open_zarr(tmp_path / "t").inverse, inverse(np.concatenate([A, A[:5]])))


def test_on_the_command_line(tmp_path, source):
    options = ["--compress", "zstd:1", "--chunks", "y=5,x=5", "--shards", "y=10,x=20"]
    ran = CliRunner().invoke(main, ["run", str(source), str(tmp_path / "t"), "--quiet", *options])
    assert ran.exit_code == 0, ran.output
    array = zarr.open_group(tmp_path / "t")["inverse"]
    assert (array.chunks, array.shards) == ((5, 5, 3, 3), (10, 20, 3, 3))
    ran = CliRunner().invoke(main, ["run", str(source), str(tmp_path / "u"), "--chunks", "y=five"])
    assert ran.exit_code == 2
    assert "--chunks takes DIM=LENGTH" in ran.output


# --- format 2 -------------------------------------------------------------------------------------------------

#: Zarr 3 warns of documents of the format that it is not asked for.
of_both_formats = pytest.mark.filterwarnings(
    "ignore:Both zarr.json", "ignore:Object at", "ignore:Consolidated metadata", "ignore:.*does not have a Zarr"
)


@pytest.fixture
def labelled(tmp_path):
    ds = xr.Dataset(
        {"cov": (("y", "x", "row", "col"), A, {"units": "m2", "grid_mapping": "crs"})},
        {"y": np.arange(30.0), "row": list("abc"), "col": list("abc"), "crs": ((), 0, {"name": "UTM"})},
        {"title": "tests"},
    )
    ds.chunk(y=10, x=10).to_zarr(tmp_path / "s")
    return tmp_path / "s"


@of_both_formats
@pytest.mark.parametrize("compress", [None, "zstd", "blosc:1"])
def test_readers_of_either_format(tmp_path, labelled, compress):
    target, options = tmp_path / "t", {"zarr_format": 2, "compress": compress, "logdet": True, "tile_size": 10_000}
    invert_store(labelled, target, **options)
    for zarr_format in (2, 3):
        for consolidated in (False, True):
            found = xr.open_zarr(target, zarr_format=zarr_format, consolidated=consolidated)
            assert_same_bits(found.inverse, inverse(A))
            assert (found["info"] == 0).all()
            assert found.inverse.dims == ("y", "x", "row", "col")
            assert found.inverse.attrs["units"] == "1/(m2)"
            assert found.row.values.tolist() == list("abc")
            assert found.crs.attrs["name"] == "UTM"
            assert (found.attrs["title"], found.attrs["complete"]) == ("tests", 1)
        assert zarr.open_group(target, zarr_format=zarr_format)["inverse"].metadata.zarr_format == zarr_format
    assert verify_store(target, source=labelled).ok
    assert invert_store(labelled, target, **options).tiles_now == 0


@of_both_formats
def test_documents_of_format_2_are_mended_grow_and_go(tmp_path, labelled):
    target = tmp_path / "t"
    invert_store(labelled, target, zarr_format=2)
    for key in (".zgroup", ".zmetadata", "inverse/.zarray", "rcond/.zattrs", "row/0"):
        before = (target / key).read_bytes()
        (target / key).unlink()
        assert invert_store(labelled, target, zarr_format=2).mended
        if key != ".zmetadata":
            assert (target / key).read_bytes() == before
    assert xr.open_zarr(target, zarr_format=2).attrs["complete"] == 1
    (target / "inverse/0.0.0.0").write_bytes(b"other")
    assert invert_store(labelled, target, zarr_format=2).tiles_now == 1
    # Other attributes are left to users.
    zarr.open_group(target, zarr_format=2, mode="r+").attrs["mine"] = 1
    assert not invert_store(labelled, target, zarr_format=2).mended
    assert zarr.open_group(target, zarr_format=2).attrs["mine"] == 1
    more = xr.open_zarr(labelled).isel(y=slice(0, 5)).load().assign_coords(y=np.arange(30.0, 35))
    more.drop_vars(["row", "col", "crs"]).to_zarr(labelled, append_dim="y")
    report = invert_store(labelled, target, zarr_format=2)
    assert report.complete
    found = xr.open_zarr(target, zarr_format=2)
    assert_same_bits(found.inverse, inverse(np.concatenate([A, A[:5]])))
    assert found.y.values.tolist() == list(range(35))
    # And gone with it.
    invert_store(labelled, target, overwrite=True)
    assert not list(target.rglob(".z*"))


@of_both_formats
def test_while_a_job_runs_format_2_says_so(tmp_path, labelled):
    (labelled / "cov/c/2/1/0/0").unlink()
    with pytest.raises(JobFailedError):
        invert_store(labelled, tmp_path / "t", zarr_format=2, tile_size=1000)
    found = xr.open_zarr(tmp_path / "t", zarr_format=2)
    assert found.attrs["complete"] == 0
    assert np.isnan(found["info"][20:, 10:]).all()  # nobody has come to these
