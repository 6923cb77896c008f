"""Large diagonal matrices: reciprocals, and zeros that are written, not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

from llvmlite import ir

from dask_batchinv.kernels.cpu.blocked_ends import first_lanes, scale, tell
from dask_batchinv.kernels.cpu.blocked_frame import Frame
from dask_batchinv.kernels.cpu.blocked_matrix import BlockedMatrix, nbytes_of_rows
from dask_batchinv.kernels.cpu.blocked_schedule import Stage
from dask_batchinv.kernels.cpu.scaling import Measure, larger_sum, without_sign_of_zero
from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.cpu.within_workspace import across
from dask_batchinv.kernels.emit.number import Number
from dask_batchinv.kernels.emit.values import Value


class DiagonalMatrix(BlockedMatrix):
    """A diagonal matrix in work: one row of the scratch, for the inverses."""

    FUNCTIONS: ClassVar[Mapping[str, int]] = {"measure": 3, "read": 3, "give": 3}

    @classmethod
    def write(cls, spec: KernelSpec, module: ir.Module) -> None:
        """Write the functions."""
        _write_measure(Frame(spec, "measure", 3, module))
        _write_read(Frame(spec, "read", 3, module))
        _write_give(Frame(spec, "give", 3, module))

    @classmethod
    def nbytes(cls, spec: KernelSpec) -> int:
        """Return the bytes of memory for a matrix of `spec.n` rows."""
        return nbytes_of_rows(spec, rows=1)

    def __init__(self, spec: KernelSpec, n: int, functions: Sequence[Callable[..., None]]):
        super().__init__(spec, n, functions, rows=1)
        self._tables = [self._table()]

    def _eliminate(self, threads: int) -> Iterator[Stage]:
        yield Stage([self._check])


def _entries(f: Frame, i: Value) -> Number:
    """Load a vector of the diagonal from entry i on; beyond the last, that once more."""
    e, scalars = f.e, []
    for lane in range(f.lanes):
        at = e.signed("smin", i + lane, f["n"] - 1)
        place = e.at(f["source"], at * (f["n"] + 1) * f.parts)
        scalars.append([e.load(e.at(place, part), e.real) for part in range(f.parts)])
    return Number(e, tuple(e.gathered(parts) for parts in zip(*scalars, strict=True)))


def _write_measure(f: Frame) -> None:
    e, measure = f.e, Measure(f.e)
    with e.loop(f.arguments[0], f.arguments[1], f.lanes) as i:
        for part in _entries(f, i).parts:
            measure.look(part)
    tell(f, *measure.bits_of_all())
    e.finish()


def _write_read(f: Frame) -> None:
    """Invert the diagonal."""
    e, (first, second) = f.e, scale(f)
    norm = e.variable(e.numbers(0.0))
    with e.loop(f.arguments[0], f.arguments[1], f.lanes) as i:
        number = _entries(f, i).times_real(first).times_real(second)
        norm.set(larger_sum(e, number.modulus(), norm.get()))
        e.store(number.size(), e.at(f["sizes"], i))
        f.store(number.reciprocal(), f["rows"], i)
    largest = e.bits(e.lane(across(e, norm.get(), partial(larger_sum, e)), 0))
    tell(f, largest, largest)
    e.finish()


def _write_give(f: Frame) -> None:
    """Write whole rows, with their inverses scaled back."""
    e, length = f.e, f["n"] * f.parts
    first, second = (f.e.lane(factor, 0) for factor in scale(f))
    norm, largest = e.variable(e.number(0.0)), e.variable(e.value(ir.Constant(e.word, 0)))
    whole = length / f.lanes * f.lanes
    with e.loop(f.arguments[0], f.arguments[1]) as i:
        row = e.at(f["target"], i * length)
        with e.loop(0, whole, f.lanes) as at:
            e.store(e.numbers(0.0), e.at(row, at))
        e.store_where(first_lanes(e, length - whole), e.numbers(0.0), e.at(row, whole))
        inverse = f.entry(f["rows"], i)
        norm.set(larger_sum(e, inverse.modulus(), norm.get()))
        for part, number in enumerate(inverse.parts):
            back = without_sign_of_zero(e, number * first, second)
            largest.set(e.unsigned("umax", largest.get(), e.bits(e.absolute(back))))
            e.store(back, e.at(row, i * f.parts + part))
    tell(f, largest.get(), e.bits(norm.get()))
    e.finish()
