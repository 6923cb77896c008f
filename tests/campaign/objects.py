"""Jobs from S3 to S3, on a real server, through a proxy that makes it unreliable."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from tests.campaign.s3 import Server, environment, fault_proxy, install, swift_server
from tests.campaign.work import Row, Work, check, chunks_of

#: At most so many times the requests of a run without faults.
REQUESTS = 1.3


@contextmanager
def _stores(work: Work, folder: Path) -> Iterator[tuple[Server, Any, list[str], dict[str, str]]]:
    """Yield a server with the source in it, its file system, a command, and the environment of those who run it."""
    with swift_server(install(folder / "swift"), folder / "server") as server:
        # Only the campaign's own settings: no profile of whoever runs it.
        base = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
        store = fsspec.filesystem(
            "s3", endpoint_url=server.endpoint, key=server.key, secret=server.secret, skip_instance_cache=True,
            use_listings_cache=False,
        )  # fmt: skip
        _remove(server, store, "source.zarr")  # of another part, in the same folder
        store.put(str(work.source), f"{server.bucket}/source.zarr", recursive=True)
        arguments = [*work.command(Path("-"))]
        arguments[1:3] = [f"s3://{server.bucket}/source.zarr", f"s3://{server.bucket}/target.zarr"]
        yield server, store, arguments, base | environment(server, server.endpoint)


def _check_target(server: Server, store: Any, folder: Path, work: Work) -> None:
    got = folder / "fetched.zarr"
    subprocess.run(["rm", "-rf", got], check=True)
    store.get(f"{server.bucket}/target.zarr", str(got), recursive=True)
    check(chunks_of(got) == chunks_of(work.reference), "the target has other chunks")
    check(_is_complete(server, store), "it is not complete")


def _is_complete(server: Server, store: Any) -> bool:
    return bool(json.loads(store.cat_file(f"{server.bucket}/target.zarr/zarr.json"))["attributes"]["complete"])


def _remove(server: Server, store: Any, name: str = "target.zarr") -> None:
    if store.exists(f"{server.bucket}/{name}"):
        store.rm(f"{server.bucket}/{name}", recursive=True)


def objects(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """5 % of the requests get 503, 2 % are reset, and of 1 % the reply is lost after the effect."""
    row = Row("S3: 5 % of requests 503, 2 % reset, 1 % replies lost")
    with _stores(work, folder) as (server, store, arguments, variables):
        with fault_proxy(server.endpoint, seed=0, p_503=0, p_reset=0, p_lost=0) as proxy:
            _run(arguments, variables | environment(server, proxy.endpoint))
            usual = proxy.total
        worst = 0.0
        for number in range(runs):
            with row.run(f"run {number}", faults=0):
                _remove(server, store)
                with fault_proxy(server.endpoint, seed=chance.randrange(2**31)) as proxy:
                    _run(arguments, variables | environment(server, proxy.endpoint))
                    row.faults += sum(proxy.faults.values())
                    worst = max(worst, proxy.total / usual)
                    check(proxy.total <= REQUESTS * usual, f"{proxy.total} requests, {usual} without faults")
                _check_target(server, store, folder, work)
    row.remarks["requests, at worst, in multiples of a run without faults"] = round(worst, 2)
    yield row


def zombies(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """A driver is stopped for longer than its lease lasts; another run takes the target over, or makes it anew."""
    row = Row("S3: a driver sleeps while its target is taken over or made anew (SIGSTOP, SIGCONT)")
    with _stores(work, folder) as (server, store, arguments, variables):
        command = [sys.executable, "-m", "dask_batchinv.cli", *arguments, "--workers", "1"]
        late = 0
        for number in range(runs):
            with row.run(f"run {number}"):
                _remove(server, store)
                with subprocess.Popen(
                    command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
                ) as sleeper:
                    try:
                        while not store.exists(f"{server.bucket}/target.zarr/zarr.json") and sleeper.poll() is None:
                            time.sleep(0.05)
                        time.sleep(chance.uniform(0.0, 6.0))
                        os.killpg(sleeper.pid, signal.SIGSTOP)
                        if number % 2:
                            time.sleep(1.0)  # what it had sent must have come
                            _remove(server, store)
                        _run(arguments, variables)
                        os.killpg(sleeper.pid, signal.SIGCONT)
                        sleeper.communicate(timeout=120)
                    finally:
                        with suppress(ProcessLookupError):
                            os.killpg(sleeper.pid, signal.SIGKILL)
                check(sleeper.returncode in (0, 1, 2), f"the sleeper ended with {sleeper.returncode}")
                # The server has no conditional writes: of a request that was on its way when the driver was stopped the
                # rest arrives, and says what was true before. The same command puts that right.
                was_complete = _is_complete(server, store)
                was_left = _run(arguments, variables)["tiles_now"]
                late += not was_complete or was_left > 0
                check(was_left == 0 or _run(arguments, variables)["tiles_now"] == 0, "something was left to do")
                _check_target(server, store, folder, work)
    row.remarks["runs in which the rest of a request that was on its way had to be put right"] = late
    yield row


def _run(arguments: list[str], variables: dict[str, str]) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "dask_batchinv.cli", *arguments, "--workers", "2"],
        capture_output=True, text=True, env=variables, timeout=300, check=False,
    )  # fmt: skip
    check(ended.returncode == 0, f"exit code {ended.returncode}: {ended.stdout[-300:]} {ended.stderr[-500:]}")
    report: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return report
