"""Values in the machine code, behind Python's operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

BIT = ir.IntType(1)
INT = ir.IntType(64)


@dataclass(frozen=True, eq=False)
class Value:
    """A number, a vector, or a mask in the machine code; Python numbers mix with it."""

    builder: ir.IRBuilder
    raw: Any

    @property
    def type(self) -> Any:
        """The LLVM type."""
        return self.raw.type

    @property
    def element(self) -> Any:
        """The LLVM type of one lane."""
        return self.type.element if isinstance(self.type, ir.VectorType) else self.type

    @property
    def is_vector(self) -> bool:
        """Whether this has lanes."""
        return isinstance(self.type, ir.VectorType)

    def lift(self, other: Any) -> Any:
        """Return a raw operand of this value's type: a constant in all lanes, or the other value itself."""
        if isinstance(other, Value):
            return other.raw
        return constant(self.type, other)

    def _op(self, integer: str, floating: str, other: Any) -> Value:
        name = integer if isinstance(self.element, ir.IntType) else floating
        return Value(self.builder, getattr(self.builder, name)(self.raw, self.lift(other)))

    def __add__(self, other: Any) -> Value:
        return self._op("add", "fadd", other)

    def __sub__(self, other: Any) -> Value:
        return self._op("sub", "fsub", other)

    def __mul__(self, other: Any) -> Value:
        return self._op("mul", "fmul", other)

    def __rsub__(self, other: Any) -> Value:
        return Value(self.builder, self.lift(other)) - self

    def __truediv__(self, other: Any) -> Value:
        return self._op("sdiv", "fdiv", other)

    def __and__(self, other: Any) -> Value:
        return self._op("and_", "", other)

    def __or__(self, other: Any) -> Value:
        return self._op("or_", "", other)

    def __lshift__(self, other: Any) -> Value:
        return self._op("shl", "", other)

    def __rshift__(self, other: Any) -> Value:
        """Shift right, bringing in copies of the sign bit."""
        return self._op("ashr", "", other)

    def __neg__(self) -> Value:
        if isinstance(self.element, ir.IntType):
            return Value(self.builder, self.builder.neg(self.raw))
        return Value(self.builder, self.builder.fneg(self.raw))

    def __invert__(self) -> Value:
        return Value(self.builder, self.builder.not_(self.raw))

    def _compare(self, sign: str, other: Any) -> Value:
        compare = self.builder.icmp_signed if isinstance(self.element, ir.IntType) else self.builder.fcmp_ordered
        return Value(self.builder, compare(sign, self.raw, self.lift(other)))

    def eq(self, other: Any) -> Value:
        """Mask of the lanes that are equal."""
        return self._compare("==", other)

    def __lt__(self, other: Any) -> Value:
        return self._compare("<", other)

    def __gt__(self, other: Any) -> Value:
        return self._compare(">", other)

    def __le__(self, other: Any) -> Value:
        return self._compare("<=", other)

    def __ge__(self, other: Any) -> Value:
        return self._compare(">=", other)

    def above(self, other: Any) -> Value:
        """Mask of the lanes that are greater as unsigned integers."""
        return Value(self.builder, self.builder.icmp_unsigned(">", self.raw, self.lift(other)))


def constant(type_: Any, number: Any) -> Any:
    """Return an LLVM constant; a single number goes to all lanes, a list gives each lane its own."""
    if isinstance(type_, ir.VectorType):
        lanes = number if isinstance(number, list) else [number] * type_.count
        return ir.Constant(type_, [ir.Constant(type_.element, lane) for lane in lanes])
    return ir.Constant(type_, number)


@dataclass(frozen=True)
class Variable:
    """A place that keeps a value from one round of a loop to the next; the compiler makes it a register."""

    builder: ir.IRBuilder
    slot: Any
    type: Any

    def get(self) -> Value:
        """Return the value of now."""
        return Value(self.builder, self.builder.load(self.slot, typ=self.type))

    def set(self, value: Value) -> None:
        """Replace the value."""
        self.builder.store(value.raw, self.slot)
