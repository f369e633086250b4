"""The HTTP server of the tests: on a free port of this machine, with replies and faults by a script."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Reply:
    """Status 0 closes the connection instead."""

    status: int = 200
    body: Any = None
    """Bytes, or something for JSON."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0
    """Seconds before the first byte."""
    trickle: float = 0
    """Seconds between the bytes of the body."""
    cut: int = 0
    """Bytes of the body that are promised and never come."""


Script = Callable[[int, dict[str, Any]], Reply]
"""From the number of the request, counted from 0, and its body to the reply."""


class Server:
    """A server that runs inside a `with` block, and what it has seen."""

    def __init__(self, script: Script | None = None, port: int = 0) -> None:
        self.script = script
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.active = self.most_active = self.connections = 0
        self._lock = threading.Lock()
        self._server = _Listener(("127.0.0.1", port), type("Handler", (_Handler,), {"owner": self}))
        self.port = int(self._server.server_address[1])
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go away as a killed process does: connections break."""
        self._server.shutdown()
        self._server.server_close()
        self._server.break_connections()

    def get(self, path: str) -> Reply:
        return Reply(404, {"detail": "Not Found"})

    def post(self, number: int, path: str, body: dict[str, Any]) -> Reply:
        assert self.script is not None
        return self.script(number, body)

    def take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        with self._lock:
            number = len(self.bodies)
            self.paths.append(path)
            self.headers.append(headers)
            self.bodies.append(body)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            reply = self.post(number, path, body)
            time.sleep(reply.delay)
            return reply
        finally:
            with self._lock:
                self.active -= 1


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sockets: list[Any] = []

    def get_request(self) -> Any:
        connection = super().get_request()
        self.sockets.append(connection[0])
        return connection

    def break_connections(self) -> None:
        for socket in self.sockets:
            with contextlib.suppress(OSError):
                socket.shutdown(2)
            socket.close()

    def handle_error(self, *_: object) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1

    def do_GET(self) -> None:
        self._send(self.owner.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._send(self.owner.take(self.path, {name.lower(): value for name, value in self.headers.items()}, body))

    def _send(self, reply: Reply) -> None:
        if reply.status == 0:
            self.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"content-length": str(len(body) + reply.cut), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for part in [body[start : start + 1] for start in range(len(body))] if reply.trickle else [body]:
            self.wfile.write(part)
            time.sleep(reply.trickle)
        self.close_connection = self.close_connection or reply.cut > 0

    def log_message(self, *_: object) -> None:
        """Quiet."""
