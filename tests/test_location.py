"""Locations: one true name, overlap, no credentials in what is printed."""

import os
import subprocess
import sys
import time
import zipfile
from datetime import UTC, datetime

import pytest

from dask_batchinv.known import Known, told_of
from dask_batchinv.location import Location, TakenOverError
from dask_batchinv.text import redact
from dask_batchinv.urls import opened


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


def test_keys_are_deleted_one_by_one_and_links_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    for name in ("zarr.json", "a/b", "a/d/e", "c"):
        path = tmp_path / "t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "t" / "link").symlink_to(tmp_path / "mine")
    location = Location.parse(tmp_path / "t")
    assert sorted(location.keys()) == ["a/b", "a/d/e", "c", "link", "zarr.json"]
    location.delete_all(["a/d/e", "c", "link", "not/there"])
    assert sorted(location.keys()) == ["a/b", "zarr.json"]
    assert not (tmp_path / "t" / "a" / "d").exists()
    assert (tmp_path / "mine" / "thesis").exists()


@pytest.mark.parametrize("url", ["memory://replaced", None])
def test_replace_expects_what_was_there(tmp_path, url):
    location = Location.parse(url or tmp_path / "t")
    stamp = location.replace("a/key", b"one", None)
    assert location.stamp("a/key") == stamp
    stamp = location.replace("a/key", b"two", stamp)
    with pytest.raises(TakenOverError, match=r"a/key of .* was removed or replaced"):
        location.replace("a/key", b"late", None)
    location.write("a/key", b"another's")
    with pytest.raises(TakenOverError):
        location.replace("a/key", b"late", stamp)
    assert location.read("a/key") == b"another's"
    location.delete("a/key")
    with pytest.raises(TakenOverError):
        location.replace("a/key", b"late", stamp)


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "key").symlink_to(tmp_path / "thesis")
    Location.parse(tmp_path / "t").write("key", b"mine")
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert (tmp_path / "t" / "key").read_bytes() == b"mine"
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["key"]


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    location = Location.parse(tmp_path)
    for name in ("pipe", "zero", "broken"):
        with pytest.raises(ValueError, match=f"{name} of .* is not a file"):
            location.read(name)
        with pytest.raises(ValueError, match=f"{name} of .* is not a file"):
            location.read_json(name)


@pytest.mark.parametrize(
    ("url", "joined"),
    [
        ("memory://host/a", "memory://host/a/cov"),
        ("https://host/a?sig=x/y", "https://host/a/cov?sig=x/y"),
        ("zip::file:///x.zip", "zip://cov::file:///x.zip"),
        ("zip://::file:///x.zip", "zip://cov::file:///x.zip"),
        ("zip://group::/x.zip", "zip://group/cov::/x.zip"),
        ("simplecache::s3://bucket/a", "simplecache::s3://bucket/a/cov"),
        ("simplecache::/a", "simplecache::/a/cov"),
        ("simplecache::zip://group::s3://bucket/x.zip", "simplecache::zip://group/cov::s3://bucket/x.zip"),
        ("reference://::https://host/refs.json?sig=x", "reference://cov::https://host/refs.json?sig=x"),
    ],
)
def test_names_are_joined_at_the_link_that_has_them(url, joined):
    assert (Location.parse(url) / "cov").url == joined


def test_the_query_of_a_web_server_is_asked_with_each_key():
    url, options = opened("https://host/a.zarr?sig=a%2Bb&empty=", {"headers": {}})
    assert url == "https://host/a.zarr"
    assert options["params"] == [("sig", "a+b"), ("empty", "")]
    assert "headers" in options
    url, options = opened("simplecache::https://host/a.zarr?sig=x", {})
    assert (url, options) == ("simplecache::https://host/a.zarr", {"https": {"params": [("sig", "x")]}})


@pytest.mark.parametrize("name", ["a::b", "::", "zip:::", "x::y::z.zarr"])
def test_two_colons_in_the_name_of_a_file_are_no_chain(tmp_path, name):
    location = Location.parse(tmp_path / name)
    assert location.is_local
    location.write("key", b"x")
    assert (tmp_path / name / "key").read_bytes() == location.read("key") == b"x"
    assert location.children() == ["key"]


def test_the_names_of_one_folder(tmp_path, monkeypatch):
    (tmp_path / "data" / "s.zarr").mkdir(parents=True)
    local = str(tmp_path / "data")
    names = [local, f"file://{local}", f"simplecache::file://{local}", f"simplecache::{local}", f"dir::file://{local}"]
    for one in names:
        for other in names:
            assert Location.parse(one).contains(Location.parse(f"{other}/s.zarr"))
            assert not Location.parse(f"{one}/s.zarr").contains(Location.parse(other))


@pytest.mark.skipif(os.getuid() != 0, reason="mounts need root")
def test_a_bind_mount_is_another_name_for_one_folder(tmp_path):
    (tmp_path / "data" / "x.zarr" / "inverse").mkdir(parents=True)
    (tmp_path / "same").mkdir()
    code = (
        "import sys; from dask_batchinv.location import Location as L\n"
        "data, same = map(L.parse, sys.argv[1:])\n"
        "print(data.contains(same), same.contains(data), (same / 'x.zarr').contains(data / 'x.zarr' / 'inverse'),"
        " (data / 'x.zarr' / 'inverse').contains(same / 'x.zarr'))"
    )
    mounts = (
        f'mount --bind {tmp_path}/data {tmp_path}/same && exec {sys.executable} -c "$0" {tmp_path}/data {tmp_path}/same'
    )
    ended = subprocess.run(["unshare", "-m", "sh", "-c", mounts, code], capture_output=True, text=True, check=False)
    if ended.returncode and "unshare" in ended.stderr:
        pytest.skip(f"this machine allows no mounts: {ended.stderr}")
    assert ended.stdout.split() == ["True", "True", "True", "False"], ended.stderr


def test_json_that_is_no_object(tmp_path):
    (tmp_path / "zarr.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        Location.parse(tmp_path).read_json("zarr.json")
    assert Location.parse(tmp_path).read_json(".zgroup") is None
    assert Location.parse(tmp_path / "zarr.json").read_json("x") is None


class ObjectStore:
    """What of an S3 file system is used to write on a condition, with the answers that servers give."""

    protocol = ("s3", "s3a")

    def __init__(self, answer):
        self.answer, self.kept, self.asked = answer, {}, []

    def info(self, path, refresh):
        return {"ETag": str(hash(self.kept[path]))}

    def cat_file(self, path, start, end):
        if path not in self.kept:
            raise FileNotFoundError(path)
        return self.kept[path]

    def pipe_file(self, path, content, **conditions):
        self.asked.append(sorted(conditions))
        if conditions and self.answer == "none":
            raise OSError(38, "Conditional object PUTs are not supported.")
        if conditions and self.answer == "another's":
            self.kept[path] = b"another's"
            raise FileExistsError(path)
        self.kept[path] = content
        if conditions and self.answer == "late":  # the second attempt, of which the first had its effect
            raise OSError("An error occurred (PreconditionFailed) when calling the PutObject operation")


@pytest.mark.parametrize("answer", ["good", "none", "another's", "late"])
def test_stores_with_conditional_writes_and_without(monkeypatch, answer):
    store, location = ObjectStore(answer), Location("s3://bucket/t")
    monkeypatch.setattr(Location, "_filesystem", lambda self: (store, "bucket/t"))
    if answer == "another's":
        with pytest.raises(TakenOverError):
            location.replace("key", b"one", None)
        assert store.kept == {"bucket/t/key": b"another's"}
        return
    stamp = location.replace("key", b"one", None)
    location.replace("key", b"two", stamp)
    assert store.kept == {"bucket/t/key": b"two"}
    # A server that has none is not asked for them twice.
    assert store.asked == ([["mode"], [], []] if answer == "none" else [["mode"], ["IfMatch"]])
    with pytest.raises(TakenOverError):
        location.replace("key", b"late", stamp)


# --- what stores tell of their files ------------------------------------------------------------------------------


def looked(location, keys=()):
    return {key: says for key, _, says in location.look(lambda: [(key, None) for key in keys])}


def test_what_a_disk_tells_changes_with_each_write(tmp_path):
    location = Location.parse(tmp_path)
    assert looked(location, ["a"]) == {}
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "loop").symlink_to("loop")
    (first,) = looked(location, ["a", "b", "loop", "a/c"]).values()
    assert first.size == 2
    assert abs(first.changed - time.time_ns()) < 10**10
    time.sleep(0.02)
    (tmp_path / "a").write_bytes(b"34")
    os.utime(tmp_path / "a", ns=(0, int(first.version.split()[0])))
    assert looked(location, ["a"])["a"].version != first.version


@pytest.mark.parametrize("url", ["memory://look/s.zarr", "zip::file://{tmp}/s.zip"])
def test_what_other_stores_tell(tmp_path, url):
    if url.startswith("zip"):
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
            archive.writestr("c/0/0", b"12")
    location = Location.parse(url.format(tmp=tmp_path))
    if url.startswith("memory"):
        location.write("c/0/0", b"12")
    found = looked(location)
    assert set(found) == {"c/0/0"}
    assert found["c/0/0"].size == 2
    assert found["c/0/0"].version


@pytest.mark.parametrize(
    ("info", "version", "changed"),
    [
        ({"size": 3, "ETag": '"1"', "LastModified": datetime(2026, 1, 1, tzinfo=UTC)}, 'etag="1"', None),
        ({"size": 3, "etag": "x", "md5Hash": "y", "updated": "2026-01-01", "generation": "7"},
         "etag=x generation=7 md5hash=y", None),
        ({"size": 3, "etag": "0x8", "last_modified": datetime(2026, 1, 1, tzinfo=UTC)}, "etag=0x8", None),
        ({"size": 3, "mtime": 1.5}, "mtime=1.5", 1_500_000_000),
        ({"size": 3, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"},
         "lastmodified=Thu, 01 Jan 2026 00:00:00 GMT", 1_767_225_600_000_000_000),
        ({"size": 3, "updated": "2026-01-01T00:00:00+00:00"}, "updated=2026-01-01T00:00:00+00:00",
         1_767_225_600_000_000_000),
        ({"size": 3, "ETag": None}, "", None),
        ({"name": "x", "type": "file"}, "", None),
    ],
)  # fmt: skip
def test_what_file_systems_tell_is_understood(info, version, changed):
    assert told_of(info) == Known(info.get("size"), version, changed)
