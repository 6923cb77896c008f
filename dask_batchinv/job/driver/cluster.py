"""The Dask cluster of a job: a local one by default, or one that is there already."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask.config
from distributed import Client, LocalCluster, Security
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.registry import backends

from dask_batchinv.job.driver.cluster_options import ClusterOptions, local_workers, usable_gpus
from dask_batchinv.job.driver.roster import ask_workers, is_silent
from dask_batchinv.job.events import WorkerEvent
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.versions import versions
from dask_batchinv.job.worker.introduction import Introduction, introduce
from dask_batchinv.kernels.device import why_unusable
from dask_batchinv.location import Location
from dask_batchinv.outcome import ClusterError
from dask_batchinv.stack import Device
from dask_batchinv.text import harmless, remember_url

#: Ways to reach a scheduler that nobody else can listen to or take part in.
_TRUSTED = ("tls", "wss", "inproc")
#: For a cluster of our own that has no dashboard: the HTTP server, which there always is, gets nothing to say; and what
#: Dask gathers for the dashboard a hundred times a second takes 0.10 of the 0.14 cores that two idle workers take.
UNWATCHED: dict[str, Any] = {
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
}
CONNECT_SECONDS = 5
WORKER_SECONDS = 30


@contextmanager
def connect(options: ClusterOptions) -> Iterator[tuple[Client, Workers]]:
    """Yield a client and what its workers have.

    Raises
    ------
    ClusterError
        If the scheduler cannot be reached within seconds, or has no workers.
    """
    if options.client is not None:
        if options.client.asynchronous:
            raise ClusterError("this client is asynchronous, but the call waits for the job: pass Client(...) without "
                               "asynchronous=True, or make the call in another thread with one")  # fmt: skip
        yield options.client, _workers_of(options.client)
    elif options.scheduler is not None:
        _check_address(options.scheduler, insecure=options.insecure)
        try:
            client = Client(options.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"no scheduler at {options.scheduler}: {error}") from harmless(error)
        with client:
            yield client, _workers_of(client)
    else:
        wanted = local_workers(options)
        with _own_cluster(options, wanted) as cluster, Client(cluster, set_as_default=False) as client:
            yield client, wanted


@contextmanager
def _own_cluster(options: ClusterOptions, wanted: Workers) -> Iterator[LocalCluster]:
    """Start processes on this machine of which no other user of it can take part, or ask anything.

    Anyone here may connect to the loopback interface, and who takes part in a cluster can run code as its owner. So
    all of it speaks TLS, with a certificate that is made for this run and never written down.
    """
    with dask.config.set({} if options.dashboard is not None else UNWATCHED), LocalCluster(
        n_workers=wanted.count,
        threads_per_worker=wanted.threads,
        memory_limit=wanted.memory or 0,
        processes=True,
        host="127.0.0.1",
        security=Security.temporary(),
        dashboard_address=f"127.0.0.1:{options.dashboard or 0}",
        # The driver counts what died with a worker, and tries it alone; Dask would blame bystanders too.
        scheduler_kwargs={"dashboard": options.dashboard is not None, "allowed_failures": 0},
        silence_logs=logging.ERROR,
        preload=["dask_batchinv.job.worker.setup"],
    ) as cluster:  # fmt: skip
        yield cluster


def _check_address(address: str, *, insecure: bool) -> None:
    """Raise ClusterError if nobody listens there: a Client would be slow to give up, and loud."""
    remember_url(address if "://" in address else f"tcp://{address}")
    try:
        scheme, location = parse_address(address)
        if scheme == "inproc":
            raise ValueError("inproc:// leads nowhere from another process")
        if scheme not in backends:
            raise ValueError(f"expected one of {', '.join(sorted(backends))} before ://, got {scheme}")
        if scheme == "tls" and Security().get_connection_args("client")["ssl_context"] is None:
            raise ClusterError(
                f"{address} needs certificates: set distributed.comm.tls.ca-file, .client.key and .client.cert in the "
                "Dask configuration"
            )
        if scheme not in _TRUSTED and not insecure and not _is_loopback(location):
            raise ClusterError(
                f"{address} is on another machine and not encrypted: whoever reaches it can run code as you, and read "
                "what passes. Use tls://, or pass --insecure if that network is yours alone"
            )
        if scheme in ("tcp", "tls"):
            socket.create_connection(parse_host_port(location), timeout=CONNECT_SECONDS).close()
    except ClusterError:
        raise
    except (OSError, ValueError) as error:
        raise ClusterError(f"no scheduler at {address}: {error}") from harmless(error)


def _is_loopback(location: str) -> bool:
    host, port = parse_host_port(location, 0)
    return all(
        ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
        for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )


def _known_workers(client: Client) -> dict[str, Any]:
    """Return what the scheduler knows of its workers, by address.

    Not by `Client.scheduler_info`: now and then a background task of the client puts an answer without workers in place
    of the one that it waited for.
    """
    workers: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    return workers


def _workers_of(client: Client) -> Workers:
    deadline = time.monotonic() + WORKER_SECONDS
    while not (known := _known_workers(client).values()):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the scheduler has had no workers for {WORKER_SECONDS} s: start some with `dask worker`"
            )
        time.sleep(0.2)
    limits = [worker["memory_limit"] for worker in known if worker["memory_limit"]]
    return Workers(len(known), max(worker["nthreads"] for worker in known), min(limits) if limits else None)


def meet_workers(
    client: Client, source: Source | None, target: Location, *, writes: bool = True
) -> tuple[Introduction, list[WorkerEvent]]:
    """Return what workers must find to get tiles, and which of those that are here did not answer.

    The latter are passed over: they may yet introduce themselves, as do those that join later.

    Raises
    ------
    ClusterError
        If a worker is of no use, or none answers.
    """
    for location in (target, *([source.location] if source else [])):
        if location.is_memory and set(client.run(os.getpid).values()) != {os.getpid()}:
            raise ClusterError(
                f"{location.name} lives in the memory of this process, where worker processes cannot reach it: "
                "use a path or a shared store, or a Client with processes=False"
            )
    introduction = Introduction(versions(), source and source.for_workers(), target, writes=writes)
    heard, silent = _ask_all(client, introduce, introduction)
    if unable := {address: why for address, answer in heard.items() if (why := introduction.why_useless(answer))}:
        address, why = next(iter(unable.items()))
        raise ClusterError(
            f"{len(unable)} worker(s) are of no use, first {address}: {why}. Install the same versions there, and have "
            "source and target on a disk or an object store that all workers share"
        )
    return introduction, [WorkerEvent("silent", address, "it was passed over") for address in silent]


def _ask_all(client: Client, function: Any, *arguments: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what a function returns on those workers that answer, and who does not; ClusterError if none does."""
    addresses = list(_known_workers(client))
    answers = client.sync(ask_workers, client, addresses, function, *arguments)
    heard = {address: answer for address, answer in answers.items() if not is_silent(answer)}
    if not heard:
        raise ClusterError(f"none of {len(addresses)} worker(s) answers: they may be frozen, or about to end")
    return heard, [address for address in addresses if address not in heard]


def count_gpus(device: Device, client: Client) -> int:
    """Return how many workers have a GPU that a job may use; DeviceError as `usable_gpus`."""
    return usable_gpus(device, lambda: _ask_all(client, why_unusable)[0])
