"""A real S3 server from PyPI alone, and a proxy before it that does what networks and object stores do on bad days.

The server is OpenStack Swift with its S3 middleware: one node, one replica, no memcached.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import pwd
import random
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
import venv
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

#: pyeclib has its C library in its wheel from 1.6.4 on.
REQUIREMENTS = ("swift>=2.35", "pyeclib>=1.6.4")
START_SECONDS = 60.0
STOP_SECONDS = 10.0
#: A request line with all its headers is not longer than that.
HEAD_NBYTES = 1 << 20

Fault = Literal["503", "reset", "lost"]


@dataclass(frozen=True)
class Server:
    """An S3 server on this machine."""

    endpoint: str
    """Its URL."""
    key: str
    """Access key."""
    secret: str
    """Secret key."""
    bucket: str
    """A bucket that is there."""


def environment(server: Server, endpoint: str | None = None) -> dict[str, str]:
    """Return the environment in which ``s3://`` means a server, for s3fs and everything else that is built on botocore.

    With `endpoint`, of a proxy for example, it is reached by way of that.
    """
    return {
        "AWS_ENDPOINT_URL": endpoint or server.endpoint,
        "AWS_ACCESS_KEY_ID": server.key,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        "AWS_SESSION_TOKEN": "",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Nothing that this machine may have been set up with plays a part, and no question goes to the outside.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


def install(folder: Path) -> Path:
    """Install the server into a virtual environment of its own, if it is not there yet, and return its Python."""
    python = folder / "bin" / "python"
    ready = folder / "installed"  # written last, so that a break does not leave half an environment
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        ready.touch()
    return python


_SWIFT = """
[swift-hash]
swift_hash_path_suffix = suffix
swift_hash_path_prefix = prefix
[storage-policy:0]
name = only
default = yes
"""
_DEFAULT = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
# One process each, without children.
workers = 0
user = {user}
swift_dir = {etc}
devices = {devices}
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
"""
_STORAGE = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
_FILTERS = ("catch_errors", "gatekeeper", "cache", "listing_formats", "bulk", "s3api", "tempauth", "slo", "dlo")
_SETTINGS = {
    "cache": "memcache_servers = 127.0.0.1:1",  # nobody is there, and all goes without
    "tempauth": "user_test_tester = testing .admin",
}


@contextmanager
def swift_server(python: Path, folder: Path) -> Iterator[Server]:
    """Run an S3 server that keeps its data in `folder`, with an empty bucket.

    Parameters
    ----------
    python : Path
        What `install` returned.
    folder : Path
        On a file system with extended attributes.
    """
    names = ("account", "container", "object", "proxy")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    _configure(python, folder, ports)
    server = Server(f"http://127.0.0.1:{ports['proxy']}", "test:tester", "testing", "campaign")
    with ExitStack() as running:
        processes = [running.enter_context(_process(python, folder, name)) for name in names]
        _create_bucket(server, processes, folder)
        yield server


def _free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _configure(python: Path, folder: Path, ports: dict[str, int]) -> None:
    etc, devices = folder / "etc", folder / "devices"
    for place in (etc, devices / "disk"):
        place.mkdir(parents=True, exist_ok=True)
    (etc / "swift.conf").write_text(_SWIFT)
    user = pwd.getpwuid(os.getuid()).pw_name
    for name, port in ports.items():
        parts = [_proxy_sections() if name == "proxy" else _STORAGE.format(name=name)]
        (etc / f"{name}.conf").write_text(
            "".join([_DEFAULT.format(port=port, user=user, etc=etc, devices=devices), *parts])
        )
        if name == "proxy":
            continue
        # 16 partitions, one replica, an hour between rebalances; one disk.
        for arguments in (("create", "4", "1", "1"), ("add", f"r1z1-127.0.0.1:{port}/disk", "1"), ("rebalance",)):
            builder = [python.with_name("swift-ring-builder"), etc / f"{name}.builder", *arguments]
            subprocess.run([python, "-W", "ignore", *builder], check=True, stdout=subprocess.DEVNULL)


def _proxy_sections() -> str:
    sections = [
        f"[pipeline:main]\npipeline = {' '.join(_FILTERS)} proxy-server",
        "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true",
    ]
    for name in _FILTERS:
        entry = "memcache" if name == "cache" else name
        sections.append(f"[filter:{name}]\nuse = egg:swift#{entry}\n{_SETTINGS.get(name, '')}")
    return "\n".join(sections)


@contextmanager
def _process(python: Path, folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of Swift's servers in a process group of its own."""
    script, configuration = python.with_name(f"swift-{name}-server"), folder / "etc" / f"{name}.conf"
    command: list[str | Path] = [python, "-W", "ignore", script, configuration]
    with open(folder / f"{name}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _create_bucket(server: Server, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Create the bucket as soon as the server can."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(_signed_put(server), timeout=10).close()
            return
        except OSError as error:  # HTTP errors too: the storage servers may come up after the proxy
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                if error.code == 409:  # of an earlier run in the same folder
                    return
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                raise RuntimeError(f"the S3 server does not start: {error}; see the logs in {folder}") from error
        time.sleep(0.2)


def _signed_put(server: Server) -> urllib.request.Request:
    """Return the request that creates the bucket, signed in the old way of S3, which takes three lines."""
    date = formatdate(usegmt=True)
    text = f"PUT\n\n\n{date}\n/{server.bucket}"
    signature = base64.b64encode(hmac.digest(server.secret.encode(), text.encode(), hashlib.sha1)).decode()
    headers = {"Date": date, "Authorization": f"AWS {server.key}:{signature}"}
    return urllib.request.Request(f"{server.endpoint}/{server.bucket}", method="PUT", headers=headers)


@dataclass(frozen=True)
class Request:
    """One request that came to the proxy."""

    method: str
    """As in HTTP."""
    target: str
    """Path and query."""
    fault: Fault | None
    """What was done to it."""
    status: int | None
    """What the server answered; None if it was not asked."""


@dataclass
class Proxy:
    """A proxy that is running."""

    endpoint: str = ""
    """Its URL."""
    requests: list[Request] = field(default_factory=list)
    """All that came, in the order of their ends."""

    @property
    def total(self) -> int:
        """How many requests came."""
        return len(self.requests)

    @property
    def faults(self) -> Counter[Fault]:
        """How many of them met which fault."""
        return Counter(request.fault for request in list(self.requests) if request.fault)


@contextmanager
def fault_proxy(
    endpoint: str, *, seed: int, p_503: float = 0.05, p_reset: float = 0.02, p_lost: float = 0.01
) -> Iterator[Proxy]:
    """Run a proxy before an S3 server that passes requests on unchanged, but for some, drawn at random.

    Parameters
    ----------
    endpoint : str
        URL of the server.
    seed : int
        Of the draws: one for each request, in the order in which they come.
    p_503 : float
        Share that is answered with 503 SlowDown, and not passed on.
    p_reset : float
        Share whose connection is reset, and not passed on.
    p_lost : float
        Share that is passed on, and whose connection is reset instead of an answer; of those that write.
    """
    proxy = _Proxy(endpoint, random.Random(seed), (p_503, p_reset, p_lost))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=[proxy.serve()], name="fault proxy", daemon=True)
    thread.start()
    try:
        if not proxy.ready.wait(START_SECONDS):
            raise RuntimeError("the proxy does not start")
        yield proxy.seen
    finally:
        loop.call_soon_threadsafe(proxy.stop.set)
        thread.join(STOP_SECONDS)
        loop.close()


_WRITES = ("PUT", "POST", "DELETE")
_SLOW_DOWN = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>Slow down</Message></Error>"
_SLOW_DOWN_HEAD = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"


class _Proxy:
    """Reads a request whole, then its answer whole: simple, and the objects are small."""

    def __init__(self, endpoint: str, draw: random.Random, shares: tuple[float, float, float]):
        parts = urlsplit(endpoint)
        self._upstream = (parts.hostname, parts.port or 80)
        self._draw = draw
        self._shares = shares
        self.seen = Proxy()
        self.ready = threading.Event()
        self.stop = asyncio.Event()

    async def serve(self) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=HEAD_NBYTES)
        self.seen.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.ready.set()
        await self.stop.wait()
        server.close()
        clients = asyncio.all_tasks() - {asyncio.current_task()}
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, request after request."""
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or we go
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection stays."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
        if _header(head, "expect").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request = head + await _body(reader, head)
        fault = self._fault(method)
        answer = await self._forward(request, method) if fault in (None, "lost") else b""
        status = int(answer.split(b" ", 2)[1]) if answer else None
        self.seen.requests.append(Request(method, target, fault, status))
        if fault in ("reset", "lost"):
            _reset(writer)
            return False
        if fault == "503":
            answer = _SLOW_DOWN_HEAD % len(_SLOW_DOWN) + (b"" if method == "HEAD" else _SLOW_DOWN)
        writer.write(answer)
        await writer.drain()
        return _header(head, "connection").lower() != "close" and _header(answer, "connection").lower() != "close"

    def _fault(self, method: str) -> Fault | None:
        drawn = self._draw.random()
        p_503, p_reset, p_lost = self._shares
        if drawn < p_503:
            return "503"
        if drawn < p_503 + p_reset:
            return "reset"
        return "lost" if method in _WRITES and drawn < p_503 + p_reset + p_lost else None

    async def _forward(self, request: bytes, method: str) -> bytes:
        """Pass a request on as it is, Host included, which is signed; return the answer as it is."""
        reader, writer = await asyncio.open_connection(*self._upstream, limit=HEAD_NBYTES)
        try:
            writer.write(request)
            await writer.drain()
            head = b"HTTP/1.1 100 Continue"
            while head.split(b" ", 2)[1] == b"100":  # which the client has had from us
                head = await reader.readuntil(b"\r\n\r\n")
            if method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304"):
                return head
            return head + await _body(reader, head)
        finally:
            writer.close()


def _header(head: bytes, name: str) -> str:
    """Return a header of a request or an answer, or an empty string."""
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return ""


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """Return what follows a head, chunked as it came if it did."""
    if _header(head, "transfer-encoding").lower() != "chunked":
        return await reader.readexactly(int(_header(head, "content-length") or 0))
    body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        if not (length := int(line.split(b";")[0], 16)):
            break
        body += line + await reader.readexactly(length + 2)
    while line != b"\r\n":  # trailers
        body += line
        line = await reader.readuntil(b"\r\n")
    return body + line


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST, as a host does that has forgotten it."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
