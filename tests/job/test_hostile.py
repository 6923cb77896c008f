"""A source may be anybody's: nothing in its metadata may run, lead elsewhere, or be read before it was checked."""

import json
import os
from contextlib import suppress

import pytest

from dask_batchinv import PlanError, RefusedError
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from tests.support.hostile import BYTES, PICKLE, V2, V3, grid, keys, nested, numcodec, shard, write_array

# Zarr warns of what is not in its specification; that is no concern here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


SAFE, DTYPE, SENSE = "not among those that are safe", "has no inverse here", "invalid metadata"

FORMAT_2 = {
    "pickle-compressor": ({"compressor": PICKLE}, SAFE),
    "pickle-filter": ({"filters": [PICKLE]}, SAFE),
    "pickle-behind-text": ({"filters": [{"id": "vlen-utf8"}, PICKLE], "dtype": "|O"}, DTYPE),
    "pickle-behind-text-numbers": ({"filters": [{"id": "vlen-utf8"}, PICKLE]}, SAFE),
    "pickle-behind-delta": ({"filters": [{"id": "delta", "dtype": "<f8"}, PICKLE]}, SAFE),
    "pickle-before-delta": ({"filters": [PICKLE, {"id": "delta", "dtype": "<f8"}]}, SAFE),
    "pickle-in-upper-case": ({"compressor": {"id": "Pickle"}}, SAFE),
    "json2": ({"filters": [{"id": "json2"}]}, SAFE),
    "msgpack2": ({"filters": [{"id": "msgpack2"}]}, SAFE),
    "categorize": ({"filters": [{"id": "categorize", "labels": ["a"], "dtype": "|O"}]}, SAFE),
    "vlen-bytes": ({"filters": [{"id": "vlen-bytes"}]}, SAFE),
    "vlen-array": ({"filters": [{"id": "vlen-array", "dtype": "<f8"}]}, SAFE),
    "zfpy": ({"compressor": {"id": "zfpy", "mode": 4}}, SAFE),
    "pcodec": ({"compressor": {"id": "pcodec"}}, SAFE),
    "unknown": ({"compressor": {"id": "no-such-codec"}}, SAFE),
    "unknown-and-huge": ({"compressor": {"id": "x" * 100_000}}, SAFE),
    "many-unknown": ({"filters": [{"id": f"codec-{i}"} for i in range(5000)]}, SAFE),
    "codec-is-text": ({"compressor": "zlib"}, SENSE),
    "codec-is-a-number": ({"compressor": 7}, SENSE),
    "codec-is-a-list": ({"compressor": [PICKLE]}, SENSE),
    "codec-is-false": ({"compressor": False}, SENSE),
    "filters-are-an-object": ({"filters": {"id": "pickle"}}, SENSE),
    "filters-are-text": ({"filters": "pickle"}, SENSE),
    "filter-is-null": ({"filters": [None]}, SENSE),
    "name-is-a-list": ({"compressor": {"id": ["pickle"]}}, SAFE),
    "name-is-an-object": ({"compressor": {"id": {"id": "pickle"}}}, SAFE),
    "name-is-null": ({"compressor": {"id": None}}, SAFE),
    "no-name": ({"compressor": {}}, SAFE),
    "two-compressors": ({"compressor": {"id": "zlib"}, "filters": [{"id": "bz2"}]}, "compressed more than once"),
    "zlib-twice": ({"filters": [{"id": "zlib"}, {"id": "zlib"}]}, "compressed more than once"),
    "astype-object": ({"filters": [{"id": "astype", "encode_dtype": "<f8", "decode_dtype": "|O"}]}, SENSE),
    "astype-huge": ({"filters": [{"id": "astype", "encode_dtype": "<f8", "decode_dtype": "S999999999"}]}, SENSE),
    "delta-of-objects": ({"filters": [{"id": "delta", "dtype": "|O"}]}, SENSE),
    "codec-with-nonsense": ({"compressor": {"id": "zlib", "level": 1, "evil": 1}}, "cannot be opened"),
    "objects": ({"dtype": "|O"}, DTYPE),
    "objects-of-pickle": ({"dtype": "|O", "filters": [PICKLE]}, DTYPE),
    "text": ({"dtype": "<U4"}, DTYPE),
    "bytes": ({"dtype": "|S4"}, DTYPE),
    "structured": ({"dtype": [["a", "<f8"], ["b", "|O"]]}, DTYPE),
    "times": ({"dtype": "<M8[ns]"}, DTYPE),
    "void": ({"dtype": "|V8"}, DTYPE),
    "huge-text": ({"dtype": "<U999999999"}, DTYPE),
    "huge-number": ({"dtype": "<f99"}, DTYPE),
    "float128": ({"dtype": "<f16"}, DTYPE),
    "nonsense-dtype": ({"dtype": "f8,O"}, DTYPE),
    "dtype-is-a-number": ({"dtype": 8}, DTYPE),
    "dtype-is-null": ({"dtype": None}, SENSE),
    "dtype-is-an-object": ({"dtype": {"names": ["a"], "formats": ["O"]}}, DTYPE),
    "dtype-is-long": ({"dtype": "f" * 10**6}, DTYPE),
    "shape-negative": ({"shape": [-4, 2, 2]}, SENSE),
    "shape-float": ({"shape": [4.0, 2, 2]}, SENSE),
    "shape-bool": ({"shape": [True, 2, 2]}, SENSE),
    "shape-text": ({"shape": ["4", 2, 2]}, SENSE),
    "shape-is-text": ({"shape": "422"}, SENSE),
    "shape-is-a-number": ({"shape": 4}, SENSE),
    "shape-nan": ({"shape": [float("nan"), 2, 2]}, SENSE),
    "shape-1e18": ({"shape": [1e18, 2, 2]}, SENSE),
    "shape-10**18": ({"shape": [10**18, 2, 2]}, "less than 2\\*\\*63 bytes"),
    "shape-10**30": ({"shape": [10**30, 2, 2]}, SENSE),
    "shape-missing": ({"shape": None}, SENSE),
    "chunks-of-another-rank": ({"chunks": [4, 2]}, SENSE),
    "chunk-zero": ({"chunks": [0, 2, 2]}, SENSE),
    "chunk-negative": ({"chunks": [-1, 2, 2]}, SENSE),
    "chunk-float": ({"chunks": [4.5, 2, 2]}, SENSE),
    "chunks-true": ({"chunks": True}, SENSE),
    "separator-leads-out": ({"dimension_separator": "/../"}, SENSE),
    "separator-is-a-list": ({"dimension_separator": ["/"]}, SENSE),
    "fill-value-nonsense": ({"fill_value": "x" * 10_000}, "cannot be opened"),
    "fill-value-is-an-object": ({"fill_value": {"a": 1}}, "cannot be opened"),
    "order": ({"order": "Q"}, "cannot be opened"),
    "format-3-in-zarray": ({"zarr_format": 3, "codecs": [numcodec("pickle")]}, SENSE),
    "format-is-text": ({"zarr_format": "2"}, SENSE),
    "format-is-a-float": ({"zarr_format": 2.0, "compressor": PICKLE}, SENSE),
}

FORMAT_3 = {
    "pickle": ({"codecs": [BYTES, numcodec("pickle")]}, SAFE),
    "pickle-alone": ({"codecs": [numcodec("pickle")]}, SAFE),
    "pickle-by-another-id": ({"codecs": [BYTES, numcodec("zlib", id="pickle")]}, SENSE),
    "pickle-in-a-shard": ({"codecs": [shard([BYTES, numcodec("pickle")])]}, SAFE),
    "pickle-in-an-index": ({"codecs": [shard(index=[numcodec("pickle")])]}, SAFE),
    "pickle-three-deep": ({"codecs": nested(3, [BYTES, numcodec("pickle")])}, SAFE),
    "pickle-in-an-inner-index": ({"codecs": nested(2, [shard(index=[BYTES, numcodec("pickle")])])}, SAFE),
    "pickle-behind-gzip": ({"codecs": [BYTES, {"name": "gzip"}, numcodec("pickle")]}, SAFE),
    "zfpy": ({"codecs": [numcodec("zfpy")]}, SAFE),
    "vlen-utf8": ({"codecs": ["vlen-utf8"]}, SAFE),
    "unknown": ({"codecs": [BYTES, {"name": "https://evil.example/codec"}]}, SAFE),
    "compressed-index": ({"codecs": [shard(index=[BYTES, {"name": "zstd"}])]}, "index of shards"),
    "two-compressors": ({"codecs": [BYTES, {"name": "zstd"}, {"name": "gzip"}]}, "compressed more than once"),
    "compressed-shards": ({"codecs": [shard(), {"name": "gzip"}]}, "whole shards"),
    "endless-shards": ({"codecs": nested(60, [BYTES])}, SENSE),
    "codec-is-a-number": ({"codecs": [BYTES, 7]}, SENSE),
    "codec-is-a-list": ({"codecs": [[BYTES]]}, SENSE),
    "codec-is-null": ({"codecs": [None]}, SENSE),
    "codecs-are-text": ({"codecs": "bytes"}, SENSE),
    "codecs-are-an-object": ({"codecs": BYTES}, SENSE),
    "codecs-missing": ({"codecs": None}, SENSE),
    "codecs-empty": ({"codecs": []}, "cannot be opened"),
    "inner-codecs-are-text": ({"codecs": [{"name": "sharding_indexed", "configuration": {"codecs": "x"}}]}, SENSE),
    "configuration-is-a-list": ({"codecs": [{"name": "bytes", "configuration": [1]}]}, SENSE),
    "name-is-a-number": ({"codecs": [{"name": 3}]}, SAFE),
    "name-is-a-list": ({"codecs": [{"name": ["bytes"]}]}, SAFE),
    "two-serializers": ({"codecs": [BYTES, BYTES]}, "cannot be opened"),
    "compressor-first": ({"codecs": [{"name": "zstd", "configuration": {}}, BYTES]}, "cannot be opened"),
    "astype-huge": ({"codecs": [numcodec("astype", encode_dtype="<f8", decode_dtype="S99999999"), BYTES]}, SENSE),
    "text": ({"data_type": "string"}, DTYPE),
    "raw": ({"data_type": "r64"}, DTYPE),
    "extension-dtype": ({"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4}}}, DTYPE),
    "structured": ({"data_type": {"name": "structured", "configuration": {"fields": [["a", "float64"]]}}}, DTYPE),
    "times": ({"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}}, DTYPE),
    "float64-as-an-object": ({"data_type": {"name": "float64", "configuration": {}}}, DTYPE),
    "dtype-is-a-list": ({"data_type": ["float64"]}, DTYPE),
    "dtype-missing": ({"data_type": None}, SENSE),
    "shape-negative": ({"shape": [-1, 2, 2]}, SENSE),
    "shape-float": ({"shape": [4.5, 2, 2]}, SENSE),
    "shape-bool": ({"shape": [4, True, True]}, SENSE),
    "shape-1e18": ({"shape": [1e18, 2, 2]}, SENSE),
    "shape-10**18": ({"shape": [10**18, 2, 2]}, "less than 2\\*\\*63 bytes"),
    "shape-is-an-object": ({"shape": {"0": 4}}, SENSE),
    "chunks-of-another-rank": (grid(4, 2, 2, 1), SENSE),
    "chunk-zero": (grid(4, 2, 0), SENSE),
    "chunk-negative": (grid(4, -2, 2), SENSE),
    "chunk-text": (grid("4", 2, 2), SENSE),
    "other-grid": ({"chunk_grid": {"name": "rectangular", "configuration": {"chunk_shape": [[4], [2], [2]]}}}, SENSE),
    "grid-is-a-list": ({"chunk_grid": [4, 2, 2]}, SENSE),
    "grid-missing": ({"chunk_grid": None}, SENSE),
    "shards-that-do-not-divide": ({"codecs": [shard(chunk=(3, 2, 2))]}, "divide a shard"),
    "shards-of-another-rank": ({"codecs": [shard(chunk=(1, 2))]}, SENSE),
    "shards-of-zero": ({"codecs": [shard(chunk=(0, 2, 2))]}, SENSE),
    "shards-of-too-many-chunks": ({**grid(10**9, 2, 2), "codecs": [shard(chunk=(1, 2, 2))]}, "chunks in a shard"),
    "shard-index-in-the-middle": ({"codecs": [shard(index_location="middle")]}, "cannot be opened"),
    "names-too-few": ({"dimension_names": ["a", "b"]}, SENSE),
    "names-numbers": ({"dimension_names": [1, 2, 3]}, SENSE),
    "names-lists": ({"dimension_names": [["a"], ["b"], ["c"]]}, SENSE),
    "names-is-text": ({"dimension_names": "abc"}, SENSE),
    "names-with-slash": ({"dimension_names": ["../x", "b", "c"]}, SENSE),
    "names-with-dots": ({"dimension_names": ["..", "b", "c"]}, SENSE),
    "names-with-nul": ({"dimension_names": ["a\0b", "b", "c"]}, SENSE),
    "names-absolute": ({"dimension_names": ["/etc", "b", "c"]}, SENSE),
    "names-of-ours": ({"dimension_names": ["inverse", "b", "c"]}, "the target needs itself"),
    "attributes-are-a-list": ({"attributes": [1]}, SENSE),
    "attributes-are-text": ({"attributes": "units"}, SENSE),
    "storage-transformers": ({"storage_transformers": [{"name": "evil"}]}, SENSE),
    "must-understand": ({"evil": {"name": "evil", "must_understand": True}}, "cannot be opened"),
    "must-understand-by-default": ({"evil": 1}, "cannot be opened"),
    "separator-leads-out": (keys("default", separator="../"), SENSE),
    "separator-leads-out-2": (keys("v2", separator="/../"), SENSE),
    "key-encoding-unknown": (keys("evil"), SENSE),
    "key-encoding-missing": ({"chunk_key_encoding": None}, SENSE),
    "fill-value-nonsense": ({"fill_value": "0x" + "f" * 10_000}, "cannot be opened"),
    "fill-value-missing": ({"fill_value": None}, "cannot be opened"),
    "fill-value-is-an-object": ({"fill_value": {"__reduce__": "os.system"}}, "cannot be opened"),
    "format-2-in-zarr-json": ({"zarr_format": 2}, SENSE),
    "format-99": ({"zarr_format": 99}, SENSE),
    "format-is-text": ({"zarr_format": "3"}, SENSE),
    "node-type": ({"node_type": "evil"}, SENSE),
    "node-type-is-a-list": ({"node_type": ["array"]}, SENSE),
}


@pytest.mark.parametrize("case", FORMAT_2)
def test_format_2(refused, tmp_path, case):
    changes, match = FORMAT_2[case]
    assert_says(refused(write_array(tmp_path / "evil", V2 | changes)), match)


@pytest.mark.parametrize("case", FORMAT_3)
def test_format_3(refused, tmp_path, case):
    changes, match = FORMAT_3[case]
    assert_says(refused(write_array(tmp_path / "evil", V3 | changes)), match)


def assert_says(text, match):
    with pytest.raises(RefusedError, match=match):
        raise RefusedError(text)


# --- documents ------------------------------------------------------------------------------------------------


def test_documents_that_are_too_deep(refused, tmp_path):
    path = write_array(tmp_path / "evil", V3)
    for depth in (10_000, 100_000):
        (path / "zarr.json").write_text('{"attributes":' * depth + "1" + "}" * depth)
        assert "cannot be opened" in refused(path)


def test_attributes_that_are_deep(refused, tmp_path):
    deep = '{"a":' * 900 + "1" + "}" * 900
    path = write_array(tmp_path / "evil", V3)
    (path / "zarr.json").write_text(json.dumps(V3)[:-1].replace('"attributes": {}', f'"attributes": {deep}') + "}")
    # Depending on the version of Python.
    with suppress(RefusedError):
        prepare(path, tmp_path / "target", JobOptions())
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["zarr.json", ".zarray", ".zattrs"])
def test_documents_that_are_too_long(refused, tmp_path, name):
    path = write_array(tmp_path / "evil", V2 if name == ".zattrs" else {"chunks": 1} if name == ".zarray" else V3)
    with open(path / name, "wb") as file:
        file.truncate(2**40)  # takes no space
    assert "longer than 16 MiB" in refused(path)


@pytest.mark.parametrize("name", ["zarr.json", ".zarray"])
def test_documents_that_are_folders(refused, tmp_path, name):
    (tmp_path / "evil" / name).mkdir(parents=True)
    assert "there is no Zarr array" in refused(tmp_path / "evil")


def test_documents_that_are_pipes(refused, tmp_path):
    (tmp_path / "evil").mkdir()
    os.mkfifo(tmp_path / "evil" / "zarr.json")
    assert "is not a file" in refused(tmp_path / "evil")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"{" * 10, b"[" * 100_000, b'{"zarr_format": ' + b"9" * 10_000 + b"}"]
)
def test_documents_that_are_no_json(refused, tmp_path, content):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "zarr.json").write_bytes(content)
    assert "cannot be opened" in refused(tmp_path / "evil")


def test_two_formats_at_once(refused, tmp_path):
    path = write_array(tmp_path / "a", V3)
    write_array(path, V2 | {"compressor": PICKLE})
    job = prepare(path, tmp_path / "target", JobOptions())
    assert job.source.zarr_format == 3
    assert job.source.open().metadata.zarr_format == 3  # the one that was checked is the one opened
    other = write_array(tmp_path / "b", V3 | {"codecs": [BYTES, numcodec("pickle")]})
    write_array(other, V2)
    assert SAFE in refused(other)


def test_metadata_that_change_between_the_check_and_the_reading(tmp_path):
    path = write_array(tmp_path / "evil", V2)
    source = prepare(path, tmp_path / "target", JobOptions()).source
    assert source.open().shape == (4, 2, 2)
    (path / ".zarray").write_text(json.dumps(V2 | {"filters": [PICKLE]}))
    with pytest.raises(RefusedError, match="have changed since the job began"):
        source.open()


# --- what only the plan can judge -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "meta",
    [
        V2 | {"shape": [10**9, 2, 2], "chunks": [10**9, 2, 2], "compressor": {"id": "zlib", "level": 1}},
        V3 | {"shape": [1, 10**6, 10**6], **grid(1, 10**6, 10**6)},
        V3 | {"shape": [10**9, 2, 2], **grid(10**9, 2, 2), "codecs": [shard(chunk=(10**8, 2, 2))]},
    ],
    ids=["chunks", "matrices", "shards"],
)
def test_plans_that_fit_no_worker(tmp_path, meta):
    job = prepare(write_array(tmp_path / "evil", meta), tmp_path / "target", JobOptions())
    with pytest.raises(PlanError) as caught:
        plan_for(job, Workers(1, 1, 2**30))
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "target").exists()
