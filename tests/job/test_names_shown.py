"""Names from stores never reach a terminal as they are: all commands, on stores whose every name is an attack."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr

from dask_batchinv import JobFailedError, invert_store, verify_store
from tests.support.stacks import conditioned

ATTACK = "\x1b]0;pwned\x07\u202e\r\nforged 1,000 matrices"


@pytest.fixture
def hostile(tmp_path):
    """A group of which every name is an attack, with two stacks and coordinates."""
    path = tmp_path / f"source{ATTACK}"
    group = zarr.create_group(path, attributes={ATTACK: ATTACK})
    for name, dims in {"v": list("trc"), "w": [f"{dim}{ATTACK}" for dim in "trc"]}.items():
        array = group.create_array(
            f"{name}{ATTACK}", shape=(40, 3, 3), chunks=(10, 3, 3), dtype="f8", dimension_names=dims, fill_value=0,
            attributes={ATTACK: ATTACK, "units": ATTACK},
        )  # fmt: skip
        array[...] = conditioned(40, 3, 10)
    labels = group.create_array("t", shape=(40,), dtype="i8", dimension_names=["t"])
    labels[...] = np.arange(40)
    return path


def shown(tmp_path, *arguments, code):
    """Run a command; return what it prints, which a terminal may have."""
    command = [sys.executable, "-m", "dask_batchinv.cli", *map(str, arguments)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    text = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == code, text
    assert all(line.isprintable() for line in text.split("\n")), text
    assert not [line for line in text.split("\n") if line.startswith("forged")], text
    return text


def test_no_command_prints_a_name_as_it_is(hostile, tmp_path):
    target, variable = tmp_path / f"t{ATTACK}", f"v{ATTACK}"
    shown(tmp_path, "plan", hostile, target, code=0)  # of the two arrays one cannot be meant
    assert r"\u202e" in shown(tmp_path, "run", hostile, target, "--variable", f"x{ATTACK}", code=2)
    assert r"\x1b" in shown(
        tmp_path, "run", hostile, target, "--variable", variable, "--dims", f"{ATTACK},{ATTACK}", code=2
    )
    assert r"t\x1b" in shown(tmp_path, "run", hostile, target, "--variable", f"w{ATTACK}", code=2)  # its dimensions
    assert r"\u202e" in shown(tmp_path, "run", hostile, target, "--max-failed", ATTACK, code=2)
    assert r"\x1b" in shown(tmp_path, "run", hostile, target, ATTACK, code=2)
    assert r"\x1b" in shown(tmp_path, "run", hostile, target, f"--{ATTACK}", code=2)
    assert r"\x1b" in shown(tmp_path, ATTACK, code=2)
    assert r"\x1b" in shown(tmp_path, "status", f"nowhere{ATTACK}", code=2)
    assert r"\x1b" in shown(tmp_path, "verify", hostile, code=2)
    job = ["run", hostile, target, "--variable", variable, "--tile-size", "720", "--workers", "1"]
    shown(tmp_path, "plan", *job[1:5], code=0)
    chunk = hostile / variable / "c/2/0/0"
    shutil.move(chunk, tmp_path / "kept")
    assert "20:30" in shown(tmp_path, *job, code=1)
    json.loads(shown(tmp_path, "status", target, "--json", code=0))
    shutil.move(tmp_path / "kept", chunk)
    assert r"source\x1b" in shown(tmp_path, *job, code=0)
    assert r"t\x1b" in shown(tmp_path, "status", target, code=0)
    assert r"t\x1b" in shown(tmp_path, "verify", target, "--source", hostile, "--workers", "1", code=0)
    next((target / "inverse").glob("c*")).unlink()
    assert "FAILED" in shown(tmp_path, "verify", target, "--workers", "1", code=1)


def test_no_report_or_error_shows_a_name_as_it_is(hostile, tmp_path, client):
    target, variable = tmp_path / f"t{ATTACK}", f"v{ATTACK}"
    (hostile / variable / "c/2/0/0").unlink()
    with pytest.raises(JobFailedError) as caught:
        invert_store(hostile, target, variable=variable, client=client, tile_size=720)
    for text in (str(caught.value), str(caught.value.report), str(verify_store(target, client=client))):
        assert all(line.isprintable() and not line.startswith("forged") for line in text.split("\n"))
    assert repr(caught.value.report).isprintable()


def test_the_name_of_a_chunk_file(tmp_path, client, make_source):
    """A separator of another kind than a slash or a dot is refused; what lies beside chunks is never named raw."""
    source = make_source(conditioned(40, 3, 10), name=f"a{ATTACK}.zarr")
    invert_store(source, tmp_path / "t", client=client)
    (tmp_path / "t" / f"c{ATTACK}").touch()
    other = make_source(conditioned(20, 3, 10), name="b.zarr")
    text = shown(tmp_path, "run", other, tmp_path / "t", "--overwrite", code=2)
    assert r"c\x1b" in text
