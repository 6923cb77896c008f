"""Where a block is inverted, and why not elsewhere."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, Literal, get_args

import dask.config

from dask_batchinv.stack import Device, parse_choice
from dask_batchinv.text import CleanError, public

#: The oldest cards that CUDA 13 compiles for.
OLDEST = 75


_DEVICES = get_args(Device)


@public
class DeviceError(CleanError, RuntimeError):
    """The wanted device cannot be used."""


@lru_cache(maxsize=1)
def why_unusable() -> str | None:
    """Return why no GPU can be used in this process, or None if one can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): pip install 'dask_batchinv[gpu]'"
    try:
        if not cupy.cuda.runtime.getDeviceCount():
            return "CUDA finds no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        if int(cupy.cuda.Device().compute_capability) < OLDEST:
            return f"the GPU is too old: compute capability {OLDEST / 10} is needed"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no usable GPU ({error}): look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    try:
        # Both are found only when they are used: the compiler, and cuBLAS.
        cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing").compile()
        importlib.import_module("cupy_backends.cuda.libs.cublas")
    except Exception as error:  # CuPy's own, the compiler's, or that of whoever loads libraries
        return (
            f"CUDA finds a GPU, but CuPy cannot use it ({type(error).__name__}: {error}): pip install "
            "'dask_batchinv[gpu]', or cupy-cuda12x[ctk] for CUDA 12"
        )
    return None


def is_gpu_array(a: Any) -> bool:
    """Tell whether an array is CuPy's, without importing CuPy."""
    return type(a).__module__.partition(".")[0] == "cupy"


def parse_device(device: Device) -> Device:
    """Return the device that was asked for: for "auto", the Dask configuration ``batchinv.device`` decides."""
    # `parse_choice` takes its time.
    if device not in _DEVICES:
        parse_choice("device", device, Device)
    if device == "auto":
        device = dask.config.get("batchinv.device", "auto")
        if device not in _DEVICES:
            parse_choice("dask.config batchinv.device", device, Device)
    return device


def device_for(block: Any, device: Device) -> Literal["cpu", "gpu"]:
    """Return where a block is inverted by this process.

    Raises
    ------
    DeviceError
        If that is not possible: nothing is copied to or from a GPU unless that is meant, and no GPU is replaced by the
        CPU in silence.
    """
    device = parse_device(device)
    if is_gpu_array(block):
        if device == "cpu":
            raise DeviceError('device="cpu", but the block is a CuPy array: convert it with '
                              '.map_blocks(cupy.asnumpy) first, or use "auto"')  # fmt: skip
        return "gpu"
    reason = None if device == "cpu" else why_unusable()
    if device == "gpu" and reason is not None:
        raise DeviceError(f'device="gpu": {reason}; or use "cpu" or "auto"')
    return "cpu" if device == "cpu" or reason is not None else "gpu"
