"""In and out of the scratch for kernels that work within a matrix and keep up its upper triangle only."""

from __future__ import annotations

from functools import partial

from dask_batchinv.kernels.cpu import scaling
from dask_batchinv.kernels.cpu.scaling import larger_sum
from dask_batchinv.kernels.cpu.symmetric_pivots import Symmetry
from dask_batchinv.kernels.cpu.within_rows import read_rows, write_rows
from dask_batchinv.kernels.cpu.within_workspace import WorkspaceMatrix, across, each_vector, settle
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.transpose import transpose
from dask_batchinv.kernels.emit.values import Value


def measure(a: WorkspaceMatrix, index: Value, symmetry: Symmetry) -> None:
    """Find the scale of the upper triangle of a matrix."""
    e, s = a.e, a.s
    source = e.at(e.a, index * s.size)
    length = s.n * s.parts
    measure = scaling.Measure(e)
    with e.loop(0, s.n) as i:
        diagonal = i * s.parts

        def look(c: Value, count: int, i: Value = i, diagonal: Value = diagonal) -> None:
            numbers = e.load_first(e.at(source, i * length + c), count)
            at = e.iota + e.splat(e.resize(c - diagonal, e.word))
            counts = at > -1
            if s.parts == 2 and symmetry.is_hermitian:
                counts = counts & ~at.eq(1)
            measure.look(e.select(counts, numbers, 0.0))

        whole = length - length % e.lanes
        with e.loop(diagonal & -e.lanes, whole, e.lanes) as c:
            look(c, e.lanes)
        if length % e.lanes:
            look(e.integer(whole), length % e.lanes)
    settle(a, measure)


def read(a: WorkspaceMatrix, index: Value, symmetry: Symmetry) -> None:
    """Bring the upper triangle to unit size, and sum up its columns."""
    e = a.e
    first, second = a.scale()
    read_rows(a, index, lambda number, i, v: Number(e, tuple(part * first * second for part in number.parts)))
    _sum_up(a, symmetry)
    e.store(e.lane(across(e, _norm(a), partial(larger_sum, e)), 0), a.norm)


def _sum_up(a: WorkspaceMatrix, symmetry: Symmetry, *, finish: bool = False) -> None:
    """Sum up the columns of a matrix whose upper triangle is there; to finish, make it whole, and negate it."""
    e, s = a.e, a.s
    with e.loop(0, s.vectors) as v:
        e.store(e.numbers(0.0), e.at(a.saved, v * e.lanes), align=e.nbytes)

    def block(i: Value, v: Value) -> list[Number]:
        numbers = [a.load(a.rows, i * e.lanes + t, v) for t in range(e.lanes)]
        return [-number for number in numbers] if finish else numbers

    def turn(numbers: list[Number]) -> list[Number]:
        parts = [transpose(e, [number.parts[p] for number in numbers]) for p in range(s.parts)]
        return [symmetry.across(Number(e, tuple(part[t] for part in parts))) for t in range(e.lanes)]

    def put(numbers: list[Number], i: Value, v: Value) -> None:
        sums = e.at(a.saved, v * e.lanes)
        total = e.load(sums, align=e.nbytes)
        for t in range(0, e.lanes, 2):
            # In pairs, to wait half as often; there is no vector of one lane.
            total = total + (numbers[t].modulus() + numbers[t + 1].modulus())
        e.store(total, sums, align=e.nbytes)
        if finish:
            for t, number in enumerate(numbers):
                a.store(number, a.rows, i * e.lanes + t, v)

    with e.loop(0, s.vectors) as i:
        numbers = block(i, i)
        pairs = enumerate(zip(numbers, turn(numbers), strict=True))
        put([x.where(e.iota > t, symmetry.diagonal(x).where(e.iota.eq(t), y)) for t, (x, y) in pairs], i, i)
        with e.loop(i + 1, s.vectors) as v:
            numbers = block(i, v)
            put(numbers, i, v)
            put(turn(numbers), v, i)


def _norm(a: WorkspaceMatrix) -> Value:
    """Return the largest sums, lane by lane."""
    e = a.e
    norm = e.variable(e.numbers(0.0))
    each_vector(
        e,
        a.s.vectors,
        lambda v: norm.set(larger_sum(e, e.load(e.at(a.saved, v * e.lanes), align=e.nbytes), norm.get())),
    )
    return norm.get()


def write(a: WorkspaceMatrix, index: Value, symmetry: Symmetry) -> None:
    """Write whole inverses, scaled back; what stands in the scratch is minus the upper triangle."""
    _sum_up(a, symmetry, finish=True)
    norm = _norm(a)
    a.put_aside(write_rows(a, index), norm)
