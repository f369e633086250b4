"""A server that answers as a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What the server sends; status 0 closes the connection instead."""

    status: int = 200
    body: Any = None
    """Bytes, or something for JSON."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0
    """Seconds before the first byte."""
    trickle: float = 0
    """Seconds between the bytes of the body."""


Script = Callable[[int, dict[str, Any]], Reply]
"""From the number of the request, counted from 0, and its body to the reply."""


@dataclass
class Server:
    """What a running server has seen."""

    script: Script
    url: str = ""
    paths: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    active: int = 0
    most_active: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-le"))
                body = json.loads(await reader.readexactly(int(length)))
                self.heads.append(head)
                self.paths.append(head.split()[1])
                self.bodies.append(body)
                self.active += 1
                self.most_active = max(self.most_active, self.active)
                try:
                    await self.answer(self.script(len(self.bodies) - 1, body), writer)
                finally:
                    self.active -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, reply: Reply, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(reply.delay)
        if reply.status == 0:
            raise ConnectionResetError
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
        lines = [f"HTTP/1.1 {reply.status} Status", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        for start in range(len(body)) if reply.trickle else [slice(None)]:
            writer.write(body[start] if isinstance(start, slice) else body[start : start + 1])
            await writer.drain()
            await asyncio.sleep(reply.trickle)


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[Server]:
    """A server on a free port of this machine, in the loop of the test."""
    server = Server(script)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        listener.close()
