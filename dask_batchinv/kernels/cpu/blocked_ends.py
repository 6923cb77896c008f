"""The way of a matrix into the scratch and of its inverse out of it, some columns at a time."""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_frame import Frame
from dask_batchinv.kernels.cpu.scaling import Measure, larger_sum, without_sign_of_zero
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.within_gauss_jordan import modulus
from dask_batchinv.kernels.cpu.within_workspace import across
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.transpose import transpose
from dask_batchinv.kernels.emit.values import INT, Value


def write(spec: KernelSpec, module: ir.Module) -> None:
    """Write ``measure(table, start, stop, part)``, and ``read`` and ``give`` likewise.

    They take the rows from `start` to `stop`, the last two columns. Word 2 `part` of "found" becomes the bits of the
    largest number, of the matrix or of its inverse, and word 2 `part` + 1 those of the smallest, or the largest sum of
    a column.
    """
    _write_measure(Frame(spec, "measure", 3, module))
    _write_read(Frame(spec, "read", 3, module))
    _write_give(Frame(spec, "give", 3, module))


def tell(f: Frame, first: Value, second: Value) -> None:
    """Note what a function has found."""
    for i, value in enumerate((first, second)):
        f.set(
            "found",
            f.arguments[2] * 2 + i,
            f.e.value(f.e.builder.zext(value.raw, INT)) if f.spec.itemsize == 4 else value,
        )


def first_lanes(e: Emitter, count: Value) -> Value:
    """Return the mask of the first lanes, of so many."""
    return e.iota < e.splat(e.resize(count, e.word))


def _write_measure(f: Frame) -> None:
    e, measure = f.e, Measure(f.e)
    start, stop, _ = (argument * (f["n"] * f.parts) for argument in f.arguments)
    whole = start + (stop - start) / f.lanes * f.lanes
    with e.loop(start, whole, f.lanes) as i:
        measure.look(e.load(e.at(f["source"], i)))
    measure.look(e.load_where(first_lanes(e, stop - whole), e.at(f["source"], whole)))
    largest, smallest = measure.bits_of_all()
    tell(f, largest, smallest)
    e.finish()


def put(f: Frame, numbers: Value, place: Value, count: Value) -> None:
    """Store the first lanes, of so many; all of them if there are more."""
    # Stores by a mask are slow on some processors.
    with f.e.builder.if_else((count >= f.lanes).raw) as (all_of_them, some):
        with all_of_them:
            f.e.store(numbers, place)
        with some:
            f.e.store_where(first_lanes(f.e, count), numbers, place)


def scale(f: Frame) -> list[Value]:
    """Return the factors that bring the matrix to unit size, and its inverse back."""
    return [f.e.splat(f.e.load(f.e.at(f["scale"], i), f.e.real)) for i in range(2)]


def _write_read(f: Frame) -> None:
    """Scale, sum up the columns, and transpose."""
    e, n, parts = f.e, f["n"], f.parts
    first, second = scale(f)
    norm = e.variable(e.numbers(0.0))
    with e.loop(f.arguments[0] * parts, f.arguments[1] * parts, f.lanes) as c:
        total = e.variable(e.numbers(0.0))
        inside = first_lanes(e, n * parts - c)
        with e.loop(0, n, f.lanes) as r:
            block = []
            for t in range(f.lanes):
                there = e.value(e.builder.and_(inside.raw, e.splat((r + t) < n).raw))
                numbers = e.load_where(there, e.at(f["source"], (r + t) * (n * parts) + c)) * first * second
                block.append(numbers)
                total.set(total.get() + modulus(e, parts, numbers))
            for q, turned in enumerate(transpose(e, block)):
                place = e.at(f.row(c / parts + q // parts), r + f.length * (q % parts))
                e.store(turned, place, align=e.nbytes)
        norm.set(larger_sum(e, total.get(), norm.get()))
    largest = e.lane(across(e, norm.get(), partial(larger_sum, e)), 0)
    tell(f, e.bits(largest), e.bits(largest))
    e.finish()


def _write_give(f: Frame) -> None:
    """Turn the inverse back and write it, rows and columns in their order."""
    e, n, parts = f.e, f["n"], f.parts
    first, second = scale(f)
    norm, largest = e.variable(e.numbers(0.0)), e.variable(e.integers(0))
    with e.loop(f.arguments[0] * parts, f.arguments[1] * parts, f.lanes) as c:
        total = e.variable(e.numbers(0.0))
        sources = []
        for q in range(f.lanes):
            # Beyond the last column it is taken once more: that changes no maximum.
            column = e.unsigned("umin", c / parts + q // parts, n - 1)
            sources.append(e.at(f.row(f.get("columns", column)), f.length * (q % parts)))
        with e.loop(0, n, f.lanes) as r:
            turned = transpose(e, [e.load(e.at(source, r), align=e.nbytes) for source in sources])
            for t in range(f.lanes):
                with e.when((r + t) < n):
                    total.set(total.get() + modulus(e, parts, turned[t]))
                    numbers = without_sign_of_zero(e, turned[t] * first, second)
                    largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(numbers))))
                    k = f.get("columns", r + t)
                    put(f, numbers, e.at(f["target"], k * (n * parts) + c), n * parts - c)
        norm.set(larger_sum(e, total.get(), norm.get()))
    tell(f, e.reduce("umax", largest.get()), e.bits(e.lane(across(e, norm.get(), partial(larger_sum, e)), 0)))
    e.finish()
