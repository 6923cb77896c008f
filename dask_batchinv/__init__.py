"""The inverse of every matrix in a very large stack."""

from pathlib import Path

import dask.config
import yaml

__version__ = "0.1.0"

dask.config.update_defaults(yaml.safe_load((Path(__file__).parent / "batchinv.yaml").read_text()))

from dask_batchinv import accessor  # noqa: E402, F401  (registers .linalg on Xarray objects)
from dask_batchinv.array import InverseEx, inverse, inverse_ex  # noqa: E402
from dask_batchinv.job import JobFailedError, JobReport, VerifyReport, invert_store, verify_store  # noqa: E402
from dask_batchinv.kernels import DeviceError  # noqa: E402
from dask_batchinv.outcome import (  # noqa: E402
    ClusterError,
    Info,
    PlanError,
    RefusedError,
    SingularMatrixError,
    SourceError,
    TargetError,
)

__all__ = [
    "ClusterError",
    "DeviceError",
    "Info",
    "InverseEx",
    "JobFailedError",
    "JobReport",
    "PlanError",
    "RefusedError",
    "SingularMatrixError",
    "SourceError",
    "TargetError",
    "VerifyReport",
    "inverse",
    "inverse_ex",
    "invert_store",
    "verify_store",
]
