"""Transposes between matrices as stored (AoS) and one matrix per lane (SoA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.values import Value


def load_columns(e: Emitter, address: Callable[[int], Value], count: int) -> list[Value]:
    """Load `count` numbers from as many addresses as there are lanes, and transpose them.

    Lane i of value j is the j-th number at ``address(i)``. Nothing beyond the numbers asked for is touched.
    """
    w, size = e.lanes, _piece(e, count)
    columns: list[Value] = []
    for start in _pieces(count, size):
        # Loading pieces into the lanes where they belong takes the place of the first rounds of exchanges.
        rows = []
        for i in range(size):
            pieces = [_load_piece(e, e.at(address(j), start), size) for j in range(i, w, size)]
            rows.append(_join(e, pieces))
        columns[start:] = exchange(e, rows, size)
    return columns


def store_columns(e: Emitter, columns: Sequence[Value], address: Callable[[int], Value]) -> None:
    """Store values to as many addresses as there are lanes; the opposite of `load_columns`."""
    w, size = e.lanes, _piece(e, len(columns))
    for start in _pieces(len(columns), size):
        rows = exchange(e, columns[start : start + size], size)
        for i, row in enumerate(rows):
            for j in range(i, w, size):
                piece = e.shuffle(row, None, range(j - i, j - i + size))
                e.store(piece, e.at(address(j), start))


def load_stack(e: Emitter, pointer: Value, count: int) -> list[Value]:
    """Load as many times `count` adjacent numbers as there are lanes, and transpose them as `load_columns` does."""
    if not _is_dealt(e, count):
        return load_columns(e, lambda lane: e.at(pointer, lane * count), count)
    return _deal(e, [e.load(e.at(pointer, i * e.lanes)) for i in range(count)])


def store_stack(e: Emitter, columns: Sequence[Value], pointer: Value) -> None:
    """Store values to adjacent numbers; the opposite of `load_stack`."""
    count = len(columns)
    if not _is_dealt(e, count):
        store_columns(e, columns, lambda lane: e.at(pointer, lane * count))
        return
    for i, value in enumerate(_gather(e, columns)):
        e.store(value, e.at(pointer, i * e.lanes))


def _is_dealt(e: Emitter, count: int) -> bool:
    return count & (count - 1) == 0 and 2 * count <= e.lanes


def _deal(e: Emitter, values: Sequence[Value]) -> list[Value]:
    """Deal the lanes of some vectors to as many: lane i of vector 0 goes to vector i, and so on in rounds."""
    if len(values) == 1:
        return list(values)
    halves = []
    for first in range(2):
        lanes, pairs = range(first, 2 * e.lanes, 2), zip(values[::2], values[1::2], strict=True)
        halves.append(_deal(e, [e.shuffle(a, b, lanes) for a, b in pairs]))
    return [value for pair in zip(*halves, strict=True) for value in pair]


def _gather(e: Emitter, values: Sequence[Value]) -> list[Value]:
    """Do the opposite of `_deal`."""
    if len(values) == 1:
        return list(values)
    halves = [_gather(e, values[first::2]) for first in range(2)]
    w = e.lanes
    orders = [[at // 2 + at % 2 * w for at in range(start, start + w)] for start in (0, w)]
    return [e.shuffle(a, b, order) for a, b in zip(*halves, strict=True) for order in orders]


def _piece(e: Emitter, count: int) -> int:
    return min(max(1, e.lanes // 2), 1 << (count.bit_length() - 1))


def _pieces(count: int, size: int) -> list[int]:
    """Return where pieces start; the last may overlap the one before."""
    return [*range(0, count - size + 1, size), *([count - size] if count % size else [])]


def _load_piece(e: Emitter, pointer: Value, size: int) -> Value:
    return e.load(pointer, ir.VectorType(e.real, size))


def _join(e: Emitter, pieces: Sequence[Value]) -> Value:
    while len(pieces) > 1:
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        pieces = [e.shuffle(a, b, range(2 * a.type.count)) for a, b in pairs]
    return pieces[0]


def transpose(e: Emitter, rows: Sequence[Value]) -> list[Value]:
    """Transpose as many vectors as there are lanes: lane j of vector i becomes lane i of vector j."""
    return exchange(e, rows, e.lanes)


def exchange(e: Emitter, rows: Sequence[Value], size: int) -> list[Value]:
    """Transpose each of the size × size squares that stand side by side in `size` vectors."""
    values, distance, w = list(rows), size // 2, rows[0].type.count
    while distance:
        low = [i if not i & distance else w + i - distance for i in range(w)]
        high = [i + distance if not i & distance else w + i for i in range(w)]
        for i in range(size):
            if not i & distance:
                a, b = values[i], values[i + distance]
                values[i], values[i + distance] = e.shuffle(a, b, low), e.shuffle(a, b, high)
        distance //= 2
    return values
