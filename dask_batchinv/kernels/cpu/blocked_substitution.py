"""Large triangular matrices: Gauss-Jordan elimination by panels, in the way of `blocked_rows`.

In an upper triangle, with d = a[k, k] and for the rows i above and the columns j beyond,

    a[k, j] <- a[k, j] / d,    a[i, j] <- a[i, j] - a[i, k] a[k, j],    a[i, k] <- -a[i, k] / d,    a[k, k] <- 1 / d.

Rows below are not concerned. The sums are those of the substitution that solves X A = I row by row.
"""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_frame import STEPS, Frame
from dask_batchinv.kernels.cpu.blocked_rows import RowPanel
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.values import Value


def write(spec: KernelSpec, module: ir.Module) -> None:
    """Write ``square(table, k0, width)``, ``rows(table, k0, width, first, last)`` and ``update`` likewise.

    They work on the panel of `width` rows from k0 on; `rows` on the blocks from `first` to `last`, `update` on the rows
    from `first` to `last`, which are above the panel.
    """
    _write_square(Frame(spec, "square", 2, module))
    _write_rows(Frame(spec, "rows", 4, module))
    _write_update(Frame(spec, "update", 4, module))


def _write_square(f: Frame) -> None:
    """The factor of a row above is for what lies beyond; of one below, for what stands above the panel."""
    panel, e = RowPanel(f, None), f.e
    k0, width = panel.k0, panel.width
    with e.loop(0, width) as p:
        k = k0 + p
        own = f.row(k)
        pivot = f.entry(own, k)
        inverse = pivot.reciprocal()
        panel.judge(pivot, pivot.size(), inverse, p)
        with e.loop(k / f.block * f.block, k) as below:
            f.set_entry(f.constant(0.0), own, below)
        with e.loop(k / f.block, panel.after) as b:
            for place in panel.each_place(b):
                f.store(f.load(own, place) * inverse.splat(), own, place)
        f.set_entry(inverse, own, k)
        with e.loop(p + 1, width) as q:
            panel.set_factor(f.entry(own, k0 + q), k0 + q, p)
        with e.loop(0, p) as q:
            row = f.row(k0 + q)
            factor = -f.entry(row, k)
            panel.set_factor(factor, k0 + q, p)
            f.set_entry(f.constant(0.0), row, k)
            with e.loop(k / f.block, panel.after) as b:
                for place in panel.each_place(b):
                    f.store(f.load(row, place).plus_product(factor.splat(), f.load(own, place)), row, place)
    e.finish()


def _write_rows(f: Frame) -> None:
    panel, e = RowPanel(f, None), f.e
    start, stop = f.arguments[2:]

    def beyond(number: Number, p: Value, column: Value) -> tuple[Number, Number]:
        scaled = number * panel.inverse(p)
        return scaled, scaled

    def above(number: Number, p: Value, column: Value) -> tuple[Number, Number]:
        panel.keep_factors(-number, column, p)
        return -number, -number * panel.inverse(p)

    with e.loop(start, e.signed("smin", stop, panel.first)) as b:
        panel.fetch(b)
        panel.sweep(b, above, lambda j, i: j > i, lambda s: [(s + STEPS, panel.width)])
    with e.loop(e.signed("smax", start, panel.after), stop) as b:
        panel.sweep(b, beyond, lambda j, i: j < i, lambda s: [(0, s)])
    e.finish()


def _write_update(f: Frame) -> None:
    panel = RowPanel(f, None)
    start, stop = f.arguments[2:]
    panel.update(start, stop, beyond=True)
    panel.put_back(start, stop)
    f.e.finish()
