"""The same of groups: their coordinates and dimensions, and what leads out of them."""

import json
import os

import pytest

from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.prepare import prepare
from tests.support.hostile import BYTES, PICKLE, V2, V3, grid, keys, numcodec, shard, write_array

# Zarr warns of what is not in its specification; that is no concern here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SENSE = "invalid metadata"


def make_group(path, zarr_format, attributes, dims=("t", "i", "j")):
    """Write a group with a stack A in it, and whose attributes name coordinates."""
    path.mkdir(parents=True)
    if zarr_format == 3:
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (path / "zarr.json").write_text(json.dumps(group))
        write_array(path / "A", V3 | {"dimension_names": list(dims), "attributes": attributes})
    else:
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps(attributes))
        write_array(path / "A", V2, {"_ARRAY_DIMENSIONS": list(dims), **attributes})
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "words",
    ["../x", "/etc", "a/../../x", ".", "..", "./t/..", "../g/A", "x\\..\\y", "t\0", "A", 7, ["../x"], {"a": 1}],
    ids=str,
)
def test_coordinates_elsewhere(tmp_path, zarr_format, words, monkeypatch):
    """Names that lead out of the group are no names in it: they are not looked at."""
    group = make_group(tmp_path / "g", zarr_format, {"coordinates": words})
    write_array(tmp_path / "x", V2 | {"shape": [4], "chunks": [4]}, {"_ARRAY_DIMENSIONS": ["t"]})
    write_array(tmp_path / "x", V3 | {"shape": [4], **grid(4), "dimension_names": ["t"]})
    touched = watch_paths(monkeypatch)
    job = prepare(group, tmp_path / "target", JobOptions(variable="A"))
    assert job.source.coordinates == ()
    assert touched
    assert all(os.path.realpath(path).startswith((str(group), str(tmp_path / "target"))) for path in touched)


def watch_paths(monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    touched = []
    original = LocalFileSystem.cat_file
    monkeypatch.setattr(
        LocalFileSystem, "cat_file", lambda self, path, **how: touched.append(path) or original(self, path, **how)
    )
    return touched


@pytest.mark.parametrize("name", ["../x", "/etc", "..", ".", "a/../../b", "t\0"], ids=ascii)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_dimensions_elsewhere(refused, tmp_path, zarr_format, name):
    group = make_group(tmp_path / "g", zarr_format, {}, (name, "i", "j"))
    assert SENSE in refused(group, variable="A")


@pytest.mark.parametrize("names", ["tij", [1, 2, 3], ["t", "i"], {"t": 1}, [["t"], "i", "j"], [{}, "i", "j"]], ids=str)
def test_dimensions_of_format_2(refused, tmp_path, names):
    path = write_array(tmp_path / "evil", V2, {"_ARRAY_DIMENSIONS": names})
    assert SENSE in refused(path)


@pytest.mark.parametrize("attributes", [[], "x", 7, [1]], ids=str)
def test_attributes_of_format_2(refused, tmp_path, attributes):
    assert "cannot be opened" in refused(write_array(tmp_path / "evil", V2, attributes))


@pytest.mark.parametrize("found", ["3", 99, None, 3.5, [3]], ids=str)
def test_format_of_a_group(refused, tmp_path, found):
    group = make_group(tmp_path / "g", 3, {})
    (group / "zarr.json").write_text(json.dumps({"zarr_format": found, "node_type": "group"}))
    assert SENSE in refused(group, variable="A")


COORDINATES_2 = {
    "objects": {"dtype": "|O"},
    "pickle": {"dtype": "|O", "filters": [PICKLE]},
    "pickle-compressor": {"dtype": "|O", "compressor": PICKLE},
    "pickle-behind-text": {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, PICKLE]},
    "text-behind-delta": {"dtype": "|O", "filters": [{"id": "delta", "dtype": "<f8"}, {"id": "vlen-utf8"}]},
    "text-in-numbers": {"filters": [{"id": "vlen-utf8"}]},
    "categorize": {"filters": [{"id": "categorize", "labels": [], "dtype": "|O"}]},
    "structured": {"dtype": [["a", "|O"]]},
    "void": {"dtype": "|V8"},
    "huge": {"dtype": "<U999999999"},
    "chunk-zero": {"chunks": [0]},
    "separator": {"dimension_separator": "/../"},
    "length": {"shape": [5]},
    "shape": {"shape": "4"},
    "twice": {"compressor": {"id": "zlib"}, "filters": [{"id": "zlib"}]},
    "format": {"zarr_format": 3},
}
COORDINATES_3 = {
    "pickle": {"codecs": [BYTES, numcodec("pickle")]},
    "pickle-in-a-shard": {"codecs": [shard([BYTES, numcodec("pickle")], chunk=[1])]},
    "vlen-bytes": {"data_type": "bytes", "codecs": ["vlen-bytes"]},
    "text-in-numbers": {"codecs": ["vlen-utf8"]},
    "structured": {"data_type": {"name": "structured", "configuration": {"fields": [["a", "string"]]}}},
    "huge": {"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4 * 10**9}}},
    "length-is-text": {"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": "9"}}},
    "configuration-is-text": {"data_type": {"name": "fixed_length_utf32", "configuration": "9"}},
    "grid": {"chunk_grid": {"name": "evil"}},
    "keys": keys("default", separator="/../"),
    "transformers": {"storage_transformers": [{"name": "evil"}]},
    "names": {"dimension_names": ["../t"]},
}


EVERY_COORDINATE = [
    *(pytest.param(2, changes, id=f"2-{case}") for case, changes in COORDINATES_2.items()),
    *(pytest.param(3, changes, id=f"3-{case}") for case, changes in COORDINATES_3.items()),
]


def write_coordinate(group, name, size, zarr_format, changes):
    if zarr_format == 2:
        meta = V2 | {"shape": [size], "chunks": [size]} | changes
        return write_array(group / name, meta, {"_ARRAY_DIMENSIONS": [name]})
    return write_array(group / name, V3 | {"shape": [size], **grid(size), "dimension_names": [name]} | changes)


@pytest.mark.parametrize(("zarr_format", "changes"), EVERY_COORDINATE)
def test_labels_of_rows(refused, tmp_path, zarr_format, changes):
    """They decide what comes out."""
    group = make_group(tmp_path / "g", zarr_format, {})
    write_coordinate(group, "i", 2, zarr_format, changes)
    assert "the labels of i, which decide what comes out, cannot be read" in refused(group, variable="A")


@pytest.mark.parametrize(("zarr_format", "changes"), EVERY_COORDINATE)
def test_other_coordinates_stop_nothing(left_out, tmp_path, zarr_format, changes):
    group = make_group(tmp_path / "g", zarr_format, {})
    write_coordinate(group, "t", 4, zarr_format, changes)
    left_out(group, "t")


@pytest.fixture
def left_out(tmp_path, opened):
    """See that one array is left out with a note, and none of its chunks read."""

    def check(group, name):
        source = prepare(group, tmp_path / "target", JobOptions(variable="A")).source
        assert source.read_coordinates() is None
        assert source.coordinate_names == ()
        (note,) = source.notes
        assert note.startswith(f"{name} beside the stack was left out: ")
        assert 40 < len(note) < 700
        assert not opened
        assert not (tmp_path / "exploded").exists()
        assert not (group / "exploded").exists()
        return note

    return check


@pytest.mark.parametrize("name", ["i", "t"])
def test_coordinates_of_two_formats(refused, left_out, tmp_path, name):
    """Xarray reads a coordinate in the format of its group, so that is the one to check."""
    group = make_group(tmp_path / "g", 2, {})
    size = {"i": 2, "t": 4}[name]
    write_coordinate(group, name, size, 3, {})
    write_coordinate(group, name, size, 2, {"dtype": "|O", "filters": [PICKLE]})
    said = refused(group, variable="A") if name == "i" else left_out(group, name)
    assert "'pickle' of the coordinate" in said


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("content", ["{", "[]", '{"zarr_format": 9, "node_type": "array"}', '{"shape": 1}', "pipe"])
def test_siblings_with_broken_metadata_stop_nothing(left_out, tmp_path, zarr_format, content):
    group = make_group(tmp_path / "g", zarr_format, {})
    (group / "other").mkdir()
    path = group / "other" / {2: ".zarray", 3: "zarr.json"}[zarr_format]
    os.mkfifo(path) if content == "pipe" else path.write_text(content)
    left_out(group, "other")
    source = prepare(group, tmp_path / "target", JobOptions()).source
    assert source.variable == "A"  # the only one that can be meant
    assert len(source.notes) == 1


def test_a_broken_sibling_is_listed_where_nothing_else_is_a_stack(refused, tmp_path):
    group = make_group(tmp_path / "g", 3, {})
    (group / "A" / "zarr.json").write_text("{")
    assert "it has A (not usable: name it with `variable=` to see why)" in refused(group)
    refused(group, variable="A")


def test_consolidated_metadata_that_lie(tmp_path, opened):
    group = make_group(tmp_path / "g", 3, {})
    lie = V3 | {"shape": [400, 2, 2], "codecs": [BYTES, numcodec("pickle")]}
    document = json.loads((group / "zarr.json").read_text())
    document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": {"A": lie}}
    (group / "zarr.json").write_text(json.dumps(document))
    source = prepare(group, tmp_path / "target", JobOptions(variable="A")).source
    assert source.open().shape == source.shape == (4, 2, 2)
