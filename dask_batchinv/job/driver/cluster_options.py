"""Which workers a job may use, as the user says; and what those of this machine would have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dask.system import CPU_COUNT
from dask.utils import parse_bytes

from dask_batchinv.job.plan.plan import Workers
from dask_batchinv.kernels.device import DeviceError, parse_device, why_unusable
from dask_batchinv.outcome import ClusterError
from dask_batchinv.stack import Device

#: Threads of a local worker with a GPU: enough that reading and writing go on meanwhile.
GPU_THREADS = 4


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster to use."""

    client: Any = None
    """A `distributed.Client` to use."""
    scheduler: str | None = None
    """Address of a scheduler to connect to."""
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
        given = [name.replace("_", "-") for name in self._given]
        if self.client is not None and self.scheduler is not None:
            raise ClusterError("pass a client or the address of a scheduler, not both")
        if given and not self.is_local:
            raise ClusterError(f"{', '.join(given)}: only for the local cluster; a running one has its own workers")

    @property
    def is_local(self) -> bool:
        """Whether we start the cluster ourselves."""
        return self.client is None and self.scheduler is None

    @property
    def is_open(self) -> bool:
        """Whether the user says nothing of it, so that there need not be one."""
        return self.is_local and not self._given

    @property
    def _given(self) -> list[str]:
        own = ("workers", "threads_per_worker", "memory_limit", "dashboard")
        return [name for name in own if getattr(self, name) is not None]


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
    try:
        memory = int(parse_bytes(options.memory_limit))
    except ValueError as error:
        text = f"memory limit {options.memory_limit!r} is not a number of bytes such as 4GiB"
        raise ClusterError(text) from error
    return Workers(count, threads, memory or None, gpus)


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
        raise DeviceError(
            f'device="gpu", but {len(without)} of {len(found)} workers have none, first {address}: {reason}'
        )
    return len(found) - len(without)
