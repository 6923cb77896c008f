"""What users are told when something is wrong: what was expected, what came, and what to do."""

import ast
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

import dask_batchinv
from dask_batchinv import (
    ClusterError,
    InterruptedJob,
    PlanError,
    RefusedError,
    SourceError,
    TargetError,
    inverse,
    inverse_ex,
    invert_store,
    plan_store,
    report_store,
    status,
    verify_store,
)
from dask_batchinv.cli import main
from dask_batchinv.cli_spelling import spelled
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.plan.prepare import plan_for, prepare
from dask_batchinv.job.report import display
from dask_batchinv.job.report.at_work import AtWork
from dask_batchinv.job.report.run_record import Progress
from dask_batchinv.job.target.lock import locked
from dask_batchinv.location import Location
from tests.support.stacks import conditioned

PACKAGE = Path(dask_batchinv.__file__).parent


@pytest.fixture
def source(make_source):
    return make_source(conditioned(40, 3, 10), chunks=(10, 3, 3))


@pytest.fixture
def group(tmp_path):
    """A group with a stack of named dimensions."""
    ds = xr.Dataset({"cov": (("time", "i", "j"), conditioned(12, 3, 10))}, coords={"time": np.arange(12)})
    ds.to_zarr(tmp_path / "s.zarr", consolidated=False)
    return tmp_path / "s.zarr"


def command(*arguments, code=0):
    """Run the command in this process, and return what it says."""
    with dask.config.set():  # it says what Dask shall log
        ran = CliRunner().invoke(main, list(map(str, arguments)))
    assert ran.exit_code == code, ran.output
    return ran.output


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


# --- places ---------------------------------------------------------------------------------------------------


def test_nobody_is_told_to_delete_what_may_be_the_source(source, tmp_path):
    invert_store(source, tmp_path / "t")
    with pytest.raises(TargetError, match=r"nothing was written\. Choose another target path; if this is the source"):
        invert_store(tmp_path / "t" / "inverse", source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(TargetError, match=r"mine exists, .* Choose another target path$"):
        invert_store(source, tmp_path / "mine")
    for look in (status, report_store, verify_store):
        with pytest.raises(TargetError, match=r"is not a target of dask_batchinv: name the target that was made from"):
            look(source)


def test_what_is_there_but_no_store(source, tmp_path):
    (tmp_path / "a.nc").write_bytes(b"CDF\x01" + bytes(20))
    with pytest.raises(SourceError, match=r"a\.nc is a file of NetCDF or HDF5: open it with Xarray"):
        invert_store(tmp_path / "a.nc", tmp_path / "t")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SourceError, match=r"a\.txt is a file, and no Zarr array or group"):
        invert_store(tmp_path / "a.txt", tmp_path / "t")
    with pytest.raises(SourceError, match=r"there is nothing at .*sourc\.zarr\. Did you mean .*/source\.zarr\?"):
        invert_store(tmp_path / "sourc.zarr", tmp_path / "t")
    with pytest.raises(TargetError, match=r"there is nothing at .*sourc\.zarr\. Did you mean"):
        status(tmp_path / "sourc.zarr")
    zarr.create_group(tmp_path / "empty")
    with pytest.raises(SourceError, match=r"empty is a group without arrays$"):
        invert_store(tmp_path / "empty", tmp_path / "t")


def test_a_target_in_a_file(source, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for call in (invert_store, plan_store):
        with pytest.raises(TargetError, match=r"file\.txt is a file, so that no target can be in it"):
            call(source, tmp_path / "file.txt" / "deep" / "x.zarr")


def test_dimensions_that_are_no_squares(make_source, tmp_path):
    with pytest.raises(SourceError, match=r"shape \(5, 3, 4\), are 3 and 4 long: these are no square matrices$"):
        invert_store(make_source(np.ones((5, 3, 4)), "a"), tmp_path / "t")
    with pytest.raises(SourceError, match=r"no square matrices\. Name others with `dims=`"):
        invert_store(make_source(np.ones((3, 3, 5)), "b"), tmp_path / "t")


def test_a_source_may_be_named_as_reports_print_it(group, tmp_path):
    invert_store(group, tmp_path / "t")
    assert verify_store(tmp_path / "t", source=group / "cov").ok
    assert status(tmp_path / "t", source=group / "cov").freshness.up_to_date
    zarr.create_array(tmp_path / "other", shape=(12, 3, 3), dtype="f8")
    with pytest.raises(SourceError, match=r"other is an array, but .* made from cov in a group: give the group"):
        verify_store(tmp_path / "t", source=tmp_path / "other")


def test_a_name_that_a_coordinate_has(group, tmp_path):
    with pytest.raises(RefusedError, match="the target has the coordinate time already: give inverse another name"):
        invert_store(group, tmp_path / "t", names={"inverse": "time"})


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["overwrite", "trust_ledger", "durable", "logdet", "like_source", "lower"])
def test_flags_are_no_texts(source, tmp_path, flag):
    with pytest.raises(RefusedError, match=f"{flag} must be True or False, got 'no'"):
        invert_store(source, tmp_path / "t", **{flag: "no"})


@pytest.mark.parametrize("flag", ["insecure", "restart_stalled"])
def test_flags_of_the_cluster_are_no_texts(source, tmp_path, flag):
    with pytest.raises(ClusterError, match=f"{flag} must be True or False, got 'no'"):
        invert_store(source, tmp_path / "t", **{flag: "no"})


def test_flags_of_arrays_are_no_texts():
    with pytest.raises(ValueError, match="logdet must be True or False, got 'yes'"):
        inverse_ex(np.eye(2), logdet="yes")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tile_size": [1]}, "`tile_size=` [1] is not a number of bytes"),
        ({"tile_size": 0}, "`tile_size=` must be more than 0 bytes"),
        ({"memory_limit": [1]}, "`memory_limit=` [1] is not a number of bytes"),
        ({"chunks": 2}, "chunks takes a mapping such as {'time': 10}, got 2"),
        ({"chunks": (2, 3)}, "chunks takes a mapping such as {'time': 10}, got (2, 3)"),
        ({"shards": [2]}, "shards takes a mapping"),
        ({"names": "inverse"}, "names takes a mapping"),
        ({"names": {"inverse": 5}}, "names gives 'inverse' the name 5, which is not a text"),
        ({"select": "time=3"}, "select takes a mapping such as {'time': '2026-01-02'}, got 'time=3'"),
        ({"dims": "ij"}, "dims takes the names of rows and columns"),
        ({"scheduler": 5}, "scheduler takes an address"),
        ({"scheduler_file": 5}, "scheduler_file takes the path of a file, got 5"),
        ({"only_workers": 5}, "only_workers takes a list of patterns"),
        ({"only_workers": "gpu-*"}, "only_workers takes a list of patterns"),
        ({"min_rcond": "x"}, "`min_rcond=` must be between 0 and 1, got 'x'"),
        ({"workers": "2"}, "workers must be a whole number from 1 on, got '2'"),
        ({"workers": 0}, "workers must be a whole number from 1 on, got 0"),
        ({"threads_per_worker": 0}, "threads_per_worker must be a whole number from 1 on, got 0"),
        ({"wait": [1]}, "[1] is not a time such as 2h"),
        ({"variable": 5}, "variable takes the name of an array in the group, got 5"),
        ({"mask": np.ones(3)}, "mask takes the name of an array in the group, got a numpy.ndarray"),
        ({"zarr_format": "2"}, "zarr_format must be 2 or 3, got '2'"),
        ({"dtype": "int8"}, "not as 'int8'"),
        ({"dtype": np.int8}, "results can be stored as float32, float64"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_is_of_another_type(source, tmp_path, given, message):
    with pytest.raises(RefusedError, match=re.escape(message)):
        invert_store(source, tmp_path / "t", **given)
    assert not (tmp_path / "t").exists()


def test_a_sample_that_is_no_share(source, tmp_path):
    invert_store(source, tmp_path / "t")
    with pytest.raises(RefusedError, match="`sample=` must be between 0 and 1, got 'x'"):
        verify_store(tmp_path / "t", sample="x")


def test_a_dtype_of_numpy(source, tmp_path):
    invert_store(source, tmp_path / "t", dtype=np.float32)
    assert zarr.open_group(tmp_path / "t", mode="r")["inverse"].dtype == np.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [("in-process", "much"), ("attempts", "zero"), ("attempts", 0), ("patience", [1]), ("tile-size", "-1MiB")],
)
def test_nonsense_in_the_configuration(source, tmp_path, name, value):
    with (
        dask.config.set({f"batchinv.job.{name}": value}),
        pytest.raises(RefusedError, match=rf"batchinv\.job\.{name} in the Dask configuration must be .*, got {value!r}"
              .replace("[1]", r"\[1\]")),
    ):  # fmt: skip
        invert_store(source, tmp_path / "t")
    assert not (tmp_path / "t").exists()


# --- advice ---------------------------------------------------------------------------------------------------


def test_who_runs_workers_is_told_to_start_larger_ones(tmp_path):
    zarr.create_array(tmp_path / "huge", shape=(2, 9000, 9000), chunks=(1, 9000, 9000), dtype="f8")
    job = prepare(tmp_path / "huge", tmp_path / "t", JobOptions())
    with pytest.raises(PlanError, match=r"Start its workers with at least [\d.]+ GiB of memory$"):
        plan_for(job, Workers(1, 1, 2**30, are_ours=False))
    with pytest.raises(PlanError, match=r"of memory, or with fewer threads$"):
        plan_for(job, Workers(1, 2, 2**30, are_ours=False))
    with pytest.raises(PlanError, match=r"\. Raise `memory_limit=` to [\d.]+ GiB$"):
        plan_for(job, Workers(1, 1, 2**30))


def test_what_is_not_definite_may_have_an_inverse():
    with pytest.raises(np.linalg.LinAlgError, match="They may have an inverse all the same") as caught:
        inverse(-np.eye(3), assume_a="pos")
    assert "two equal rows" not in str(caught.value)


def test_nothing_is_said_of_chunks_that_were_not_read(make_source, tmp_path):
    source = make_source(conditioned(60, 3, 10), chunks=(25, 3, 3))
    notes = [invert_store(source, tmp_path / "t", tile_size=360).notes for _ in range(2)]
    assert [any("chunk of the source was decoded" in note for note in said) for said in notes] == [True, False]


def test_a_run_at_work_is_no_reason_to_run_another(source, tmp_path):
    invert_store(source, tmp_path / "t", tile_size=720)
    place = Location.parse(tmp_path / "t")
    with locked(place):
        found = status(tmp_path / "t")
        assert isinstance(found.at_work, AtWork)
        assert ("state", "complete: a run is at work") in found.rows()
        assert ("state", "complete: a run is at work") in report_store(tmp_path / "t").rows()
    assert ("state", "complete") in status(tmp_path / "t").rows()


# --- interruptions --------------------------------------------------------------------------------------------


def test_an_interrupted_command_says_what_it_was(source, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    for name in ("plan_job", "status_of", "check_job", "run_job"):
        monkeypatch.setattr(f"dask_batchinv.cli.{name}", interrupt)
    assert command("plan", source, tmp_path / "t", code=130) == "Interrupted.\n"
    assert command("run", source, tmp_path / "t", "--dry-run", code=130) == "Interrupted.\n"
    assert command("run", source, tmp_path / "t", "--check", code=130) == "Interrupted.\n"
    assert command("status", tmp_path / "t", code=130) == "Interrupted.\n"
    assert "What is done is recorded" in command("run", source, tmp_path / "t", code=130)


def test_an_interrupted_verification(source, tmp_path):
    def stop(progress):
        raise KeyboardInterrupt

    invert_store(source, tmp_path / "t")
    with pytest.raises(InterruptedJob, match="was not verified to its end"):
        verify_store(tmp_path / "t", on_progress=stop)


def test_the_command_may_be_interrupted_while_it_is_imported(tmp_path):
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    ended = python("-m", "dask_batchinv", "--version", env=os.environ | {"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"})
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted.\n")
    assert "dask-batchinv" in python("-m", "dask_batchinv", "--version", cwd=PACKAGE.parent).stdout


def test_who_starts_workers_ends_in_silence_if_nobody_wants_any():
    from dask_batchinv.job.driver import start_workers

    ended = python(start_workers.__file__, stdin=subprocess.DEVNULL)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_dask_is_silent_when_a_worker_is_killed(source, tmp_path):
    code = (
        "import os, psutil, sys, time, dask_batchinv\n"
        "killed = []\n"
        "def kill(now):\n"
        "    time.sleep(0.05)\n"
        "    if now.matrices_done and not killed:\n"
        "        workers = [p for p in psutil.Process().children(recursive=True) if 'spawn_main' in str(p.cmdline())]\n"
        "        killed.append(workers[0]); workers[0].kill()\n"
        "report = dask_batchinv.invert_store(*sys.argv[1:], workers=2, tile_size=72, on_progress=kill)\n"
        "print(report.deaths)\n"
    )
    ended = python("-c", code, source, tmp_path / "t")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_loggers_stay_silent_when_dask_is_imported_later(source, tmp_path):
    code = (
        "import logging, sys\n"
        "from dask_batchinv.cli import main\n"
        "try: main(['plan', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "import distributed\n"
        "print(logging.getLogger('distributed.scheduler').getEffectiveLevel() >= logging.CRITICAL)\n"
    )
    assert "True" in python("-c", code, source, tmp_path / "t").stdout


# --- names ----------------------------------------------------------------------------------------------------


def test_classes_are_called_what_users_call_them():
    """In a fresh process, in which nobody has asked for them by these names."""
    code = (
        "import importlib, json, pkgutil, dask_batchinv\n"
        "names = {*dask_batchinv.__all__, 'AmbiguousDimsError'}\n"
        "for _, name, _ in pkgutil.walk_packages(dask_batchinv.__path__, 'dask_batchinv.'):\n"
        "    for thing in vars(importlib.import_module(name)).values():\n"
        "        if isinstance(thing, type) and thing.__name__ in names:\n"
        "            names.discard(thing.__name__)\n"
        "            assert thing.__module__ == 'dask_batchinv', thing\n"
        "            assert getattr(dask_batchinv, thing.__name__) is thing, thing\n"
        "print(sorted(names))\n"
    )
    ended = python("-c", code)
    assert ended.stderr == ""
    functions = [name for name in dask_batchinv.__all__ if not isinstance(getattr(dask_batchinv, name), type)]
    assert ast.literal_eval(ended.stdout) == functions


def test_methods_are_called_what_users_call_them():
    with pytest.raises(TypeError, match=r"^DataArray\.linalg\.inv\(\) got an unexpected"):
        xr.DataArray(np.eye(2)).linalg.inv(wrong=1)
    with pytest.raises(TypeError, match=r"^linalg\.inv\(\) got an unexpected"):
        xr.Dataset().linalg.inv(wrong=1)


def test_windows():
    ended = python("-c", "import sys; sys.platform = 'win32'; import dask_batchinv")
    assert "ImportError: dask_batchinv runs on Linux and macOS" in ended.stderr


# --- numbers --------------------------------------------------------------------------------------------------


def test_one_of_something_is_one(make_source, tmp_path):
    source = make_source(np.zeros((1, 3, 3)), chunks=(1, 3, 3))
    with pytest.raises(dask_batchinv.JobFailedError, match=r"^1 matrix has no inverse, 0 allowed") as caught:
        invert_store(source, tmp_path / "t", progress=False)
    shown = f"{caught.value}\n{status(tmp_path / 't')}\n{plan_store(source, tmp_path / 'u')}"
    assert not re.search(r"\b1 (tiles|chunks|matrices|workers|threads|requests)\b|\(s\)", shown)
    assert re.search(r"read at [\d.]+ \w+/s", shown)
    assert not re.search(r"\d\.\d+ B/s", shown)


def test_the_last_line_is_printed_once():
    stream = io.StringIO()
    with display.shown(stream=stream) as tell:
        for seconds in (1.0, 2.0, 2.5):
            tell(Progress("inverting", 100, 100 if seconds > 1 else 10, 0, 0, 0, seconds))
        tell(Progress("inverting", 100, 100, 0, 1, 0, 3.0))
    assert len(stream.getvalue().splitlines()) == 3


# --- options --------------------------------------------------------------------------------------------------


def literals():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.relative_to(PACKAGE), node.value


def test_options_are_named_as_they_are_passed_in_python():
    for path, text in literals():
        is_code = path.parts[:2] == ("kernels", "cuda") or "--ink:" in text  # for other compilers; CSS
        if not path.name.startswith("cli") and not is_code:
            assert not re.search(r"(?<![\w-])--[a-z]", text), f"{path}: {text}"


def test_options_that_are_named_are_there():
    known = {name for call in (inverse, invert_store, verify_store) for name in inspect.signature(call).parameters}
    named = {name for _, text in literals() for name in re.findall(r"(?<!`)`(\w+)=", text)}
    assert "variable" in named
    assert named <= known


def test_the_command_names_options_as_they_are_typed(group, tmp_path):
    ds = xr.open_zarr(group, consolidated=False).load()
    ds.assign(other=ds.cov).drop_encoding().to_zarr(group, mode="w", consolidated=False)
    said = command("run", group, tmp_path / "t", code=2)
    assert "name the stack with --variable; it has" in said
    told = json.loads(command("run", group, tmp_path / "t", "--json", code=2).splitlines()[-1])
    assert "name the stack with --variable; it has" in told["error"]["message"]
    command("run", group, tmp_path / "t", "--variable", "cov", "--quiet")
    said = command("run", group, tmp_path / "t", "--variable", "other", code=2)
    assert "or pass --overwrite to replace it" in said


def test_options_are_spelled():
    run = main.commands["run"]
    assert spelled("pass `missing='fill'`", run) == "pass --missing fill"
    assert spelled("wait longer (`wait=`)", run) == "wait longer (--for)"
    assert spelled("`dims=('a b', 'c')` or `client=`", run) == "--dims 'a b,c' or `client=`"
    assert spelled("time=3 `nothing` `x=1`", click.Command("none")) == "time=3 `nothing` `x=1`"
