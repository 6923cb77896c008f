"""Source and target as people have them in hand, each with what its file system is given."""

import importlib.util
import json

import dask
import fsspec.implementations.reference
import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from dask_batchinv import SourceError, TargetError, inverse, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.job.report.freshness import status_of
from dask_batchinv.location import Location
from dask_batchinv.places import locate
from tests.support.private import TOKEN
from tests.support.stacks import conditioned
from tests.support.targets import tree


@pytest.fixture
def source(make_source):
    return make_source(conditioned(40, 3, 10), chunks=(10, 3, 3))


# --- options ----------------------------------------------------------------------------------------------------


def test_source_and_target_have_options_of_their_own(tmp_path, source, client):
    options = {"target_options": {"token": TOKEN}, "client": client}
    report = invert_store(source, f"private://{tmp_path}/t", tile_size=720, **options)
    assert report.complete
    assert "nothing was left to do" in str(invert_store(source, f"private://{tmp_path}/t", tile_size=720, **options))
    assert verify_store(f"private://{tmp_path}/t", source=source, **options).ok
    for name, content in tree(tmp_path / "t").items():
        assert TOKEN.encode() not in content, name
    report = invert_store(
        f"private://{source}", f"private://{tmp_path}/u", source_options={"token": TOKEN}, tile_size=720, **options
    )
    assert report.complete
    assert TOKEN not in str(report) + json.dumps(report.to_json())
    for name, content in tree(tmp_path / "u").items():
        assert TOKEN.encode() not in content, name


def test_wrong_options_are_refused_and_not_shown(tmp_path, source, client):
    wrong = {"token": "not-the-token-0815"}
    with pytest.raises(SourceError, match="wrong token") as caught:
        invert_store(f"private://{source}", tmp_path / "t", source_options=wrong, client=client)
    assert wrong["token"] not in str(caught.value)
    with pytest.raises((TargetError, SourceError), match="wrong token") as caught:
        invert_store(source, f"private://{tmp_path}/t", target_options=wrong, client=client)
    assert wrong["token"] not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_options_on_the_command_line(tmp_path, source):
    runner, places = CliRunner(), [f"private://{source}", f"private://{tmp_path}/t"]
    given = ["--source-options", json.dumps({"token": TOKEN}), "--target-options", "stores.mine"]
    with dask.config.set({"stores": {"mine": {"token": TOKEN}}}):
        done = runner.invoke(main, ["run", *places, *given])
        assert done.exit_code == 0, done.output
        done = runner.invoke(main, ["status", places[1], *given])
        assert done.exit_code == 0, done.output
        done = runner.invoke(main, ["verify", places[1], "--source", places[0], *given, "--workers", "1"])
        assert done.exit_code in (0, 1, 2)  # worker processes do not know this file system
        done = runner.invoke(main, ["run", *places, "--dry-run", *given])
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("text", ["{", "no.such.name", '{"a": 1} x', "[1]", ""])
def test_options_that_are_none(tmp_path, source, text):
    done = CliRunner().invoke(main, ["run", str(source), str(tmp_path / "t"), "--source-options", text])
    assert done.exit_code == 2
    assert "--source-options takes a JSON object, or the name of one" in done.output
    assert not (tmp_path / "t").exists()


def test_stores_with_other_endpoints_are_not_one():
    here, there = ({"client_kwargs": {"endpoint_url": f"http://{host}"}} for host in ("a", "b"))
    a = Location.parse("s3://bucket/a", here)
    assert a.contains(Location.parse("s3://bucket/a/b", here))
    assert a.contains(Location.parse("s3://bucket/a/b"))  # which may be the same, by the environment
    assert not a.contains(Location.parse("s3://bucket/a/b", there))
    assert not a.contains(Location.parse("s3://bucket/a/b", {"endpoint_url": "http://b"}))
    assert (a / "b").options == here


# --- what stands for a place ------------------------------------------------------------------------------------


def test_what_stands_for_a_local_place(tmp_path, source, client):
    array, group = zarr.open_array(source, mode="r"), zarr.open_group(tmp_path / "t", mode="w")
    group.create_array("inner", shape=(1,), dtype=float)
    mapper = fsspec.get_mapper(str(source))
    for place in (source, str(source), f"file://{source}", array, mapper, array.store, locate(source)):
        assert locate(place) == Location(str(source))
    assert locate(group["inner"]) == Location(str(tmp_path / "t" / "inner"))
    assert invert_store(array, fsspec.get_mapper(str(tmp_path / "u")), client=client).complete
    with pytest.raises(TargetError, match=r"is, or lies inside, the source"):
        invert_store(array, mapper, client=client)


def test_what_stands_for_a_place_with_options(tmp_path, source, client):
    url, options = f"private://{source}", {"token": TOKEN}
    mapper = fsspec.get_mapper(url, **options)
    array = zarr.open_array(url, storage_options=options, mode="r")
    for place in (mapper, array, array.store):
        found = locate(place)
        assert (found.url, dict(found.options)) == (url, options)
    assert invert_store(array, tmp_path / "t", client=client, tile_size=720).complete


@pytest.mark.parametrize("url", ["memory://host/a.zarr", "/tmp/a.zarr", "s3://bucket/a.zarr"])
def test_a_path_of_universal_pathlib(url):
    upath = pytest.importorskip("upath", reason="universal_pathlib is not installed")
    found = locate(upath.UPath(url))
    assert (found.url, dict(found.options)) == (url, {})


def test_a_place_in_memory_has_one_url():
    place = fsspec.get_mapper("memory://host/a.zarr")
    assert locate(place) == locate("memory://host/a.zarr") == locate("memory:///host/a.zarr")


def test_a_zip_file_is_a_source(tmp_path, client):
    a = conditioned(20, 3, 10)
    with zarr.storage.ZipStore(tmp_path / "s.zip", mode="w") as store:
        zarr.create_array(store, data=a, chunks=(10, 3, 3))
    store = zarr.storage.ZipStore(tmp_path / "s.zip", mode="r")
    assert invert_store(store, tmp_path / "t", client=client).complete
    found = zarr.open_array(tmp_path / "t" / "inverse")[...]
    np.testing.assert_allclose(found @ a, np.broadcast_to(np.eye(3), a.shape), atol=1e-10)


@pytest.mark.parametrize(
    "place", [zarr.storage.MemoryStore(), {"a": b""}, 3, None], ids=["memory", "dict", "int", "none"]
)
def test_what_no_other_process_could_open(tmp_path, source, place):
    with pytest.raises(SourceError, match=r"is no place that worker processes could open: pass its path or URL"):
        invert_store(place, tmp_path / "t")
    with pytest.raises(TargetError, match=r"is no place"):
        invert_store(source, place)


# --- what others than Zarr have made, and lists ---------------------------------------------------------------


def write_references(folder, a, *, parquet=False):
    """References to parts of a file of another format, as kerchunk and VirtualiZarr write them."""
    (folder / "data.bin").write_bytes(b"a header" + a.astype("<f8").tobytes())
    half, meta = a.nbytes // 2, {"zarr_format": 2, "dtype": "<f8", "compressor": None, "filters": None, "order": "C"}
    refs = {
        ".zgroup": json.dumps({"zarr_format": 2}),
        "cov/.zarray": json.dumps(meta | {"shape": a.shape, "chunks": [len(a) // 2, 3, 3], "fill_value": None}),
        "cov/.zattrs": json.dumps({"_ARRAY_DIMENSIONS": ["t", "i", "j"]}),
        "cov/0.0.0": [str(folder / "data.bin"), 8, half],
        "cov/1.0.0": [str(folder / "data.bin"), 8 + half, half],
    }
    if parquet:
        mapper = fsspec.implementations.reference.LazyReferenceMapper
        table = mapper.create(str(folder / "refs.parquet"), fs=fsspec.filesystem("file"), record_size=1000)
        for key, value in refs.items():
            table[key] = value.encode() if isinstance(value, str) else value
        table.flush()
        return folder / "refs.parquet"
    (folder / "refs.json").write_text(json.dumps({"version": 1, "refs": refs}))
    return folder / "refs.json"


@pytest.mark.parametrize("how", ["chain", "chain of URLs", "options", "mapping"])
def test_references(tmp_path, how):
    a = conditioned(40, 3, 10)
    refs = write_references(tmp_path, a)
    place, options = {
        "chain": (f"reference://::{refs}", None),
        "chain of URLs": (f"reference://::file://{refs}", None),
        "options": ("reference://", {"fo": str(refs)}),
        "mapping": (f"reference://::{refs}", {}),
    }[how]
    report = invert_store(place, tmp_path / "t", variable="cov", source_options=options, tile_size=720)
    assert report.complete
    assert "refs.json" in report.source  # by which they are told from others
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "t")["inverse"][...], inverse(a))
    assert verify_store(tmp_path / "t", source=place, source_options=options).ok
    again = invert_store(place, tmp_path / "t", variable="cov", source_options=options, tile_size=720)
    assert again.tiles_now == 0


@pytest.mark.filterwarnings("ignore:The 'fastparquet' engine")  # fsspec's default
def test_references_in_parquet(tmp_path):
    pytest.importorskip("kerchunk.df", reason="kerchunk is not installed")
    a = conditioned(40, 3, 10)
    place = f"reference://::{write_references(tmp_path, a, parquet=True)}"
    assert invert_store(place, tmp_path / "t", variable="cov", tile_size=720).complete
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "t")["inverse"][...], inverse(a))
    assert verify_store(tmp_path / "t", source=place).ok
    assert invert_store(place, tmp_path / "t", variable="cov", tile_size=720).tiles_now == 0


def test_places_of_obstore(tmp_path, source):
    stores = pytest.importorskip("obstore.store", reason="obstore is not installed")
    assert invert_store(stores.LocalStore(source), tmp_path / "t").complete
    assert invert_store(zarr.storage.ObjectStore(stores.LocalStore(source)), tmp_path / "u").complete
    remote = stores.S3Store("b", prefix="p/q", endpoint="http://e", access_key_id="k", secret_access_key=TOKEN)
    location = locate(remote)
    assert (location.url, location.options) == ("s3://b/p/q", {"key": "k", "secret": TOKEN, "endpoint_url": "http://e"})
    assert TOKEN not in repr(location)
    with pytest.raises(SourceError, match="of an obstore MemoryStore pass the URL"):
        invert_store(stores.MemoryStore(), tmp_path / "v")


def test_what_a_store_needs_is_named(tmp_path):
    for protocol, (package, extra) in {"gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure")}.items():
        if importlib.util.find_spec(package) is None:
            with pytest.raises(SourceError, match=rf"pip install 'dask_batchinv\[{extra}\]', here and on all workers"):
                invert_store(f"{protocol}://bucket/a.zarr", tmp_path / "t")


def test_status_finds_a_source_in_an_archive_whatever_the_folder(tmp_path, monkeypatch, capsys):
    with zarr.storage.ZipStore(tmp_path / "s.zip", mode="w") as store:
        group = zarr.create_group(store)
        group.create_array("cov", data=conditioned(40, 3, 10), chunks=(10, 3, 3))
    monkeypatch.chdir(tmp_path)
    assert invert_store("zip::s.zip", "t", variable="cov", tile_size=720).complete
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert invert_store("zip::../s.zip", "../t", variable="cov", tile_size=720).tiles_now == 0
    assert status_of(Location.parse("../t")).exit_code == 0
