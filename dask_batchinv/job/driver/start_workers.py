"""Run as a script by `own_cluster`: starts worker processes, and ends with whoever asked for them.

It imports Dask alone, for what it imports its caller waits for.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import IO, Any

#: How the line begins that says where the cluster is: what is imported may have something to say, too.
ANSWER = "the cluster: "


def is_readable(stream: IO[Any], seconds: float) -> bool:
    """Wait until there is something to read, or the end; return whether there is."""
    # Not by `select`, which knows no descriptor above 1023.
    poll = select.poll()
    poll.register(stream, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(1000 * seconds))


def main() -> None:
    """Start what is asked for on the standard input, and keep it until that is closed."""
    # A terminal sends Ctrl-C to the whole process group, but it is for the driver to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = os.getppid()
    import dask.config
    from distributed import LocalCluster, Security  # before anybody says what is wanted

    if not (line := sys.stdin.buffer.readline()):  # the driver has ended already
        return
    wanted = json.loads(line)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what workers print is no answer
    dask.config.update(dask.config.config, wanted["config"])
    dask.config.set(wanted["settings"])
    security = Security.temporary()
    with LocalCluster(security=security, **wanted["cluster"]) as cluster:
        client = security.get_tls_config_for_role("client")
        names = {"ca_file": "tls_ca_file", "cert": "tls_client_cert", "key": "tls_client_key"}
        answer = {
            "address": cluster.scheduler_address,
            "security": {theirs: client[name] for name, theirs in names.items()},
        }
        print(f"{ANSWER}{json.dumps(answer)}", file=answers, flush=True)
        # Nothing is said any more: it is closed when the driver ends, however, unless a fork of that has it too.
        while os.getppid() == driver and not is_readable(sys.stdin, 1.0):
            if len(cluster.scheduler.workers) < len(cluster.worker_spec):  # one may have died while it started
                cluster.scale(len(cluster.worker_spec))


if __name__ == "__main__":
    main()
