"""Memory that begins where a cache line does."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return a new array whose content is not set."""
    size = int(np.prod(shape, dtype=np.intp)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
