"""The update of columns by steps of a panel: nearly all the work. A tile of them is in registers at a time."""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_frame import CHUNK, PANEL, STEPS, Frame, rows_of_group, rows_of_tile
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.number import Number, NumberVariable
from dask_batchinv.kernels.emit.values import Value


def factors_nbytes(spec: KernelSpec) -> int:
    """Return the bytes of memory for factors that an update needs."""
    return CHUNK * _factors(spec) * spec.itemsize


def _factors(spec: KernelSpec) -> int:
    """Return the reals that the factors of a column take, some steps more among them than there are."""
    return (PANEL + STEPS) * spec.parts


def write(spec: KernelSpec, module: ir.Module) -> None:
    """Write ``update(table, k0, p0, width, start, stop, factors)``.

    It updates the columns from `start` to `stop`, a multiple of `STEPS` or the last, by `width` steps from p0 on of a
    panel: those of columns k0 on. `factors` is the address of `factors_nbytes` of memory.
    """
    f = Frame(spec, "update", 6, module)
    e, (_, p0, width, start, stop, address) = f.e, f.arguments
    memory = e.value(e.builder.inttoptr(address.raw, ir.PointerType()))
    group, size = rows_of_group(spec), rows_of_tile(spec)
    with e.loop(start, stop, CHUNK) as first:
        # Beyond the last column there are rows to spare.
        last = e.unsigned("umin", first + CHUNK, stop)
        with e.loop(first, last, group) as j:
            _find_factors(f, group, j, e.at(memory, (j - first) * _factors(spec)))
        with e.loop(0, f["blocks"]) as b, e.loop(first, last, group) as j:
            factors = e.at(memory, (j - first) * _factors(spec))
            for t in range(0, group, size):
                update_tile(f, b, j + t, e.at(factors, t), p0, width)
    e.finish()


def factors_of_step(f: Frame, factors: Value, step: Value | int) -> list[Value]:
    """Return where a step has its factors of a group, for each part."""
    group = rows_of_group(f.spec)
    first = f.e.at(factors, step * (f.parts * group))
    return [f.e.at(first, part * group) for part in range(f.parts)]


def _find_factors(f: Frame, group: int, j: Value, factors: Value) -> None:
    """Find f of a group of columns for all steps, some of these together; what they stand in becomes 0."""
    e, kind = f.e, ir.VectorType(f.e.real, group)
    k0, p0, width = f.arguments[:3]
    rows, together = [f.row(j + t) for t in range(group)], STEPS // f.parts

    def lower(step: Value, earlier: Value) -> Number:
        place = f.lower(p0 + step, p0 + earlier)
        parts = [e.load(e.at(place, part), e.real) for part in range(f.parts)]
        return Number(e, tuple(parts)).splat(group)

    with e.loop(0, width, together) as first:
        numbers = []
        for i in range(together):
            pivot = f.get("pivots", k0 + first + i)
            entries = [f.entry(row, pivot).parts for row in rows]
            numbers.append(Number(e, tuple(e.gathered(parts) for parts in zip(*entries, strict=True))))
            for row in rows:
                f.set_entry(f.constant(0.0), row, pivot)
        sums = [NumberVariable(number) for number in numbers]
        with e.loop(0, first) as earlier:
            factor = Number(e, tuple(e.load(place, kind) for place in factors_of_step(f, factors, earlier)))
            for i, total in enumerate(sums):
                total.set(total.get().plus_product(factor, lower(first + i, earlier)))
        found: list[Number] = []
        for i, total in enumerate(sums):
            number = total.get()
            for earlier_one, factor in enumerate(found):
                number = number.plus_product(factor, lower(first + i, first + earlier_one))
            found.append(number)
            for value, place in zip(number.parts, factors_of_step(f, factors, first + i), strict=True):
                e.store(value, place)


def update_tile(f: Frame, b: Value, j: Value, factors: Value, p0: Value, width: Value | int) -> None:
    """Update a block of the rows of a tile from j on by some steps from p0 on of the panel, with their factors."""
    e, size = f.e, rows_of_tile(f.spec)
    rows = [f.row(j + t) for t in range(size)]
    places = [b * f.block + v * f.lanes for v in range(f.vectors)]
    for t in range(size):  # what comes next, as far as the processor cannot guess it
        following = f.row(j + (size + t))
        for at in range(0, f.block * f.spec.itemsize, 64):
            e.prefetch(e.at(following, b * f.block + at // f.spec.itemsize))
    sums = [[NumberVariable(f.load(row, place)) for place in places] for row in rows]
    with e.loop(0, width) as p:
        saved = f.saved(b, p0 + p)
        columns = []
        for v in range(f.vectors):
            parts = f.saved_parts(saved, v * f.lanes)
            columns.append(Number(e, tuple(e.load(part, align=e.nbytes) for part in parts)))
        step = factors_of_step(f, factors, p)
        for t in range(size):
            factor = Number(e, tuple(e.load(e.at(part, t), e.real) for part in step)).splat()
            for total, column in zip(sums[t], columns, strict=True):
                total.set(total.get().plus_product(factor, column))
    for row, totals in zip(rows, sums, strict=True):
        for total, place in zip(totals, places, strict=True):
            f.store(total.get(), row, place)
