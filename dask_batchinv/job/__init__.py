"""Batch jobs: Zarr to Zarr, on a Dask cluster, resumable, every matrix accounted for."""

from dask_batchinv.job.api import invert_store, plan_store, report_store, status, verify_store
from dask_batchinv.job.plan.plan import Plan
from dask_batchinv.job.report.freshness import Status
from dask_batchinv.job.report.interrupted import InterruptedJob
from dask_batchinv.job.report.job_report import JobFailedError, JobReport
from dask_batchinv.job.report.page.target_report import TargetReport
from dask_batchinv.job.report.verify_report import VerifyReport

__all__ = [
    "InterruptedJob",
    "JobFailedError",
    "JobReport",
    "Plan",
    "Status",
    "TargetReport",
    "VerifyReport",
    "invert_store",
    "plan_store",
    "report_store",
    "status",
    "verify_store",
]
