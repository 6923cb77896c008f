"""The update of columns by steps of a panel: nearly all the work. A tile of them is in registers at a time."""

from __future__ import annotations

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_frame import BLOCK, CHUNK, PANEL, STEPS, Frame
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.number import Number, NumberVariable
from dask_batchinv.kernels.emit.values import Value


def columns_of_tile(spec: KernelSpec) -> int:
    """Return how many columns are in registers together; measured."""
    return (8 if spec.lanes * spec.itemsize == 64 else 4) // spec.parts


def factors_nbytes(spec: KernelSpec) -> int:
    """Return the bytes of memory for factors that an update needs."""
    return CHUNK * _factors(spec) * spec.itemsize


def _factors(spec: KernelSpec) -> int:
    """Return the reals that the factors of a column take, some steps more among them than there are."""
    return (PANEL + STEPS) * spec.parts


def write(spec: KernelSpec, module: ir.Module) -> None:
    """Write ``update(table, k0, p0, width, start, stop, factors)``.

    It updates the columns from `start` to `stop` by `width` steps from p0 on of a panel: those of columns k0 on.
    `factors` is the address of `factors_nbytes` of memory.
    """
    f = Frame(spec, "update", 6, module)
    e, (start, stop, address) = f.e, f.arguments[3:]
    memory = e.value(e.builder.inttoptr(address.raw, ir.PointerType()))
    size = columns_of_tile(spec)
    with e.loop(start, stop, CHUNK) as first:
        last = e.unsigned("umin", first + CHUNK, stop)
        whole = first + (last - first) / size * size
        _update(_Tile(f, size, memory), first, whole)
        _update(_Tile(f, 1, memory), whole, last)
    e.finish()


def _update(tile: _Tile, start: Value, stop: Value) -> None:
    f, e = tile.f, tile.f.e
    with e.loop(start, stop, tile.size) as j:
        tile.find_factors(j, tile.factors(j - start))
    with e.loop(0, f["blocks"]) as b, e.loop(start, stop, tile.size) as j:
        tile.update(b, j, tile.factors(j - start))


class _Tile:
    """Some columns that are in work together."""

    def __init__(self, f: Frame, size: int, memory: Value):
        self.f, self.e, self.size, self.memory = f, f.e, size, memory
        self.k0, self.p0, self.width = f.arguments[:3]
        self.kind = ir.VectorType(f.e.real, size)

    def factors(self, columns: Value) -> Value:
        """Return where the factors of the tile are that begins after so many columns."""
        return self.e.at(self.memory, columns * _factors(self.f.spec))

    def _factor(self, factors: Value, step: Value | int) -> list[Value]:
        first = self.e.at(factors, step * (self.f.parts * self.size))
        return [self.e.at(first, part * self.size) for part in range(self.f.parts)]

    def find_factors(self, j: Value, factors: Value) -> None:
        """Find f of each column for all steps, some of these together; what they stand in becomes 0."""
        f, e = self.f, self.e
        rows = [f.row(j + t) for t in range(self.size)]
        with e.loop(0, self.width, STEPS) as first:
            numbers = []
            for i in range(STEPS):
                pivot = f.get("pivots", self.k0 + first + i)
                entries = [f.entry(row, pivot) for row in rows]
                numbers.append(
                    Number(e, tuple(e.gathered(parts) for parts in zip(*(x.parts for x in entries), strict=True)))
                )
                for row in rows:
                    f.set_entry(f.constant(0.0), row, pivot)
            sums = [NumberVariable(number) for number in numbers]
            with e.loop(0, first) as earlier:
                factor = Number(e, tuple(e.load(place, self.kind) for place in self._factor(factors, earlier)))
                for i, total in enumerate(sums):
                    total.set(total.get().plus_product(factor, self._lower(first + i, earlier)))
            found: list[Number] = []
            for i, total in enumerate(sums):
                number = total.get()
                for earlier_one, factor in enumerate(found):
                    number = number.plus_product(factor, self._lower(first + i, first + earlier_one))
                found.append(number)
                for value, place in zip(number.parts, self._factor(factors, first + i), strict=True):
                    e.store(value, place)

    def _lower(self, step: Value, earlier: Value) -> Number:
        place = self.f.lower(self.p0 + step, self.p0 + earlier)
        parts = [self.e.load(self.e.at(place, part), self.e.real) for part in range(self.f.parts)]
        return Number(self.e, tuple(parts)).splat(self.size)

    def update(self, b: Value, j: Value, factors: Value) -> None:
        """Update a block of each column."""
        f, e, size = self.f, self.e, self.size
        rows = [f.row(j + t) for t in range(size)]
        places = [b * f.block + v * f.lanes for v in range(BLOCK)]
        for t in range(size):  # what comes next, as far as the processor cannot guess it
            following = f.row(j + (size + t))
            for at in range(0, f.block * f.spec.itemsize, 64):
                e.prefetch(e.at(following, b * f.block + at // f.spec.itemsize))
        sums = [[NumberVariable(f.load(row, place)) for place in places] for row in rows]
        with e.loop(0, self.width) as p:
            saved = f.saved(b, self.p0 + p)
            columns = []
            for v in range(BLOCK):
                parts = f.saved_parts(saved, v * f.lanes)
                columns.append(Number(e, tuple(e.load(part, align=e.nbytes) for part in parts)))
            step = self._factor(factors, p)
            for t in range(size):
                factor = Number(e, tuple(e.load(e.at(part, t), e.real) for part in step)).splat()
                for total, column in zip(sums[t], columns, strict=True):
                    total.set(total.get().plus_product(factor, column))
        for row, totals in zip(rows, sums, strict=True):
            for total, place in zip(totals, places, strict=True):
                f.store(total.get(), row, place)
