"""What a store tells of a file without its bytes: its size, and what changes when the file does."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

#: What stores tell of a file that changes with its content, and what with the time of its last change, by the names
#: that fsspec gives it, in small letters alone.
_VERSIONS = frozenset(["etag", "md5hash", "md5", "contentmd5", "crc32c", "crc", "generation", "versionid"])
_TIMES = frozenset(["mtime", "modified", "lastmodified", "updated", "created", "datetime", "timemodified"])


class Known(NamedTuple):
    """What a store tells of a file."""

    size: int | None
    """Its bytes."""
    version: str
    """A text that changes when the content does; empty if there is none."""
    changed: int | None
    """When it changed last, in nanoseconds since 1970, where `version` is made of nothing else; None if unknown."""


def known_of(found: os.stat_result) -> Known:
    """Return what a disk tells of a file."""
    # Whoever sets the time of change, as copies do, cannot do so with that of the file's own record.
    version = f"{found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    return Known(found.st_size, version, found.st_ctime_ns)


def told_of(info: dict[str, Any]) -> Known:
    """Return what a file system of fsspec tells of a file."""
    told = {name.lower().replace("_", "").replace("-", ""): value for name, value in info.items()}
    versions, times = (sorted((name, told[name]) for name in names & told.keys() if told[name] is not None)
                       for names in (_VERSIONS, _TIMES))  # fmt: skip
    changed = None if versions else max(map(_nanoseconds, dict(times).values()), default=None)
    return Known(info.get("size"), " ".join(f"{name}={value}" for name, value in versions or times), changed)


def _nanoseconds(when: Any) -> int:
    """Return a time since 1970; what cannot be read as one counts as just now."""
    if isinstance(when, str):
        for parse in (parsedate_to_datetime, datetime.fromisoformat):
            with suppress(ValueError):
                when = parse(when)
                break
    if isinstance(when, datetime):
        when = when.timestamp()
    return int(when * 1e9) if isinstance(when, (int, float)) else time.time_ns()
