"""What a worker did, beside Dask's own metrics: on its page ``/metrics``, which Prometheus reads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from dask_batchinv.job.results import TileResult, TileRow

_LOCK = threading.Lock()


def count(results: Iterable[TileResult[TileRow]]) -> None:
    """Count tiles that a worker has done, and their matrices by what happened to them.

    Where there is no such page nothing is imported: Dask has imported what makes it where there is one.
    """
    if (prometheus := sys.modules.get("prometheus_client")) is not None:
        with suppress(Exception):  # to count costs no tile
            _count(prometheus, results)


def _count(prometheus: Any, results: Iterable[TileResult[TileRow]]) -> None:
    with _LOCK:  # they can be registered but once
        metrics = _metrics(prometheus)
    for result in results:
        metrics["tiles"].labels("failed" if result.value is None else "done").inc()
        metrics["seconds"].inc(result.milliseconds / 1000)
        metrics["cpu_seconds"].inc(result.cpu_milliseconds / 1000)
        if result.value is not None:
            counts = result.value.counts
            others = {kind: number for kind, number in counts.items() if kind != "matrices"}
            for outcome, number in {**others, "inverted": counts["matrices"] - sum(others.values())}.items():
                metrics["matrices"].labels(outcome).inc(number)


@cache
def _metrics(prometheus: Any) -> dict[str, Any]:
    counter = prometheus.Counter
    return {
        "tiles": counter("dask_batchinv_tiles", "Tiles, by whether they were done.", ["outcome"]),
        "matrices": counter("dask_batchinv_matrices", "Matrices, by what happened to them.", ["outcome"]),
        "seconds": counter("dask_batchinv_tile_seconds", "Seconds that threads were at work on tiles."),
        "cpu_seconds": counter("dask_batchinv_tile_cpu_seconds", "For how long of that they have computed."),
    }
