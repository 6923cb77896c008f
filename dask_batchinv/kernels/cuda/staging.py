"""From main memory to the GPU and back: copying in, inverting and copying out overlap."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_batchinv.kernels.cuda import kernels as cuda
from dask_batchinv.kernels.cuda import launch
from dask_batchinv.stack import AssumeA

HostArray = npt.NDArray[Any]

#: Bytes of the matrices that are copied at a time; and where cuBLAS inverts them, which wants many.
PIECE_NBYTES = 2**25
PIECE_FOR_CUBLAS_NBYTES = 2**28
#: Pieces on their way at once: one is copied while another is inverted.
SLOTS = 2


def scratch_nbytes(n: int, dtype: npt.DTypeLike, assume_a: AssumeA = "general") -> int:
    """Return the main memory that `invert` takes, whatever the number of matrices."""
    one = n * n * np.dtype(dtype).itemsize + 16
    slots, piece = _pieces(n, dtype, assume_a)
    # CuPy keeps pinned memory in powers of two.
    return 2 * slots * max(piece, 1 << (one - 1).bit_length())


def _pieces(n: int, dtype: npt.DTypeLike, assume_a: AssumeA) -> tuple[int, int]:
    """Return how many pieces are on their way at once, and the bytes of each."""
    if n and launch.choose_launch(n, dtype, assume_a).layout == "cublas":
        # One handle of it serves one stream at a time.
        return 1, PIECE_FOR_CUBLAS_NBYTES
    return SLOTS, PIECE_NBYTES


def invert(a: HostArray, out: HostArray, info: HostArray, rcond: HostArray, *, assume_a: AssumeA) -> None:
    """Invert a block that is in main memory on the current GPU; the contract is in `dask_batchinv.kernels`."""
    m, n = a.shape[:2]
    at_once, nbytes = _pieces(n, a.dtype, assume_a)
    step = max(1, min(m, nbytes // max(1, n * n * a.itemsize)))
    slots: list[_Slot] = []
    results = out, info, rcond
    try:
        for number, start in enumerate(range(0, m, step)):
            if number < at_once:
                slots.append(_Slot.make(number, step, n, a.dtype))
            slot = slots[number % at_once]
            slot.finish(results, assume_a)
            slot.begin(a, slice(start, min(start + step, m)), assume_a)
        for slot in slots:
            slot.finish(results, assume_a)
    finally:
        for slot in slots:  # after an error too: memory that is still copied to must not become another's
            slot.stream.synchronize()


@dataclass
class _Slot:
    """Room for one piece, in pinned memory and on the GPU, and a stream of its own."""

    stream: Any
    pinned: tuple[HostArray, ...]
    """The matrices, their results, which are inverse, info, rcond, and how many overflowed in single precision."""
    on_gpu: tuple[Any, ...]
    """The same."""
    part: slice | None = None
    """What of the block is on its way."""

    @classmethod
    def make(cls, number: int, m: int, n: int, dtype: Any) -> _Slot:
        import cupy

        real = np.empty(0, dtype).real.dtype
        int32, uint32 = np.dtype(np.int32), np.dtype(np.uint32)
        layout = (((m, n, n), dtype), ((m, n, n), dtype), ((m,), int32), ((m,), real), ((1,), uint32))
        stream = _stream(cupy.cuda.Device().id, number)
        with stream:  # CuPy's memory belongs to the stream that it is first used on
            return cls(stream, tuple(_pinned(*one) for one in layout), tuple(cupy.empty(*one) for one in layout))

    def begin(self, a: HostArray, part: slice, assume_a: AssumeA) -> None:
        """Send a part of a block on its way."""
        m = part.stop - part.start
        self.part = part
        self.pinned[0][:m] = a[part]
        on_gpu = [x[:m] for x in self.on_gpu]
        with self.stream:
            on_gpu[0].set(self.pinned[0][:m], stream=self.stream)
            on_gpu[4].fill(0)
            cuda.run(*on_gpu[:4], assume_a=assume_a, overflows=on_gpu[4] if a.dtype.char in "fF" else None)
            for x, host in zip(on_gpu[1:], self.pinned[1:], strict=True):
                x.get(stream=self.stream, out=host[:m], blocking=False)

    def finish(self, results: tuple[HostArray, ...], assume_a: AssumeA) -> None:
        """Wait for what is on its way, and take it out."""
        if self.part is None:
            return
        self.stream.synchronize()
        m = self.part.stop - self.part.start
        if self.pinned[4][0]:
            with self.stream:
                on_gpu = [x[:m] for x in self.on_gpu[:4]]
                cuda.again_in_double(*on_gpu, assume_a=assume_a)
                for x, host in zip(on_gpu[1:], self.pinned[1:4], strict=True):
                    x.get(stream=self.stream, out=host[:m])
        for result, host in zip(results, self.pinned[1:4], strict=True):
            result[self.part] = host[:m]
        self.part = None


class _Streams(threading.local):
    """The streams of a thread, by device and number: CuPy keeps memory for each that there ever was."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], Any] = {}


_streams = _Streams()


def _stream(device: int, number: int) -> Any:
    import cupy

    if (device, number) not in _streams.known:
        _streams.known[device, number] = cupy.cuda.Stream(non_blocking=True)
    return _streams.known[device, number]


def _pinned(shape: tuple[int, ...], dtype: Any) -> HostArray:
    import cupy

    size = math.prod(shape)
    memory = cupy.cuda.alloc_pinned_memory(max(1, size * dtype.itemsize))
    return np.frombuffer(memory, dtype, size).reshape(shape)
