"""Batch jobs: Zarr to Zarr, on a Dask cluster, resumable, every matrix accounted for."""

from dask_batchinv.job.api import invert_store, verify_store
from dask_batchinv.job.report.job_report import JobFailedError, JobReport
from dask_batchinv.job.report.verify_report import VerifyReport

__all__ = ["JobFailedError", "JobReport", "VerifyReport", "invert_store", "verify_store"]
