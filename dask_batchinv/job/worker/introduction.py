"""What a worker is asked before it gets its first tile: whether it runs what we run, and sees what we see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dask_batchinv.job.source.source import Source
from dask_batchinv.job.target.holder import holder_of
from dask_batchinv.job.versions import Versions, differing, versions
from dask_batchinv.location import Location
from dask_batchinv.requests import COUNT
from dask_batchinv.text import clean


@dataclass(frozen=True)
class Introduction:
    """What a worker must find to be of use."""

    versions: Versions
    """What the driver runs."""
    source: Source | None
    """What must be readable there."""
    target: Location
    """What must be the same place there."""
    holder: str | None = None
    """What the lock of the target says, by which a worker knows that it sees the same one."""
    place: str | None = None
    """The `place_of` the target, where nothing is locked because nothing is written."""
    writes: bool = True
    """Whether it must be able to write there."""

    def why_useless(self, answer: Any) -> str | None:
        """Return what the answer of a worker to `introduce` means, which may be an error of any kind."""
        if not isinstance(answer, Exception):
            return None if answer is None else str(answer)
        version = self.versions["dask_batchinv"]
        return clean(f"it cannot run dask_batchinv {version}: {type(answer).__name__}: {answer}")


def place_of(target: Location) -> str | None:
    """Return what two processes see alike if and only if they see one target, as far as can be told without writing.

    On a disk the number of the file and its time, which a copy does not have; of the device nothing is known elsewhere.
    """
    stamp = target.stamp("zarr.json")
    return stamp.partition(" ")[2] if stamp and target.is_local else stamp


def introduce(introduction: Introduction) -> str | None:
    """Return why this worker is of no use, or None if it is."""
    COUNT.take()  # of what was before
    if different := differing(introduction.versions, versions()):
        return f"it has other versions: {different}"
    source, target = introduction.source, introduction.target
    try:
        if source is not None and source.open().shape != source.stored_shape:
            return f"{source.location.name} is another array there"
        if introduction.holder is not None and holder_of(target) != introduction.holder:
            return f"{target.name} is another place there: what this job has written to it is not to be seen"
        if introduction.place is not None and place_of(target) != introduction.place:
            return f"{target.name} is another place there"
        if introduction.writes and not target.is_writable():
            return f"{target.name} cannot be written there"
    except Exception as error:  # whatever a file system may raise
        return clean(f"it cannot reach the stores: {type(error).__name__}: {error}")
    return None


def tasks_begun(prefix: str, dask_worker: Any = None) -> list[str]:
    """Return the keys of those of our tasks that this worker is at work on."""
    return [str(key) for key in list(dask_worker.active_threads.values()) if str(key).startswith(prefix)]
