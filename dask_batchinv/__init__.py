"""The inverse of every matrix in a very large stack."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("dask_batchinv runs on Linux and macOS: on Windows, use the Windows Subsystem for Linux (WSL)")

from dask_batchinv import config, with_xarray
from dask_batchinv._version import __version__ as __version__

if TYPE_CHECKING:
    from dask_batchinv.array import inverse, inverse_ex
    from dask_batchinv.job import (
        InterruptedJob,
        JobFailedError,
        JobReport,
        Plan,
        Status,
        TargetReport,
        VerifyReport,
        invert_store,
        plan_store,
        report_store,
        status,
        verify_store,
    )
    from dask_batchinv.kernels import InverseEx, InverseExLogdet
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
        TargetInUseError,
    )

__all__ = [
    "ClusterError",
    "DeviceError",
    "IllConditionedWarning",
    "Info",
    "InterruptedJob",
    "InverseEx",
    "InverseExLogdet",
    "JobFailedError",
    "JobReport",
    "Plan",
    "PlanError",
    "RefusedError",
    "SingularMatrixError",
    "SourceError",
    "Status",
    "TargetError",
    "TargetInUseError",
    "TargetReport",
    "VerifyReport",
    "inverse",
    "inverse_ex",
    "invert_store",
    "plan_store",
    "report_store",
    "status",
    "verify_store",
]

_OF_JOBS = ("InterruptedJob", "JobFailedError", "JobReport", "Plan", "Status", "TargetReport", "VerifyReport",
            "invert_store", "plan_store", "report_store", "status", "verify_store")  # fmt: skip
#: Where the names are. A job needs no Dask arrays, and `inverse` no cluster: what is not asked for is not imported.
_HOMES = {
    "AmbiguousDimsError": "labels",  # a ValueError, which users may meet and need not know
    "DeviceError": "kernels.device",
    "InverseEx": "kernels",
    "InverseExLogdet": "kernels",
    "inverse": "array",
    "inverse_ex": "array",
    **dict.fromkeys(_OF_JOBS, "job"),
}

config.set_defaults()
with_xarray.register()


def __getattr__(name: str) -> Any:
    if name not in __all__ and name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    thing = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'outcome')}"), name)
    if _HOMES.get(name) == "array" and "xarray" in sys.modules:
        importlib.import_module(f"{__name__}.labelled")  # it takes Xarray's objects, too
    globals()[name] = thing
    return thing


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
