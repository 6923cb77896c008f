"""URLs of fsspec: one file system, or a chain of them."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import fsspec

from dask_batchinv.text import clean

#: What extra of this package brings what a protocol needs.
EXTRAS = {
    **dict.fromkeys(("s3", "s3a", "http", "https"), "remote"), **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "azure"),
}  # fmt: skip
#: File systems that keep copies of what others have.
CACHES = ("simplecache", "filecache", "blockcache", "cached")


def is_chain(url: str) -> bool:
    """Tell whether a URL is a chain of file systems, and not a path that has two colons in a name."""
    first, mark, _ = url.partition("::")
    protocol = first.partition("://")[0]
    return bool(mark) and ("://" in first or protocol in fsspec.available_protocols())


def resolved(parts: list[str], url: str) -> list[str]:
    """Return the parts of the path of a URL without dots; ValueError if they lead out of it."""
    done: list[str] = []
    for part in parts:
        if part == "..":
            if not done:
                raise ValueError(f"{clean(url)} leads out of its store by '..'")
            done.pop()
        elif part != ".":
            done.append(part)
    return done


def joined(url: str, part: str) -> str:
    """Return the URL of a part of a place; of a chain, in the file system that has the names: none that only caches."""
    links = url.split("::")
    names = (k for k, link in enumerate(links) if link.partition("://")[0] not in CACHES)
    place = next(names, len(links) - 1)
    head, mark, query = links[place].partition("?")
    if place < len(links) - 1 and "://" not in head:
        head += "://"
    links[place] = f"{head}{'' if head.endswith('://') else '/'}{part}{mark}{query}"
    return "::".join(links)


def without(url: str, part: str) -> str:
    """Return the URL of a place of which another one is that of a part.

    Examples
    --------
    >>> without("zip://a/cov::/data/s.zip", "cov"), without("/data/s.zarr/cov", "cov")
    ('zip://a::/data/s.zip', '/data/s.zarr')
    """
    links = url.split("::") if is_chain(url) else [url]
    for place, link in enumerate(links):
        head, mark, query = link.partition("?")
        if head.endswith(f"/{part}"):
            above = head[: -len(part)]
            links[place] = (above if above.endswith("://") else above[:-1]) + mark + query
            break
        if query.endswith(f"/{part}"):
            links[place] = link[: -len(part) - 1]
            break
    return "::".join(links)


def opened(url: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what fsspec opens, and its options: with the query of a web server's URL, for keys are joined to that."""
    bare, mark, query = url.partition("?")
    protocol = bare.rpartition("::")[2].partition("://")[0]
    if not mark or protocol not in ("http", "https"):
        return url, options
    params: dict[str, Any] = {"params": parse_qsl(query, keep_blank_values=True)}
    return bare, ({protocol: params} if is_chain(url) else params) | options
