"""Numbers of a kernel, real or complex: one value for the real parts, a second for the imaginary ones."""

from __future__ import annotations

from dataclasses import dataclass

from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.values import Value


@dataclass(frozen=True)
class Number:
    """One number per lane, or a scalar."""

    e: Emitter
    parts: tuple[Value, ...]
    """The real part, then the imaginary part if there is one."""

    def __neg__(self) -> Number:
        return Number(self.e, tuple(-part for part in self.parts))

    def __mul__(self, other: Number) -> Number:
        if len(self.parts) == 1:
            return Number(self.e, (self.parts[0] * other.parts[0],))
        (a, b), (c, d) = self.parts, other.parts
        return Number(self.e, (self.e.fma(-b, d, a * c), self.e.fma(b, c, a * d)))

    def times_real(self, factor: Value) -> Number:
        """Multiply by a real number."""
        return Number(self.e, tuple(part * factor for part in self.parts))

    def plus_product(self, a: Number, b: Number) -> Number:
        """Return self + a·b."""
        fma = self.e.fma
        if len(self.parts) == 1:
            return Number(self.e, (fma(a.parts[0], b.parts[0], self.parts[0]),))
        (re, im), (ar, ai), (br, bi) = self.parts, a.parts, b.parts
        return Number(self.e, (fma(-ai, bi, fma(ar, br, re)), fma(ai, br, fma(ar, bi, im))))

    def conjugate(self) -> Number:
        """Return the complex conjugate."""
        return Number(self.e, (self.parts[0], *(-part for part in self.parts[1:])))

    def real_part(self) -> Number:
        """Return the number without its imaginary part."""
        return constant_number(self.e, self.parts[0], len(self.parts))

    def size(self) -> Value:
        """|re| + |im|: what LAPACK compares pivots by."""
        first, *rest = (self.e.absolute(part) for part in self.parts)
        return first + rest[0] if rest else first

    def modulus(self) -> Value:
        """|z|, for numbers whose squares stay in range."""
        if len(self.parts) == 1:
            return self.e.absolute(self.parts[0])
        re, im = self.parts
        return self.e.sqrt(self.e.fma(re, re, im * im))

    def reciprocal(self) -> Number:
        """1 / self; NaN where that is infinite, as in `real_reciprocal`."""
        e = self.e
        if len(self.parts) == 1:
            return Number(e, (real_reciprocal(e, self.parts[0]),))
        # The squares must not underflow: bring the number near 1 by a power of two first.
        factor = e.unit_factor(e.bits(self.size()))
        re, im = (part * factor for part in self.parts)
        # Not the size less itself: that may be infinite where both parts are finite, which does no harm.
        nothing = (self.parts[0] - self.parts[0]) + (self.parts[1] - self.parts[1])
        inverse = factor / e.fma(im, im, re * re) + nothing
        return Number(e, (re * inverse, -im * inverse))

    def where(self, mask: Value, other: Number) -> Number:
        """Return self where the mask is set, else the other."""
        pairs = zip(self.parts, other.parts, strict=True)
        return Number(self.e, tuple(self.e.select(mask, a, b) for a, b in pairs))

    def splat(self, lanes: int | None = None) -> Number:
        """Return a scalar in all lanes of a vector, or of a shorter one."""
        return Number(self.e, tuple(self.e.splat(part, lanes) for part in self.parts))

    def lane(self, index: int) -> Number:
        """Return one lane."""
        return Number(self.e, tuple(self.e.lane(part, index) for part in self.parts))


def real_reciprocal(e: Emitter, value: Value) -> Value:
    """1 / a real value; NaN where that is infinite.

    A pivot that has overflowed would otherwise turn its row into zeros, and leave an inverse that is finite and wrong.
    """
    return e.like(value, 1.0) / value + (value - value)


def constant_number(e: Emitter, real: Value, parts: int) -> Number:
    """Return a real number as a number of so many parts."""
    return Number(e, (real, *(e.like(real, 0.0) for _ in range(parts - 1))))


class NumberVariable:
    """A place that keeps a number; see `Variable`."""

    def __init__(self, number: Number):
        self.e = number.e
        self.parts = [number.e.variable(part) for part in number.parts]

    def get(self) -> Number:
        """Return the number of now."""
        return Number(self.e, tuple(part.get() for part in self.parts))

    def set(self, number: Number) -> None:
        """Replace the number."""
        for variable, part in zip(self.parts, number.parts, strict=True):
            variable.set(part)
