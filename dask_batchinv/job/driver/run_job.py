"""A job from its beginning to its end: where it runs, and what it replaces."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace

from dask_batchinv.job.driver.cluster_options import ClusterOptions, own_task
from dask_batchinv.job.driver.executor import InProcess, Serial
from dask_batchinv.job.driver.own_cluster import launched
from dask_batchinv.job.driver.placing import plan_for_unlike, plan_here, plan_locally
from dask_batchinv.job.driver.run import Run
from dask_batchinv.job.plan.plan import Plan, Workers
from dask_batchinv.job.plan.prepare import Job, plan_for, replacement
from dask_batchinv.job.report.job_report import JobReport
from dask_batchinv.job.report.run_record import OnProgress, RunTotals, ignore
from dask_batchinv.job.target.lock import locked, refuse_held, remove_stale_lock
from dask_batchinv.job.target.state import State
from dask_batchinv.job.target.swap import InterruptedWhenDone, place_beside, put_back, swap
from dask_batchinv.outcome import TargetError


def run_job(job: Job, options: ClusterOptions, on_progress: OnProgress | None = None) -> JobReport:
    """Run a prepared job to its end and return the report, whatever it says.

    What replaces a finished target is built beside it, so that its readers lose nothing until all is done.
    """
    if put_back(job.target):
        raise TargetError(
            f"{job.target.name} had been moved aside when its replacement was interrupted, and is in its place again: "
            "run the job again, with `overwrite=True` to go on with the replacement"
        )
    if (beside := replacement(job)) is None:
        report = _run(job, options, on_progress)
        return replace(report, notes=(*report.notes, *_on_replacing(job)))
    with locked(job.target) as lock:
        report = _run(beside, options, on_progress)
        notes = report.notes
        if report.exit_code != 1:
            try:
                left = swap(beside.target, job.target, job.found, lock)
            except InterruptedWhenDone as end:
                end.report = replace(report, target=job.target.name, notes=(*notes, str(end)))
                raise
            notes += () if left is None else (left,)
        else:
            notes += (f"{job.target.name} is what it was: what is done so far lies beside it, and the same job, "
                      "with `overwrite=True`, goes on with that",)  # fmt: skip
    return replace(report, target=job.target.name, notes=notes)


def plan_job(job: Job, options: ClusterOptions) -> Plan:
    """Return the plan of a prepared job, for the workers that there are."""
    options = options.resolved()
    if options.is_local:
        return plan_locally(job, options)
    from dask_batchinv.job.driver.cluster import connect, count_gpus

    with connect(options) as (client, (first, *others)):
        gpus = count_gpus(job.options.device, client, options.only_workers)
        made, _ = plan_for_unlike(job, [replace(first, gpus=gpus), *others])
        return replace(made, where=options.where(client))


def _on_replacing(job: Job) -> list[str]:
    """Return what to say of a finished target that was not replaced beside, and of what such a replacement has left."""
    beside, notes = place_beside(job.target), []
    if job.action == "create" and job.found.state is State.COMPLETE:
        notes.append(f"{job.target.name} was removed before it was made anew: nothing could be built beside it")
    elif beside is not None and (
        os.path.lexists(beside.url) if beside.is_local else beside.transaction is not None and beside.exists()
    ):
        notes.append(
            f"{beside.name} was left by an interrupted replacement: `overwrite=True` goes on with it, or removes it"
        )
    return notes


def _run(job: Job, options: ClusterOptions, on_progress: OnProgress | None) -> JobReport:
    is_here = any(location.is_memory for location in (job.source.location, job.target))
    found, on_progress = options.resolved(is_here=is_here), on_progress or ignore
    nobody = Workers(0, 0, None)
    idle = Run(job, replace(plan_for(job, nobody), where="this process"), nobody, Serial(), on_progress)
    if (ledger := idle.nothing_to_do()) is not None:
        remove_stale_lock(job.target)
        return idle.report(ledger)
    refuse_held(job.target)  # before workers are started, or asked
    # Small jobs in tasks, which may be many, stay in their tasks.
    if (here := plan_here(job, options if own_task() else found)) is not None:
        workers = Workers(1, here.limits.threads, None)
        return Run(job, here, workers, InProcess(workers.threads), on_progress, looks=idle.looks)()
    with ExitStack() as held:
        helper = held.enter_context(launched()) if found.is_local else None
        # Not before it is needed: to import Dask's cluster takes as long as a small job.
        from dask_batchinv.job.driver.cluster import connect, count_gpus, meet_workers
        from dask_batchinv.job.driver.dispatch import Dispatcher

        client, kinds = held.enter_context(connect(found, helper))
        if not found.is_local:
            gpus = count_gpus(job.options.device, client, found.only_workers)
            kinds = [replace(kinds[0], gpus=gpus), *kinds[1:]]
        plan, workers = plan_for_unlike(job, kinds)
        plan = replace(plan, where=found.where(client))
        introduction, silent = meet_workers(client, job.source, job.target, found.only_workers)
        executor = Dispatcher(
            client, introduction, plan.room, is_own=found.is_local, restart_stalled=found.restart_stalled,
            only=found.only_workers,
        )  # fmt: skip
        return Run(job, plan, workers, executor, on_progress, RunTotals(events=list(silent)), idle.looks)()
