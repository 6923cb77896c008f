"""What a run writes to its target itself: nothing, once another run has taken over or what it wrote last has gone.

A driver may be stopped for any time, by Ctrl-Z or a laptop that sleeps, and not know it when it goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from dask_batchinv.disk import Stamp
from dask_batchinv.job.target.lock import Lock
from dask_batchinv.location import Location


class Writer:
    """Writes for the run that holds a target."""

    def __init__(self, target: Location, lock: Lock):
        self._target, self._lock = target, lock
        self._stamps: dict[str, Stamp] = {}

    def create(self, key: str, content: bytes) -> None:
        """Store what belongs to a target that is being created or mended, and put it on the disk."""
        self._lock.confirm()
        self._target.write(key, content, synced=True)

    def watch(self, key: str) -> None:
        """Have `replace` expect what is stored under `key` now."""
        self._stamps[key] = self._target.stamp(key)

    def replace(self, key: str, content: bytes, *, synced: bool) -> None:
        """Store bytes under a key that holds what this run wrote last, or what was there when it began to watch.

        Raises
        ------
        TakenOverError
            If it does not, or this run holds the target no more.
        """
        self._lock.confirm()
        self._stamps[key] = self._target.replace(key, content, self._stamps[key], synced=synced)

    def change(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        """Store what `change` makes of what is stored under a key, unless that is replaced meanwhile."""
        self._lock.confirm()
        stamp = self._target.stamp(key)
        try:
            old = None if stamp is None else self._target.read(key)
        except FileNotFoundError:
            old, stamp = None, None
        except ValueError:  # a link to what is no file: it is replaced, not followed
            old = None
        self._target.replace(key, change(old), stamp, synced=True)

    def commit(self, message: str) -> None:
        """Make what was written last, where a store knows commits; elsewhere it does already."""
        self._target.commit(message)

    def delete_all(self, keys: list[str]) -> None:
        """Delete keys, in order."""
        self._lock.confirm()
        self._target.delete_all(keys)
