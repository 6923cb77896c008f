"""Threads at one matrix: they take tasks from a list, in its order, without coming back to the interpreter.

A task begins when so many have been done. A number is enough, as tasks are taken in order and what they need never
falls: none that stands behind the first so many can be among those. Any thread could do them all, should no other have
time; one that has waited for a while comes back, to be asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llvmlite import ir

from dask_batchinv.kernels.cpu.spec import KernelSpec
from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.values import INT, Value


class Task(NamedTuple):
    """What one thread does, as all functions see it: each has its own use for the numbers."""

    needs: int
    """How many tasks, from the first of the list on, must be done before."""
    action: int
    """Which of the actions it is."""
    table: int
    """The address of the table of the panel."""
    next_table: int
    """That of the next panel."""
    k0: int
    """The first row of the panel."""
    width: int
    """How many it has."""
    start: int
    """Where the work begins."""
    stop: int
    """Where it ends."""


Call = Callable[..., None]
"""``call(name, table, *integers)`` of one of the functions."""
Action = Callable[[Call, dict[str, Value]], None]
"""Calls what a task is, from its fields and "memory", the address of memory of the thread's own."""

#: What threads count with: tasks taken, and done. Each has a cache line of its own.
COUNTERS = (0, 8)
#: Words of a thread's own: the number of the task that it holds, or -1; its memory begins after that.
OWN = 8
#: How often a thread looks whether it may begin: some microseconds.
_LOOKS = 3000


def write(spec: KernelSpec, module: ir.Module, actions: Sequence[Action]) -> None:
    """Write ``work(tasks, count, counters, own)``, which returns when there is nothing more to take, or nothing yet.

    In the former case the number that it holds is `count` or more.
    """
    e = Emitter(f"{spec.name}_work", spec.itemsize, spec.lanes, integers=3, module=module)
    tasks, count, *addresses = e.arguments
    counters, own = (e.value(e.builder.inttoptr(address.raw, ir.PointerType())) for address in addresses)
    taken, done = (e.at(counters, place, INT) for place in COUNTERS)
    memory = addresses[1] + 8 * OWN

    def call(name: str, table: Value, *integers: Value) -> None:
        pointer = e.value(e.builder.inttoptr(table.raw, ir.PointerType()))
        e.call(f"{spec.name}_{name}", ir.VoidType(), pointer, *integers)

    number, goes_on = e.variable(e.load(own, INT)), e.variable(e.boolean(True))
    with e.repeat(goes_on.get):
        with e.builder.if_then((number.get() < 0).raw):
            number.set(e.atomic_add(taken))
        e.store(number.get(), own)
        goes_on.set(number.get() < count)
        with e.builder.if_then(goes_on.get().raw):
            place = e.at(tasks, number.get() * len(Task._fields), INT)
            task = {name: e.load(e.at(place, i, INT), INT) for i, name in enumerate(Task._fields)}
            looks = e.variable(e.integer(0))
            with e.repeat(lambda: (e.atomic_load(done) < task["needs"]) & (looks.get() < _LOOKS)):
                looks.set(looks.get() + 1)
            goes_on.set(looks.get() < _LOOKS)
            with e.builder.if_then(goes_on.get().raw):
                for i, action in enumerate(actions):
                    with e.builder.if_then(task["action"].eq(i).raw):
                        action(call, task | {"memory": memory})
                e.atomic_add(done)
                number.set(e.integer(-1))
    e.finish()
