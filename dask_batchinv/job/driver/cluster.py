"""The Dask cluster of a job: a local one by default, or one that is there already."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from dask.utils import parse_timedelta
from distributed import Client, Security, secede
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.registry import backends

from dask_batchinv.job.driver.cluster_options import ClusterOptions, local_workers, own_task, usable_gpus
from dask_batchinv.job.driver.demand import Demand
from dask_batchinv.job.driver.own_cluster import Helper, launched, own_cluster
from dask_batchinv.job.driver.roster import ask_workers, is_silent, known_workers
from dask_batchinv.job.events import WorkerEvent
from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.job.source.source import Source
from dask_batchinv.job.versions import versions
from dask_batchinv.job.worker.introduction import Introduction, introduce
from dask_batchinv.kernels.device import why_unusable
from dask_batchinv.location import Location, json_object
from dask_batchinv.outcome import ClusterError
from dask_batchinv.shown import counted
from dask_batchinv.stack import Device
from dask_batchinv.text import clean, harmless, remember_url

#: Ways to reach a scheduler that nobody else can listen to or take part in.
_TRUSTED = ("tls", "wss", "inproc")
CONNECT_SECONDS = 5
#: So many workers are named in an error.
_NAMED = 10
WORKER_SECONDS = 30
#: An adaptive cluster takes a task that it does not know for half a second's, and by default wants a core for each five
#: seconds of them: where it is set otherwise, more are needed.
TASKS_FOR_A_CORE, DOUBLING_SECONDS, MOST_WAITING_FOR_WORKERS = 10, 10, 10_000
#: No file with the address of a scheduler is longer.
SCHEDULER_FILE_NBYTES = 2**24


@contextmanager
def connect(options: ClusterOptions, helper: Helper | None = None) -> Iterator[tuple[Client, list[Workers]]]:
    """Yield a client and what its workers have, those together that have the same.

    With a `helper` that was launched before, which starts workers of our own.

    Raises
    ------
    ClusterError
        If the scheduler cannot be reached within seconds, or has no workers.
    """
    if options.client is not None:
        if options.client.asynchronous:
            raise ClusterError("this client is asynchronous, but the call waits for the job: pass Client(...) without "
                               "asynchronous=True, or make the call in another thread with one")  # fmt: skip
        with _seceded(), Demand(options.client, "tiles") as demand:
            yield options.client, _workers_of(options.client, options, demand)
    elif not options.is_local:
        address = options.scheduler or _address_in(options.scheduler_file, _wait_of(options))
        _check_address(address, insecure=options.insecure)
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"no scheduler at {address}: {error}") from harmless(error)
        with client, _seceded(), Demand(client, "tiles") as demand:
            yield client, _workers_of(client, options, demand)
    else:
        wanted = local_workers(options)
        with nullcontext(helper) if helper else launched() as process, own_cluster(process, options, wanted) as client:
            yield client, [wanted]


@contextmanager
def _seceded() -> Iterator[None]:
    """Where this is a task itself, let its worker take another one meanwhile: it might be all there is.

    The thread does not go back: it would wait for one of others to end, and Dask has put another in its place.
    """
    if own_task() is not None:
        with suppress(KeyError, AttributeError):  # it has seceded already, or its threads are not Dask's
            secede()
    yield


def _address_in(file: str | os.PathLike[str] | None, seconds: float) -> str:
    """Return the address that a scheduler has written to a file; wait for one that was started just now."""
    start = time.monotonic()
    while True:
        try:
            with open(os.fspath(file or ""), "rb") as stream:
                found = json_object(stream.read(SCHEDULER_FILE_NBYTES), f"the scheduler file {file}")
            return str(found["address"])
        except (OSError, ValueError, KeyError) as error:
            if time.monotonic() - start > seconds:
                text = f"no address of a scheduler in {file}: {type(error).__name__}: {error}"
                raise ClusterError(clean(text)) from harmless(error)
        time.sleep(0.2)


def _wait_of(options: ClusterOptions) -> float:
    """Return how many seconds to wait for a running cluster."""
    return WORKER_SECONDS if options.wait is None else float(parse_timedelta(options.wait))


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
                "what passes. Use tls://, or pass `insecure=True` if that network is yours alone"
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


def _workers_of(client: Client, options: ClusterOptions, demand: Demand) -> list[Workers]:
    """Wait for workers, and return what they have: those together that have the same.

    A cluster that grows with what there is to do is shown that there will be something, ever more while too few come.
    What is shown of it last keeps a worker there until the job begins.
    """
    wanted = options.wait_for_workers or 1
    seconds = _wait_of(options)
    start, only = time.monotonic(), options.only_workers
    while len(known := known_workers(client, only)) < wanted:
        waited = time.monotonic() - start
        if waited > seconds:
            which = f" that are {' or '.join(map(repr, only))}" if only else ""
            raise ClusterError(
                f"the scheduler has {len(known)} of {counted(wanted, 'worker')}{which} after {seconds:.0f} s: start "
                f"some with `dask worker`, or wait longer for them (`wait=`){_others(client) if only else ''}"
            )
        threads = max((worker["nthreads"] for worker in known.values()), default=1)
        tasks = TASKS_FOR_A_CORE * threads * wanted << int(waited // DOUBLING_SECONDS)
        demand.ask_for(tasks, MOST_WAITING_FOR_WORKERS)
        time.sleep(0.2)
    demand.ask_for(1)
    kinds = Counter((worker["nthreads"], worker["memory_limit"] or None) for worker in known.values())
    return [Workers(count, threads, memory, are_ours=False) for (threads, memory), count in kinds.items()]


def _others(client: Client) -> str:
    """Return which workers there are that were not asked for, to find a slip of the pen by."""
    known = known_workers(client).values()
    names = sorted(str(worker["name"]) for worker in known)
    resources = sorted({f"resource:{name}" for worker in known for name in worker.get("resources") or ()})
    return f". There are: {', '.join([*names[:_NAMED], *resources[:_NAMED]]) or 'none'}"


def meet_workers(
    client: Client, source: Source | None, target: Location, only: Sequence[str] = (), *, writes: bool = True
) -> tuple[Introduction, list[WorkerEvent]]:
    """Return what workers must find to get tiles, and which of those that are here did not answer.

    The latter are passed over: they may yet introduce themselves, as do those that join later. Those that are of no use
    get no tiles, and the report names them.

    Raises
    ------
    ClusterError
        If no worker is of use, or none answers.
    """
    if source is not None and source.is_lazy:  # workers get it with their tiles
        source = None
    for location in (target, *([source.location] if source else [])):
        if location.is_memory and set(_ask_all(client, only, os.getpid)[0].values()) != {os.getpid()}:
            raise ClusterError(
                f"{location.name} lives in the memory of this process, where worker processes cannot reach it: "
                "use a path or a shared store, or a Client with processes=False"
            )
    introduction = Introduction(versions(), source and source.for_workers(), target, writes=writes)
    heard, silent = _ask_all(client, only, introduce, introduction)
    unable = {address: why for address, answer in heard.items() if (why := introduction.why_useless(answer))}
    if len(unable) == len(heard):
        address, why = next(iter(unable.items()))
        raise ClusterError(
            f"{counted(len(unable), 'worker')} of no use, first {address}: {why}. Install the same versions there, and "
            "have source and target on a disk or an object store that all workers share"
        )
    return introduction, [WorkerEvent("silent", address, "it was passed over") for address in silent]


def _ask_all(client: Client, only: Sequence[str], function: Any, *arguments: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what a function returns on those workers that answer, and who does not; ClusterError if none does."""
    addresses = list(known_workers(client, only))
    answers = client.sync(ask_workers, client, addresses, function, *arguments)
    heard = {address: answer for address, answer in answers.items() if not is_silent(answer)}
    if not heard:
        raise ClusterError(f"none of {counted(len(addresses), 'worker')} answers: they may be frozen, or about to end")
    return heard, [address for address in addresses if address not in heard]


def count_gpus(device: Device, client: Client, only: Sequence[str] = ()) -> int:
    """Return how many workers have a GPU that a job may use; DeviceError as `usable_gpus`."""
    return usable_gpus(device, lambda: _ask_all(client, only, why_unusable)[0])
