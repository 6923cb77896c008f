"""What stores that know commits offer: what is written lasts together, or not at all."""

from __future__ import annotations

from typing import Any, Protocol


class Transaction(Protocol):
    """What was written to a place since the last commit."""

    def begin(self) -> None:
        """Begin, with what is committed now."""

    def end(self) -> None:
        """Forget what was not committed."""

    def merge(self, fork: Any) -> None:
        """Add the changes of a fork, as `Location.changes` returns them."""

    def changed_by_others(self, array: Any) -> set[tuple[int, ...]]:
        """Return the places of chunks of an array, which is a location, that others have changed since it has begun."""

    def exchange(self, one: Any, other: Any) -> None:
        """Let what is at two places, which are locations, change these, in one commit."""
