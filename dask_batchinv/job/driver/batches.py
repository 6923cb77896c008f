"""In stores that know commits: tiles in batches, of which each lasts as a whole, with its rows of the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from dask_batchinv.job.events import Heartbeat
from dask_batchinv.job.results import TileResult
from dask_batchinv.location import Location, raised_as
from dask_batchinv.transaction import Transaction

#: The first batch has about so many tasks for each thread, later ones as many more, each time at most so many times
#: more, as take so many seconds: what a killed run has not committed is done again.
FIRST_BATCH_TASKS, LARGEST_GROWTH, BATCH_SECONDS = 4, 4.0, 60.0

Results = Iterator[TileResult[Any] | Heartbeat]


def in_batches(
    target: Location,
    transaction: Transaction,
    spans: Iterator[range],
    threads: int,
    commit: Callable[[], bool],
    invert: Callable[[Location, list[range]], Results],
) -> Results:
    """Yield what `invert` yields for spans of tiles that it writes to a fork of the target, once that is merged.

    Parameters
    ----------
    target, transaction
        Where they belong.
    spans
        The tiles.
    threads
        How many work at a time.
    commit
        Makes last what was merged and recorded; tells whether to go on.
    invert
        Inverts a batch.
    """
    size = FIRST_BATCH_TASKS * max(1, threads)
    # A fork is made of what is committed, before anything of its batch is merged.
    while (batch := list(islice(spans, size))) and commit():
        start, merged = time.monotonic(), None
        with raised_as(OSError, f"{target.name} cannot be written", "; run the job again"):
            fork = target.forked()
        for result in invert(fork, batch):
            if isinstance(result, Heartbeat):
                yield result
                continue
            if result.changes is not None and result.changes is not merged:  # several tiles of a task have the same
                merged = result.changes
                with raised_as(OSError, f"{target.name} cannot be written", "; run the job again"):
                    transaction.merge(merged)
            if result.stops:
                spans = iter(())
            yield replace(result, changes=None)
        size = max(1, round(size * min(LARGEST_GROWTH, BATCH_SECONDS / (time.monotonic() - start))))
