"""How often this process has asked stores for chunks, or for parts of them, and given them some."""

from __future__ import annotations

import threading


class _Count:
    """A number that several threads add to."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def add(self, count: int = 1) -> None:
        """Add to it."""
        with self._lock:
            self._count += count

    def take(self) -> int:
        """Return what was added since the last time."""
        with self._lock:
            count, self._count = self._count, 0
        return count


#: Of jobs: what tiles are read from and written to.
COUNT = _Count()
