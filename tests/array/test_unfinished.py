"""`out=PATH`: what a call has done stays, the same call goes on with it, and nothing is ever removed."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import dask
import dask.array as da
import fsspec
import numpy as np
import pytest
import zarr

from dask_batchinv import SingularMatrixError, inverse
from dask_batchinv.unfinished import Unfinished
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import tree

SCHEDULERS = ["threads", "sync", "processes", "cluster"]
PLACES = ["path", "url", "memory"]


def noted(block, folder, block_info=None):
    """Leave a note of each block that is computed; fail, or die, at those with the numbers in a file."""
    number = block_info[0]["chunk-location"][0]
    with open(f"{folder}/computed", "a") as notes:
        notes.write(f"{number}\n")
    with open(f"{folder}/fails") as fails:
        words = fails.read().split()
    if "dies" in words and str(number) in words:
        os._exit(9)
    if str(number) in words:
        raise RuntimeError(f"block {number} fails")
    return block


def noted_stack(folder):
    a = conditioned(24, 3, 10)
    return da.from_array(a, chunks=(3, 3, 3)).map_blocks(noted, str(folder), dtype=a.dtype, meta=a[:0])


@pytest.fixture
def noting(tmp_path):
    """Return a stack, it as a lazy one of eight blocks that fail as told, and what was computed since the last time."""
    folder = tmp_path / "notes"
    folder.mkdir()
    computed = folder / "computed"

    def stack(*fails):
        (folder / "fails").write_text(" ".join(map(str, fails)))
        return noted_stack(folder)

    def since():
        found = sorted(map(int, computed.read_text().split())) if computed.exists() else []
        computed.unlink(missing_ok=True)
        return found

    return conditioned(24, 3, 10), stack, since


def test_a_chunk_that_is_lost_before_the_end_is_not_passed_over(tmp_path, noting, monkeypatch):
    a, stack, since = noting
    chunk, finish = tmp_path / "x" / "c" / "1" / "0" / "0", Unfinished.finish

    def lose(self, array):
        chunk.unlink()
        return finish(self, array)

    with monkeypatch.context() as patched:
        patched.setattr(Unfinished, "finish", lose)
        with pytest.raises(OSError, match="1 chunk removed meanwhile"):
            inverse(stack(), out=tmp_path / "x")
    since()
    os.mkfifo(tmp_path / "x" / "c" / "3" / "0" / "0.pipe")
    os.replace(tmp_path / "x" / "c" / "3" / "0" / "0.pipe", tmp_path / "x" / "c" / "3" / "0" / "0")
    assert_same_bits(inverse(stack(), out=tmp_path / "x")[...], inverse(a))
    assert since() == [1, 3]


def left(computed, *fails):
    """Return the blocks that are left when some were computed, of which some failed, in whatever order."""
    return sorted({*range(8)} - {*computed} | {*fails})


@pytest.fixture(params=SCHEDULERS)
def scheduler(request, processes):
    with dask.config.set(scheduler=processes if request.param == "cluster" else request.param):
        yield request.param


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    """A place for a new array, which other processes see unless it is in memory."""
    there = {
        "path": tmp_path / "x", "url": f"file://{tmp_path}/x", "memory": f"memory://x-{uuid.uuid4().hex}",
    }  # fmt: skip
    return there[request.param]


def opened(place):
    if str(place).startswith("memory"):
        return zarr.open_array(zarr.storage.FsspecStore.from_url(place), mode="r")
    return zarr.open_array(str(place).rpartition("file://")[2], mode="r")


def test_the_same_call_goes_on(noting, scheduler, place):
    a, stack, since = noting
    with pytest.raises(RuntimeError, match="block 5 fails") as caught:
        inverse(stack(5), out=place)
    assert "make the same call again to go on" in caught.value.__notes__[0]
    begun, first = opened(place), since()
    assert begun.attrs["complete"] == 0
    assert "dask_batchinv" in begun.attrs
    out = inverse(stack(), out=place)
    again = since()
    assert 5 in {*first} & {*again}
    if scheduler == "sync":  # what was computed is written before the next is
        assert again == left(first, 5)
    assert_same_bits(out[...], inverse(a))
    assert dict(out.attrs) == dict(opened(place).attrs) == {}


def test_a_finished_result_is_refused_like_all_else(tmp_path, noting):
    _, stack, since = noting
    inverse(stack(), out=tmp_path / "x")
    since()
    before = tree(tmp_path / "x")
    with pytest.raises(FileExistsError, match="exists: pass the path of a new array"):
        inverse(stack(), out=tmp_path / "x")
    assert since() == []
    assert tree(tmp_path / "x") == before


@pytest.mark.parametrize("harm", ["missing", "flipped", "cut", "empty"])
def test_a_block_that_is_not_as_it_was_written_is_done_again(tmp_path, noting, harm):
    a, stack, since = noting
    with dask.config.set(scheduler="sync"):
        with pytest.raises(RuntimeError):
            inverse(stack(4), out=tmp_path / "x")
        first = since()
        harmed = next(number for number in first if number != 4)
        chunk = tmp_path / "x" / f"c/{harmed}/0/0"
        content = bytearray(chunk.read_bytes())
        if harm == "missing":
            chunk.unlink()
        elif harm == "flipped":
            content[11] ^= 4
            chunk.write_bytes(content)
        else:
            chunk.write_bytes({"cut": content[:-9], "empty": b""}[harm])
        out = inverse(stack(), out=tmp_path / "x")
    assert since() == left(first, 4, harmed)
    assert_same_bits(out[...], inverse(a))


def test_a_process_that_was_killed_is_gone_on_with(tmp_path, noting):
    a, stack, since = noting
    stack("dies", 4)
    code = (
        "import sys, dask; from tests.array.test_unfinished import inverse, noted_stack; "
        "dask.config.set(scheduler='sync'); inverse(noted_stack(sys.argv[1]), out=sys.argv[2])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "notes", tmp_path / "x"], cwd=Path(__file__).parents[2], check=False
    )
    assert ended.returncode == 9
    first = since()
    with dask.config.set(scheduler="sync"):
        out = inverse(stack(), out=tmp_path / "x")
    assert since() == left(first, 4)
    assert_same_bits(out[...], inverse(a))


@pytest.mark.parametrize(("begun", "now"), [*itertools.product(["raise", "skipna", "nan"], repeat=2)])
def test_a_laxer_call_goes_on_and_a_stricter_one_does_not(tmp_path, noting, begun, now):
    a, stack, since = noting
    strict = ["raise", "skipna", "nan"]
    with dask.config.set(scheduler="sync"):
        with pytest.raises(RuntimeError):
            inverse(stack(5), out=tmp_path / "x", on_error=begun)
        before = tree(tmp_path / "x")
        first = since()
        if strict.index(now) < strict.index(begun):
            with pytest.raises(FileExistsError, match=f"on_error={begun!r}, which let matrices fail: make that call"):
                inverse(stack(), out=tmp_path / "x", on_error=now)
            assert tree(tmp_path / "x") == before
            assert since() == []
            return
        with pytest.raises(RuntimeError):
            inverse(stack(0, 7), out=tmp_path / "x", on_error=now)
        assert {*since()} <= {*left(first, 5)}
        if now != begun:
            with pytest.raises(FileExistsError, match=f"on_error={now!r}"):
                inverse(stack(), out=tmp_path / "x", on_error=begun)
        assert_same_bits(inverse(stack(), out=tmp_path / "x", on_error=now)[...], inverse(a))


def test_singular_matrices_raise_and_the_rest_stays(tmp_path):
    bad = conditioned(6, 2, 10)
    bad[5] = 0
    lazy = da.from_array(bad, chunks=(2, 2, 2))
    with dask.config.set(scheduler="sync"), pytest.raises(SingularMatrixError) as caught:
        inverse(lazy, out=tmp_path / "x")
    assert caught.value.__notes__ == [
        f"what is done stays in {tmp_path / 'x'}: make the same call again to go on, or delete that"
    ]
    out = inverse(lazy, out=tmp_path / "x", on_error="nan")
    assert_same_bits(out[...], inverse(bad, on_error="nan"))


@pytest.mark.parametrize("other", ["data", "option", "chunks", "no name", "another memory"])
def test_another_call_is_refused(tmp_path, noting, other, monkeypatch):
    a, _, _ = noting
    stack = da.from_array(np.concatenate([a, np.zeros((1, 3, 3))]), chunks=(5, 3, 3))
    options = {}
    if other == "another memory":
        kept = zarr.create_array(zarr.storage.MemoryStore(), shape=(25, 3, 3), chunks=(5, 3, 3), dtype="f8")
        kept[...] = stack.compute()
        stack = da.from_array(kept, chunks=(5, 3, 3))
    with dask.config.set(scheduler="sync"), pytest.raises(SingularMatrixError):
        inverse(stack, out=tmp_path / "x")
    before = tree(tmp_path / "x")
    if other == "data":
        stack = da.from_array(np.concatenate([a, np.ones((1, 3, 3))]), chunks=(5, 3, 3))
    elif other == "option":
        options = {"assume_a": "sym"}
    elif other == "chunks":
        stack = stack.rechunk((3, 3, 3))
    elif other == "no name":
        stack = da.from_delayed(dask.delayed(np.ones)(stack.shape), stack.shape, dtype="f8")
    else:
        monkeypatch.setattr("dask_batchinv.out._PROCESS", "another")
    with pytest.raises(FileExistsError, match="holds the unfinished result of another call: delete it yourself, or"):
        inverse(stack, out=tmp_path / "x", **options)
    assert tree(tmp_path / "x") == before


@pytest.mark.parametrize(
    "meta",
    [
        "", "[]", "{}", "null", json.dumps({"attributes": 3}), json.dumps({"attributes": {"dask_batchinv": 3}}),
        json.dumps({"attributes": {"dask_batchinv": "{"}}),
        json.dumps({"node_type": "array", "attributes": {"dask_batchinv": "[]"}}),
        json.dumps({"node_type": "group", "attributes": {"dask_batchinv": json.dumps({"call": "x"})}}),
        json.dumps({"node_type": "array", "attributes": {"dask_batchinv": json.dumps({"call": 1, "on_error": []})}}),
    ],
)  # fmt: skip
def test_metadata_of_others_are_left_alone(tmp_path, meta):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "zarr.json").write_text(meta)
    with pytest.raises(FileExistsError, match=r"exists: pass the path|unfinished result of another"):
        inverse(da.ones((1, 1, 1)), out=tmp_path / "x")
    assert (tmp_path / "x" / "zarr.json").read_text() == meta


def test_what_else_may_be_there(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    memory = fsspec.filesystem("memory")
    memory.pipe("/taken/notes.txt", b"mine")
    for place in (tmp_path / "file", "memory://taken"):
        with pytest.raises(FileExistsError, match="exists: pass the path of a new array"):
            inverse(np.eye(2)[None], out=place)
    assert (tmp_path / "file").read_text() == "mine"
    assert memory.find("/taken") == ["/taken/notes.txt"]
    assert_same_bits(inverse(np.eye(2)[None], out=tmp_path / "empty")[...], np.eye(2)[None])


@pytest.mark.parametrize("inner", ["", "/inner"])
def test_overlap_is_seen_before_anything_is_created(tmp_path, inner):
    z = zarr.create_array(tmp_path / "z", shape=(4, 2, 2), chunks=(2, 2, 2), dtype="f8")
    z[...] = conditioned(4, 2, 10)
    before = tree(tmp_path)
    for source in (z, da.from_array(z, chunks=(1, 2, 2)) + 0):
        with pytest.raises(ValueError, match="is in the array that the input is read from: write elsewhere"):
            inverse(source, out=f"{tmp_path}/z{inner}")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["numpy", "zarr", "dask of zarr"])
def test_every_input_goes_on_in_another_process(tmp_path, kind):
    bad = conditioned(8, 2, 10)
    bad[5] = 0
    z = zarr.create_array(tmp_path / "z", shape=bad.shape, chunks=(2, 2, 2), dtype="f8")
    z[...] = bad
    code = (
        "import sys, dask.array as da, numpy as np, zarr; from dask_batchinv import inverse; z = zarr.open_array(sys."
        "argv[1], mode='r'); a = {'numpy': lambda: z[...], 'zarr': lambda: z, 'dask of zarr': lambda: "
        "da.from_zarr(sys.argv[1])}[sys.argv[3]](); inverse(a, out=sys.argv[2], on_error=sys.argv[4])"
    )
    call = [sys.executable, "-c", code, tmp_path / "z", tmp_path / "x", kind]
    for _ in range(2):
        ended = subprocess.run([*call, "raise"], capture_output=True, text=True, check=False)
        assert "SingularMatrixError" in ended.stderr
    subprocess.run([*call, "nan"], check=True)
    assert_same_bits(zarr.open_array(tmp_path / "x", mode="r")[...], inverse(bad, on_error="nan"))


def test_an_array_that_was_taken_away_meanwhile_is_not_written_to(tmp_path):
    def take_away(block):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        return block

    lazy = da.ones((2, 1, 1), chunks=1).map_blocks(take_away, dtype="f8", meta=np.empty((0, 1, 1)))
    with pytest.raises(OSError, match="was finished, replaced or deleted by another call meanwhile"):
        inverse(lazy, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_credentials_are_in_no_error(capsys):
    with pytest.raises(OSError, match="cannot be read") as caught:
        inverse(np.eye(2)[None], out="s3x://AKIA:CANARY/7f3a@bucket/x")
    assert "CANARY" not in str(caught.value)
    assert "s3x://***@bucket/x" in str(caught.value)
