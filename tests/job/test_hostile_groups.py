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


@pytest.mark.parametrize("case", COORDINATES_2)
def test_coordinates_of_format_2(refused, tmp_path, case):
    group = make_group(tmp_path / "g", 2, {})
    meta = V2 | {"shape": [4], "chunks": [4]} | COORDINATES_2[case]
    write_array(group / "t", meta, {"_ARRAY_DIMENSIONS": ["t"]})
    refused(group, variable="A")


@pytest.mark.parametrize("case", COORDINATES_3)
def test_coordinates_of_format_3(refused, tmp_path, case):
    group = make_group(tmp_path / "g", 3, {})
    write_array(group / "t", V3 | {"shape": [4], **grid(4), "dimension_names": ["t"]} | COORDINATES_3[case])
    refused(group, variable="A")


def test_coordinates_of_two_formats(refused, tmp_path):
    """Xarray reads a coordinate in the format of its group, so that is the one to check."""
    group = make_group(tmp_path / "g", 2, {})
    write_array(group / "t", V3 | {"shape": [4], **grid(4), "dimension_names": ["t"]})
    write_array(
        group / "t",
        V2 | {"shape": [4], "chunks": [4], "dtype": "|O", "filters": [PICKLE]},
        {"_ARRAY_DIMENSIONS": ["t"]},
    )
    assert "'pickle' of the coordinate" in refused(group, variable="A")


def test_consolidated_metadata_that_lie(tmp_path, opened):
    group = make_group(tmp_path / "g", 3, {})
    lie = V3 | {"shape": [400, 2, 2], "codecs": [BYTES, numcodec("pickle")]}
    document = json.loads((group / "zarr.json").read_text())
    document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": {"A": lie}}
    (group / "zarr.json").write_text(json.dumps(document))
    source = prepare(group, tmp_path / "target", JobOptions(variable="A")).source
    assert source.open().shape == source.shape == (4, 2, 2)
