"""The states of a target, and what a run makes of each: pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.outputs import Keep, Outputs
from dask_batchinv.job.target.encoding import Encoding
from dask_batchinv.job.tiling import Tiling

Fingerprint = dict[str, Any]
Action = Literal["create", "continue", "check", "refuse"]


class State(Enum):
    """What there is at the location of a target. What is not ours has no state: it is an error."""

    ABSENT = "absent"
    """Nothing, or an empty folder."""
    BEING_CREATED = "being created"
    """A creation, or a removal, that is going on or was interrupted."""
    BEGUN = "begun"
    """All metadata, and some of the tiles."""
    COMPLETE = "complete"
    """All tiles."""
    OTHER_FORMAT = "of another format"
    """What another version has made, in a way that this one does not continue."""


@dataclass(frozen=True)
class Target:
    """What is known of a target."""

    state: State
    """Its state."""
    fingerprint: Fingerprint
    """What it is made of: source, parameters, versions."""
    generation: str = ""
    """Which creation it stems from."""
    replaces: str = ""
    """The generation of the target whose place it is to take, if it is built beside one."""
    shape: tuple[int, ...] = ()
    """Its shape."""
    tile: tuple[int, ...] = ()
    """Its tiles, which stay whatever limits a later run has."""
    core: tuple[int, int] = (-2, -1)
    """Axes of the rows and columns of its source, in the order of that: names may have changed places since."""
    members: tuple[str, ...] = ()
    """What else than its metadata is in it."""
    outputs: Outputs = ()
    """The arrays that are made."""
    encoding: Encoding = field(default_factory=Encoding)
    """How their chunks are stored."""
    ledger: str = "tiles"
    """The name of the array with the rows of its ledger: another one where growth has given tiles other numbers."""

    @property
    def tiling(self) -> Tiling:
        """How it is cut into tiles."""
        return Tiling(self.shape, self.core, self.tile)

    @property
    def is_there(self) -> bool:
        """Whether there is a ledger to be read."""
        return self.state in (State.BEGUN, State.COMPLETE)


#: What a fingerprint says of what was not asked for.
_NOTHING = {"mask": "none", **dict.fromkeys(("compress", "shards", "packed", "complex_dim", "imag"), "no")}


def options_of(target: Target, **others: Any) -> JobOptions:
    """Return the options by which a target was made, and `others`, which it does not tell."""
    made, names = target.fingerprint, {output.role: output.name for output in target.outputs}
    as_is = (
        "variable", "dims", "select", "assume_a", "lower", "min_rcond", "precision", "like_source", "chunks",
        "zarr_format",
    )  # fmt: skip
    known: dict[str, Any] = {name: made[name] for name in as_is}
    if made["packed"] != "no":  # rows and columns have no names there
        known["dims"] = made["packed_dims"]
    for name, nothing in _NOTHING.items():
        known[name] = None if made[name] == nothing else made[name]
    keep: Keep = "diagonal" if "diagonal" in names else "inverse"
    return JobOptions(**known | others, dtype=made["stored as"], keep=keep, logdet="logdet" in names, names=names)


def decide(state: State, *, same_job: bool, overwrite: bool) -> Action:
    """Return what a run does with a target.

    ``"create"`` removes what a creation left behind, and with `overwrite` any target of ours. ``"check"`` reads a
    finished target back, and does again what is damaged.

    Examples
    --------
    >>> decide(State.BEGUN, same_job=True, overwrite=False)
    'continue'
    >>> decide(State.COMPLETE, same_job=False, overwrite=False)
    'refuse'
    """
    if state is State.ABSENT:
        return "create"
    if overwrite or not same_job:
        return "create" if overwrite else "refuse"
    # A creation that was interrupted left nothing worth keeping.
    actions: dict[State, Action] = {State.BEING_CREATED: "create", State.BEGUN: "continue", State.COMPLETE: "check"}
    return actions[state]


#: So much is shown of what a target is made of.
_LENGTH = 200
#: What to say of what is known by its digest alone.
_DIGESTS = {"labels": "the labels of its rows or columns have changed"}


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return what differs between two fingerprints, in words."""
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [_DIGESTS.get(key) or f"{key} was {_shown(old.get(key))}, is {_shown(new.get(key))}" for key in keys]


def _shown(fact: Any) -> str:
    text = "not known" if fact is None else repr(fact)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]} ..."


def shrunk(old: tuple[int, ...], new: tuple[int, ...], dims: tuple[str, ...]) -> list[str]:
    """Return in words along which dimensions a source has shrunk; a target follows one that grows.

    Examples
    --------
    >>> shrunk((10, 5, 3, 3), (8, 6, 3, 3), ("time", "x", "row", "col"))
    ['the source has shrunk: time was 10 long, is 8']
    """
    if len(old) != len(new):
        return []
    lengths = zip(dims, old, new, strict=True)
    return [f"the source has shrunk: {dim} was {was} long, is {now}" for dim, was, now in lengths if now < was]
