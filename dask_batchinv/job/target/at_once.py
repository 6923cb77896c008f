"""Several requests at a time, where a store makes us wait for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dask_batchinv.location import Location

_REQUESTS = 16
K = TypeVar("K")
T = TypeVar("T")


def for_each(location: Location, function: Callable[[K], T], keys: Iterable[K]) -> list[T]:
    """Return what a function gives for each key, in their order; one after the other where none makes us wait."""
    if location.is_local or location.is_memory or location.transaction is not None:
        return [*map(function, keys)]
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="dask_batchinv-requests") as pool:
        return [*pool.map(function, keys)]
