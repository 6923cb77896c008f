"""Large positive definite matrices, by panels of sweeps: the formula is in `within_sweep`, the way in `blocked_rows`.

In the square of a panel, too, only the upper triangle is kept up to date.
"""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_frame import STEPS, Frame
from dask_batchinv.kernels.cpu.blocked_rows import RowPanel
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.symmetric_pivots import Symmetry
from dask_batchinv.kernels.emit.number import Number, constant_number
from dask_batchinv.kernels.emit.values import Value

_HERMITIAN = Symmetry(is_hermitian=True)


def write(spec: KernelSpec, module: ir.Module) -> None:
    """Write ``square(table, k0, width)``, ``rows(table, k0, width, first, last)`` and ``update`` likewise.

    They work on the panel of `width` rows from k0 on; `rows` on the blocks from `first` to `last`, `update` on the rows
    from `first` to `last`.
    """
    _write_square(Frame(spec, "square", 2, module))
    _write_rows(Frame(spec, "rows", 4, module))
    _write_update(Frame(spec, "update", 4, module))


def _write_square(f: Frame) -> None:
    panel, e = RowPanel(f, _HERMITIAN), f.e
    k0, width = panel.k0, panel.width
    with e.loop(0, width) as p:
        k = k0 + p
        own = f.row(k)
        pivot = f.entry(own, k).real_part()
        inverse = constant_number(e, e.like(pivot.parts[0], 1.0) / pivot.parts[0], f.parts)
        panel.judge(pivot, pivot.parts[0], inverse, p)
        with e.loop(0, p) as q:  # what stands above the pivot, beside it
            f.set_entry(f.entry(f.row(k0 + q), k).conjugate(), own, k0 + q)
            f.set_entry(f.constant(0.0), f.row(k0 + q), k)
        with e.loop(0, width) as q:
            panel.set_factor(-f.entry(own, k0 + q).conjugate(), k0 + q, p)
        with e.loop(panel.first, panel.after) as b:
            for place in panel.each_place(b):
                f.store(f.load(own, place).times_real(e.splat(inverse.parts[0])), own, place)
        f.set_entry(-inverse, own, k)

        def add(q: Value, own: Value = own, p: Value = p) -> None:
            row, factor = f.row(k0 + q), panel.factor(k0 + q, p)
            with e.loop((k0 + q) / f.block, panel.after) as b:
                for place in panel.each_place(b):
                    f.store(f.load(row, place).plus_product(factor, f.load(own, place)), row, place)

        with e.loop(0, p) as q:
            add(q)
        with e.loop(p + 1, width) as q:
            add(q)
    e.finish()


def _write_rows(f: Frame) -> None:
    panel, e = RowPanel(f, _HERMITIAN), f.e
    _, width, start, stop = f.arguments

    def step(number: Number, p: Value, column: Value) -> tuple[Number, Number]:
        panel.keep_factors(-number.conjugate(), column, p)
        scaled = number.times_real(panel.inverse(p).parts[0])
        return scaled, scaled

    with panel.each_outside(start, stop) as b:
        with e.when(b < panel.first):
            panel.fetch(b)
        panel.sweep(b, step, lambda j, i: True, lambda s: ((0, s), (s + STEPS, width)))
    e.finish()


def _write_update(f: Frame) -> None:
    panel = RowPanel(f, _HERMITIAN)
    start, stop = f.arguments[2:]
    panel.update(start, stop)
    with f.e.when(start < panel.k0):
        panel.put_back(start, stop)
    f.e.finish()
