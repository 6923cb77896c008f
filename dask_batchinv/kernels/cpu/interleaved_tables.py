"""Tables with a number for each row of each matrix of a group, where each lane may ask for a row of its own.

What a lane wants is loaded or stored by itself: that takes as many steps as there are lanes, not rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dask_batchinv.kernels.cpu.interleaved_group import Group
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number, constant_number
from dask_batchinv.kernels.emit.values import INT, Value


@dataclass(frozen=True)
class Row:
    """The number of a row."""

    scalar: Value
    vector: Value
    """The same in all lanes."""


def each_row(e: Emitter, start: Value | int, n: int, body: Callable[[Row], None]) -> None:
    """Run the body for each row from `start` on."""
    number = e.variable(e.integers(start) if isinstance(start, int) else e.splat(e.resize(start, e.word)))
    with e.loop(start, n) as i:
        body(Row(i, number.get()))
        number.set(number.get() + 1)


def rows_of_lanes(e: Emitter, rows: Value) -> list[Value]:
    """Return the row number of each lane as a scalar."""
    return [e.resize(e.lane(rows, lane), INT) for lane in range(e.lanes)]


def gathered(e: Emitter, places: list[Value], parts: int) -> Number:
    """Return the numbers at some addresses, one for each lane; the parts of each are a vector apart."""
    loaded = [[e.load(e.at(place, p * e.lanes), e.real) for place in places] for p in range(parts)]
    return Number(e, tuple(e.gathered(part) for part in loaded))


class Table:
    """Numbers of all rows, and of row n, which is read and written for lanes that have none."""

    def __init__(self, g: Group, start: Value, parts: int):
        self.g, self.e, self.start, self.parts = g, g.e, start, parts
        self._keep(constant_number(self.e, self.e.numbers(0.0), parts), self.e.integer(g.n))

    def get(self, row: Row) -> Number:
        """Return the numbers of a row."""
        load, align, address = self.e.load, self.e.nbytes, self._address(row.scalar)
        return Number(self.e, tuple(load(self.g.vector(p, address), align=align) for p in range(self.parts)))

    def set(self, row: Row, number: Number) -> None:
        """Replace the numbers of a row."""
        self._keep(number, row.scalar)

    def pick(self, rows: Value) -> Number:
        """Return the number of each lane's row."""
        return gathered(self.e, self._places(rows), self.parts)

    def put(self, rows: Value, number: Number) -> None:
        """Replace the number of each lane's row."""
        for lane, place in enumerate(self._places(rows)):
            for p, part in enumerate(number.parts):
                self.e.store(self.e.lane(part, lane), self.e.at(place, p * self.e.lanes))

    def _keep(self, number: Number, row: Value) -> None:
        for p, part in enumerate(number.parts):
            self.e.store(part, self.g.vector(p, self._address(row)), align=self.e.nbytes)

    def _address(self, row: Value) -> Value:
        return self.g.vector(row * self.parts, self.start)

    def _places(self, rows: Value) -> list[Value]:
        return [self.e.at(self._address(row), lane) for lane, row in enumerate(rows_of_lanes(self.e, rows))]
