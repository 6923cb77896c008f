"""One matrix per lane, in the first-level cache: for matrices that do not fit into registers.

The scratch holds a group of as many matrices as there are lanes, entry by entry: vector (i, j) has that entry of
all of them. What happens to it in between is in `elimination` and `decomposition`.
"""

from __future__ import annotations

from dask_batchinv.kernels.cpu import interleaved_ldl, scaling
from dask_batchinv.kernels.cpu.interleaved_gauss_jordan import eliminate
from dask_batchinv.kernels.cpu.interleaved_group import Group
from dask_batchinv.kernels.cpu.streaming import Traffic
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.transpose import load_columns, store_columns, transpose
from dask_batchinv.kernels.emit.values import Value


def write(name: str, n: int, itemsize: int, parts: int, lanes: int, *, definite: bool) -> str:
    """Write the kernel; the parameters are those of `registers.write`."""
    e = Emitter(name, itemsize, lanes)
    g = Group(e, n, parts)
    traffic = Traffic(e, g.size, g.buffer)
    with e.loop(0, e.arguments[4]) as group:
        finite, scale = _read(g, group, definite)
        if definite:
            _multiply_rarely(g, scale)
            steps = interleaved_ldl.pauses(n)
            outcome = interleaved_ldl.invert(g, scale.first, lambda step: traffic.step(group, step, steps))
            failed, norm, norm_of_inverse = outcome.failed, outcome.norm, outcome.norm_of_inverse
            target = traffic.place(group)
            _write_as_it_is(g, target, scale)
        else:
            norm = _scale(g, scale)
            failed = eliminate(g, lambda k: traffic.step(group, k, n))
            target = traffic.place(group)
            if e.can_permute:
                norm_of_inverse = _write_permuted(g, target, scale)
            else:
                _exchange_columns(g)
                norm_of_inverse = _norm(g)
                _write_as_it_is(g, target, scale)
        info = _judge(g, failed, finite, scale, norm_of_inverse, target)
        at = group * lanes
        e.store(e.resize(info, e.int32), e.at(e.arguments[2], at, e.int32), align=4)
        e.store(scaling.rcond(e, info, finite, norm, norm_of_inverse), e.at(e.arguments[3], at))
    traffic.finish(e.arguments[4])
    return e.finish()


# --- in ---------------------------------------------------------------------------------------------------------


def _read(g: Group, group: Value, definite: bool) -> tuple[Value, scaling.Scale]:
    """Interleave the matrices, and find their scale."""
    e = g.e
    base = e.at(e.arguments[0], group * (e.lanes * g.size))
    measure = scaling.Measure(e)

    def take(start: Value, count: int) -> None:
        entries = load_columns(e, lambda lane: e.at(base, start + lane * g.size), count)
        for q, entry in enumerate(entries):
            if not definite:
                measure.look(entry)
            e.store(entry, g.vector(start + q), align=e.nbytes)

    g.each_piece(take)
    if definite:
        with e.loop(0, g.n) as i:
            measure.look(g.read(g.entry(i, i)).parts[0])
            with e.loop(i + 1, g.n) as j:
                for part in g.read(g.entry(i, j)).parts:
                    measure.look(part)
    return measure.of_lanes()


def _scale(g: Group, scale: scaling.Scale) -> Value:
    """Bring the matrices to unit size, and return their 1-norms."""
    e = g.e
    _multiply_rarely(g, scale)
    norm = e.variable(e.numbers(0.0))
    with e.loop(0, g.n) as j:
        total = e.numbers(0.0)
        for i in range(g.n):
            number = g.read(g.entry(e.integer(i), j)).times_real(scale.first)
            g.keep(number, g.entry(e.integer(i), j))
            total = number.modulus() if i == 0 else total + number.modulus()
        norm.set(scaling.larger_sum(e, total, norm.get()))
    return norm.get()


def _multiply_rarely(g: Group, scale: scaling.Scale) -> None:
    e = g.e
    with e.when(scale.is_long), e.loop(0, g.size) as at:
        e.store(e.load(g.vector(at), align=e.nbytes) * scale.second, g.vector(at), align=e.nbytes)


# --- out --------------------------------------------------------------------------------------------------------


def _norm(g: Group) -> Value:
    e = g.e
    norm = e.variable(e.numbers(0.0))
    with e.loop(0, g.n) as j:
        total = g.read(g.entry(e.integer(0), j)).modulus()
        for i in range(1, g.n):
            total = total + g.read(g.entry(e.integer(i), j)).modulus()
        norm.set(scaling.larger_sum(e, total, norm.get()))
    return norm.get()


def _judge(g: Group, failed: Value, finite: Value, scale: scaling.Scale, norm: Value, target: Value) -> Value:
    """Return ``info``, after writing NaN over the inverses where it is not 0."""
    e = g.e
    overflow = e.variable(e.integers(0))
    with e.when(e.any(~(norm * scale.first * scale.second < float("inf")))):
        # The sum is too large; is one of its numbers?
        largest = e.variable(e.integers(0))
        with e.loop(0, g.size) as at:
            entry = e.load(g.vector(at), align=e.nbytes) * scale.first * scale.second
            largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(entry))))
        overflow.set(e.bit_words(~scaling.is_finite(e, largest.get())))
    info = scaling.outcome(e, failed, finite, ~overflow.get().eq(0))
    bad = ~info.eq(0)
    with (
        e.when(e.any(bad)),
        e.loop(0, e.lanes) as lane,
        e.when(~(e.mask_bits(bad) & (e.integer(1) << lane)).eq(0)),
        e.loop(0, g.size) as at,
    ):
        e.store(e.number(float("nan")), e.at(target, lane * g.size + at))
    return info


def _write_as_it_is(g: Group, target: Value, scale: scaling.Scale) -> None:
    e = g.e

    def give(start: Value, count: int) -> None:
        entries = [_scaled_back(e, e.load(g.vector(start + q), align=e.nbytes), scale) for q in range(count)]
        store_columns(e, entries, lambda lane: e.at(target, start + lane * g.size))

    g.each_piece(give)


def _scaled_back(e: Emitter, entry: Value, scale: scaling.Scale) -> Value:
    return scaling.without_sign_of_zero(e, entry * scale.first, scale.second)


def _exchange_columns(g: Group) -> None:
    """Undo to columns what was done to rows."""
    e = g.e
    with e.loop(0, g.n) as row:
        for k in reversed(range(g.n - 1)):
            chosen = e.load(g.vector(k, g.chosen), e.words, align=e.nbytes)
            mine = g.read(g.entry(row, k))
            for i in range(k + 1, g.n):
                here = chosen.eq(i)
                other = g.read(g.entry(row, i))
                g.keep(mine.where(here, other), g.entry(row, i))
                mine = other.where(here, mine)
            g.keep(mine, g.entry(row, k))


def _write_permuted(g: Group, target: Value, scale: scaling.Scale) -> Value:
    """Write row by row, putting the columns in order within the registers; return the 1-norms before scaling."""
    e, n, length = g.e, g.n, g.n * g.parts
    blocks = range(-(-length // e.lanes))
    _find_orders(g, blocks)
    # Square roots are slow, but leave time for shuffling.
    on_the_way = g.parts == 2
    for j in range(n if on_the_way else 0):
        e.store(e.numbers(0.0), g.vector(j, g.sums), align=e.nbytes)
    norm = None if on_the_way else _norm(g)
    with e.loop(0, n) as line:
        numbers = [g.read(g.entry(line, j)) for j in range(n)]
        for j, number in enumerate(numbers if on_the_way else []):
            total = e.load(g.vector(j, g.sums), align=e.nbytes) + number.modulus()
            e.store(total, g.vector(j, g.sums), align=e.nbytes)
        parts = [_scaled_back(e, part, scale) for number in numbers for part in number.parts]
        parts += [e.numbers(0.0)] * (len(blocks) * e.lanes - length)
        turned = [transpose(e, parts[b * e.lanes :][: e.lanes]) for b in blocks]
        for lane in range(e.lanes):
            for b in blocks:
                order = e.load(g.vector(b * e.lanes + lane, g.orders), e.words, align=e.nbytes)
                place = e.at(target, line * length + (lane * g.size + b * e.lanes))
                e.store_first(e.permute([block[lane] for block in turned], order), place, length - b * e.lanes)
    return norm or scaling.largest_sum(e, [e.load(g.vector(j, g.sums), align=e.nbytes) for j in range(n)])


def _find_orders(g: Group, blocks: range) -> None:
    """Find for each number in a row of the inverse where in a row of the scratch it is, matrix by matrix."""
    e = g.e
    # For each column of the inverse the column of the scratch; then the same lane by lane.
    source = [e.integers(j) for j in range(g.n)]
    for k in reversed(range(g.n - 1)):
        chosen = e.load(g.vector(k, g.chosen), e.words, align=e.nbytes)
        for i in range(k + 1, g.n):
            here = chosen.eq(i)
            source[k], source[i] = e.select(here, source[i], source[k]), e.select(here, source[k], source[i])
    orders = [column * g.parts + p for column in source for p in range(g.parts)]
    orders += [e.integers(0)] * (len(blocks) * e.lanes - len(orders))
    for b in blocks:
        turned = transpose(e, [e.from_bits(order) for order in orders[b * e.lanes :][: e.lanes]])
        for lane, value in enumerate(turned):
            e.store(value, g.vector(b * e.lanes + lane, g.orders), align=e.nbytes)
