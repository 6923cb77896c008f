"""Icechunk: a group on a branch of a repository as a place that is written, commit by commit.

Nobody is locked out. Workers write to forks of what a run has open, which are merged; what others commit to the branch
meanwhile stays, and is an error only if it is the same that the run has changed.
"""

from __future__ import annotations

import json
import pickle
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import quote_plus

from zarr.buffer.cpu import Buffer
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dask_batchinv.disk import Stamp
from dask_batchinv.known import Known
from dask_batchinv.location import Location, TakenOverError, json_object
from dask_batchinv.repositories.snapshots import SnapshotLocation, key_of

T = TypeVar("T")

_DOCUMENT = "zarr.json"
#: So often groups are made again that others make at the same time.
_ATTEMPTS = 5
#: In what the node of a document that is none of Zarr's holds it.
_CONTENT = "content"


class Branch:
    """A branch of a repository: as it is, or in a transaction with what was written since its last commit.

    Parameters
    ----------
    repository : icechunk.Repository
        The repository.
    name : str
        The name of the branch.
    """

    def __init__(self, repository: Any, name: str):
        self._repository, self._name = repository, name
        self._writes, self._begun, self._own = False, "", set[str]()
        self._changes: dict[str, Any] = {}
        self._opening = threading.Lock()
        self._session = self._open()

    def _open(self) -> Any:
        if self._writes:
            return self._repository.writable_session(self._name)
        return self._repository.readonly_session(branch=self._name)

    @property
    def _now(self) -> Any:
        """What is open, opened where nothing is: what then fails is tried again by who asked for it."""
        with self._opening:  # threads that write at the same time write to one
            if self._session is None:
                self._session = self._open()
                self._begun = self._begun or str(self._session.snapshot_id)
            return self._session

    def begin(self) -> None:
        """Begin a transaction, with what the branch has now."""
        self._writes, self._session = True, None
        self._begun, self._own = "", set()

    def end(self) -> None:
        """Forget what was not committed, and see what the branch has now."""
        self._writes, self._session = False, None

    @property
    def store(self) -> Any:
        """The Zarr store of what is open."""
        return self._now.store

    @property
    def snapshot_id(self) -> str:
        """The last commit that is seen here."""
        return str(self._now.snapshot_id)

    def chunk_coordinates(self, path: str) -> Any:
        """Yield, asynchronously, the places of the chunks of an array."""
        return self._now.chunk_coordinates(path)

    def snapshot(self) -> Any:
        """Return a session of what was committed last, which other processes can read."""
        return self._repository.readonly_session(snapshot_id=self.snapshot_id)

    def fork(self) -> Any:
        """Return what other processes can write to; nothing may be uncommitted."""
        return self._now.fork()

    def merge(self, fork: Any) -> None:
        """Add what was written to a fork."""
        self._now.merge(fork)

    def commit(self, message: str) -> None:
        """Make what was written last, on top of what others have committed, and go on.

        Raises
        ------
        TakenOverError
            If others have changed the same.
        """
        if self._session is not None and self._session.has_uncommitted_changes:
            self._commit(self._session, message)

    def _commit(self, session: Any, message: str) -> None:
        import icechunk  # not before it is needed, and only where it is

        try:
            self._own.add(session.commit(message, rebase_with=icechunk.ConflictDetector()))
        except icechunk.ConflictError as error:
            raise TakenOverError(
                f"what this run has changed was changed by another commit to branch {self._name} as well: {error}"
            ) from error
        self._session = None

    def make_groups(self, paths: Iterable[str]) -> None:
        """Make groups where there are none, in a commit of its own, for others may make them at the same time.

        Raises
        ------
        ValueError
            If there is an array.
        """
        for attempt in range(_ATTEMPTS):
            for path in paths:
                key = f"{path}/{_DOCUMENT}".lstrip("/")
                sync(self.store.set_if_not_exists(key, Buffer.from_bytes(_group({}))))
                found = sync(self.store.get(key, default_buffer_prototype()))
                if found is not None and json_object(found.to_bytes(), key).get("node_type") == "array":
                    raise ValueError(f"{path} is an array: nothing can lie in it")
            try:
                self.commit("dask_batchinv: groups for what comes")
                return
            except TakenOverError:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._session = None

    @property
    def moves(self) -> bool:
        """Whether groups can be moved in this repository, which older ones cannot."""
        return int(getattr(self._repository, "spec_version", 1)) > 1

    def exchange(self, one: Any, other: Any) -> None:
        """Let the groups at two places change these, in one commit; nothing else may be uncommitted."""
        session = self._repository.rearrange_session(self._name)
        between = f"{one.path}-{uuid.uuid4().hex}"  # in no commit
        for old, new in ((one.path, between), (other.path, one.path), (between, other.path)):
            session.move(f"/{old}", f"/{new}")
        self._commit(session, f"dask_batchinv, {other.path}: replaced")

    def changed_by_others(self, array: Any) -> set[tuple[int, ...]]:
        """Return the places of chunks of an array, which is a location, that others have changed since it has begun."""
        changed = set[tuple[int, ...]]()
        for commit in self._repository.ancestry(snapshot_id=self.snapshot_id):
            if commit.id == self._begun or commit.parent_id is None:
                break
            if commit.id not in self._own:
                found = self._changes_of(commit).updated_chunks
                changed |= {tuple(place) for place in found.get(f"/{array.path}", ())}
        return changed

    def _changes_of(self, commit: Any) -> Any:
        """Return what a commit has changed, which never changes itself."""
        if commit.id not in self._changes:
            found = self._repository.diff(from_snapshot_id=commit.parent_id, to_snapshot_id=commit.id)
            self._changes[commit.id] = found
        return self._changes[commit.id]

    def last_changes(self, path: str) -> tuple[dict[tuple[int, ...], str], str]:
        """Return by which commit chunks of an array were changed last, and by which all others."""
        last: dict[tuple[int, ...], str] = {}
        node, commit_id = f"/{path}", self.snapshot_id
        for commit in self._repository.ancestry(snapshot_id=self.snapshot_id):
            if commit.parent_id is None:
                break
            commit_id = commit.id
            changes = self._changes_of(commit)
            for place in changes.updated_chunks.get(node, ()):
                last.setdefault(tuple(place), commit_id)
            if node in changes.new_arrays:
                break
            node = _before(node, getattr(changes, "moved_nodes", ()))
        return last, commit_id


@dataclass(frozen=True, repr=False)
class BranchLocation(SnapshotLocation):
    """A location on a branch; `session` is the `Branch`. Other processes get what was committed of it last."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return SnapshotLocation, (self.url, {}, self.session.snapshot(), self.path)

    @property
    def transaction(self) -> Branch:
        """What makes writes last together."""
        branch: Branch = self.session
        return branch

    def commit(self, message: str) -> None:
        """Make what was written last."""
        self.transaction.commit(f"dask_batchinv, {self.path or '/'}: {message}")

    def forked(self) -> Location:
        """Return a place for the writes of others, whose changes are to be merged; itself where there can be none."""
        if self.is_memory:
            return self
        return ForkLocation(self.url, {}, self.session.fork(), self.path)

    def beside(self, ending: str) -> BranchLocation | None:
        """Return the place of a hidden group beside this one, with which it can change places; None if it cannot."""
        above, mark, name = self.path.rpartition("/")
        if not name or not self.transaction.moves:
            return None
        path = f"{above}{mark}.{name}{ending}"
        return replace(self, url=f"{self.url.partition('group=')[0]}group={quote_plus(path, safe='/')}", path=path)

    def is_writable(self) -> bool:
        """Tell whether it can be written, as far as that can be told beforehand."""
        return True

    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return what is stored under `key`; FileNotFoundError if there is no such key."""
        if not _is_wrapped(key):
            return super().read(key, limit)
        content = json_object(super().read(f"{key}/{_DOCUMENT}"), key).get("attributes", {}).get(_CONTENT)
        return str(content).encode()[:limit]

    def write(self, key: str, content: bytes, *, synced: bool = False) -> Stamp:
        """Store bytes under `key`; they last once they are committed."""
        if _is_wrapped(key):
            key, content = f"{key}/{_DOCUMENT}", _group({_CONTENT: content.decode()})
        if key == _DOCUMENT and self.path and not self.exists():
            names = self.path.split("/")
            self.transaction.make_groups(["/".join(names[:end]) for end in range(len(names))])
        sync(self.store().set(key, Buffer.from_bytes(content)))
        return self.stamp(key)

    def replace(self, key: str, content: bytes, expected: Stamp, *, synced: bool = False) -> Stamp:
        """Store bytes under `key` if it still holds what `expected` was returned for; return the new stamp."""
        if self.stamp(key) != expected:
            raise TakenOverError(f"{key} of {self.name} was replaced by somebody else while this run was on")
        return self.write(key, content)

    def delete(self, key: str) -> None:
        """Delete what is stored under `key`."""
        self.delete_all([key])

    def delete_all(self, keys: Iterable[str]) -> None:
        """Delete keys."""
        store, prefix = self.session.store, f"{self.path}/" if self.path else ""
        stored = [f"{key}/{_DOCUMENT}" if _is_wrapped(key) else key for key in keys]
        # With an array its chunks go.
        arrays = {key.removesuffix(_DOCUMENT) for key in stored if key.endswith(_DOCUMENT)}
        left = [key for key in stored if key.endswith(_DOCUMENT) or f"{key.partition('/c')[0]}/" not in arrays]

        async def delete() -> None:
            for key in left:
                await store.delete(prefix + key)

        sync(delete())

    def keys(self) -> list[str]:
        """Return all keys that are inside, at any depth."""
        keys = super().keys()
        wrapped = {key: key.removesuffix(f"/{_DOCUMENT}") for key in keys}
        return [wrapped[key] if _is_wrapped(wrapped[key]) else key for key in keys]

    def look(self, keys: Callable[[], Iterable[tuple[str, T]]]) -> Iterator[tuple[str, T | None, Known]]:
        """Yield the key of each chunk of the array here, its size, and the commit that has changed it last."""
        if not (places := self._chunks()):
            return
        last, first = self.transaction.last_changes(self.path)
        names = [*map(key_of, places)]
        for place, key, size in zip(places, names, self._sizes(names), strict=True):
            yield key, None, Known(size, last.get(place, first), None)


@dataclass(frozen=True, repr=False)
class ForkLocation(SnapshotLocation):
    """A location to which one task writes; `session` is its fork."""

    copy: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells it from other forks."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return ForkLocation, (self.url, {}, self.session, self.path)

    def forked(self) -> ForkLocation:
        """Return a place for the writes of another one."""
        return replace(self, session=pickle.loads(pickle.dumps(self.session)), copy=uuid.uuid4().hex)

    @property
    def changes(self) -> Any:
        """What was written, to be merged."""
        return self.session


def _before(path: str, moved: Iterable[tuple[str, str]]) -> str:
    """Return where a node was before groups were moved.

    Examples
    --------
    >>> _before("/new/inverse", [("/old", "/new"), ("/new", "/old")])
    '/old/inverse'
    """
    for old, new in moved:
        if path == new or path.startswith(f"{new}/"):
            return old + path[len(new) :]
    return path


def _group(attributes: dict[str, str]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def _is_wrapped(key: str) -> bool:
    """Tell whether a document is none of Zarr's: Icechunk stores no others, and keeps it as attributes of a group."""
    return key.rpartition("/")[2] in ("run.json", "runs.json")
