"""What a look at a million tiles costs in an object store: a folder served in the protocol of S3, and its requests.

A real server takes an hour to be filled with so much. This one lists a thousand keys at a time, as S3 does.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000


@contextmanager
def served(folder: Path, without: tuple[str, ...] = ()) -> Iterator[tuple[str, Counter[str]]]:
    """Serve a folder, whose files do not change, as a bucket; yield the URL and what was asked for.

    Not those of its folders whose names are in `without`.
    """
    keys = _keys(folder, without)
    counts: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            asked = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(asked.query, keep_blank_values=True).items()}
            key = unquote(asked.path).lstrip("/").partition("/")[2]
            counts["listings" if "list-type" in query else f"{self.command} of an object"] += 1
            if "list-type" in query:
                self._send(200, _listing(folder, keys, query), with_body=with_body)
            elif (folder / key).is_file():
                content = (folder / key).read_bytes()
                start, _, stop = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                part = content[int(start) : int(stop) + 1 if stop else None] if start else content[-int(stop) :]
                self._send(206 if "Range" in self.headers else 200, part, with_body=with_body, etag=_etag(folder / key))
            else:
                self._send(404, b"<Error><Code>NoSuchKey</Code></Error>", with_body=with_body)

        def _send(self, status: int, content: bytes, *, with_body: bool, etag: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/xml")
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            if etag:
                self.send_header("ETag", etag)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", counts
        finally:
            server.shutdown()
            thread.join()


def _keys(folder: Path, without: tuple[str, ...]) -> list[str]:
    keys = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in without]
        keys += [os.path.relpath(os.path.join(top, name), folder) for name in names]
    return sorted(keys)


def _etag(path: Path) -> str:
    return f'"{hashlib.md5(str(path.stat().st_mtime_ns).encode()).hexdigest()}"'


def _listing(folder: Path, keys: list[str], query: dict[str, str]) -> bytes:
    """Return a page of keys; folders in them stand for all that is inside where that is asked for."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    at = bisect_right(keys, query.get("continuation-token") or query.get("start-after") or prefix[:-1] or "")
    entries: list[str] = []
    folders: dict[str, None] = {}
    while at < len(keys) and len(entries) + len(folders) < PAGE and (keys[at].startswith(prefix) or keys[at] < prefix):
        rest = keys[at][len(prefix) :]
        if keys[at].startswith(prefix) and delimiter and delimiter in rest:
            folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
        elif keys[at].startswith(prefix):
            path = folder / keys[at]
            entries.append(
                f"<Contents><Key>{escape(keys[at])}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(_etag(path))}</ETag><Size>{path.stat().st_size}</Size></Contents>"
            )
        at += 1
    more = at < len(keys) and keys[at].startswith(prefix)
    token = f"<NextContinuationToken>{escape(keys[at - 1])}</NextContinuationToken>" if more else ""
    inside = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
    return (
        f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        f"<KeyCount>{len(entries)}</KeyCount>{''.join(entries)}{inside}</ListBucketResult>"
    ).encode()
