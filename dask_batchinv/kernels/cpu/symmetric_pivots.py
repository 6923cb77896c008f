"""How symmetric and Hermitian matrices are inverted that need not be definite: sweeps, and the choice of their pivots.

Sweeping some rows S of a symmetric matrix, with D the block where they cross and C the columns of S beside it, makes

    other entries:  A <- A - C D^-1 C^T,    C <- C D^-1,    D <- -D^-1,

which is symmetric again; after all rows stands minus the inverse (for Hermitian matrices with ^H for ^T). Rows never
move. S is one row or two, as Bunch and Kaufman (1977) choose, but beginning with the largest number that is left of the
diagonal: pairs are then rare, and their partners are where a second search is not needed. Both ways the residuals were
the least of all that were tried. To mirror what Gauss-Jordan elimination gives is no way out: of the residuals XA - I
and AX - I it keeps only one small, and the mirrored inverse has a share of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from dask_batchinv.kernels.emit.number import Number, constant_number, real_reciprocal
from dask_batchinv.kernels.emit.values import Value
from dask_batchinv.stack import AssumeA

#: A number on the diagonal is a pivot by itself if it is so large beside the others of its row: (1 + √17) / 8, where
#: numbers grow least.
ALPHA = 0.6403882032022076


@dataclass(frozen=True)
class Symmetry:
    """What an entry is to the one across the diagonal."""

    is_hermitian: bool

    @classmethod
    def of(cls, structure: AssumeA) -> Symmetry:
        """Return that of a structure."""
        return cls(structure != "symmetric")

    def across(self, number: Number) -> Number:
        """Return the entry across the diagonal."""
        return number.conjugate() if self.is_hermitian else number

    def diagonal(self, number: Number) -> Number:
        """Return a number as it stands on the diagonal."""
        return number.real_part() if self.is_hermitian else number

    def reads(self, i: int, j: int, part: int) -> bool:
        """Tell whether a part of an entry counts: of the upper triangle, without imaginary parts that must be zero."""
        return i < j or (i == j and (part == 0 or not self.is_hermitian))

    def reciprocal(self, diagonal: Number) -> Number:
        """Return 1 / a number of the diagonal."""
        if not self.is_hermitian:
            return diagonal.reciprocal()
        real = real_reciprocal(diagonal.e, diagonal.parts[0])
        return constant_number(diagonal.e, real, len(diagonal.parts))

    def times(self, number: Number, diagonal: Number) -> Number:
        """Return a number times one of the diagonal."""
        return number.times_real(diagonal.parts[0]) if self.is_hermitian else number * diagonal


def wants_partner(size: Value, offside: Value) -> Value:
    """Tell whether pivots of a size are small beside the largest other numbers of their rows."""
    return ~(size >= offside * ALPHA)


def stands_alone(size: Value, offside: Value, offside_of_partner: Value) -> Value:
    """Tell whether they make better pivots by themselves all the same."""
    return size > offside * ALPHA * (offside / offside_of_partner)


@dataclass(frozen=True)
class Block:
    """The inverse of a block of pivots: of one row, or of two."""

    first: Number
    beside: Number
    second: Number

    def factors(self, symmetry: Symmetry, of_first: Number, of_second: Number) -> tuple[Number, Number]:
        """Return entries of C D^-1, from those of the rows of both pivots."""
        c, d = symmetry.across(of_first), symmetry.across(of_second)
        one = symmetry.times(c, self.first).plus_product(d, symmetry.across(self.beside))
        return one, (c * self.beside).plus_product(d, self.second)


def inverse_of_pair(symmetry: Symmetry, first: Number, beside: Number, second: Number) -> Block:
    """Return the inverse of a block of two pivots, and of what stands beside them, which is larger."""
    size = beside.size()
    small = beside.e.like(size, 1.0) / size
    p, b, q = (number.times_real(small) for number in (first, beside, second))
    determinant = symmetry.diagonal((p * q).plus_product(-b, symmetry.across(b)))
    inverse = symmetry.reciprocal(determinant).times_real(small)
    return Block(q * inverse, -(b * inverse), p * inverse)
