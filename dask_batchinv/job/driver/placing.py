"""Where a job runs: a small one in the process of its caller, for to start others takes longer than the job.

And for which workers it is planned, where they are unlike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dask.system import CPU_COUNT

from dask_batchinv.job.driver.cluster_options import ClusterOptions, local_gpus, local_workers, own_task
from dask_batchinv.job.plan.plan import IDLE_WORKER_NBYTES, USABLE, Plan, Workers
from dask_batchinv.job.plan.prepare import Job, plan_for
from dask_batchinv.job.settings import settings
from dask_batchinv.outcome import PlanError

#: What a job may take of the memory of its caller's process, in bytes: it cannot be ended there if it took more.
LARGEST_NBYTES = 2**30


def plan_here(job: Job, options: ClusterOptions) -> Plan | None:
    """Return the plan of a job that runs in this process; None if it needs worker processes.

    It does if the user says something of them, if it has a GPU to use, or if it is large.
    """
    if not options.is_open or local_gpus(job.options.device):
        return None
    most = threads_here()
    plan = plan_for(job, Workers(1, most, None))
    if not is_small(plan.nbytes_in + plan.nbytes_out):
        return None
    threads = min(most, -(-plan.tiling.n_tiles // plan.together))
    plan = replace(plan_for(job, Workers(1, max(1, threads), None)), where="this process, because it is small")
    return plan if plan.projected_nbytes <= LARGEST_NBYTES else None


def is_small(nbytes: int) -> bool:
    """Tell whether what reads and writes so many bytes is done sooner than processes are started."""
    return nbytes <= settings().in_process_nbytes


def threads_here() -> int:
    """Return how many threads of this process may be used: in a Dask task, of which there may be many, its own."""
    return 1 if own_task() else CPU_COUNT


def plan_for_unlike(job: Job, kinds: Sequence[Workers]) -> tuple[Plan, Workers]:
    """Return the plan of a job for unlike workers, and what those are like that it was made for.

    These have the least memory for each thread, of those in which the job fits at all.
    """

    def memory_per_thread(kind: Workers) -> float:
        return math.inf if kind.memory is None else (USABLE * kind.memory - IDLE_WORKER_NBYTES) / kind.threads

    refusal = None
    count, gpus = (sum(getattr(kind, name) for kind in kinds) for name in ("count", "gpus"))
    for kind in sorted(kinds, key=memory_per_thread):
        workers = replace(kind, count=count, gpus=gpus)
        try:
            return plan_for(job, workers), workers
        except PlanError as error:
            refusal = refusal or error
    raise refusal or PlanError("there are no workers")


def plan_locally(job: Job, options: ClusterOptions) -> Plan:
    """Return the plan of a job on this machine."""
    return plan_here(job, options) or plan_for(job, local_workers(options))
