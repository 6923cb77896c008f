"""Credentials appear nowhere: a canary in URLs and in the environment, and a look at all that a job leaves behind."""

import io
import os
import re
import shutil
import subprocess
import sys
import traceback

import psutil
import pytest

from dask_batchinv import ClusterError
from dask_batchinv.job.driver.cluster import _check_address
from tests.support.stacks import conditioned
from tests.support.targets import tree

CANARY = "CANARY7f3a"
CODE = """
import sys, fsspec, pathlib, shutil
from dask_batchinv import cli
source = pathlib.Path(sys.argv.pop(1))
memory = fsspec.filesystem("memory")
for path in source.rglob("*"):
    if path.is_file():
        memory.pipe(f"/user:CANARY7f3a@host/{path.relative_to(source)}", path.read_bytes())
cli.main()
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_the_canary_is_in_no_output(tmp_path, make_source, damaged):
    source = make_source(conditioned(40, 3, 10))
    if damaged:
        (source / "c/1/0/0").unlink()
    url = f"memory://user:{CANARY}@host?token={CANARY}"
    for command in (
        ["plan", url, "t"],
        ["run", url, "t", "--scheduler", "inproc"],
        ["run", url, f"s3x://{CANARY}@h/t"],
    ):
        arguments = [sys.executable, "-c", CODE, str(source), *command]
        environment = os.environ | {"AWS_SECRET_ACCESS_KEY": CANARY, "AWS_SESSION_TOKEN": CANARY}
        ended = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert CANARY not in ended.stdout + ended.stderr
    for name, content in tree(tmp_path).items():
        assert CANARY.encode() not in content, name


def test_the_canary_is_in_nothing_that_a_job_leaves(tmp_path, make_source):
    source = make_source(conditioned(40, 3, 10), chunks=(10, 3, 3))
    shutil.move(source, tmp_path / f"token={CANARY}.zarr")
    arguments = [sys.executable, "-m", "dask_batchinv.cli", "run", f"token={CANARY}.zarr", "t", "--tile-size", "720"]
    for _ in range(2):
        ended = subprocess.run([*arguments, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0
        assert CANARY not in ended.stdout + ended.stderr
    for name, content in tree(tmp_path / "t").items():
        assert CANARY.encode() not in content, name


#: Raises where a file system is called that does not know it, as s3fs does, or a library that a worker calls.
PLACES = """
import sys
from dask_batchinv import cli
import fsspec, fsspec.implementations.memory, dask_batchinv.job.source.source as source
SECRET = "CANARY7f3a/x+y=="
def fail(*args, **kwargs):
    raise OSError(5, f'Invalid bucket name "{SECRET}"; signature of CANARY7f3a%2Fx%2By%3D%3D', SECRET)
place = sys.argv.pop(1)
if place == "config":
    fsspec.config.conf["memory"] = {"secret": SECRET}
if place == "bug":
    source.read_node = lambda *args: fail()
    source.SourceError = ZeroDivisionError
fsspec.implementations.memory.MemoryFileSystem.exists = fail
fsspec.implementations.memory.MemoryFileSystem.cat_file = fail
for command in sys.argv.pop(1).split():
    both = [sys.argv[1], "t"] if command in ("plan", "run") else [sys.argv[1]]
    for stream in (sys.stdout, sys.stderr):
        print(f"== {command}", file=stream, flush=True)
    try:
        cli.main([command, *both, *sys.argv[2:]])
    except SystemExit as end:
        print(f"== ended: {end.code}")
"""


@pytest.mark.parametrize("place", ["environment", "config", "source", "chain", "usage", "bug"])
def test_no_text_of_others_brings_a_credential_back(tmp_path, place):
    secret = f"{CANARY}/x+y=="
    url = {
        "source": f"memory://AKIA:{secret}@bucket/a",
        "chain": f"simplecache::memory://AKIA:{secret}@bucket/a",
        "usage": f"memory://AKIA:{secret}@bucket/a",
    }.get(place, "memory://bucket/a")
    more = {"usage": [url], "bug": ["--json"]}.get(place, [])
    commands = ("plan", "run", "status", "verify")
    arguments = [sys.executable, "-c", PLACES, place, " ".join(commands), url, *more]
    named = {"AWS_SECRET_ACCESS_KEY": secret} if place in ("environment", "bug") else {}
    ended = subprocess.run(arguments, cwd=tmp_path, env=os.environ | named, capture_output=True, text=True, check=False)
    assert [code in "12" for code in re.findall(r"== ended: (\d+)", ended.stdout)] == [True] * 4
    for command in commands:
        out, err = (re.search(f"(?s)== {command}\n(.*?)(== |$)", text)[1] for text in (ended.stdout, ended.stderr))
        assert "Error" in err
        assert "***" in out + err
    assert CANARY not in ended.stdout + ended.stderr


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:8786", "ws://192.0.2.1:8786", "tcp://[2001:db8::1]:8786"])
def test_a_scheduler_elsewhere_without_tls_needs_a_flag(address, monkeypatch):
    with pytest.raises(ClusterError, match=r"on another machine and not encrypted.*`insecure=True`"):
        _check_address(address, insecure=False)
    monkeypatch.setattr("socket.create_connection", lambda *args, **options: io.StringIO())
    _check_address(address, insecure=True)


@pytest.mark.parametrize("address", ["tcp://user:{}@127.0.0.1:1", "user:{}@127.0.0.1:1", "tcp://u:{}:99@127.0.0.1:1",
                                     "inproc://user:{}@x", "foo://u:{}@h", "foo://h?code={}"])  # fmt: skip
def test_passwords_in_the_address_of_a_scheduler(address):
    with pytest.raises(ClusterError, match="no scheduler at") as caught:
        _check_address(address.format(CANARY), insecure=True)
    shown = "".join(traceback.format_exception(caught.value))
    assert "***" in shown
    assert CANARY not in shown


def test_a_scheduler_here_or_behind_tls_needs_none(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.create_connection", lambda *args, **options: io.StringIO())
    for address in ("tcp://127.0.0.1:8786", "tcp://localhost:8786", "tcp://[::1]:8786"):
        _check_address(address, insecure=False)
    with pytest.raises(ClusterError, match="needs certificates"):  # and nothing but that
        _check_address("tls://192.0.2.1:8786", insecure=False)


def test_the_local_cluster_listens_on_the_loopback_interface_alone(tmp_path, make_source):
    source = make_source(conditioned(2000, 30, 10))
    arguments = [sys.executable, "-m", "dask_batchinv.cli", "run", source, tmp_path / "t", "--tile-size", "720"]
    arguments += ["--workers", "2"]
    with subprocess.Popen([*arguments, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while not (tmp_path / "t" / "ledger").exists():
            assert job.poll() is None
        processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        listening = {
            connection.laddr.ip
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        job.terminate()
    assert listening == {"127.0.0.1"}
