"""A target that replaces another is built beside it, and takes its place when it is complete: readers lose nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dask_batchinv.disk import between, exchange
from dask_batchinv.job.target import target as targets
from dask_batchinv.job.target.at_once import for_each
from dask_batchinv.job.target.documents import ROOT
from dask_batchinv.job.target.found import foreign_keys, inspect
from dask_batchinv.job.target.holder import LOCK
from dask_batchinv.job.target.lock import Lock, locked, remove_stale_lock, who_holds
from dask_batchinv.job.target.state import State, Target
from dask_batchinv.job.target.writer import Writer
from dask_batchinv.location import Location, TakenOverError, raised_as
from dask_batchinv.outcome import TargetError
from dask_batchinv.text import clean
from dask_batchinv.transaction import Transaction

#: What the name of a target ends with that is to take another one's place.
_ENDING = ".dask_batchinv-new"


class InterruptedWhenDone(KeyboardInterrupt):
    """All is done: who runs the same command again would replace what has just taken its place."""

    report: Any = None
    """The report of the run."""


def place_beside(target: Location) -> Location | None:
    """Return where a target is built that is to take this one's place; None if it must be built in its place."""
    return target.beside(_ENDING)


def swap(new: Location, target: Location, old: Target, lock: Lock) -> str | None:
    """Let a complete target take the place of another one, whose lock is held.

    On a disk they change places in one step. Where there are no folders that could, keys are copied one by one within
    the store, and meanwhile the target says that it is not complete.

    Returns
    -------
    str or None
        What had to be left beside, and why.

    Raises
    ------
    OSError
        If that fails; both are there still, and it can be done again.
    """
    with raised_as(OSError, f"{new.name} could not take the place of {target.name}", "; run the job again"):
        with locked(new):
            lock.confirm()
            if (transaction := target.transaction) is not None:
                _exchange_by_commit(transaction, new, target, old)
                return _removed(new, old)
            if not target.is_local:
                _copy(new, target, old, lock)
                return None
            exchange(new.url, target.url)
            left = _removed(new, old)
        remove_stale_lock(target)  # which was that of the new one
        return left


def _exchange_by_commit(transaction: Transaction, new: Location, target: Location, old: Target) -> None:
    made = inspect(new).generation
    if not _is_still(target, old):
        raise TakenOverError(f"{target.name} was changed by others meanwhile; what was built lies in {new.name}")
    try:
        transaction.exchange(new, target)
    except (Exception, KeyboardInterrupt):
        transaction.begin()
        if inspect(target).generation != made:  # else it was committed all the same
            raise


def put_back(target: Location) -> bool:
    """Give what a break had left between two steps of a swap its place again; return whether that is the target's.

    Only systems that cannot exchange two folders in one step have several.
    """
    beside = place_beside(target)
    if beside is None or not beside.is_local or not os.path.lexists(between(beside.url)):
        return False
    aside = replace(beside, url=between(beside.url))
    if not inspect(aside).is_there or who_holds(aside):
        return False
    place = beside if os.path.lexists(target.url) else target
    if os.path.lexists(place.url):
        return False
    os.rename(aside.url, place.url)
    return place is target


def _is_still(location: Location, old: Target) -> bool:
    try:
        found = inspect(location)
    except TargetError:  # it is not ours
        return False
    return (found.state, found.generation) == (old.state, old.generation)


def _removed(location: Location, old: Target) -> str | None:
    try:
        return _remove(location, old)
    except (Exception, KeyboardInterrupt) as error:
        left = clean(f"{location.name} has a part of what was replaced, remove it: {type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedWhenDone(left) from error
        return left


def _remove(location: Location, old: Target) -> str | None:
    """Remove a target that was replaced; return what to say if there is something in it that is not ours."""
    if not _is_still(location, old):
        return f"{location.name} has what was there instead of what was to be replaced: that is left to you"
    keys = location.keys()
    if others := foreign_keys(keys, old):
        return f"{location.name} has what was replaced, because of {', '.join(others[:3])} in it, which is not ours"
    # The document by which it is ours last, so that a break leaves it in place.
    location.delete_all(sorted(keys, key=lambda key: key == ROOT))
    location.commit("what was replaced is removed")
    with suppress(OSError):
        os.rmdir(location.url)
    return None


def _copy(new: Location, target: Location, old: Target, lock: Lock) -> None:
    if old.state is State.COMPLETE:
        targets.set_complete(Writer(target, lock), old, False)
    mine, theirs = new.keys(), target.keys()
    keys = [key for key in mine if key != LOCK]
    for_each(target, lambda key: new.copy_to(target, key), [key for key in keys if key != ROOT])
    gone = [key for key in theirs if key not in {*keys, LOCK}]
    target.delete_all([key for key in gone if not foreign_keys([key], old)])
    lock.confirm()
    new.copy_to(target, ROOT)
    new.delete_all(sorted(keys, key=lambda key: key == ROOT))
