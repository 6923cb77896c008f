"""A cluster of our own: worker processes on this machine, which end with the process that asked for them.

They are started by another process, that of `start_workers`. So they import nothing of the caller's script, which may
be in any state, have no ``if __name__ == "__main__":``, or come from a pipe; and it may be a process that may have no
children of its own, as those of a pool.
"""

from __future__ import annotations

import json
import logging
import multiprocessing.spawn
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import dask.config

from dask_batchinv.job.driver import start_workers
from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.driver.start_workers import ANSWER, is_readable
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.outcome import ClusterError

if TYPE_CHECKING:  # to import Dask's cluster takes a second
    from distributed import Client

Helper = subprocess.Popen[bytes]
#: For a cluster of our own that has no dashboard: the HTTP server, which there always is, gets nothing to say; and what
#: Dask gathers for the dashboard a hundred times a second takes 0.10 of the 0.14 cores that two idle workers take.
UNWATCHED: dict[str, Any] = {
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
}
#: How long the workers may take to start, and to end.
START_SECONDS, START_SECONDS_PER_WORKER, END_SECONDS = 120.0, 5.0, 10.0


@contextmanager
def launched() -> Iterator[Helper]:
    """Yield the process that will start workers; it ends with this, and they with it.

    Early, it does what takes longest, to import Dask's cluster, while its caller does the same.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path and type(path) is str)}
    # -P: not the modules that lie in the working directory.
    command = [os.fsdecode(multiprocessing.spawn.get_executable()), "-P", start_workers.__file__]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    except OSError as error:
        raise ClusterError(f"no process can be started on this machine: {error}") from error
    try:
        yield process
    finally:
        _end(process)


@contextmanager
def own_cluster(helper: Helper, options: ClusterOptions, wanted: Workers) -> Iterator[Client]:
    """Yield a client of processes of which no other user of this machine can take part, or ask anything.

    Anyone here may connect to the loopback interface, and who takes part in a cluster can run code as its owner. So
    all of it speaks TLS, with a certificate that is made for this run and never written down.

    Raises
    ------
    ClusterError
        If they do not start.
    """
    from distributed import Client, Security

    watched = options.dashboard is not None
    found = _begin(helper, {
        "config": _plain(dask.config.config),
        "settings": {} if watched else UNWATCHED,
        "cluster": {
            "n_workers": wanted.count,
            "threads_per_worker": wanted.threads,
            "memory_limit": wanted.memory or 0,
            "processes": True,
            "host": "127.0.0.1",
            "dashboard_address": f"127.0.0.1:{options.dashboard or 0}",
            # The driver counts what died with a worker, and tries it alone; Dask would blame bystanders too.
            "scheduler_kwargs": {"dashboard": watched, "allowed_failures": 0},
            "silence_logs": logging.CRITICAL,
            "preload": ["dask_batchinv.job.worker.setup"],
        },
    })  # fmt: skip
    security = Security(require_encryption=True, **found["security"])
    with Client(found["address"], security=security, set_as_default=False) as client:
        yield client


def _plain(config: Any) -> Any:
    """Return what of a configuration can be told to another process: no callables, and the like."""
    if isinstance(config, Mapping):
        return {str(name): _plain(value) for name, value in config.items() if not callable(value)}
    if isinstance(config, (list, tuple)):
        return [_plain(value) for value in config]
    return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)


def _begin(process: Helper, wanted: dict[str, Any]) -> dict[str, Any]:
    """Say what is wanted, and return the answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(wanted).encode() + b"\n")
        process.stdin.flush()
        deadline = time.monotonic() + START_SECONDS + START_SECONDS_PER_WORKER * wanted["cluster"]["n_workers"]
        while is_readable(process.stdout, max(0.0, deadline - time.monotonic())):
            line = process.stdout.readline()
            if not line or line.startswith(ANSWER.encode()):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER.encode()))
                return found
        raise TimeoutError("they take too long")
    except (OSError, ValueError) as error:
        raise ClusterError(
            "no worker processes could be started on this machine; what they said is above. Use a running cluster "
            "(`scheduler=`), or raise batchinv.job.in-process so that the job runs in this process"
        ) from error


def _end(process: Helper) -> None:
    """Let go of the process, which ends it and its workers."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):  # what could not be written
        process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
