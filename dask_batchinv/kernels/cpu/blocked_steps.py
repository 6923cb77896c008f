"""A few columns of a general matrix, eliminated step by step; the formula is in `within_gauss_jordan`."""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_frame import STEPS, Frame
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.within_workspace import across
from dask_batchinv.kernels.emit.values import INT, Value


def write(spec: KernelSpec, module: ir.Module) -> None:
    """Write ``steps(table, k0, p0, width)``: it eliminates `width` columns from k0 on, steps p0 on of their panel."""
    f = Frame(spec, "steps", 3, module)
    e, (k0, p0, width) = f.e, f.arguments
    with e.loop(0, width) as q:
        k, step = k0 + q, p0 + q
        own = f.row(k)
        largest, pivot = search(f, own)
        e.store(largest, e.at(f["sizes"], k))
        f.set("pivots", k, pivot)
        f.set("columns", pivot, k)
        word, bit = pivot >> (f.lanes.bit_length() - 1), e.integer(1) << (pivot & (f.lanes - 1))
        f.set("used", word, f.get("used", word) | bit)
        _set_aside(f, step, pivot)
        minus = -f.entry(own, pivot).reciprocal().splat()
        rows = [f.row(k0 + t) for t in range(STEPS)]
        factors = [f.entry(row, pivot).splat() for row in rows]
        for row in rows:
            f.set_entry(f.constant(0.0), row, pivot)
        # Which makes P of the pivot itself what it must be.
        f.set_entry(f.constant(-1.0), own, pivot)
        with e.loop(0, f["blocks"]) as b:
            saved = f.saved(b, step)
            for v in range(0, f.block, f.lanes):
                index = b * f.block + v
                replacing = f.load(own, index) * minus
                sums = [
                    f.load(row, index).plus_product(factor, replacing)
                    for row, factor in zip(rows, factors, strict=True)
                ]
                for row, total in zip(rows, sums, strict=True):
                    f.store(total, row, index)
                # After all others, of which it is one.
                f.store(replacing, own, index)
                for value, place in zip(replacing.parts, f.saved_parts(saved, v), strict=True):
                    e.store(value, place, align=e.nbytes)
    e.finish()


def search(f: Frame, row: Value) -> tuple[Value, Value]:
    """Return the largest size in rows of the matrix that have not been pivots, and which is the first to have it."""
    e = f.e
    best, first = e.variable(e.numbers(-1.0)), e.variable(e.integers(0))
    start = e.variable(e.iota)
    with e.loop(0, f["blocks"]) as b:
        for v in range(f.vectors):
            used = e.mask_from(f.get("used", b * f.vectors + v))
            size = e.select(used, e.numbers(-1.0), f.load(row, b * f.block + v * f.lanes).size())
            more = size > best.get()
            best.set(e.select(more, size, best.get()))
            first.set(e.select(more, start.get(), first.get()))
            start.set(start.get() + f.lanes)
    largest = across(e, best.get(), e.larger)
    here = best.get().eq(largest)
    return e.lane(largest, 0), e.resize(e.reduce("umin", e.select(here, first.get(), e.integers(-1))), INT)


def _set_aside(f: Frame, step: Value, pivot: Value) -> None:
    """For the row of a later pivot P becomes a part of its f."""
    e = f.e
    block = pivot / f.block
    inside = pivot - block * f.block
    with e.loop(0, step) as earlier:
        places = f.saved_parts(f.saved(block, earlier), inside)
        for part, place in enumerate(places):
            e.store(e.load(place, e.real), e.at(f.lower(step, earlier), part))
            e.store(e.number(0.0), place)
