"""What the arguments of the commands mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dask.config

from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.prepare import Job, prepare
from dask_batchinv.location import Location, json_object
from dask_batchinv.outcome import RefusedError, SourceError, TargetError
from dask_batchinv.places import locate

_CLUSTER_ARGUMENTS = (
    "scheduler", "scheduler_file", "wait_for_workers", "wait", "only_workers", "insecure", "restart_stalled", "workers",
    "threads_per_worker", "memory_limit", "dashboard",
)  # fmt: skip


def parse(arguments: dict[str, Any]) -> tuple[Job, ClusterOptions]:
    """Return the job that the arguments of `run` describe, and the cluster for it."""
    cluster = ClusterOptions(**{name: arguments.pop(name) for name in _CLUSTER_ARGUMENTS})
    source = locate_argument("source", arguments)
    target = locate_argument("target", arguments)
    if target.is_memory:
        raise RefusedError(f"the target {target.name} would end with this command: choose a path or a store")
    arguments["zarr_format"] = int(arguments["zarr_format"])
    arguments["select"] = _selection(arguments["select"])
    arguments["names"] = _pairs("names", arguments["names"], "WHAT=NAME")
    arguments["chunks"] = _lengths("chunks", arguments["chunks"]) or {}
    arguments["shards"] = _lengths("shards", arguments["shards"])
    if arguments["dims"] is not None:
        arguments["dims"] = tuple(arguments["dims"].split(","))
    return prepare(source, target, JobOptions(**arguments)), replace(cluster, device=arguments["device"])


def _selection(texts: tuple[str, ...]) -> dict[str, str]:
    """Return what --select says."""
    pairs = [text.partition("=") for text in texts]
    if bad := [dim for dim, mark, _ in pairs if not mark or not dim]:
        raise RefusedError(f"--select takes DIM=LABEL or DIM=FIRST..LAST, got {bad[0]!r}")
    return _each_once("select", [(dim, label) for dim, _, label in pairs])


def _pairs(option: str, text: str | None, form: str) -> dict[str, str]:
    """Return what an option says that takes pairs."""
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    if bad := [what for what, mark, _ in pairs if not mark]:
        raise RefusedError(f"--{option} takes {form},{form}, got {bad[0]!r}")
    return _each_once(option, [(what.strip(), name.strip()) for what, _, name in pairs])


def _each_once(option: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedError(f"--{option} names something twice: {', '.join(what for what, _ in pairs)}")
    return found


def _lengths(option: str, text: str | None) -> dict[str, int] | None:
    """Return lengths by dimension; None if the option was not given."""
    if text is None:
        return None
    pairs = _pairs(option, text, "DIM=LENGTH")
    if bad := [f"{dim}={size}" for dim, size in pairs.items() if not size.isdecimal()]:
        raise RefusedError(f"--{option} takes DIM=LENGTH,DIM=LENGTH, got {bad[0]!r}")
    return {dim: int(size) for dim, size in pairs.items()}


def options_of(name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the file system of an argument is given; of what was typed, which may be secret, nothing is shown."""
    if (text := arguments.pop(f"{name}_options")) is None:
        return None
    try:
        if text.lstrip().startswith("{"):
            return json_object(text, "it")
        found = dask.config.get(text)
    except (ValueError, KeyError, TypeError, IndexError):
        found = None
    if not isinstance(found, dict):
        why = "this is neither" if found is None else f"that name has a {type(found).__name__} there"
        raise RefusedError(f"--{name}-options takes a JSON object, or the name of one in the Dask configuration: {why}")
    return found


def locate_argument(name: str, arguments: dict[str, Any]) -> Location:
    """Return the location of an argument, with its options."""
    try:
        return locate(arguments.pop(name), options_of(name, arguments))
    except ValueError as error:
        raise (SourceError if name == "source" else TargetError)(f"{name}: {error}") from error


def source_if_given(arguments: dict[str, Any]) -> Location | None:
    """Return the location of the source, or None; what is about it is not among the arguments any more."""
    if arguments["source"] is not None:
        return locate_argument("source", arguments)
    arguments.pop("source")
    arguments.pop("source_options")
    return None
