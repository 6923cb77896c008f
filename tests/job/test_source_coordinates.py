"""Coordinates are read as the stack is: what was judged, within bounds, and with the bits that Xarray would give."""

import gzip
import json
import os
import pickle
import shutil
import struct
import tracemalloc
from functools import partial

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr

from dask_batchinv import SourceError, invert_store
from dask_batchinv.job.source import bounded_decoding, coordinates
from dask_batchinv.job.source.source import open_source
from tests.support.hostile import BYTES, PICKLE, V2, V3, Bomb, grid, numcodec, shard, write_array
from tests.support.stacks import conditioned

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STACK = (("t", "i", "j"), conditioned(4, 2, 10))
TIMES = np.array(["2020-01-01", "2021-06-05", "NaT", "1999-12-31"], "M8[ns]")
WORDS = ["a", "", "höhe", "\U0001f600x"]


# --- the same as Xarray ---------------------------------------------------------------------------------------

COORDINATES = {
    "numbers": {"t": [3, 1, 2, 4], "lat": ("t", np.arange(4.0)), "mask": ("t", [True, False, True, True])},
    "scalars": {"crs": ((), 0, {"crs_wkt": "x"}), "when": ((), TIMES[0]), "name": ((), "a")},
    "text": {"t": WORDS, "i": ["x", "y"], "bytes": ("t", np.array([b"a", b"bc", b"", b"d"]))},
    "objects": {"t": np.array(WORDS, object), "place": (("t", "i"), np.array([WORDS[:2]] * 4, object))},
    "times": {"t": TIMES, "delay": ("t", np.array([1, 2, 3, 4], "m8[s]")), "day": ("t", TIMES.astype("M8[s]"))},
    "two dimensions": {"grid": (("t", "j"), np.arange(8.0).reshape(4, 2)), "of_rows": ("i", [1, 2])},
    "attributes": {"lat": ("t", np.arange(4.0), {"units": "m", "coordinates": "crs", "_nc": "x"}), "crs": ((), 0)},
    "nothing": {"t": ("t", np.arange(4.0), {"_FillValue": 3.0})},
    "complex": {"phase": ("t", np.arange(4) * 1j)},
    "odd": {"short": ("t", np.arange(4, dtype=">i2")), "half": ("t", np.arange(4, dtype="f2"))},
}  # fmt: skip


def from_xarray(path, names):
    """What Xarray gives of coordinates, undecoded."""
    opened = xr.open_zarr(path, consolidated=False, chunks={}, mask_and_scale=False, decode_times=False)
    return opened[sorted(names)].reset_coords().load().drop_encoding().drop_attrs(deep=False)


def assert_as_xarray(path, names=None):
    source = open_source(path, "A", ("i", "j"))
    assert source.notes == ()
    if names is not None:
        assert {*source.coordinate_names} == {*names}
    got = source.read_coordinates()
    want = from_xarray(path, source.coordinate_names)
    xr.testing.assert_identical(got.reset_coords(), want)
    for name in source.coordinate_names:
        assert got[name].dtype == want[name].dtype
        assert {key: type(value) for key, value in got[name].attrs.items()} == {
            key: type(value) for key, value in want[name].attrs.items()
        }
    assert {*got.indexes} == {*want.indexes}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("case", COORDINATES)
def test_same_as_xarray(tmp_path, zarr_format, case):
    ds = xr.Dataset({"A": STACK}, coords=COORDINATES[case])
    ds.to_zarr(tmp_path / "g", zarr_format=zarr_format, consolidated=False)
    assert_as_xarray(tmp_path / "g", COORDINATES[case])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", sorted({"bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}))
@pytest.mark.parametrize("case", ["numbers", "objects"])
def test_same_as_xarray_of_every_compressor(tmp_path, zarr_format, kind, case):
    name = kind if kind in ("gzip", "zstd") else f"numcodecs.{kind}"
    codec = (
        numcodecs.get_codec({"id": kind})
        if zarr_format == 2
        else zarr.registry.get_codec_class(name).from_dict({"name": name, "configuration": {}})
    )
    ds = xr.Dataset({"A": STACK}, coords=COORDINATES[case])
    encoding = {name: {"compressors": [codec]} for name in ds.coords}
    ds.to_zarr(tmp_path / "g", zarr_format=zarr_format, encoding=encoding, consolidated=False)
    assert_as_xarray(tmp_path / "g", ds.coords)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("shards", [None, (4,)])
def test_same_as_xarray_of_several_chunks(tmp_path, zarr_format, shards):
    if zarr_format == 2 and shards:
        pytest.skip("format 2 has no shards")
    ds = xr.Dataset({"A": STACK}, coords={"t": np.array(WORDS, object), "lat": ("t", np.arange(4.0))})
    encoding = {name: {"chunks": (2,)} | ({"shards": shards} if shards else {}) for name in ds.coords}
    ds.to_zarr(tmp_path / "g", zarr_format=zarr_format, encoding=encoding, consolidated=False)
    assert_as_xarray(tmp_path / "g", ds.coords)


def test_same_as_xarray_of_times_in_zarr_itself(tmp_path):
    group = zarr.create_group(tmp_path / "g")
    group.create_array("A", data=STACK[1], dimension_names=STACK[0])
    group.create_array("t", data=TIMES.astype("M8[s]"), dimension_names=["t"])
    group.create_array("i", data=np.array(["a", "b"], "U3"), dimension_names=["i"])
    group.create_array("j", data=np.array(["a", "b"], np.dtypes.StringDType()), dimension_names=["j"])
    assert_as_xarray(tmp_path / "g", "tij")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_chunks_that_were_never_written(tmp_path, zarr_format):
    """As Xarray: they have the fill value."""
    ds = xr.Dataset({"A": STACK}, coords={"lat": ("t", np.zeros(4)), "crs": 0})
    ds.to_zarr(tmp_path / "g", zarr_format=zarr_format, consolidated=False)
    for name, chunk in {"lat": "0", "crs": "0"}.items():
        found = tmp_path / "g" / name
        for path in (found / chunk, found / "c" / "0", found / "c"):
            if path.is_file():
                path.unlink()
    assert_as_xarray(tmp_path / "g", ["lat", "crs"])


# --- what was judged is what is read --------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_metadata_that_change_between_the_check_and_the_reading(tmp_path, zarr_format, opened):
    ds = xr.Dataset({"A": STACK}, coords={"t": np.arange(4.0)})
    encoding = {"t": {"compressors": None}}
    ds.to_zarr(tmp_path / "g", zarr_format=zarr_format, encoding=encoding, consolidated=False)
    source = open_source(tmp_path / "g", "A")
    evil = pickle.dumps(Bomb(tmp_path / "exploded"))
    if zarr_format == 2:
        meta = V2 | {"shape": [4], "chunks": [4], "compressor": PICKLE}
        (tmp_path / "g" / "t" / ".zarray").write_text(json.dumps(meta))
    else:
        meta = V3 | {"shape": [4], **grid(4), "codecs": [BYTES, numcodec("pickle")]}
        (tmp_path / "g" / "t" / "zarr.json").write_text(json.dumps(meta))
    assert source.read_coordinates()["t"].values.tolist() == [0, 1, 2, 3]
    chunk_of(tmp_path / "g" / "t").write_bytes(evil)
    with pytest.raises(SourceError, match="cannot be read, t"):
        source.read_coordinates()
    assert not (tmp_path / "exploded").exists()


def test_what_workers_get_is_small(tmp_path):
    ds = xr.Dataset({"A": (*STACK, {"history": "x" * 10**6})}, coords={"t": np.arange(4.0)}, attrs={"y": "z" * 10**6})
    ds["t"].attrs["long"] = "x" * 10**6
    ds.to_zarr(tmp_path / "g", consolidated=False)
    source = open_source(tmp_path / "g")
    small = pickle.loads(pickle.dumps(source.for_workers()))
    assert len(pickle.dumps(small)) < 5000
    assert small == source
    assert hash(small) == hash(source)
    np.testing.assert_array_equal(small.read_block(small.open(), (slice(1, 3),)), STACK[1][1:3])
    shutil.rmtree(tmp_path / "g" / "A")
    ds.assign(A=ds.A.astype("f4")).to_zarr(tmp_path / "g", mode="w", consolidated=False)
    with pytest.raises(SourceError, match="have changed"):
        small.open()


# --- what would fill the memory, or never end -----------------------------------------------------------------


def text_of(words):
    return numcodecs.VLenUTF8().encode(np.array(words, object))


TEXT_2 = V2 | {"dtype": "|O", "filters": [{"id": "vlen-utf8"}], "shape": [4], "chunks": [4], "fill_value": ""}
TEXT_3 = V3 | {"data_type": "string", "fill_value": "", "codecs": ["vlen-utf8"], "shape": [4], **grid(4)}
GZIP_3 = {"name": "gzip", "configuration": {"level": 1}}
LONG = text_of(["x" * 2**22] * 4)  # 16 MiB
EVIL_TEXTS = {
    "count": (struct.pack("<I", 2**31 - 1) + bytes(100), False),
    "count of one more": (text_of([*WORDS, "x"]), False),
    "count of one less": (text_of(WORDS[:3]), False),
    "length": (struct.pack("<II", 4, 2**31 - 1) + bytes(100), False),
    "cut short": (text_of(WORDS)[:-2], False),
    "empty": (b"", False),
    "not UTF-8": (struct.pack("<IIIII", 4, 1, 0, 0, 0)[:8] + b"\xff" + bytes(12), False),
    "bomb": (gzip.compress(bytes(2**28)), True),
    "bomb of several members": (gzip.compress(text_of(WORDS)) + gzip.compress(bytes(2**28)), True),
    "long": (gzip.compress(LONG), True),
}  # fmt: skip


def group_with(tmp_path, name, meta, dims, content=None):
    """Write a stack, and beside it an array by hand."""
    ds = xr.Dataset({"A": STACK})
    ds["A"].attrs["coordinates"] = "lat"
    path = tmp_path / "g"
    ds.to_zarr(path, zarr_format=meta["zarr_format"], consolidated=False)
    if meta["zarr_format"] == 2:
        write_array(path / name, meta, {"_ARRAY_DIMENSIONS": list(dims)})
    else:
        write_array(path / name, meta | {"dimension_names": list(dims)})
        shutil.rmtree(path / name / "c")
        (path / name / "c").mkdir()
        (path / name / "c" / "0").write_bytes(b"junk")
    if content is not None:
        chunk_of(path / name).write_bytes(content)
    return path


def chunk_of(path):
    return path / "0" if (path / ".zarray").exists() else path / "c" / "0"


def assert_left_out(path, name, match):
    """Nobody needs it: it is left out with a note, whenever that is found; without a list for that it is an error."""
    source, notes = open_source(path, "A"), []
    if not source.notes:
        with pytest.raises(SourceError, match=match):
            source.read_coordinates()
    tracemalloc.start()
    try:
        found = source.read_coordinates(notes)
        assert tracemalloc.get_traced_memory()[1] < 2**24 + 2**20
    finally:
        tracemalloc.stop()
    assert found is None or name not in found
    (note,) = [*source.notes, *notes]
    assert note.startswith(f"{name} beside the stack was left out: ")
    assert match in note


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("case", EVIL_TEXTS)
def test_texts(tmp_path, zarr_format, case, monkeypatch):
    monkeypatch.setattr(bounded_decoding, "TEXT_NBYTES", 2**22)
    monkeypatch.setattr(bounded_decoding.TextAllowance.__init__, "__defaults__", (2**22,))
    content, compressed = EVIL_TEXTS[case]
    if zarr_format == 2:
        meta = TEXT_2 | ({"compressor": {"id": "gzip", "level": 1}} if compressed else {})
    else:
        meta = TEXT_3 | ({"codecs": ["vlen-utf8", GZIP_3]} if compressed else {})
    path = group_with(tmp_path, "lat", meta, ["t"], content)
    assert_left_out(path, "lat", "")
    shutil.move(path / "lat", path / "t")
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(path, "A").read_coordinates()


def test_texts_of_many_chunks_have_one_allowance(tmp_path, monkeypatch):
    words = np.array(["x" * 1000] * 4, object)
    ds = xr.Dataset({"A": STACK}, coords={"t": words, "u": ("t", words), "v": ("t", words)})
    ds.to_zarr(tmp_path / "g", encoding={name: {"chunks": (1,)} for name in "tuv"}, consolidated=False)
    monkeypatch.setattr(bounded_decoding.TextAllowance.__init__, "__defaults__", (10_000,))
    notes = []
    found = open_source(tmp_path / "g").read_coordinates(notes)
    assert {*found.variables} == {"t", "u"}
    assert len(notes) == 1
    assert "where of all the text there may only be" in notes[0]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_numbers_that_are_bombs(tmp_path, zarr_format):
    meta = (
        V2 | {"compressor": {"id": "gzip"}, "chunks": [4]}
        if zarr_format == 2
        else V3 | {"codecs": [BYTES, GZIP_3], **grid(4)}
    )
    path = group_with(tmp_path, "lat", meta | {"shape": [4]}, ["t"], gzip.compress(bytes(2**28)))
    assert_left_out(path, "lat", "a decompression bomb")


@pytest.mark.parametrize(
    "make", [os.mkfifo, partial(os.symlink, "/dev/zero"), partial(os.symlink, "/nowhere"), os.mkdir]
)
@pytest.mark.parametrize(
    "meta", [V2 | {"chunks": [4]}, V3 | grid(4), TEXT_2, TEXT_3], ids=["2", "3", "text-2", "text-3"]
)
def test_chunks_that_are_no_files(tmp_path, make, meta):
    path = group_with(tmp_path, "lat", meta | {"shape": [4]}, ["t"])
    chunk_of(path / "lat").unlink()
    make(chunk_of(path / "lat"))
    assert_left_out(path, "lat", "")


@pytest.mark.parametrize(
    "meta",
    [
        V2 | {"shape": [4], "chunks": [2**40]},
        V2 | {"shape": [4], "chunks": [2**40], "compressor": {"id": "zlib"}},
        V2 | {"shape": [4], "chunks": [2**26], "dtype": "<U4", "fill_value": ""},
        TEXT_2 | {"chunks": [2**40]},
        V3 | {"shape": [4], **grid(2**40)},
        V3 | {"shape": [4], **grid(2**40), "codecs": [shard(chunk=[2**21])]},
        TEXT_3 | grid(2**40),
        V2 | {"shape": [4], "chunks": [2**27], "dtype": "|u1", "fill_value": 0, "filters": [
            {"id": "astype", "encode_dtype": "<c16", "decode_dtype": "|u1"}]},
    ],
    ids=["2", "zlib", "wide", "text-2", "3", "shards", "text-3", "astype"],
)  # fmt: skip
def test_huge_chunks(tmp_path, meta):
    path = group_with(tmp_path, "lat", meta, ["t"])
    assert open_source(path, "A").coordinate_names == ()
    (note,) = open_source(path, "A").notes
    assert "all coordinates together may take 1,073,741,824" in note or "chunks in a shard" in note


def test_very_many_chunks(tmp_path):
    """Each takes memory and time, also where none was ever written."""
    group = zarr.create_group(tmp_path / "g", attributes={"coordinates": "lat"})
    group.create_array("A", shape=(2**20, 2, 2), dtype="f8", dimension_names=["t", "i", "j"])
    group.create_array("lat", shape=(2**20,), chunks=(1,), dtype="u1", dimension_names=["t"])
    assert "all coordinates together" in open_source(tmp_path / "g", "A").notes[0]


def test_all_coordinates_together(tmp_path, monkeypatch):
    coords = {name: ("t", np.arange(4.0)) for name in "abct"} | {"i": [1, 2], "j": [1, 2]}
    xr.Dataset({"A": STACK}, coords).to_zarr(tmp_path / "g", consolidated=False)
    each = 2048 + 32
    monkeypatch.setattr(coordinates, "COORDINATES_NBYTES", 4 * each)
    source = open_source(tmp_path / "g")
    assert {*source.coordinate_names} == {"a", "i", "j", "t"}  # labels of dimensions come first
    assert [note.partition(":")[0] for note in source.notes] == [f"{x} beside the stack was left out" for x in "bc"]
    monkeypatch.setattr(coordinates, "COORDINATES_NBYTES", each // 2)
    with pytest.raises(SourceError, match="labels of i, which decide what comes out, cannot be read: it may take 2,0"):
        open_source(tmp_path / "g")


# --- what nobody needs stops nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["length", "codec", "metadata", "attributes"])
def test_a_spoilt_coordinate_stops_nothing(tmp_path, client, spoil):
    ds = xr.Dataset(
        {"A": STACK}, coords={"t": np.arange(4.0), "lat": ("t", np.arange(4.0)), "k": ("t", np.arange(4.0))}
    )
    ds.to_zarr(tmp_path / "g", consolidated=False)
    path = tmp_path / "g" / "lat" / "zarr.json"
    meta = json.loads(path.read_text())
    meta |= {
        "length": {"shape": [3]}, "codec": {"codecs": [BYTES, numcodec("pickle")]}, "metadata": {"zarr_format": 7},
        "attributes": {"attributes": {"_FillValue": {"a": 1}}},
    }[spoil]  # fmt: skip
    path.write_text(json.dumps(meta))
    source, notes = open_source(tmp_path / "g"), []
    found = source.read_coordinates(notes)
    assert {*found.variables} == {"t", "k"}
    assert len([*source.notes, *notes]) == 1
    if source.notes:
        invert_store(tmp_path / "g", tmp_path / "x", client=client)
        assert {*xr.open_zarr(tmp_path / "x").coords} == {"t", "k"}


def test_labels_that_decide_which_dimensions_are_meant(tmp_path):
    """Of a stack (3, 3, 3) all labels do, unless the dimensions are named; then those of the others may be broken."""
    xr.Dataset({"A": (("t", "i", "j"), conditioned(3, 3, 10))}, {"t": [1, 2, 3]}).to_zarr(
        tmp_path / "g", consolidated=False
    )
    (tmp_path / "g" / "t" / "zarr.json").write_text("{")
    with pytest.raises(SourceError, match="labels of t, which decide what comes out"):
        open_source(tmp_path / "g", "A")
    assert len(open_source(tmp_path / "g", "A", ("i", "j")).notes) == 1


def test_a_name_in_the_attributes_that_is_not_there(tmp_path, monkeypatch):
    """Each would be looked for, and there may be a million."""
    xr.Dataset({"A": STACK}, attrs={"x": 1}).to_zarr(tmp_path / "g", consolidated=False)
    zarr.open_group(tmp_path / "g").attrs["coordinates"] = " ".join(f"x{i}" for i in range(100_000))
    looked = []
    original = coordinates.read_node
    monkeypatch.setattr(coordinates, "read_node", lambda *args: looked.append(args) or original(*args))
    assert open_source(tmp_path / "g").notes == ()
    assert len(looked) < 20
