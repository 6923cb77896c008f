"""The command line, as a person or a batch system runs it."""

import errno
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import zarr
from click.testing import CliRunner

import dask_batchinv
from dask_batchinv import inverse_ex, verify_store
from dask_batchinv.cli import main
from dask_batchinv.job.report.display import shown
from dask_batchinv.job.report.run_record import Guarded, Progress
from dask_batchinv.job.report.streams import Lasting
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target

COMMAND = [sys.executable, "-m", "dask_batchinv.cli"]


def cli(*arguments, code=0, **options):
    """Run the command and return its standard output and standard error."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def source(make_source):
    a = conditioned(400, 3, 10)
    a[7] = 0
    return make_source(a, chunks=(10, 3, 3))


def test_a_job_from_plan_to_verify(source, tmp_path):
    target = tmp_path / "t"
    text, _ = cli("plan", source, target)
    assert "400 of 3 x 3" in text
    assert cli("run", source, target, "--dry-run")[0] == text
    assert not target.exists()

    report, progress = cli("run", source, target, code=3)
    assert "400, 1 without an inverse" in report
    assert "1 singular: (7,)" in report
    assert "400 of 400 matrices (100%)" in progress
    assert_same_bits(read_target(target)[0], inverse_ex(read_source(source)).inverse)

    assert "complete" in cli("status", target)[0]
    assert "verified" in cli("verify", target, "--source", source)[0]
    again, _ = cli("run", source, target, "--max-failed", "1")
    assert "nothing was left to do" in again


def read_source(path):
    return zarr.open_array(path, mode="r")[...]


def test_json_is_one_object_on_standard_output(source, tmp_path):
    target = tmp_path / "t"
    plan = json.loads(cli("plan", source, target, "--json")[0])
    assert plan["matrices"] == 400
    out, _ = cli("run", source, target, "--json", "--max-failed", "any")
    report = json.loads(out)
    assert report["complete"] is True
    assert report["failed"]["singular"] == 1
    assert report["first_failed"]["singular"] == [[7]]
    assert json.loads(cli("status", target, "--json")[0])["tiles_done"] == report["tiles"]
    assert json.loads(cli("verify", target, "--json")[0])["ok"] is True
    assert_same_bits(read_target(target)[0], inverse_ex(read_source(source)).inverse)


def test_quiet(source, tmp_path):
    assert cli("run", source, tmp_path / "t", "--quiet", "--max-failed", "1") == ("", "")
    out, err = cli("run", source, tmp_path / "u", "--quiet", code=3)
    assert "1 without an inverse" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere", "{tmp}/t"], "there is nothing at"),
        (["{source}", "{source}/inside"], "lies inside, the source"),
        (["{source}", "{tmp}/mine"], "dask_batchinv did not make it"),
        (["{source}", "{tmp}/t", "--variable", "A"], "is an array, not a group"),
        (["{source}", "{tmp}/t", "--dims", "a"], "two different names"),
        (["{source}", "{tmp}/t", "--assume-a", "positive"], "'positive' is not one of"),
        (["{source}", "{tmp}/t", "--max-failed", "few"], "takes a number, a share"),
        (["{source}", "{tmp}/t", "--device", "gpu"], "CuPy cannot be imported|CUDA finds no"),
        (["{source}", "{tmp}/t", "--memory-limit", "1MiB"], "do not fit|does not fit"),
        (["{source}", "{tmp}/t", "--scheduler", "tcp://127.0.0.1:9"], "no scheduler at tcp://127.0.0.1:9"),
        (["{source}", "memory://t", "--workers", "1"], "would end with this command"),
        (["{source}"], "Missing argument 'TARGET'"),
    ],
    ids=lambda value: " ".join(value[2:]) or "bad place" if isinstance(value, list) else None,
)
def test_refused_with_exit_code_2_before_anything_is_written(source, tmp_path, arguments, message, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    before = sorted(tmp_path.rglob("*"))
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main(["run", *(text.format(tmp=tmp_path, source=source) for text in arguments)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert re.search(message, err)
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert time.monotonic() - start < 20


def test_a_damaged_source_is_exit_code_1_and_mended_by_the_same_command(source, tmp_path):
    target = tmp_path / "t"
    chunk = source / "c" / "3" / "0" / "0"
    shutil.move(chunk, tmp_path / "kept")
    options = ["run", source, target, "--tile-size", "720", "--max-failed", "any"]
    out, err = cli(*options, code=1)
    said = "tile 3 [30:40]: 1 chunk of the source cannot be read: c/3/0/0: MissingChunkError: chunk c/3/0/0 is not in"
    assert said in out
    assert "run the same command again" in err
    shutil.move(tmp_path / "kept", chunk)
    assert "40 of 40, 1 in this run" in cli(*options)[0]
    cli("verify", target, "--source", source)


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_is_exit_code_130_and_the_same_command_continues(make_source, tmp_path, sign):
    a = conditioned(4000, 40, 10)
    # So many tiles that some are left however late this process sees the first ones.
    source, target = make_source(a, chunks=(4, 40, 40)), tmp_path / "t"
    arguments = ["run", source, target, "--tile-size", "51200", "--workers", "1"]
    # A shell that runs these tests in the background has them ignore SIGINT, and what is ignored is inherited.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    running = subprocess.Popen(
        [sys.executable, "-c", f"{heed}; from dask_batchinv.cli import main; main()", *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (target / "inverse" / "c.400.0.0").exists():  # tasks have up to 256 tiles, and are recorded when they end
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # A terminal sends Ctrl-C to the whole process group, a batch system SIGTERM to the process that it started.
    if sign == signal.SIGINT:
        os.killpg(running.pid, sign)
    else:
        running.send_signal(sign)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, out + err
    assert "run the same command again for the rest" in err
    assert "Traceback" not in err
    before = json.loads(cli("status", target, "--json", code=4)[0])
    assert not before["complete"]
    assert before["tiles_done"] > 0
    report = json.loads(cli(*arguments, "--json")[0])
    assert report["tiles_now"] == report["tiles"] - before["tiles_done"]
    assert_same_bits(read_target(target)[0], inverse_ex(a).inverse)


def test_what_is_refused_is_told_in_json_too(tmp_path, make_source):
    source = make_source(conditioned(4, 3, 10))
    out, err = cli("run", tmp_path / "nothing", tmp_path / "t", "--json", code=2)
    told = json.loads(out)
    assert (told["schema"], told["exit_code"], told["error"]["kind"]) == (1, 2, "SourceError")
    assert told["error"]["message"] in err
    out, err = cli("run", source, "--json", "--no-such-option", code=2)
    told = json.loads(out)
    assert (told["schema"], told["exit_code"], told["error"]["kind"]) == (1, 2, "NoSuchOption")
    assert told["error"]["message"] in err
    assert json.loads(cli("run", source, "--json", code=2)[0])["error"]["message"] == "Missing argument 'TARGET'."
    assert json.loads(cli("plan", source, tmp_path / "t", "--json")[0])["exit_code"] == 0
    assert json.loads(cli("status", source, "--json", code=2)[0])["error"]["kind"] == "TargetError"
    out, err = cli("status", source, code=2)
    assert "is not a target" in err
    assert "delete" not in err
    assert json.loads(cli("run", source, tmp_path / "t", "--json")[0])["schema"] == 1
    assert json.loads(cli("plan", source, tmp_path / "u", "--json")[0])["schema"] == 1
    assert json.loads(cli("status", tmp_path / "u", "--json", code=2)[0])["error"]["kind"] == "TargetError"


def test_help_suffices():
    runner = CliRunner()
    top = runner.invoke(main, ["--help"])
    assert top.exit_code == 0
    for command in ("run", "plan", "status", "verify"):
        assert command in top.output
        told = runner.invoke(main, [command, "-h"]).output
        for option in main.commands[command].params:
            assert option.opts[0] in told or option.name.upper() in told
            assert option.param_type_name == "argument" or option.help, f"{command} {option.name} has no help"
    assert "130  interrupted" in runner.invoke(main, ["run", "--help"]).output
    assert dask_batchinv.__version__ in runner.invoke(main, ["--version"]).output


def test_installed_commands():
    scripts = Path(sys.executable).parent
    for command in (["dask-batchinv"], ["dask", "batchinv"]):
        done = subprocess.run([scripts / command[0], *command[1:], "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert "Invert every matrix of a Zarr store" in done.stdout


def progress(done, before=0, failed=0, seconds=2.0):
    return Progress("inverting", 1000, done, before, failed, 0, seconds)


def test_progress_lines(capsys):
    with shown(stream=sys.stdout) as callback:
        callback(progress(200, before=100, failed=3))
        callback(progress(300))
        callback(progress(1000, seconds=10.0))
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line.partition(" ")[2] for line in lines] == [
        "200 of 1,000 matrices (20%), 50/s, 16 s left, 3 without an inverse",
        "1,000 of 1,000 matrices (100%), 100/s, 0 s left, 0 without an inverse",
    ]


def test_progress_bar_on_a_terminal():
    read, write = pty.openpty()
    termios.tcsetwinsize(write, (24, 120))
    text = ""
    with os.fdopen(write, "w") as stream:
        with shown(stream=stream) as callback:
            for done in (200, 700):
                time.sleep(0.2)  # tqdm draws ten times a second at most
                callback(progress(done, before=100, failed=4))
        while select.select([read], [], [], 0.1)[0]:
            text += os.read(read, 100_000).decode()
    os.close(read)
    assert "70%" in text
    assert "700/1.00k" in text
    assert "4 without an inverse" in text


def test_progress_can_be_off():
    with shown(enabled=False) as callback:
        assert callback is None


class Gone(io.StringIO):
    """A stream whose reader is gone, or whose disk is full."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))


def test_progress_that_nobody_reads_any_more(capsys):
    for stream in (Gone(errno.EPIPE), Gone(errno.EIO), None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with shown() as callback:
                callback(progress(200))
                callback(progress(1000))
    closed = io.StringIO()
    closed.close()
    assert not Lasting(closed).isatty()
    full = Lasting(Gone(errno.ENOSPC))
    print("x", file=full, flush=True)
    assert full.failure.errno == errno.ENOSPC
    print("y", file=full, flush=True)


def test_a_stream_that_cannot_have_every_letter():
    taken = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("‖A‖ = 1", file=Lasting(taken), flush=True)
    assert taken.buffer.getvalue() == b"\\u2016A\\u2016 = 1\n"


@pytest.mark.parametrize(
    ("ending", "code"),
    [("2>&1 | head -1", 3), ("2>&1 | true", 3), (">&-", 3), ("2>&-", 3), ("<&- >&- 2>&-", 3), ("--json | true", 3)],
)
def test_a_job_outlives_those_who_read_what_it_prints(source, tmp_path, client, ending, code):
    target = tmp_path / "t"
    own = (
        ["--workers", "1"] if ending in ("2>&1 | true", "<&- >&- 2>&-") else []
    )  # else in one process, which is sooner
    line = f'{{ "$@" {ending.partition("|")[0]}; echo $? >{tmp_path / "code"}; }} |{ending.partition("|")[2] or "cat"}'
    command = ["sh", "-c", line, "sh", *COMMAND, "run", source, target, "--tile-size", "720", *own]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (tmp_path / "code").read_text() == f"{code}\n", ended
    assert not re.search("Broken|Errno|Traceback|Exception", ended.stdout + ended.stderr)
    report = verify_store(target, source=source, client=client)
    assert report.complete
    assert report.ok


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_told(source, tmp_path):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*COMMAND, "plan", source, tmp_path / "t"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.stderr == "Error: the output could not be written: [Errno 28] No space left on device\n"


def test_descriptors_that_are_closed_are_not_given_to_files(tmp_path):
    code = (
        "import os, sys; from dask_batchinv.job.report.streams import open_closed_descriptors; "
        f"open_closed_descriptors(); f = open({str(tmp_path / 'f')!r}, 'w'); print(f.fileno(), file=f)"
    )
    subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code], check=True)
    assert int((tmp_path / "f").read_text()) > 2


#: A run in which the interrupt comes while Python runs a destructor, and is dropped.
SWALLOWED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dask_batchinv import cli
from dask_batchinv.job.report.run_record import Progress
sign = getattr(signal, sys.argv.pop(1))
class Dying:
    def __del__(self):
        os.kill(os.getpid(), sign)
        [None for _ in range(1000)]
def run_job(job, cluster, on_progress):
    dying = Dying()
    del dying
    print("went on", file=sys.stderr)
    for done in range(5):
        on_progress(Progress("inverting", 400, done, 0, 0, 0, 1.0))
    raise SystemExit("not interrupted")
cli.run_job = run_job
cli.main()
"""


@pytest.mark.parametrize("sign", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_an_interrupt_in_a_destructor_is_not_lost(source, tmp_path, sign, quiet):
    ended = subprocess.run(
        [sys.executable, "-c", SWALLOWED, sign, "run", source, tmp_path / "t", *quiet],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "went on" in ended.stderr
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Interrupted" in ended.stderr


def test_what_is_not_of_an_interrupt_is_still_complained_of(source, tmp_path):
    code = SWALLOWED.replace("os.kill(os.getpid(), sign)", "raise ValueError('odd')")
    ended = subprocess.run(
        [sys.executable, "-c", code, "SIGINT", "run", source, tmp_path / "t"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "ValueError: odd" in ended.stderr
    assert "not interrupted" in ended.stderr


def test_handlers_are_as_before_when_a_command_ends(source, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook
    assert CliRunner().invoke(main, ["plan", str(source), str(tmp_path / "t")]).exit_code == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_a_callback_that_fails_is_not_called_again():
    calls = []

    def fail(now):
        calls.append(now)
        raise ValueError("no\nroom")

    guarded = Guarded(fail)
    guarded(progress(1))
    guarded(progress(2))
    assert calls == [progress(1)]
    assert guarded.notes == [r"on_progress failed and was not called again: ValueError: no\nroom"]

    def interrupt(now):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(interrupt)(progress(1))
    fine = Guarded(calls.append)
    fine(progress(2))
    assert (calls[-1], fine.notes) == (progress(2), [])
