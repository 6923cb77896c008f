"""A panel of a general matrix, eliminated by strips of columns, and these by a few at a time."""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_frame import STEPS, STRIP, Frame
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.values import Value


def write(spec: KernelSpec, module: ir.Module) -> None:
    """Write ``panel(table, start, stop, factors)``: it eliminates the columns from `start` to `stop`."""
    f = Frame(spec, "panel", 3, module)
    e, (start, stop, factors) = f.e, f.arguments

    def update(k: Value, width: Value, first: Value, last: Value) -> None:
        f.call("update", k, k - start, width, first, last, factors)

    with e.loop(start, stop, STRIP) as strip:
        end = e.unsigned("umin", strip + STRIP, stop)
        with e.loop(strip, end, STEPS) as k:
            width = e.unsigned("umin", end - k, e.integer(STEPS))
            f.call("steps", k, k - start, width)
            update(k, width, strip, k)
            update(k, width, k + width, end)
        update(strip, end - strip, start, strip)
        update(strip, end - strip, end, stop)
    e.finish()
