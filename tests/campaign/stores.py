"""A store that fails by a schedule: before it has done what was asked, or after; once, or always for one key."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import dask
import zarr.storage
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dask_batchinv import JobFailedError, JobReport, RefusedError, disk, invert_store
from dask_batchinv.chunks.bounded_store import BoundedStore
from dask_batchinv.location import Location
from tests.campaign.work import Row, Work, check

TILE: dict[str, Any] = {"variable": "cov", "tile_size": "600KB", "max_failed": None}


@dataclass(frozen=True)
class Fault:
    """What goes wrong."""

    operation: str
    """get or set."""
    number: int
    """Which of these operations."""
    after: bool
    """Whether the operation has its effect all the same."""
    error: type[Exception]
    """What it raises."""


@dataclass
class Schedule:
    """When a store fails; shared by all stores of a run."""

    faults: list[Fault]
    broken: str | None = None
    """A chunk that always fails."""
    calls: dict[str, int] = field(default_factory=lambda: {"get": 0, "set": 0})
    injected: int = 0

    def due(self, operation: str, key: str) -> Fault | None:
        """Return the fault of this call, if it has one."""
        number = self.calls[operation]
        self.calls[operation] += 1
        if self.broken is not None and key == self.broken and operation == "set":
            self.injected += 1
            return Fault(operation, number, False, OSError)
        for fault in self.faults:
            if fault.operation == operation and fault.number == number:
                self.injected += 1
                return fault
        return None


#: The one that holds now: not an attribute of the stores, for Dask copies those.
_now: list[Schedule] = []


class FaultyStore(zarr.storage.WrapperStore[Any]):
    """A store that fails as the schedule says that holds now."""

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return a value, or fail."""
        fault = _now[-1].due("get", key)
        if fault is None or fault.after:
            value = await self._store.get(key, prototype, byte_range)
        if fault is not None:
            raise fault.error("injected")
        return value

    async def set(self, key: str, value: Any) -> None:
        """Store a value, or fail, or both."""
        fault = _now[-1].due("set", key)
        if fault is None or fault.after:
            await self._store.set(key, value)
        if fault is not None:
            raise fault.error("injected")


_original_read, _original_write, _original_opened = Location.read, disk.write_file, BoundedStore.opened


def _read(self: Location, key: str, limit: int | None = None) -> bytes:
    """Read what is not read by Zarr, or fail."""
    if _now[-1].due("get", key) is not None:
        raise OSError("injected")
    return _original_read(self, key, limit)


@contextmanager
def _opened(self: BoundedStore, key: str) -> Iterator[Any]:
    """Open a chunk that is read without Zarr, or fail."""
    if (fault := _now[-1].due("get", key)) is not None:
        raise fault.error("injected")
    with _original_opened(self, key) as file:
        yield file


def _write_file(path: str, content: Any, *, synced: bool) -> str:
    """Write what is not written by Zarr, or fail, or both."""
    fault = _now[-1].due("set", os.path.basename(path))
    stamp = _original_write(path, content, synced=synced) if fault is None or fault.after else ""
    if fault is not None:
        raise fault.error("injected")
    return stamp


@contextmanager
def faulty(schedule: Schedule) -> Iterator[None]:
    """Let every store of this process fail by a schedule."""
    original = Location.store

    def store(self: Location, *, read_only: bool = False) -> Any:
        return FaultyStore(original(self, read_only=read_only))

    _now.append(schedule)
    with (
        mock.patch.object(Location, "store", store),
        mock.patch.object(Location, "read", _read),
        mock.patch("dask_batchinv.location.write_file", _write_file),
        mock.patch("dask_batchinv.chunks.sealed.write_file", _write_file),
        mock.patch.object(BoundedStore, "opened", _opened),
    ):
        yield
    _now.append(Schedule([]))  # for what still has such a store open


#: About as many operations as a run has.
GETS, SETS = 64, 32
FAULTS = st.lists(
    st.builds(
        lambda which, after, error: Fault(*which, after, error),
        st.integers(0, GETS).map(lambda n: ("get", n)) | st.integers(0, SETS).map(lambda n: ("set", n)),
        st.booleans(),
        st.sampled_from([OSError, TimeoutError, ConnectionResetError, RuntimeError]),
    ),
    max_size=5,
)


def schedules(work: Work, examples: int, chance: random.Random) -> Iterator[Row]:
    """Hypothesis makes the schedules; a failing one is made as small as it can be."""
    row = Row("a store fails by a schedule, before or after the effect")
    total = {"faults": 0, "runs that were stopped": 0, "tiles that were named": 0}

    @seed(chance.randrange(2**32))
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(FAULTS, st.none() | st.integers(0, work.tiles - 1))
    def once(faults: list[Fault], broken: int | None) -> None:
        schedule = Schedule(faults, None if broken is None else f"c.{broken}.0.0")
        with row.run(f"{schedule}"):
            _one(work, client, schedule, broken, total)
            total["faults"] += schedule.injected

    quick = {"batchinv.job.attempts": 4}
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
        dask.config.set(quick),
        mock.patch("dask_batchinv.job.driver.retry.BACK_OFF_SECONDS", 0.005),
        mock.patch("dask_batchinv.job.driver.run.FLUSH_BACK_OFF_SECONDS", 0.005),
    ):
        once()
    row.faults = total.pop("faults")
    row.remarks |= total
    yield row


def _one(work: Work, client: Client, schedule: Schedule, broken: int | None, total: dict[str, int]) -> None:
    target = work.fresh()
    report: JobReport | None = None
    with faulty(schedule):
        try:
            report = invert_store(work.source, target, client=client, **TILE)
        except JobFailedError as error:
            report = error.report
        except (OSError, RefusedError) as error:
            check("injected" in str(error), f"another error than the injected one: {error}")
            total["runs that were stopped"] += 1
    if report is not None:
        named = [bad.number for bad in report.failed_tiles]
        expected = [] if broken is None else [broken]
        check(report.stopped or named == expected, f"{named} were named, {expected} are broken")
        check(not named or "injected" in report.failed_tiles[0].cause, "the cause is not named")
        total["tiles that were named"] += len(named)
        if not named and not report.stopped:
            work.check(target)
    again = invert_store(work.source, target, client=client, **TILE)
    check(again.exit_code == 0, "it was not finished without the faults")
    work.check(target)
