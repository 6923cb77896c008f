"""Writing vector code: LLVM's instructions as methods.

A kernel is a Python function that runs once, at compile time, and leaves machine code behind: a ``for`` over a
`range` is unrolled, a ``with e.loop(...)`` is a loop in the machine code. Every operation here rounds like its
NumPy counterpart and is never merged with another (no fast-math), so a matrix has the same inverse whatever
the width of the vectors. Fused multiply-add is used where `Emitter.fma` says so, on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from dask_batchinv.kernels.emit.values import BIT, INT, Value, Variable, constant


class Emitter:
    """Writes ``void name(a, inverse, info, rcond, count, scratch, nontemporal)`` for one real type and width.

    Its arguments are attributes: four arrays and the scratch memory as pointers; `count` groups of matrices to invert,
    and whether `nontemporal` stores are wanted, as 64-bit integers. Or it writes ``void name(table, …)``, where `table`
    is the address of 64-bit integers, and what follows are such integers: `arguments`.

    Parameters
    ----------
    name : str
        The function's name in the machine code.
    itemsize : int
        Bytes of a real number: 4 or 8.
    lanes : int
        Real numbers in a vector.
    integers : int, optional
        How many integers follow the table.
    module : optional
        Where to write the function; without it to a module of its own.
    """

    def __init__(
        self, name: str, itemsize: int, lanes: int, *, integers: int | None = None, module: ir.Module | None = None
    ):
        self.itemsize, self.lanes = itemsize, lanes
        self.real = ir.FloatType() if itemsize == 4 else ir.DoubleType()
        self.word = ir.IntType(8 * itemsize)
        self.vector = ir.VectorType(self.real, lanes)
        self.words = ir.VectorType(self.word, lanes)
        self.int32 = ir.IntType(32)
        self.module = ir.Module(name) if module is None else module
        pointer = ir.PointerType()
        types = [pointer] * 4 + [INT, pointer, INT] if integers is None else [pointer] + [INT] * integers
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), types), name)
        self._entry = function.append_basic_block("entry")
        self.builder = ir.IRBuilder(self._entry)
        self.arguments = [self.value(argument) for argument in function.args]
        if integers is None:
            for i in (0, 1, 2, 3, 5):
                function.args[i].add_attribute("noalias")
            self.a, self.inverse, self.info, self.rcond, self.count, self.scratch, self.nontemporal = self.arguments

    @property
    def nbytes(self) -> int:
        """Bytes of a vector."""
        return self.lanes * self.itemsize

    @property
    def can_permute(self) -> bool:
        """Whether `permute` is at hand: LLVM has no shuffle by numbers known at run time but the processor's own."""
        return self.nbytes == 64

    def value(self, raw: Any) -> Value:
        """Wrap what LLVM returned."""
        return Value(self.builder, raw)

    # --- constants --------------------------------------------------------------------------------------------

    def integer(self, number: int) -> Value:
        """Return a 64-bit integer."""
        return self.value(constant(INT, number))

    def boolean(self, truth: bool) -> Value:
        """Return a scalar condition."""
        return self.value(constant(BIT, int(truth)))

    def number(self, number: float) -> Value:
        """Return a single real."""
        return self.value(constant(self.real, number))

    def numbers(self, number: Any) -> Value:
        """Return a vector of reals."""
        return self.value(constant(self.vector, number))

    def integers(self, number: Any) -> Value:
        """Return a vector of integers as wide as the reals."""
        return self.value(constant(self.words, number))

    def counting(self, start: int, count: int) -> Value:
        """Return start, start + 1, … as a vector of 64-bit integers."""
        return self.value(constant(ir.VectorType(INT, count), list(range(start, start + count))))

    @property
    def iota(self) -> Value:
        """0, 1, 2, … in the lanes."""
        return self.integers(list(range(self.lanes)))

    # --- memory -----------------------------------------------------------------------------------------------

    def at(self, pointer: Value, index: Value | int, type_: Any = None) -> Value:
        """Return the address of the index-th number after a pointer."""
        index = self.integer(index) if isinstance(index, int) else index
        return self.value(self.builder.gep(pointer.raw, [index.raw], source_etype=type_ or self.real))

    def launder(self, pointer: Value) -> Value:
        """Return an address that the compiler does not recognise: what is stored there is not kept in registers."""
        kind = ir.FunctionType(ir.PointerType(), [ir.PointerType()])
        return self.value(self.builder.asm(kind, "", "=r,0", [pointer.raw], False))

    def load(self, pointer: Value, type_: Any = None, align: int | None = None) -> Value:
        """Load a vector (or what `type_` says) from any address."""
        raw = self.builder.load(pointer.raw, typ=type_ or self.vector, align=align or self.itemsize)
        return self.value(raw)

    def store(self, value: Value, pointer: Value, align: int | None = None) -> None:
        """Store a value to any address."""
        self.builder.store(value.raw, pointer.raw, align=align or self.itemsize)

    def prefetch(self, pointer: Value, *, write: bool = False, level: int = 3) -> None:
        """Ask for a cache line that will be needed; level 3 is the first cache, 2 the second."""
        numbers = [self.value(ir.Constant(self.int32, number)) for number in (int(write), level, 1)]
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *numbers)

    def store_nontemporal(self, vector: Value, pointer: Value) -> None:
        """Store a vector to an address that is a multiple of its size, without reading the line first."""
        raw = self.builder.store(vector.raw, pointer.raw, align=self.nbytes)
        raw.set_metadata("nontemporal", self.module.add_metadata([ir.Constant(self.int32, 1)]))

    def atomic_add(self, pointer: Value) -> Value:
        """Add 1 to an integer that several threads count with; return what it was."""
        one = ir.Constant(INT, 1)
        return self.value(self.builder.atomic_rmw("add", pointer.raw, one, "acq_rel"))

    def atomic_load(self, pointer: Value) -> Value:
        """Load an integer that several threads count with; what they stored before they changed it can be seen."""
        return self.value(self.builder.load_atomic(pointer.raw, "acquire", 8, typ=INT))

    def fence(self) -> None:
        """Order all stores before what comes later: non-temporal ones are not ordered by themselves."""
        self.builder.fence("seq_cst")

    def address(self, pointer: Value) -> Value:
        """Return a pointer as an integer."""
        return self.value(self.builder.ptrtoint(pointer.raw, INT))

    def load_first(self, pointer: Value, count: int) -> Value:
        """Load `count` numbers into the first lanes, zero in the others; what lies beyond is not touched."""
        if count >= self.lanes:
            return self.load(pointer)
        if count <= 0:
            return self.numbers(0.0)
        return self.load_where(self._first(count), pointer)

    def load_where(self, mask: Value, pointer: Value) -> Value:
        """Load the lanes where the mask is set, zero in the others."""
        name = f"llvm.masked.load.v{self.lanes}f{8 * self.itemsize}.p0"
        return self.call(name, self.vector, pointer, self._align(), mask, self.numbers(0.0))

    def store_first(self, value: Value, pointer: Value, count: int) -> None:
        """Store the first `count` lanes."""
        if count >= self.lanes:
            self.store(value, pointer)
            return
        self.store_where(self._first(count), value, pointer)

    def store_where(self, mask: Value, value: Value, pointer: Value) -> None:
        """Store the lanes where the mask is set."""
        name = f"llvm.masked.store.v{self.lanes}f{8 * self.itemsize}.p0"
        self.call(name, ir.VoidType(), value, pointer, self._align(), mask)

    def _first(self, count: int) -> Value:
        return self.mask([i < count for i in range(self.lanes)])

    def _align(self) -> Value:
        return self.value(ir.Constant(self.int32, self.itemsize))

    # --- arithmetic -------------------------------------------------------------------------------------------

    def call(self, name: str, returns: Any, *arguments: Value) -> Value:
        """Call one of LLVM's intrinsics."""
        function = self.module.globals.get(name)
        if function is None:
            types = [argument.type for argument in arguments]
            function = ir.Function(self.module, ir.FunctionType(returns, types), name)
        return self.value(self.builder.call(function, [argument.raw for argument in arguments]))

    def _suffix(self, value: Value) -> str:
        letter = "i" if isinstance(value.element, ir.IntType) else "f"
        bits = value.element.width if letter == "i" else 8 * self.itemsize
        return f"v{value.type.count}{letter}{bits}" if isinstance(value.type, ir.VectorType) else f"{letter}{bits}"

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c, rounded once."""
        return self.call(f"llvm.fma.{self._suffix(a)}", a.type, a, b, c)

    def absolute(self, a: Value) -> Value:
        """|a| of reals."""
        return self.call(f"llvm.fabs.{self._suffix(a)}", a.type, a)

    def sqrt(self, a: Value) -> Value:
        """The square root."""
        return self.call(f"llvm.sqrt.{self._suffix(a)}", a.type, a)

    def select(self, mask: Value, yes: Value, no: Value | float | int) -> Value:
        """Lane by lane, `yes` where the mask is set, else `no`."""
        return self.value(self.builder.select(mask.raw, yes.raw, yes.lift(no)))

    def larger(self, a: Value, b: Value) -> Value:
        """The larger, `b` where they are not ordered."""
        return self.select(a > b, a, b)

    def unsigned(self, what: str, a: Value, b: Value) -> Value:
        """Return "umax" or "umin" of integers."""
        return self.call(f"llvm.{what}.{self._suffix(a)}", a.type, a, b)

    def signed(self, what: str, a: Value, b: Value | int) -> Value:
        """Return "smax" or "smin" of integers."""
        return self.call(f"llvm.{what}.{self._suffix(a)}", a.type, a, self.value(a.lift(b)))

    def reduce(self, what: str, a: Value) -> Value:
        """Bring a vector down to one number: "umax", "umin", "smax", "smin", "fmax" (NaN loses)."""
        return self.call(f"llvm.vector.reduce.{what}.{self._suffix(a)}", a.element, a)

    def leading_zeros(self, a: Value) -> Value:
        """Leading zero bits of integers."""
        return self.call(f"llvm.ctlz.{self._suffix(a)}", a.type, a, self.value(ir.Constant(BIT, 0)))

    def trailing_zeros(self, a: Value) -> Value:
        """Trailing zero bits of an integer; its size where it is 0."""
        return self.call(f"llvm.cttz.{self._suffix(a)}", a.type, a, self.value(ir.Constant(BIT, 0)))

    def bits(self, a: Value) -> Value:
        """Reals as integers of their size."""
        return self.value(self.builder.bitcast(a.raw, self._like(a, self.word)))

    def from_bits(self, a: Value) -> Value:
        """Integers as the reals with their bits."""
        return self.value(self.builder.bitcast(a.raw, self._like(a, self.real)))

    def like(self, a: Value, number: float) -> Value:
        """Return a constant of the type of a value."""
        return self.value(constant(a.type, number))

    def exponent(self, bits: Value) -> Value:
        """The exponent of numbers as `numpy.frexp` gives it, from the bits of their absolute values."""
        digits, lowest = self.digits, self.lowest
        tiny = (lowest - digits + 8 * self.itemsize) - self.leading_zeros(bits)
        return self.select(bits < (1 << digits), tiny, (bits >> digits) + (lowest - 1))

    def power_of_two(self, exponent: Value) -> Value:
        """2**exponent, brought into the range of normal numbers."""
        exponent = self.signed("smin", self.signed("smax", exponent, self.lowest), 1 - self.lowest)
        return self.from_bits((exponent + (1 - self.lowest)) << self.digits)

    def unit_factor(self, bits: Value) -> Value:
        """Return powers of two that bring numbers of these bits near 1, as near as one normal factor can."""
        one = 1 << self.digits
        factor = (1 - 2 * self.lowest) * one - (bits & -one)
        return self.from_bits(self.signed("smax", factor, one))

    @property
    def digits(self) -> int:
        """Bits of the fraction."""
        return 23 if self.itemsize == 4 else 52

    @property
    def lowest(self) -> int:
        """The exponent of the smallest normal number, 2**lowest."""
        return -126 if self.itemsize == 4 else -1022

    @property
    def infinity_bits(self) -> int:
        """The bits of infinity; those of NaN are larger."""
        return (1 - 2 * self.lowest + 2) << self.digits

    def mask_bits(self, mask: Value) -> Value:
        """Return a mask as an integer, lane 0 in the lowest bit."""
        narrow = self.builder.bitcast(mask.raw, ir.IntType(mask.type.count))
        return self.value(self.builder.zext(narrow, INT))

    def number_of(self, condition: Value) -> Value:
        """Return 1 or 0 for a scalar condition."""
        return self.value(self.builder.zext(condition.raw, INT))

    def mask_from(self, bits: Value) -> Value:
        """Return the mask whose lanes are the lowest bits of an integer."""
        narrow = self.builder.trunc(bits.raw, ir.IntType(self.lanes))
        return self.value(self.builder.bitcast(narrow, ir.VectorType(BIT, self.lanes)))

    def bit_words(self, mask: Value) -> Value:
        """Return integers with all bits set where the mask is set."""
        return self.value(self.builder.sext(mask.raw, self._like(mask, self.word)))

    def resize(self, a: Value, element: Any) -> Value:
        """Integers of another size; they must fit."""
        if element.width == a.element.width:
            return a
        change = self.builder.sext if element.width > a.element.width else self.builder.trunc
        return self.value(change(a.raw, self._like(a, element)))

    @staticmethod
    def _like(a: Value, element: Any) -> Any:
        return ir.VectorType(element, a.type.count) if isinstance(a.type, ir.VectorType) else element

    # --- lanes ------------------------------------------------------------------------------------------------

    def splat(self, scalar: Value, lanes: int | None = None) -> Value:
        """Return a vector with the same number in all lanes."""
        lanes = lanes or self.lanes
        type_ = ir.VectorType(scalar.type, lanes)
        one = self.builder.insert_element(ir.Constant(type_, ir.Undefined), scalar.raw, ir.Constant(self.int32, 0))
        return self.shuffle(self.value(one), None, [0] * lanes)

    def gathered(self, scalars: Sequence[Value]) -> Value:
        """Return a vector of single numbers."""
        vector = ir.Constant(ir.VectorType(scalars[0].type, len(scalars)), ir.Undefined)
        for i, scalar in enumerate(scalars):
            vector = self.builder.insert_element(vector, scalar.raw, ir.Constant(self.int32, i))
        return self.value(vector)

    def mask(self, lanes: Sequence[bool]) -> Value:
        """Return a constant mask."""
        return self.value(constant(ir.VectorType(BIT, len(lanes)), [int(lane) for lane in lanes]))

    def lane(self, vector: Value, index: int) -> Value:
        """Return one lane."""
        return self.value(self.builder.extract_element(vector.raw, ir.Constant(self.int32, index)))

    def shuffle(self, a: Value, b: Value | None, lanes: Sequence[int]) -> Value:
        """Return the lanes named, counted through `a` and on through `b`."""
        order = ir.Constant(ir.VectorType(self.int32, len(lanes)), [ir.Constant(self.int32, i) for i in lanes])
        other = b.raw if b is not None else ir.Constant(a.type, ir.Undefined)
        return self.value(self.builder.shuffle_vector(a.raw, other, order))

    def permute(self, values: Sequence[Value], order: Value) -> Value:
        """Return the lanes that `order` names at run time, counted through all the vectors."""
        w, result = self.lanes, None
        for start in range(0, len(values), 2):
            kind, pair = "df" if self.itemsize == 8 else "sf", values[start : start + 2]
            if len(pair) == 1:
                found = self.call(f"llvm.x86.avx512.permvar.{kind}.512", self.vector, pair[0], order)
            else:
                kind = "pd" if self.itemsize == 8 else "ps"
                found = self.call(f"llvm.x86.avx512.vpermi2var.{kind}.512", self.vector, pair[0], order, pair[1])
            # The instructions look at the lowest bits of a number only.
            result = found if result is None else self.select(order < start * w, result, found)
        assert result is not None
        return result

    # --- control ----------------------------------------------------------------------------------------------

    def variable(self, value: Value) -> Variable:
        """Return a new variable with a first value."""
        with self.builder.goto_block(self._entry):
            # Before the entry's jump, once, however often the code around it runs.
            slot = self.builder.alloca(value.type)
        made = Variable(self.builder, slot, value.type)
        made.set(value)
        return made

    @contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: int = 1) -> Iterator[Value]:
        """Run the body for start, start + step, … while less than stop."""
        index = self.variable(self.integer(start) if isinstance(start, int) else start)
        stop = self.integer(stop) if isinstance(stop, int) else stop
        head, body, after = (self.builder.append_basic_block(name) for name in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        now = index.get()
        self.builder.cbranch((now < stop).raw, body, after)
        self.builder.position_at_end(body)
        yield now
        index.set(now + step)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def repeat(self, condition: Callable[[], Value]) -> Iterator[None]:
        """Run the body as long as a scalar condition holds."""
        head, body, after = (self.builder.append_basic_block(name) for name in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(condition().raw, body, after)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the body if a scalar condition holds; it seldom does."""
        with self.builder.if_then(condition.raw, likely=False):
            yield

    def any(self, mask: Value) -> Value:
        """Whether the mask is set in some lane; a scalar condition itself."""
        if not mask.is_vector:
            return mask
        return ~self.mask_bits(mask).eq(0)

    def finish(self) -> str:
        """Close the function and return LLVM's text of it."""
        self.builder.ret_void()
        return str(self.module)
