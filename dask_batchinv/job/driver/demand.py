"""Shows a cluster that grows with its work how much there is to do.

An adaptive cluster counts the tasks that its scheduler cannot place, and what such tasks have taken so far. We place
our own, a few at a time, so that it would see next to none. So that many more of their name wait for a worker with
something that none has, and are taken back before the job ends.
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from typing import Any

from distributed import Client, Future

#: At most so many wait: an adaptive cluster looks at a hundred, and takes the others to be like them.
MOST_WAITING = 500
#: What no worker has.
_NOBODY_HAS = "dask_batchinv: shows what is left to do"


class Demand:
    """Tasks that wait, and never run.

    Parameters
    ----------
    client : Client
        The cluster.
    prefix : str
        How the keys of the tasks begin that they stand for.
    """

    def __init__(self, client: Client, prefix: str):
        self._client, self._prefix = client, prefix
        self._waiting: list[Future] = []

    def __enter__(self) -> Demand:
        return self

    def __exit__(self, *args: object) -> None:
        self.ask_for(0)

    def ask_for(self, count: int, most: int = MOST_WAITING) -> None:
        """Have about so many tasks wait; whether a cluster heeds them is its own affair."""
        # Somebody may have restarted the cluster.
        self._waiting = [future for future in self._waiting if future.status == "pending"]
        count, now = min(count, most), len(self._waiting)
        if abs(count - now) <= now // 10 and count:
            return
        with suppress(Exception):  # whatever a connection may raise: it is seen where it matters
            if count > now:
                keys = [f"{self._prefix}-waiting-{uuid.uuid4().hex}" for _ in range(count - now)]
                # Not a function of ours, which the scheduler would have to know.
                self._waiting += self._client.map(
                    time.sleep, [0.0] * len(keys), key=keys, resources={_NOBODY_HAS: 1}, pure=False
                )
            elif surplus := self._cut(count):
                self._client.cancel(surplus, force=True)

    def _cut(self, count: int) -> list[Any]:
        kept, surplus = self._waiting[:count], self._waiting[count:]
        self._waiting = kept
        return surplus
