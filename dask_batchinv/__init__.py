"""The inverse of every matrix in a very large stack."""

from dask_batchinv import accessor, config  # noqa: F401  (register .linalg on Xarray objects, and defaults)
from dask_batchinv._version import __version__ as __version__
from dask_batchinv.array import inverse, inverse_ex
from dask_batchinv.job import JobFailedError, JobReport, VerifyReport, invert_store, verify_store
from dask_batchinv.kernels import InverseEx
from dask_batchinv.kernels.device import DeviceError
from dask_batchinv.outcome import (
    ClusterError,
    IllConditionedWarning,
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
    "IllConditionedWarning",
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

for _name in __all__:
    if isinstance(_thing := globals()[_name], type):
        _thing.__module__ = __name__  # what tracebacks and documentation call it: where users find it
