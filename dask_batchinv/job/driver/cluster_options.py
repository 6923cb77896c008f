"""Which workers a job may use, as the user says; and what those of this machine would have."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import dask.config
from dask.system import CPU_COUNT
from dask.utils import parse_bytes, parse_timedelta

from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.kernels.device import DeviceError, parse_device, why_unusable
from dask_batchinv.outcome import ClusterError, RefusedError
from dask_batchinv.shown import counted
from dask_batchinv.stack import Device, parse_flag, shown

#: Threads of a local worker with a GPU: enough that reading and writing go on meanwhile.
GPU_THREADS = 4


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster to use."""

    client: Any = None
    """A `distributed.Client` to use."""
    scheduler: str | None = None
    """Address of a scheduler to connect to."""
    scheduler_file: str | os.PathLike[str] | None = None
    """A file to which a scheduler has written its address."""
    wait_for_workers: int | None = None
    """How many workers of a running cluster to wait for; by default one."""
    wait: str | float | None = None
    """How long, and for the scheduler's file, such as "2h" or in seconds; by default half a minute."""
    only_workers: Sequence[str] = ()
    """Which of its workers to use: patterns of names or addresses, or ``resource:NAME``; by default all."""
    workers: int | None = None
    """Processes of the local cluster; by default one per core."""
    threads_per_worker: int | None = None
    """Their threads; by default one."""
    memory_limit: str | int | None = None
    """Memory of each of them, such as "4GiB", 0 for no limit; by default a fair share of the machine."""
    dashboard: int | None = None
    """Port of this machine on which to serve Dask's dashboard; by default there is none."""
    insecure: bool = False
    """Allow a scheduler on another machine that is not reached by TLS."""
    restart_stalled: bool = False
    """Restart workers that give no result even if they are not ours."""
    device: Device = "cpu"
    """Where the job computes: the local cluster has one process for a GPU."""

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.client is not None and not hasattr(self.client, "asynchronous"):
            way_out = "scheduler=" if isinstance(self.client, str) else "Client(...) of it"
            kind = type(self.client).__name__
            raise ClusterError(f"client takes a distributed.Client, got a {kind}: pass {way_out}")
        if not all(pattern.removeprefix("resource:") for pattern in self.only_workers):
            raise ClusterError("only_workers has a pattern that is empty: nothing matches that")
        clusters = (self.client, self.scheduler, self.scheduler_file)
        if sum(cluster is not None for cluster in clusters) > 1:
            raise ClusterError("pass a client, the address of a scheduler or its file, not several of them")
        if self._given and not self.is_local:
            raise ClusterError(
                f"{_options(self._given)}: only for the local cluster; a running one has its own workers"
            )
        try:
            parse_bytes(self.memory_limit or 0)
        except (ValueError, OverflowError, TypeError, AttributeError) as error:
            text = f"`memory_limit=` {self.memory_limit!r} is not a number of bytes such as 4GiB"
            raise ClusterError(text) from error
        try:
            parse_timedelta(self.wait)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RefusedError(f"{self.wait!r} is not a time such as 2h") from error

    def _check_kinds(self) -> None:
        """Raise ClusterError where something is not of the type that it should be, or of no use as a number."""
        try:
            for flag in ("insecure", "restart_stalled"):
                object.__setattr__(self, flag, parse_flag(flag, getattr(self, flag)))
        except ValueError as error:
            raise ClusterError(str(error)) from error
        for name, least in (("workers", 1), ("threads_per_worker", 1), ("wait_for_workers", 1), ("dashboard", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
                raise ClusterError(f"{name} must be a whole number from {least} on, got {shown(value)}")
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ClusterError(f"scheduler takes an address such as 'tls://host:8786', got {shown(self.scheduler)}")
        if self.scheduler_file is not None and not isinstance(self.scheduler_file, (str, os.PathLike)):
            raise ClusterError(f"scheduler_file takes the path of a file, got {shown(self.scheduler_file)}")
        only = self.only_workers
        if isinstance(only, str) or not isinstance(only, Sequence) or not all(isinstance(each, str) for each in only):
            raise ClusterError(f"only_workers takes a list of patterns, such as ['gpu-*'], got {shown(only)}")

    @property
    def is_local(self) -> bool:
        """Whether we start the cluster ourselves."""
        return self.client is None and self.scheduler is None and self.scheduler_file is None

    @property
    def is_open(self) -> bool:
        """Whether the user says nothing of it, so that there need not be one."""
        return self.is_local and not self._given

    def where(self, client: Any) -> str:
        """Return in words where a job of these options runs."""
        return "worker processes of its own" if self.is_local else f"workers of {client.scheduler.address}"

    def resolved(self, *, is_here: bool = False) -> ClusterOptions:
        """Return these options with the cluster that the user has in use, where they say nothing of one.

        As everything in Dask does: the active client, inside a task that of its worker, or the scheduler of the
        configuration (``scheduler-address``, ``DASK_SCHEDULER_ADDRESS``). What `is_here`, in the memory of this
        process, only workers in it can reach.

        Raises
        ------
        ClusterError
            If they say something of a running cluster, and there is none.
        """
        found = self
        client = _active_client() if self.is_open else None
        if client is not None and (not is_here or client.scheduler.address.startswith("inproc://")):
            found = replace(self, client=client)
        elif self.is_open and not is_here and (address := dask.config.get("scheduler-address", None)):
            found = replace(self, scheduler=address)
        running = ("wait_for_workers", "wait", "only_workers")
        if found.is_local and (given := [name for name in running if getattr(self, name)]):
            raise ClusterError(f"{_options(given)}: only for a running cluster, and none was named, nor is one active")
        return found

    @property
    def _given(self) -> list[str]:
        own = ("workers", "threads_per_worker", "memory_limit", "dashboard")
        return [name for name in own if getattr(self, name) is not None]


def _options(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}=`" for name in names)


def _active_client() -> Any:
    """Return the client that Dask would use, if there is one."""
    if "distributed" not in sys.modules:  # then nobody has made one
        return None
    from distributed import get_client

    try:
        client = get_client()
    except ValueError:
        return None
    # One that is closed, or of whoever waits for nothing, is of no use here.
    return client if client.status == "running" and not client.asynchronous else None


def own_task() -> str | None:
    """Return the key of the Dask task that this thread is doing, if it is doing one."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return str(get_worker().get_current_task())
    except (ValueError, AttributeError, KeyError):  # another thread may have inherited what it is found by
        return None


def local_workers(options: ClusterOptions) -> Workers:
    """Return what the local cluster would have, without starting it."""
    from distributed.system import MEMORY_LIMIT  # not before it is needed: it takes a third of a second

    gpus = local_gpus(options.device)
    if gpus:
        count, threads = options.workers or 1, options.threads_per_worker or min(GPU_THREADS, CPU_COUNT)
    else:
        count = options.workers or max(1, CPU_COUNT // (options.threads_per_worker or 1))
        threads = options.threads_per_worker or 1
    if options.memory_limit is None:
        return Workers(count, threads, MEMORY_LIMIT // count, gpus)
    return Workers(count, threads, int(parse_bytes(options.memory_limit)) or None, gpus)


def local_gpus(device: Device) -> int:
    """Return 1 if this machine has a GPU that a job may use, else 0; DeviceError as `usable_gpus`."""
    return usable_gpus(device, lambda: {"this machine": why_unusable()})


def usable_gpus(device: Device, ask: Callable[[], dict[str, str | None]]) -> int:
    """Return how many of those that are asked have a GPU that a job may use; they say why not, or None.

    Raises
    ------
    DeviceError
        With ``device="gpu"``, if one has none.
    """
    device = parse_device(device)
    if device == "cpu":
        return 0
    found = ask()
    without = {address: reason for address, reason in found.items() if reason is not None}
    if device == "gpu" and without:
        address, reason = next(iter(without.items()))
        some = f"{len(without)} of {counted(len(found), 'worker')}"
        raise DeviceError(f'device="gpu", but {some} without one, first {address}: {reason}')
    return len(found) - len(without)
