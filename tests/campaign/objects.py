"""Jobs from S3 to S3, on a real server, through a proxy that makes it unreliable."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from tests.campaign.s3 import environment, fault_proxy, install, swift_server
from tests.campaign.work import Row, Work, check, chunks_of

#: At most so many times the requests of a run without faults.
REQUESTS = 1.3


def objects(work: Work, folder: Path, runs: int, chance: random.Random) -> Iterator[Row]:
    """5 % of the requests get 503, 2 % are reset, and of 1 % the reply is lost after the effect."""
    row = Row("S3: 5 % of requests 503, 2 % reset, 1 % replies lost")
    with swift_server(install(folder / "swift"), folder / "server") as server:
        plain = environment(server, server.endpoint)
        # Only the campaign's own settings: no profile of whoever runs it.
        base = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
        store = fsspec.filesystem(
            "s3", endpoint_url=server.endpoint, key=server.key, secret=server.secret, skip_instance_cache=True,
            use_listings_cache=False,
        )  # fmt: skip
        store.put(str(work.source), f"{server.bucket}/source.zarr", recursive=True)
        arguments = [*work.command(Path("-"))]
        arguments[1:3] = [f"s3://{server.bucket}/source.zarr", f"s3://{server.bucket}/target.zarr"]
        with fault_proxy(server.endpoint, seed=0, p_503=0, p_reset=0, p_lost=0) as proxy:
            _run(arguments, base | plain | environment(server, proxy.endpoint))
            usual = proxy.total
        worst, faults = 0.0, 0
        for number in range(runs):
            with row.run(f"run {number}", faults=0):
                if store.exists(f"{server.bucket}/target.zarr"):
                    store.rm(f"{server.bucket}/target.zarr", recursive=True)
                with fault_proxy(server.endpoint, seed=chance.randrange(2**31)) as proxy:
                    _run(arguments, base | plain | environment(server, proxy.endpoint))
                    row.faults += sum(proxy.faults.values())
                    faults += proxy.total
                    worst = max(worst, proxy.total / usual)
                    check(proxy.total <= REQUESTS * usual, f"{proxy.total} requests, {usual} without faults")
                got = folder / "fetched.zarr"
                subprocess.run(["rm", "-rf", got], check=True)
                store.get(f"{server.bucket}/target.zarr", str(got), recursive=True)
                check(chunks_of(got) == chunks_of(work.reference), "the target has other chunks")
                check(json.loads((got / "zarr.json").read_text())["attributes"]["complete"], "it is not complete")
    row.remarks["requests, at worst, in multiples of a run without faults"] = round(worst, 2)
    yield row


def _run(arguments: list[str], variables: dict[str, str]) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "dask_batchinv.cli", *arguments, "--workers", "2"],
        capture_output=True, text=True, env=variables, timeout=300, check=False,
    )  # fmt: skip
    check(ended.returncode == 0, f"exit code {ended.returncode}: {ended.stdout[-300:]} {ended.stderr[-500:]}")
    report: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return report
