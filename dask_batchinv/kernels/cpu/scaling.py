"""What all compiled kernels do before and after: bring each matrix to unit size, and account for it.

The largest number of a matrix is brought into [1/2, 2) by a power of two, and the inverse back by the same. Sums
and products on the way then neither overflow nor underflow unless the inverse does, and matrices that differ by a
power of two have inverses that do. The smallest number must not become subnormal: where both cannot be had, it
decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.values import Value
from dask_batchinv.outcome import Info

#: ``info`` of a good matrix whose ``rcond`` the kernel cannot tell: nobody else sees it, `dispatch` finds the number.
RCOND_UNKNOWN = -(2**30)


class Measure:
    """The largest and the smallest of the numbers looked at, lane by lane."""

    def __init__(self, e: Emitter):
        self.e = e
        # This, added to the bits, makes zeros the largest integers: many processors compare signed ones only.
        self._added = (1 << (8 * e.itemsize - 1)) - 1
        self._largest, self._smallest = e.variable(e.integers(0)), e.variable(e.integers(self._added))

    def look(self, numbers: Value) -> None:
        """Look at a vector of numbers; zeros do not count."""
        e = self.e
        bits = e.bits(e.absolute(numbers))
        self._largest.set(e.signed("smax", self._largest.get(), bits))
        self._smallest.set(e.signed("smin", self._smallest.get(), bits + self._added))

    def of_lanes(self) -> tuple[Value, Scale]:
        """Return whether the matrix in each lane is finite, and by what it is scaled."""
        largest, smallest = self._largest.get(), self._smallest.get() - self._added
        return is_finite(self.e, largest), unit_scale(self.e, largest, smallest)

    def of_all(self) -> tuple[Value, Scale]:
        """Return the same, as scalars, of one matrix that all lanes belong to."""
        largest, smallest = self.bits_of_all()
        return is_finite(self.e, largest), unit_scale(self.e, largest, smallest)

    def bits_of_all(self) -> tuple[Value, Value]:
        """Return the bits of the largest and the smallest number in all lanes."""
        e = self.e
        return e.reduce("smax", self._largest.get()), e.reduce("smin", self._smallest.get()) - self._added


@dataclass(frozen=True)
class Scale:
    """A power of two, as one factor that nearly always is enough and a second for what it lacks."""

    e: Emitter
    first: Value
    second: Value
    is_long: Value
    """Whether a second factor is needed somewhere."""


def power(e: Emitter, shift: Value) -> Scale:
    """Return the factors of 2**shift."""
    near = e.signed("smin", e.signed("smax", shift, e.lowest), 1 - e.lowest)
    rest = shift - near
    return Scale(e, e.power_of_two(near), e.power_of_two(rest), e.any(~rest.eq(0)))


def unit_shift(e: Emitter, largest: Value, smallest: Value) -> Value:
    """Return the exponent that scales matrices, from the bits of their largest and smallest nonzero numbers."""
    bearable = e.signed("smin", (e.lowest + 1) - e.exponent(smallest), 0)
    shift = e.signed("smax", -e.exponent(largest), bearable)
    return e.select(largest.eq(0), shift * 0, shift)


def unit_scale(e: Emitter, largest: Value, smallest: Value) -> Scale:
    """Return what `power` makes of `unit_shift`, in few steps where there is nothing unusual.

    That is: the largest number of each matrix is normal, and so is what becomes of its smallest.
    """
    one = 1 << e.digits
    first = e.from_bits((2 - 2 * e.lowest) * one - (largest & -one))
    variables = [e.variable(value) for value in (first, e.like(first, 1.0), e.boolean(False))]
    unusual = (largest - one).above((-2 * e.lowest + 1) * one - 1) | (smallest - largest < (e.lowest + 2) * one)
    with e.when(e.any(unusual)):
        exact = power(e, unit_shift(e, largest, smallest))
        for variable, value in zip(variables, (exact.first, exact.second, exact.is_long), strict=True):
            variable.set(value)
    return Scale(e, *(variable.get() for variable in variables))


def without_sign_of_zero(e: Emitter, value: Value, factor: Value) -> Value:
    """Return a product in which every zero is positive."""
    return e.fma(value, factor, e.like(value, 0.0))


def is_finite(e: Emitter, largest: Value) -> Value:
    """Whether numbers are finite, from the bits of the largest."""
    return largest < e.infinity_bits


def larger_sum(e: Emitter, a: Value, b: Value) -> Value:
    """Return the larger of two sums of absolute values; NaN is the largest of all, so that it is not lost."""
    return e.from_bits(e.unsigned("umax", e.bits(a), e.bits(b)))


def largest_sum(e: Emitter, sums: Sequence[Value]) -> Value:
    """Return the largest of sums."""
    return reduce(partial(larger_sum, e), sums)


def info_of(e: Emitter, pivot: Value, finite: Value, overflow: Value) -> Value:
    """Return ``info`` from the number of the failing pivot (0 if none), and from what else may be wrong."""
    info = e.select(overflow & pivot.eq(0), e.like(pivot, Info.OVERFLOW), pivot)
    return e.select(finite, info, e.like(pivot, Info.NOT_FINITE))


def rcond_of(e: Emitter, norm: Value, norm_of_inverse: Value) -> Value:
    """Return ``rcond`` from the 1-norms of the matrix and of its inverse: eps / (eps ‖A‖ ‖A⁻¹‖).

    The formula of all kernels. As eps is a power of two it changes no bit, but without it the product would overflow
    where ``rcond`` is small and yet a number.
    """
    return e.like(norm, _eps(e)) / _product(e, norm, norm_of_inverse)


def _eps(e: Emitter) -> float:
    return 2.0**-e.digits


def _product(e: Emitter, norm: Value, norm_of_inverse: Value) -> Value:
    return norm * _eps(e) * norm_of_inverse


def marked(e: Emitter, info: Value, norm: Value, norm_of_inverse: Value, parts: int) -> Value:
    """Return ``info`` with `RCOND_UNKNOWN` for good matrices whose 1-norms have left the range, or their squares have.

    Those of complex numbers overflow, or lose digits where they underflow. In a matrix of unit size that matters to
    neither norm; in one that its smallest number keeps from it, to that of the inverse.
    """
    known = _product(e, norm, norm_of_inverse) < float("inf")
    if parts == 2:
        # What a square loses is less than the root of the smallest number, and that is less than eps of the norm.
        known = known & (norm_of_inverse >= 2.0 ** ((e.lowest + e.digits + 1) // 2 + 1))
    result = e.variable(info)
    with e.when(e.any(~known)):
        result.set(e.select(known | ~info.eq(0), info, e.like(info, RCOND_UNKNOWN)))
    return result.get()


def write_account(
    e: Emitter, index: Value, info: Value, norm: Value, norm_of_inverse: Value, finite: Value, parts: int
) -> None:
    """Write ``info`` and ``rcond`` of a matrix, or of those in the lanes, from a place on."""
    e.store(e.resize(marked(e, info, norm, norm_of_inverse, parts), e.int32), e.at(e.info, index, e.int32), align=4)
    rcond = rcond_of(e, norm, norm_of_inverse)
    e.store(rcond_or_failure(e, rcond, info, finite), e.at(e.rcond, index))


def rcond_or_failure(e: Emitter, rcond: Value, info: Value, finite: Value) -> Value:
    """Return what ``rcond`` is to be: 0 for singular matrices, NaN for those with infinities or NaN."""
    return e.select(finite, e.select(info > 0, e.like(rcond, 0.0), rcond), e.like(rcond, float("nan")))
