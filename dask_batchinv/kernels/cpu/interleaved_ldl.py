"""The inverse of a group of interleaved positive definite matrices, from the factorization A = U^H D U.

Unit triangular U and diagonal D, then V = U^-1, then V D^-1 V^H: the steps of LAPACK's potrf and potri without square
roots. Two rows are in work at a time. Each entry is a sum of products, kept in registers. While it goes on, the upper
triangle holds -U, then V, then the inverse; the diagonal D^-1; and the lower triangle what is to be multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dask_batchinv.kernels.cpu import interleaved, scaling
from dask_batchinv.kernels.cpu.interleaved import Inverted, multiply_rarely, write_as_it_is
from dask_batchinv.kernels.cpu.interleaved_group import Group
from dask_batchinv.kernels.emit.number import Number, constant_number
from dask_batchinv.kernels.emit.values import Value, Variable

#: Columns of two rows whose sums are kept in registers, by parts of a number.
_WIDTH = {1: 4, 2: 2}


def invert(g: Group, scale: scaling.Scale, between_steps: Callable[[Value], None]) -> Inverted:
    """Invert upper triangles; the inverses are whole matrices."""
    half = g.n // 2
    multiply_rarely(g, scale)
    failed, norm = _factorize(g, scale.first, between_steps)
    _invert_triangle(g, lambda step: between_steps(step + half))
    norm_of_inverse = _multiply(g, lambda step: between_steps(step + 2 * half))

    def store(target: Value) -> Value:
        write_as_it_is(g, target, scale)
        return norm_of_inverse

    return Inverted(failed, norm, store)


class _Sums:
    """The sums of the columns of Hermitian matrices, from two rows of their upper triangles at a time."""

    def __init__(self, g: Group):
        self.g, self.e = g, g.e
        self.norm = self.e.variable(self.e.numbers(0.0))
        self.rows: list[Variable] = []
        for j in range(g.n):
            self._put(self.e.integer(j), self.e.numbers(0.0))

    def begin(self, a: Value, count: int) -> None:
        """Take up rows: what is above the diagonal in their columns is there already."""
        self.rows = [self.e.variable(self._get(a + r)) for r in range(count)]

    def add(self, number: Number, row: int, j: Value) -> None:
        """Add an entry to the sum of its row, which is that of a column too, and to that of its own column."""
        modulus = number.modulus()
        self._add_to_row(modulus, row)
        self._put(j, self._get(j) + modulus)

    def add_block(self, block: _Block) -> None:
        """Add the entries that stand in the columns of the rows themselves."""
        for (i, j), number in block.numbers().items():
            for row in {i, j}:
                self._add_to_row(number.modulus(), row)

    def end(self) -> None:
        """Note the sums of the rows."""
        for row in self.rows:
            self.norm.set(scaling.larger_sum(self.e, row.get(), self.norm.get()))

    def _add_to_row(self, modulus: Value, row: int) -> None:
        self.rows[row].set(self.rows[row].get() + modulus)

    def _get(self, j: Value) -> Value:
        return self.e.load(self.g.vector(j, self.g.sums), align=self.e.nbytes)

    def _put(self, j: Value, value: Value) -> None:
        self.e.store(value, self.g.vector(j, self.g.sums), align=self.e.nbytes)


class _Block:
    """Sums of products for some rows and columns, by their numbers within the block."""

    def __init__(self, g: Group, numbers: dict[tuple[int, int], Number]):
        self.g = g
        self.kept = {at: [g.e.variable(part) for part in number.parts] for at, number in numbers.items()}

    def numbers(self) -> dict[tuple[int, int], Number]:
        """Return the sums of now."""
        return {at: Number(self.g.e, tuple(v.get() for v in variables)) for at, variables in self.kept.items()}

    def add(self, left: list[Number], right: dict[int, Number]) -> None:
        """Add the products of numbers of all rows and of numbers of some columns."""
        for (i, j), number in self.numbers().items():
            if j in right:
                total = number.plus_product(left[i], right[j])
                for variable, part in zip(self.kept[i, j], total.parts, strict=True):
                    variable.set(part)


def _blocks(g: Group, first: Value, body: Callable[[Value, range], None], *, backwards: bool = False) -> None:
    """Run the body for blocks from a column on, with their first column and the numbers of their columns within."""
    e, width = g.e, _WIDTH[g.parts]
    count = (e.integer(g.n) - first) / width
    rest = e.integer(g.n) - first - count * width

    def last() -> None:
        for columns in range(1, width):
            # Two rows at a time leave an even or an odd number of columns, as n is.
            if (columns - g.n) % 2 == 0:
                with e.when(rest.eq(columns)):
                    body(first + count * width, range(columns))

    if backwards:
        last()
    with e.loop(0, count) as t:
        body(first + ((count - 1 - t) if backwards else t) * width, range(width))
    if not backwards:
        last()


def _at(g: Group, i: Value, j: Value) -> Number:
    return g.read(g.entry(i, j))


def _real(g: Group, i: Value) -> Value:
    return g.e.load(g.entry(i, i), align=g.e.nbytes)


def _factorize(g: Group, factor: Value, between_steps: Callable[[Value], None]) -> tuple[Value, Value]:
    """Put -U in place of A, D^-1 on the diagonal, and (D U)^H below; return `failed` and the 1-norms."""
    work = _Factorization(g, factor)
    with g.e.loop(0, g.n - g.n % 2, 2) as a:
        between_steps(a >> 1)
        work.do(a, 2)
    if g.n % 2:
        work.do(g.e.integer(g.n - 1), 1)
    return work.failed.get(), work.sums.norm.get()


class _Factorization:
    def __init__(self, g: Group, factor: Value):
        self.g, self.e, self.factor = g, g.e, factor
        self.failed, self.sums = g.e.variable(g.e.integers(0)), _Sums(g)

    def do(self, a: Value, count: int) -> None:
        """Do one row or two, from a on."""
        g = self.g
        self.sums.begin(a, count)
        block = self._read(a, a, [(i, j) for i in range(count) for j in range(i, count)])
        for i in range(count):
            for imaginary in block.kept[i, i][1:]:
                imaginary.set(self.e.numbers(0.0))
        self.sums.add_block(block)
        self._add_products(block, a, count, a, range(count))
        numbers = block.numbers()
        inverses = [self._inverse_of(numbers[0, 0], a)]
        if count == 2:
            beside = numbers[0, 1]
            over = beside.times_real(-inverses[0])
            inverses.append(self._inverse_of(numbers[1, 1].plus_product(beside.conjugate(), over), a + 1))
            g.keep(over, g.entry(a, a + 1))
            g.keep(beside.conjugate(), g.entry(a + 1, a))
            _blocks(g, a + 2, lambda start, columns: self._others(a, start, columns, inverses, beside))
        self.sums.end()

    def _others(self, a: Value, start: Value, columns: range, inverses: list[Value], beside: Number) -> None:
        """Do two rows in some of the columns right of them."""
        g = self.g
        tile = self._read(a, start, [(i, j) for j in columns for i in range(2)])
        for (i, j), number in tile.numbers().items():
            self.sums.add(number, i, start + j)
        self._add_products(tile, a, 2, start, columns)
        numbers = tile.numbers()
        for j in columns:
            upper = numbers[0, j].times_real(-inverses[0])
            lower = numbers[1, j].plus_product(beside.conjugate(), upper)
            g.keep(upper, g.entry(a, start + j))
            g.keep(lower.times_real(-inverses[1]), g.entry(a + 1, start + j))
            g.keep(numbers[0, j].conjugate(), g.entry(start + j, a))
            g.keep(lower.conjugate(), g.entry(start + j, a + 1))

    def _read(self, a: Value, start: Value, places: list[tuple[int, int]]) -> _Block:
        return _Block(self.g, {(i, j): _at(self.g, a + i, start + j).times_real(self.factor) for i, j in places})

    def _add_products(self, tile: _Block, a: Value, rows: int, start: Value, columns: range) -> None:
        g = self.g
        with self.e.loop(0, a) as p:
            tile.add([_at(g, a + i, p) for i in range(rows)], {j: _at(g, p, start + j) for j in columns})

    def _inverse_of(self, pivot: Number, k: Value) -> Value:
        g, e, real = self.g, self.e, pivot.parts[0]
        # NaN is no failure of the matrix but of the arithmetic: what overflowed is noticed at the end.
        fails = (real <= 0.0) & self.failed.get().eq(0)
        self.failed.set(e.select(fails, g.row_number(k + 1), self.failed.get()))
        inverse = e.like(real, 1.0) / real
        g.keep(constant_number(e, inverse, g.parts), g.entry(k, k))
        return inverse


def _invert_triangle(g: Group, between_steps: Callable[[Value], None]) -> None:
    """Put V over -U, from the bottom up and from the right."""
    e = g.e
    with e.loop(0, g.n // 2) as step:
        between_steps(step)
        a = e.integer(g.n // 2 * 2 - 2) - step * 2

        def others(start: Value, columns: range, a: Value = a) -> None:
            tile = _Block(g, {(i, j): _at(g, a + i, start + j) for j in columns for i in range(2)})

            def add(k: Value, columns: range) -> None:
                tile.add([_at(g, a + i, k) for i in range(2)], {j: _at(g, k, start + j) for j in columns})

            with e.loop(a + 2, start) as k:
                add(k, columns)
            for first in columns:
                add(start + first, columns[first + 1 :])
            numbers = tile.numbers()
            for j in columns:
                g.keep(numbers[1, j], g.entry(a + 1, start + j))
                upper = numbers[0, j].plus_product(_at(g, a, a + 1), numbers[1, j])
                g.keep(upper, g.entry(a, start + j))

        _blocks(g, a + 2, others, backwards=True)


def _multiply(g: Group, between_steps: Callable[[Value], None]) -> Value:
    """Put V D^-1 V^H in place of V, and mirror it; return the 1-norms."""
    e, n, sums = g.e, g.n, _Sums(g)

    with e.loop(0, n - n % 2, 2) as a:
        between_steps(a >> 1)
        sums.begin(a, 2)
        block = _first_products(g, a)
        for (i, j), number in block.numbers().items():
            number = number.real_part() if i == j else number
            g.keep(number, g.entry(a + i, a + j))
            if i != j:
                g.keep(number.conjugate(), g.entry(a + j, a + i))
        sums.add_block(block)

        def others(start: Value, columns: range, a: Value = a) -> None:
            tile = _Block(g, {(i, j): _at(g, start + j, a + i) for j in columns for i in range(2)})

            def add(k: Value, columns: range) -> None:
                left = [_at(g, k, a + i) for i in range(2)]
                tile.add(left, {j: _at(g, start + j, k).conjugate() for j in columns})

            for last in columns:
                add(start + last, columns[:last])
            with e.loop(start + len(columns), n) as k:
                add(k, columns)
            for (i, j), number in tile.numbers().items():
                sums.add(number, i, start + j)
                g.keep(number, g.entry(a + i, start + j))
                g.keep(number.conjugate(), g.entry(start + j, a + i))

        _blocks(g, a + 2, others)
        sums.end()
    if n % 2:
        sums.begin(e.integer(n - 1), 1)
        sums.add_block(_Block(g, {(0, 0): _at(g, e.integer(n - 1), e.integer(n - 1))}))
        sums.end()
    return sums.norm.get()


def _first_products(g: Group, a: Value) -> _Block:
    """Put V D^-1 of two rows below the diagonal, and return the sums of products for their own columns."""
    e = g.e
    beside = _at(g, a, a + 1)
    over = beside.times_real(_real(g, a + 1))
    own = [constant_number(e, _real(g, a + i), g.parts) for i in range(2)]
    block = _Block(g, {(0, 0): own[0].plus_product(over, beside.conjugate()), (0, 1): over, (1, 1): own[1]})
    with e.loop(a + 2, g.n) as k:
        inverse = _real(g, k)
        numbers = [_at(g, a + i, k) for i in range(2)]
        scaled = [number.times_real(inverse) for number in numbers]
        for i in range(2):
            g.keep(scaled[i], g.entry(k, a + i))
        block.add(scaled, {i: numbers[i].conjugate() for i in range(2)})
    return block


write = partial(
    interleaved.write, interleaved.Algorithm(part="upper Hermitian", invert=invert, n_steps=lambda n: 3 * (n // 2))
)
