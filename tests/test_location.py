"""Locations: one true name, overlap, no credentials in what is printed."""

import fsspec
import pytest

from dask_batchinv.location import Location
from dask_batchinv.text import redact


def test_one_location_has_one_name(tmp_path, monkeypatch):
    real = tmp_path / "a"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    names = ["a", "./a/", "b/../a", str(real), f"{real}/", f"file://{real}", str(tmp_path / "link"), real, "link/../a"]
    assert {Location.parse(name) for name in names} == {Location(str(real))}
    urls = ["s3://b/x/y", "s3://b/x/y/", "s3://b//x/./y", "s3://b/x/z/../y"]
    assert {Location.parse(url) for url in urls} == {Location("s3://b/x/y")}


@pytest.mark.parametrize(
    ("outer", "inner", "contains"),
    [
        ("/a/b", "/a/b", True),
        ("/a/b", "/a/b/c", True),
        ("/a/b", "/a/bc", False),
        ("/a/b/c", "/a/b", False),
        ("s3://b/x", "s3://b/x/y", True),
        ("s3://b/x", "s3://b/xy", False),
        ("s3://b/x", "gs://b/x", False),
        ("s3://me:secret@b/x", "s3://b/x/y", True),
        ("/a/b?1", "/a/b?2", False),
        ("memory:///b", "memory://b/c", True),
    ],
)
def test_contains(outer, inner, contains):
    assert Location.parse(outer).contains(Location.parse(inner)) is contains


def test_a_chain_of_file_systems_is_left_as_it_is():
    assert Location.parse("simplecache::file:///tmp/x/").url == "simplecache::file:///tmp/x"


def test_a_url_cannot_leave_its_store():
    with pytest.raises(ValueError, match=r"leads out of its store"):
        Location.parse("s3://bucket/../other")
    with pytest.raises(ValueError, match="empty string"):
        Location.parse("")


@pytest.mark.parametrize(
    "text",
    [
        "s3://user:CANARY@host/path",
        "ftp://user:pass@CANARY@host/path",
        "https://h/x?pwd=CANARY",
        "https://h/x?X-Amz-Signature=CANARY&y=1",
        "https://h/x?sig=CANARY",
        "error for https://h/x?access_token=CANARY: no",
        "abfs://c@a/x?secret_key=CANARY",
    ],
)
def test_credentials_are_not_printed(text):
    assert "CANARY" not in redact(text)
    if "error" not in text:
        assert "CANARY" not in Location.parse(text).name


def test_remove_takes_the_mark_last(tmp_path, monkeypatch):
    for name in ("zarr.json", "a/b", "c"):
        path = tmp_path / "t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    removed = []
    local = fsspec.filesystem("file")
    rm = type(local).rm

    def spy(self, path, **options):
        removed.append(path)
        return rm(self, path, **options)

    monkeypatch.setattr(type(local), "rm", spy)
    Location.parse(tmp_path / "t").remove(last="zarr.json")
    assert not (tmp_path / "t").exists()
    assert removed[-2:] == [str(tmp_path / "t" / "zarr.json"), str(tmp_path / "t")]


def test_json_that_is_no_object(tmp_path):
    (tmp_path / "zarr.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        Location.parse(tmp_path).read_json("zarr.json")
    assert Location.parse(tmp_path).read_json(".zgroup") is None
    assert Location.parse(tmp_path / "zarr.json").read_json("x") is None
