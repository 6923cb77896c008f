"""A cluster of our own: worker processes on this machine, which end with the process that asked for them.

They are started by another process, in which `main` runs. So they import nothing of the caller's script, which may be
in any state, have no ``if __name__ == "__main__":``, or come from a pipe; and it may be a process that may have no
children of its own, as those of a pool.
"""

from __future__ import annotations

import json
import logging
import multiprocessing.spawn
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

import dask.config
from distributed import Client, LocalCluster, Security

from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.outcome import ClusterError

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
_ANSWER = b"the cluster: "
_CODE = "from dask_batchinv.job.driver.own_cluster import main; main()"


@contextmanager
def own_cluster(options: ClusterOptions, wanted: Workers) -> Iterator[Client]:
    """Yield a client of processes of which no other user of this machine can take part, or ask anything.

    Anyone here may connect to the loopback interface, and who takes part in a cluster can run code as its owner. So
    all of it speaks TLS, with a certificate that is made for this run and never written down.

    Raises
    ------
    ClusterError
        If they do not start.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path and type(path) is str)}
    # -P: not the modules that lie in the working directory.
    command = [os.fsdecode(multiprocessing.spawn.get_executable()), "-P", "-c", _CODE]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    except OSError as error:
        raise ClusterError(f"no process can be started on this machine: {error}") from error
    try:
        found = _begin(process, {
            "workers": wanted.count, "threads": wanted.threads, "memory": wanted.memory or 0,
            "dashboard": options.dashboard, "config": _plain(dask.config.config),
        })  # fmt: skip
        security = Security(require_encryption=True, **found["security"])
        with Client(found["address"], security=security, set_as_default=False) as client:
            yield client
    finally:
        _end(process)


def _plain(config: Any) -> Any:
    """Return what of a configuration can be told to another process: no callables, and the like."""
    if isinstance(config, Mapping):
        return {str(name): _plain(value) for name, value in config.items() if not callable(value)}
    if isinstance(config, (list, tuple)):
        return [_plain(value) for value in config]
    return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)


def _begin(process: subprocess.Popen[bytes], wanted: dict[str, Any]) -> dict[str, Any]:
    """Say what is wanted, and return the answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(wanted).encode() + b"\n")
        process.stdin.flush()
        deadline = time.monotonic() + START_SECONDS + START_SECONDS_PER_WORKER * wanted["workers"]
        while _is_readable(process.stdout, max(0.0, deadline - time.monotonic())):
            line = process.stdout.readline()
            if not line or line.startswith(_ANSWER):  # what is imported may have something to say, too
                found: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
                return found
        raise TimeoutError("they take too long")
    except (OSError, ValueError) as error:
        raise ClusterError(
            "no worker processes could be started on this machine; what they said is above. Use a running cluster "
            "(--scheduler), or raise batchinv.job.in-process so that the job runs in this process"
        ) from error


def _is_readable(stream: IO[Any], seconds: float) -> bool:
    # Not by `select`, which knows no descriptor above 1023.
    poll = select.poll()
    poll.register(stream, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(1000 * seconds))


def _end(process: subprocess.Popen[bytes]) -> None:
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


def main() -> None:
    """Start what is asked for on the standard input, and keep it until that is closed."""
    # A terminal sends Ctrl-C to the whole process group, but it is for the driver to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = os.getppid()
    wanted = json.loads(sys.stdin.buffer.readline())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what workers print is no answer
    dask.config.update(dask.config.config, wanted["config"])
    security = Security.temporary()
    dashboard = wanted["dashboard"]
    with dask.config.set({} if dashboard is not None else UNWATCHED), LocalCluster(
        n_workers=wanted["workers"],
        threads_per_worker=wanted["threads"],
        memory_limit=wanted["memory"],
        processes=True,
        host="127.0.0.1",
        security=security,
        dashboard_address=f"127.0.0.1:{dashboard or 0}",
        # The driver counts what died with a worker, and tries it alone; Dask would blame bystanders too.
        scheduler_kwargs={"dashboard": dashboard is not None, "allowed_failures": 0},
        silence_logs=logging.ERROR,
        preload=["dask_batchinv.job.worker.setup"],
    ) as cluster:  # fmt: skip
        client = security.get_tls_config_for_role("client")
        names = {"ca_file": "tls_ca_file", "cert": "tls_client_cert", "key": "tls_client_key"}
        answer = {
            "address": cluster.scheduler_address,
            "security": {theirs: client[name] for name, theirs in names.items()},
        }
        print(f"{_ANSWER.decode()}{json.dumps(answer)}", file=answers, flush=True)
        # Nothing is said any more: it is closed when the driver ends, however, unless a fork of that has it too.
        while os.getppid() == driver and not _is_readable(sys.stdin, 1.0):
            if len(cluster.scheduler.workers) < wanted["workers"]:  # one may have died while it started
                cluster.scale(wanted["workers"])
