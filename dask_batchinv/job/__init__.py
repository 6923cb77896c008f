"""Batch jobs: Zarr to Zarr, on a Dask cluster, resumable, every matrix accounted for."""

from dask_batchinv.job.driver import invert_store
from dask_batchinv.job.report import JobFailedError, JobReport
from dask_batchinv.job.verify import VerifyReport, verify_store

__all__ = ["JobFailedError", "JobReport", "VerifyReport", "invert_store", "verify_store"]
