"""A store that answers as one far away does: each request waits, and each connection carries so many bytes a second.

A file system of fsspec over a folder of this machine, as ``slow://``. What goes through it is noted.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

#: Seconds that a request waits, bytes a second of a connection, and connections that a process has.
LATENCY, BANDWIDTH, CONNECTIONS = 0.05, 100e6, 8


class Traffic:
    """What went through since it was cleared."""

    def __init__(self) -> None:
        self.requests: list[tuple[float, float, int]] = []
        """When each began and ended, and its bytes."""


TRAFFIC = Traffic()
_rooms: dict[int, asyncio.Semaphore] = {}


class SlowFileSystem(AsyncFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Files of this machine, reached slowly."""

    protocol = "slow"

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._files = LocalFileSystem(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return "/" + path.rpartition("://")[2].strip("/")

    async def _wait(self, nbytes: int = 0) -> None:
        room = _rooms.setdefault(id(asyncio.get_running_loop()), asyncio.Semaphore(CONNECTIONS))
        async with room:
            start = time.perf_counter()
            await asyncio.sleep(LATENCY + nbytes / BANDWIDTH)
            TRAFFIC.requests.append((start, time.perf_counter(), nbytes))

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        path = self._strip_protocol(path)
        if not os.path.isfile(path):
            await self._wait()
            raise FileNotFoundError(path)
        nbytes = os.path.getsize(path) if start is None and end is None else 0
        data, _none = await asyncio.gather(
            asyncio.to_thread(self._files.cat_file, path, start, end), self._wait(nbytes)
        )
        return bytes(data)

    async def _pipe_file(self, path: str, value: Any, mode: str = "overwrite", **_: Any) -> None:
        path = self._strip_protocol(path)
        partial = f"{path}.{uuid.uuid4().hex}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        await asyncio.gather(asyncio.to_thread(_write, partial, value), self._wait(len(value)))
        if mode == "create" and os.path.exists(path):
            os.unlink(partial)
            raise FileExistsError(path)
        os.replace(partial, path)

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        await self._wait()
        found = self._files.info(self._strip_protocol(path))
        return {**found, "ETag": f"{found['mtime']} {found['size']}"}

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        await self._wait()
        return self._files.ls(self._strip_protocol(path), detail=detail)

    async def _find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any) -> Any:
        await self._wait()
        found = self._files.find(self._strip_protocol(path), maxdepth=maxdepth, withdirs=withdirs, detail=True)
        return found if options.get("detail") else sorted(found)

    async def _exists(self, path: str, **_: Any) -> bool:
        await self._wait()
        return bool(self._files.exists(self._strip_protocol(path)))

    async def _rm_file(self, path: str, **_: Any) -> None:
        await self._wait()
        self._files.rm_file(self._strip_protocol(path))

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._files.makedirs(self._strip_protocol(path), exist_ok=True)


def _write(path: str, content: Any) -> None:
    with open(path, "wb") as file:
        file.write(content)


fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
