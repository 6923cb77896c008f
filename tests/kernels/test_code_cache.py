"""Whom the cache of machine code trusts; that it spares compiling is in `test_compiled`."""

import contextlib
import hashlib
import os
import stat
from pathlib import Path

import pytest

from dask_batchinv.kernels.code_cache import cached

CODE = b"machine code"
EVIL = b"machine code of others'"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The folder that the cache is in."""
    base = tmp_path / "home" / "cache"
    base.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    return base


def is_compiled():
    """Tell whether the next process would have to compile."""
    made = []

    def make():
        made.append(CODE)
        return CODE

    assert cached("kernel", b"facts", make) == CODE
    return bool(made)


def kept(base):
    is_compiled()
    (file,) = (base / "dask_batchinv").iterdir()
    assert not is_compiled()
    return file


def give_away(path, monkeypatch):
    """Make a file or folder that of another user, who is not root."""
    if os.getuid() == 0:
        os.chown(path, 12345, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o720, 0o702])
@pytest.mark.parametrize("above", [".", "..", "dask_batchinv"])
def test_a_folder_that_others_may_write_to_is_not_trusted(base, above, mode):
    kept(base)
    folder = (base / above).resolve()
    folder.chmod(mode)
    before = sorted(base.rglob("*"))
    assert is_compiled()
    assert is_compiled()
    assert sorted(base.rglob("*")) == before


@pytest.mark.parametrize("above", [".", "..", "dask_batchinv"])
def test_a_folder_of_another_user_is_not_trusted(base, above, monkeypatch):
    kept(base)
    give_away((base / above).resolve(), monkeypatch)
    assert is_compiled()


def test_nothing_is_made_in_a_folder_that_is_not_trusted(base):
    base.chmod(0o777)
    assert is_compiled()
    assert not list(base.iterdir())


def test_sticky_folders_above_are_trusted_but_the_cache_is_none_of_them(base):
    base.chmod(0o1777)
    kept(base)
    (base / "dask_batchinv").chmod(0o1777)
    assert is_compiled()


def test_folders_that_are_made_belong_to_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    umask = os.umask(0)
    try:
        kept(tmp_path / "a" / "b")
    finally:
        os.umask(umask)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_link_to_a_trusted_folder_is_followed_and_one_through_others_is_not(tmp_path, base, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(base)
    monkeypatch.setenv("XDG_CACHE_HOME", str(link))
    kept(base)
    open_to_all = tmp_path / "open"
    (open_to_all / "own").mkdir(parents=True)
    open_to_all.chmod(0o777)
    link.unlink()
    link.symlink_to(open_to_all / "own")
    assert is_compiled()
    assert not list((open_to_all / "own").iterdir())


@pytest.mark.parametrize("relative", ["cache", "./cache", "../cache", ""])
def test_a_relative_folder_counts_as_none(tmp_path, monkeypatch, relative):
    home, here = tmp_path / "home", tmp_path / "here" / "below"
    home.mkdir(mode=0o700)
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    kept(home / ".cache")
    assert [path.name for path in (tmp_path / "here").rglob("*")] == ["below"]


def exchange(file, how, tmp_path, monkeypatch):
    """Put code into the cache in a way that others could."""
    whole = file.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(whole)
    other.chmod(0o600)
    if how == "writable for others":
        file.chmod(0o602)
    elif how == "writable for the group":
        file.chmod(0o620)
    elif how == "of another user":
        give_away(file, monkeypatch)
    else:
        file.unlink()
        if how == "a link":
            file.symlink_to(other)
        elif how == "a second name":
            os.link(other, file)
        elif how == "a pipe":
            os.mkfifo(file)
        else:
            file.mkdir()


def open_files():
    """Return the paths of the files that this process has open, where the system tells."""
    paths = []
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            paths.append(str(descriptor.readlink()))
    return paths


@pytest.mark.parametrize("how", [
    "writable for others", "writable for the group", "of another user", "a link", "a second name", "a pipe", "a folder",
])  # fmt: skip
def test_a_file_that_others_can_have_put_there_is_not_loaded(base, tmp_path, monkeypatch, how):
    file = kept(base)
    exchange(file, how, tmp_path, monkeypatch)
    assert is_compiled()
    assert not [path for path in open_files() if path.startswith(str(tmp_path))]
    if how != "a folder" and (how != "of another user" or os.getuid() == 0):
        assert stat.S_ISREG(file.lstat().st_mode)  # what was there has been replaced
        assert not is_compiled()


def test_what_is_loaded_is_what_was_looked_at(base, tmp_path, monkeypatch):
    """Exchanging the file after it was opened changes nothing."""
    file, fstat = kept(base), os.fstat
    evil = tmp_path / "evil"
    evil.write_bytes(hashlib.sha256(EVIL).digest() + EVIL)

    def exchanging(descriptor):
        found = fstat(descriptor)
        if evil.exists():
            os.replace(evil, file)
        return found

    monkeypatch.setattr(os, "fstat", exchanging)
    assert not is_compiled()
    assert not evil.exists()


def test_without_a_home_it_works_too(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert is_compiled()
    assert is_compiled()
