"""The inverse of diagonal matrices: reciprocals, and zeros that are written, not computed.

Small matrices go one per lane, and by way of a buffer where that makes non-temporal stores possible (`streaming`). Of
larger ones, which are mostly zeros, one is in work at a time, its diagonal in vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dask_batchinv.kernels.cpu import scaling
from dask_batchinv.kernels.cpu.spec import KernelSpec, Workspace
from dask_batchinv.kernels.cpu.streaming import Streaming, buffer_nbytes
from dask_batchinv.kernels.cpu.within_workspace import across
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.values import Value

#: The largest n of which matrices go one per lane: no less than the lanes of any vector, as the others need.
PER_LANE = 32


def workspace(spec: KernelSpec) -> Workspace:
    """Return what the kernel works on at a time: for each vector of the diagonal its numbers, and a buffer."""
    vector_nbytes = spec.lanes * spec.itemsize
    if spec.n <= PER_LANE:
        return Workspace(spec.lanes, spec.n * spec.parts * vector_nbytes + buffer_nbytes(spec.size, vector_nbytes))
    return Workspace(1, -(-spec.n // spec.lanes) * spec.parts * vector_nbytes)


def write(spec: KernelSpec) -> str:
    """Write the kernel."""
    e = Emitter(spec.name, spec.itemsize, spec.lanes)
    if spec.n <= PER_LANE:
        _write_per_lane(e, spec)
    else:
        _write_within(e, spec)
    return e.finish()


class _Diagonals:
    """The diagonals in work, as vectors: each with an entry of several matrices, or with several entries of one."""

    def __init__(self, e: Emitter, spec: KernelSpec, vectors: int, read: Callable[[Value], Number]):
        self.e, self.spec, self.vectors, self.read = e, spec, vectors, read

    def _place(self, v: Value, part: int) -> Value:
        return self.e.at(self.e.scratch, (v * self.spec.parts + part) * self.e.lanes)

    def get(self, v: Value) -> Number:
        """Return a vector of inverses."""
        return Number(
            self.e, tuple(self.e.load(self._place(v, p), align=self.e.nbytes) for p in range(self.spec.parts))
        )

    def measure(self, between: Callable[[Value], None] = lambda v: None) -> scaling.Measure:
        """Read the diagonals, and measure them."""
        measure = scaling.Measure(self.e)
        with self.e.loop(0, self.vectors) as v:
            between(v)
            for p, part in enumerate(self.read(v).parts):
                measure.look(part)
                self.e.store(part, self._place(v, p), align=self.e.nbytes)
        return measure

    def invert(self, scale: scaling.Scale) -> tuple[Value, Value, Value, Value]:
        """Put the inverses there.

        Returns
        -------
        tuple
            Lane by lane: the number of the first vector with a zero, counted from 1, or 0; the largest magnitudes of
            the numbers at unit size, and of their inverses; and the bits of the largest number written.
        """
        e = self.e
        first, second = (e.splat(x) if not x.is_vector else x for x in (scale.first, scale.second))
        failed, largest = e.variable(e.integers(0)), e.variable(e.integers(0))
        norm, norm_of_inverse = e.variable(e.numbers(0.0)), e.variable(e.numbers(0.0))
        with e.loop(0, self.vectors) as v:
            number = self.get(v).times_real(first).times_real(second)
            now = failed.get()
            failed.set(e.select(number.size().eq(0.0) & now.eq(0), e.splat(e.resize(v + 1, e.word)), now))
            inverse = number.reciprocal()
            norm.set(scaling.larger_sum(e, number.modulus(), norm.get()))
            norm_of_inverse.set(scaling.larger_sum(e, inverse.modulus(), norm_of_inverse.get()))
            for p, part in enumerate(inverse.parts):
                back = scaling.without_sign_of_zero(e, part * first, second)
                largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(back))))
                e.store(back, self._place(v, p), align=e.nbytes)
        return failed.get(), norm.get(), norm_of_inverse.get(), largest.get()


def _write_per_lane(e: Emitter, spec: KernelSpec) -> None:
    n, parts, size, lanes = spec.n, spec.parts, spec.size, spec.lanes
    streaming = Streaming(e, size, e.at(e.scratch, n * parts * lanes))
    step = (n + 1) * parts
    with e.loop(0, e.count) as group:
        source = e.at(e.a, group * (lanes * size))

        def read(i: Value, source: Value = source) -> Number:
            scalars = [
                [e.load(e.at(source, i * step + (lane * size + p)), e.real) for lane in range(lanes)]
                for p in range(parts)
            ]
            return Number(e, tuple(e.gathered(part) for part in scalars))

        diagonals = _Diagonals(e, spec, n, read)
        finite, scale = diagonals.measure(partial(streaming.step, group, steps=n)).of_lanes()
        failed, norm, norm_of_inverse, largest = diagonals.invert(scale)
        info = scaling.info_of(e, failed, finite, ~scaling.is_finite(e, largest))
        target = streaming.target(group)
        with e.loop(0, size) as v:
            e.store(e.numbers(0.0), e.at(target, v * lanes))
        with e.loop(0, n) as i:
            for p, part in enumerate(diagonals.get(i).parts):
                for k in range(lanes):
                    e.store(e.lane(part, k), e.at(target, i * step + (k * size + p)))
        bad = ~info.eq(0)
        with (
            e.when(e.any(bad)),
            e.loop(0, lanes) as lane,
            e.when(~(e.mask_bits(bad) & (e.integer(1) << lane)).eq(0)),
            e.loop(0, size) as at,
        ):
            e.store(e.number(float("nan")), e.at(target, lane * size + at))
        scaling.write_account(e, group * lanes, info, norm, norm_of_inverse, finite, parts)
    streaming.finish()


def _write_within(e: Emitter, spec: KernelSpec) -> None:
    n, parts, size, lanes = spec.n, spec.parts, spec.size, spec.lanes
    step, vectors = (n + 1) * parts, -(-n // lanes)
    with e.loop(0, e.count) as index:
        source, target = (e.at(array, index * size) for array in (e.a, e.inverse))

        def first(v: Value) -> Value:
            # The last vector may have entries of the one before.
            return e.signed("smin", v * lanes, n - lanes)

        def read(v: Value, source: Value = source) -> Number:
            start = e.at(source, first(v) * step)
            scalars = [[e.load(e.at(start, lane * step + p), e.real) for lane in range(lanes)] for p in range(parts)]
            return Number(e, tuple(e.gathered(part) for part in scalars))

        diagonals = _Diagonals(e, spec, vectors, read)
        finite, scale = diagonals.measure().of_all()
        failed, norm, norm_of_inverse, largest = diagonals.invert(scale)
        whole = size - size % lanes
        with e.loop(0, whole, lanes) as at:
            e.store(e.numbers(0.0), e.at(target, at))
        e.store_first(e.numbers(0.0), e.at(target, whole), size - whole)
        with e.loop(0, vectors) as v:
            start = e.at(target, first(v) * step)
            for p, part in enumerate(diagonals.get(v).parts):
                for lane in range(lanes):
                    e.store(e.lane(part, lane), e.at(start, lane * step + p))
        # Vectors count from 1 in `failed`; in which lane the first zero is says where.
        rows = (failed - 1) * lanes + e.iota
        rows = e.select(failed.eq(vectors), e.iota + (n - lanes), rows)
        row = e.reduce("umin", e.select(failed.eq(0), e.integers(-1), rows + 1))
        info = scaling.info_of(
            e, e.select(row.eq(-1), row * 0, row), finite, ~scaling.is_finite(e, e.reduce("umax", largest))
        )
        with e.when(~info.eq(0)):
            with e.loop(0, whole, lanes) as at:
                e.store(e.numbers(float("nan")), e.at(target, at))
            e.store_first(e.numbers(float("nan")), e.at(target, whole), size - whole)
        largest_of = [e.lane(across(e, x, partial(scaling.larger_sum, e)), 0) for x in (norm, norm_of_inverse)]
        scaling.write_account(e, index, info, largest_of[0], largest_of[1], finite, parts)
