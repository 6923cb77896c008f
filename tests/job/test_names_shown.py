"""Names from stores never reach a terminal as they are: all commands, on stores whose every name is an attack."""

import json
import shutil

import numpy as np
import pytest
import zarr

from dask_batchinv import JobFailedError, invert_store, verify_store
from dask_batchinv.cli import main
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


@pytest.fixture
def shown(capsys):
    """Runs a command; returns what it prints, which a terminal may have."""

    def run(*arguments, code):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        text = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == code, text
        return checked(text)

    return run


def checked(text):
    assert all(line.isprintable() for line in text.split("\n")), text
    assert not [line for line in text.split("\n") if line.startswith("forged")], text
    return text


def test_no_command_prints_a_name_as_it_is(hostile, tmp_path, shown):
    target, variable = tmp_path / f"t{ATTACK}", f"v{ATTACK}"
    shown("plan", hostile, target, code=0)  # of the two arrays one cannot be meant
    assert r"\u202e" in shown("run", hostile, target, "--variable", f"x{ATTACK}", code=2)
    assert r"\x1b" in shown("run", hostile, target, "--variable", variable, "--dims", f"{ATTACK},{ATTACK}", code=2)
    assert r"t\x1b" in shown("run", hostile, target, "--variable", f"w{ATTACK}", code=2)  # its dimensions
    assert r"\u202e" in shown("run", hostile, target, "--max-failed", ATTACK, code=2)
    assert r"\x1b" in shown("run", hostile, target, ATTACK, code=2)
    assert r"\x1b" in shown("run", hostile, target, f"--{ATTACK}", code=2)
    assert r"\x1b" in shown(ATTACK, code=2)
    assert r"\x1b" in shown("status", f"nowhere{ATTACK}", code=2)
    assert r"\x1b" in shown("verify", hostile, code=2)
    job = ["run", hostile, target, "--variable", variable, "--tile-size", "720", "--workers", "1"]
    shown("plan", *job[1:5], code=0)
    chunk = hostile / variable / "c/2/0/0"
    shutil.move(chunk, tmp_path / "kept")
    assert "20:30" in shown(*job, code=1)
    json.loads(shown("status", target, "--json", code=5))  # by the name that is shown the source is not found
    shutil.move(tmp_path / "kept", chunk)
    assert r"source\x1b" in shown(*job, code=0)
    assert r"t\x1b" in shown("status", target, "--source", hostile, code=0)
    assert r"t\x1b" in shown("verify", target, "--source", hostile, "--workers", "1", code=0)
    next((target / "inverse").glob("c*")).unlink()
    assert "FAILED" in shown("verify", target, "--workers", "1", code=1)


def test_no_report_or_error_shows_a_name_as_it_is(hostile, tmp_path, client):
    target, variable = tmp_path / f"t{ATTACK}", f"v{ATTACK}"
    (hostile / variable / "c/2/0/0").unlink()
    with pytest.raises(JobFailedError) as caught:
        invert_store(hostile, target, variable=variable, client=client, tile_size=720)
    for text in (str(caught.value), str(caught.value.report), str(verify_store(target, client=client))):
        assert all(line.isprintable() and not line.startswith("forged") for line in text.split("\n"))
    assert repr(caught.value.report).isprintable()


def test_the_name_of_a_chunk_file(tmp_path, client, make_source, shown):
    """A separator of another kind than a slash or a dot is refused; what lies beside chunks is never named raw."""
    source = make_source(conditioned(40, 3, 10), name=f"a{ATTACK}.zarr")
    invert_store(source, tmp_path / "t", client=client)
    (tmp_path / "t" / f"c{ATTACK}").touch()
    other = make_source(conditioned(20, 3, 10), name="b.zarr")
    text = shown("run", other, tmp_path / "t", "--overwrite", code=2)
    assert r"c\x1b" in text
