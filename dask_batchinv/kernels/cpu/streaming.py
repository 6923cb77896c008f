"""Prefetching of input, and non-temporal stores of output for large stacks.

An ordinary store first reads the line that it changes: for large stacks of small matrices that is a third of all
traffic. A non-temporal store of a whole aligned line does without. So a group of inverses is put together in the
scratch, and sent off piece by piece while the next group is in work.
"""

from __future__ import annotations

from collections.abc import Callable

from dask_batchinv.kernels.emit.emitter import Emitter
from dask_batchinv.kernels.emit.values import Value

#: Input is prefetched at least so far ahead; measured.
_AHEAD_NBYTES = 4096
#: It is prefetched to the first-level cache up to this size of a group, else to the second.
_FIRST_LEVEL_NBYTES = 2**14


def buffer_nbytes(size: int, vector_nbytes: int) -> int:
    """Bytes of the scratch for groups of `size` vectors."""
    return (size + 1) * vector_nbytes


class Streaming:
    """Moves groups of `size` vectors of numbers: from the stack, and to the inverses."""

    def __init__(self, e: Emitter, size: int, buffer: Value):
        self.e, self.size, self.buffer = e, size, buffer
        self.nontemporal = ~e.nontemporal.eq(0)
        # Lanes by which the first inverse begins after a whole vector.
        self.skew = (e.address(e.inverse) & (e.nbytes - 1)) >> (e.itemsize.bit_length() - 1)
        self.level = 3 if size * e.nbytes <= _FIRST_LEVEL_NBYTES else 2

    def step(self, group: Value, step: Value | int, steps: int) -> None:
        """In each of `steps` steps of the work on a group, prefetch a part of the next and store a part of the last."""
        e, share = self.e, -(-self.size // steps)
        ahead = -(-_AHEAD_NBYTES // (self.size * e.nbytes))
        source = self._numbers(e.a, group + ahead)
        target = self._numbers(e.inverse, group + (ahead if ahead > 1 else 0))
        line = max(1, 64 // e.nbytes)
        self._each(step, share, lambda v: e.prefetch(self._vector(source, v), level=self.level), line)
        with e.when(~self.nontemporal):
            self._each(step, share, lambda v: e.prefetch(self._vector(target, v), write=True, level=self.level), line)
        if isinstance(step, int):
            if step == 0:
                self._send_first(group)
        else:
            with e.when(step.eq(0)):
                self._send_first(group)
        with e.when(self.nontemporal & (group > 0)):
            self._send_share(group - 1, step * share, share)

    def target(self, group: Value) -> Value:
        """Return where to write the inverses of a group; all steps for the one before must have been done."""
        # The end of the group before is in the same vector as the beginning of this.
        self.e.store(self._line(self.size), self.buffer, align=self.e.nbytes)
        return self.e.select(self.nontemporal, self.e.at(self.buffer, self.skew), self._numbers(self.e.inverse, group))

    def finish(self) -> None:
        """Send what is left after the last group."""
        e, count = self.e, self.e.count
        with e.when(self.nontemporal & (count > 0)):
            self._send_first(count)
            with e.loop(1, self.size) as v:
                self._send(count - 1, v)
            self._store_some(self._line(self.size), e.iota < e.splat(e.resize(self.skew, e.word)), count)
            e.fence()

    def _send_first(self, group: Value) -> None:
        """Send the first vector of the group before; that of the very first group may begin before the target."""
        e = self.e
        with e.when(self.nontemporal & (group > 1)):
            e.store_nontemporal(self._line(0), self._start(group - 1))
        with e.when(self.nontemporal & group.eq(1)):
            self._store_some(self._line(0), ~(e.iota < e.splat(e.resize(self.skew, e.word))), group - 1)

    def _send_share(self, group: Value, first: Value | int, share: int) -> None:
        if isinstance(first, int):
            for vector in range(max(1, first), min(first + share, self.size)):
                self._send(group, vector)
            return
        # No vector twice: that is slow.
        with self.e.loop(self.e.signed("smax", first, 1), self.e.signed("smin", first + share, self.size)) as v:
            self._send(group, v)

    def _send(self, group: Value, vector: Value | int) -> None:
        """Send a vector; the first has a way of its own."""
        self.e.store_nontemporal(self._line(vector), self._vector(self._start(group), vector))

    def _store_some(self, line: Value, lanes: Value, group: Value) -> None:
        self.e.store_where(lanes, line, self._start(group))

    def _each(self, step: Value | int, share: int, body: Callable[[Value | int], None], every: int) -> None:
        """Run the body for a step's share of vectors: for all, or only for every second or fourth."""
        stop = share if isinstance(step, Value) else min(share, self.size - step * share)
        for v in range(0, stop, every):
            body(step * share + v)

    def _numbers(self, array: Value, group: Value) -> Value:
        return self.e.at(array, group * (self.size * self.e.lanes))

    def _start(self, group: Value) -> Value:
        return self.e.at(self._numbers(self.e.inverse, group), -self.skew)

    def _vector(self, base: Value, index: Value | int) -> Value:
        return self.e.at(base, index * self.e.lanes)

    def _line(self, index: Value | int) -> Value:
        return self.e.load(self._vector(self.buffer, index), align=self.e.nbytes)
