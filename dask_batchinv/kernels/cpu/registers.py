"""One matrix per lane, in registers: for the smallest matrices.

A vector of W lanes holds the same entry of W matrices, so that one instruction works on all of them. Everything is
unrolled, and in place. What happens in between is in `registers_gauss_jordan` and `registers_ldl`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from dask_batchinv.kernels.cpu import scaling
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.streaming import Streaming
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.transpose import load_stack, store_stack
from dask_batchinv.kernels.emit.values import Value
from dask_batchinv.outcome import Info

Matrix = list[list[Number]]


@dataclass(frozen=True)
class Algorithm:
    """How matrices of a structure are inverted in registers."""

    reads: Callable[[int, int, int], bool]
    """``reads(i, j, part)``: whether a part of entry (i, j) counts."""
    complete: Callable[[Matrix], None]
    """Fills up what is not read, or was not computed."""
    invert: Callable[[Emitter, Matrix, Callable[[], None]], Value]
    """``invert(e, a, between_steps)`` works in place and returns ``info`` of the pivots; 0 where none fails."""
    n_steps: Callable[[int], int]
    """``n_steps(n)``: how often `invert` calls `between_steps`."""


def write(algorithm: Algorithm, spec: KernelSpec) -> str:
    """Write the kernel: it inverts `count` groups of as many matrices as there are lanes."""
    n, parts, size, lanes = spec.n, spec.parts, spec.size, spec.lanes
    e = Emitter(spec.name, spec.itemsize, lanes)
    streaming = Streaming(e, size, e.scratch)
    with e.loop(0, e.count) as group:
        entries = load_stack(e, e.at(e.a, group * (lanes * size)), size)
        measure = scaling.Measure(e)
        for at, entry in enumerate(entries):
            (i, j), part = divmod(at // parts, n), at % parts
            if algorithm.reads(i, j, part):
                measure.look(entry)
        finite, scale = measure.of_lanes()
        entries = _multiply(e, entries, scale)
        a = [[Number(e, tuple(entries[(i * n + j) * parts :][:parts])) for j in range(n)] for i in range(n)]
        algorithm.complete(a)
        norm = _norm(e, a)
        steps = itertools.count()
        pivot = algorithm.invert(e, a, lambda: streaming.step(group, next(steps), algorithm.n_steps(n)))
        algorithm.complete(a)
        norm_of_inverse = _norm(e, a)
        entries = _multiply(e, [part for row in a for number in row for part in number.parts], scale)
        info = e.variable(e.select(finite, pivot, Info.NOT_FINITE))
        rcond = e.variable(scaling.rcond_of(e, norm, norm_of_inverse))
        with e.when(e.any(~(norm_of_inverse * scale.first * scale.second < float("inf")))):
            # The column sum overflowed: did an entry?
            info.set(e.select(_is_finite(e, entries) | ~info.get().eq(0), info.get(), Info.OVERFLOW))
        variables = [e.variable(entry) for entry in entries]
        with e.when(e.any(~info.get().eq(0))):
            for variable in variables:
                variable.set(e.select(info.get().eq(0), variable.get(), float("nan")))
            rcond.set(scaling.rcond_or_failure(e, rcond.get(), info.get(), finite))
        store_stack(e, [variable.get() for variable in variables], streaming.target(group))
        first = group * lanes
        marked = scaling.marked(e, info.get(), norm, norm_of_inverse, parts)
        e.store(e.resize(marked, e.int32), e.at(e.info, first, e.int32), align=4)
        e.store(rcond.get(), e.at(e.rcond, first))
    streaming.finish()
    return e.finish()


def _multiply(e: Emitter, entries: list[Value], scale: scaling.Scale) -> list[Value]:
    """Return entries scaled, with no negative zeros."""
    variables = [e.variable(scaling.without_sign_of_zero(e, entry, scale.first)) for entry in entries]
    with e.when(scale.is_long):
        for variable in variables:
            variable.set(scaling.without_sign_of_zero(e, variable.get(), scale.second))
    return [variable.get() for variable in variables]


def _norm(e: Emitter, a: Matrix) -> Value:
    """Return the 1-norm: the largest sum of a column."""
    sums = [row.modulus() for row in a[0]]
    for row in a[1:]:
        sums = [total + number.modulus() for total, number in zip(sums, row, strict=True)]
    return scaling.largest_sum(e, sums)


def _is_finite(e: Emitter, entries: list[Value]) -> Value:
    largest = e.integers(0)
    for entry in entries:
        largest = e.unsigned("umax", largest, e.bits(e.absolute(entry)))
    return scaling.is_finite(e, largest)
