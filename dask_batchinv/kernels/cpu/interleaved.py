"""One matrix per lane, in the first-level cache: for matrices that do not fit into registers.

The scratch holds a group of as many matrices as there are lanes, entry by entry: vector (i, j) has that entry of
all of them. What happens to it in between is in `interleaved_gauss_jordan`, `interleaved_ldl`, `interleaved_symmetric`
and `interleaved_triangular`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dask_batchinv.kernels.cpu import scaling
from dask_batchinv.kernels.cpu.interleaved_group import Group
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.streaming import Streaming
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.transpose import load_columns, store_columns
from dask_batchinv.kernels.emit.values import Value


@dataclass(frozen=True)
class Inverted:
    """A group that was inverted, but for its way out."""

    failed: Value
    """``info`` of the pivots; 0 where none fails."""
    norm: Value
    """The 1-norms of the matrices, scaled."""
    store: Callable[[Value], Value]
    """``store(target)`` writes the inverses and returns their 1-norms before they are scaled back."""


@dataclass(frozen=True)
class Algorithm:
    """How matrices of a structure are inverted in a group."""

    part: Literal["all", "upper", "lower", "upper Hermitian"]
    """What is read; in the last case without the imaginary parts of the diagonal."""
    invert: Callable[[Group, scaling.Scale, Callable[[Value | int], None]], Inverted]
    """``invert(g, scale, between_steps)``; the latter is called with the number of each step."""
    n_steps: Callable[[int], int]
    """``n_steps(n)``: how often `invert` calls `between_steps`."""
    tables: Sequence[int] = ()
    """Lengths in vectors of tables that it has in the scratch for itself: `Group.more`."""


def write(algorithm: Algorithm, spec: KernelSpec) -> str:
    """Write the kernel: it inverts `count` groups of as many matrices as there are lanes."""
    e = Emitter(spec.name, spec.itemsize, spec.lanes)
    g = Group(e, spec, algorithm.tables)
    streaming, steps = Streaming(e, g.size, g.buffer), algorithm.n_steps(g.n)
    with e.loop(0, e.count) as group:
        finite, scale = _read(g, group, algorithm.part)
        inverted = algorithm.invert(g, scale, lambda step: streaming.step(group, step, steps))
        target = streaming.target(group)
        norm_of_inverse = inverted.store(target)
        info = _judge(g, inverted.failed, finite, scale, norm_of_inverse, target)
        scaling.write_account(e, group * spec.lanes, info, inverted.norm, norm_of_inverse, finite, spec.parts)
    streaming.finish()
    return e.finish()


def _read(g: Group, group: Value, part: str) -> tuple[Value, scaling.Scale]:
    """Interleave the matrices, and find the scale of what is read of them."""
    e = g.e
    base = e.at(e.a, group * (e.lanes * g.size))
    measure = scaling.Measure(e)

    def take(start: Value, count: int) -> None:
        entries = load_columns(e, lambda lane: e.at(base, start + lane * g.size), count)
        for q, entry in enumerate(entries):
            if part == "all":
                measure.look(entry)
            e.store(entry, g.vector(start + q), align=e.nbytes)

    g.each_piece(take)
    if part != "all":
        with e.loop(0, g.n) as i:
            diagonal = g.read(g.entry(i, i)).parts
            for value in diagonal[:1] if part == "upper Hermitian" else diagonal:
                measure.look(value)
            with e.loop(0, i) if part == "lower" else e.loop(i + 1, g.n) as j:
                for value in g.read(g.entry(i, j)).parts:
                    measure.look(value)
    return measure.of_lanes()


def multiply_rarely(g: Group, scale: scaling.Scale) -> None:
    """Multiply by what one factor of the scale lacks, which is rare."""
    e = g.e
    with e.when(scale.is_long), e.loop(0, g.size) as at:
        e.store(e.load(g.vector(at), align=e.nbytes) * scale.second, g.vector(at), align=e.nbytes)


def _judge(g: Group, failed: Value, finite: Value, scale: scaling.Scale, norm: Value, target: Value) -> Value:
    """Return ``info``, after writing NaN over the inverses where it is not 0."""
    e = g.e
    overflow = e.variable(e.integers(0))
    with e.when(e.any(~(norm * scale.first * scale.second < float("inf")))):
        # The column sum overflowed: did an entry?
        largest = e.variable(e.integers(0))
        with e.loop(0, g.size) as at:
            entry = e.load(g.vector(at), align=e.nbytes) * scale.first * scale.second
            largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(entry))))
        overflow.set(e.bit_words(~scaling.is_finite(e, largest.get())))
    info = scaling.info_of(e, failed, finite, ~overflow.get().eq(0))
    bad = ~info.eq(0)
    with (
        e.when(e.any(bad)),
        e.loop(0, e.lanes) as lane,
        e.when(~(e.mask_bits(bad) & (e.integer(1) << lane)).eq(0)),
        e.loop(0, g.size) as at,
    ):
        e.store(e.number(float("nan")), e.at(target, lane * g.size + at))
    return info


def write_as_it_is(g: Group, target: Value, scale: scaling.Scale) -> None:
    """Deinterleave the inverses to where they belong, scaled back."""
    e = g.e

    def give(start: Value, count: int) -> None:
        entries = [scaled_back(e, e.load(g.vector(start + q), align=e.nbytes), scale) for q in range(count)]
        store_columns(e, entries, lambda lane: e.at(target, start + lane * g.size))

    g.each_piece(give)


def scaled_back(e: Emitter, entry: Value, scale: scaling.Scale) -> Value:
    """Return numbers of the inverse at the scale of the matrix."""
    return scaling.without_sign_of_zero(e, entry * scale.first, scale.second)
