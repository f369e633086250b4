"""Reward servers made of recorded JSON, honest ones and others."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from polar import EncodedGroup, RewardModel

Ids = list[int]


def reward(ids: Ids) -> float:
    """The model of these servers: any number between -9 and 3, always the same for the same ids."""
    return zlib.crc32(json.dumps(ids).encode()) % 12_000_000 / 1e6 - 9


def rewards_of(model: RewardModel) -> Callable[[Ids], float]:
    """A real model for these servers."""
    return lambda ids: model.score_encoded([EncodedGroup([], [ids], [])])[0][0]


def sigmoid(ids: Ids) -> float:
    return 1 / (1 + math.exp(-reward(ids)))


def vllm(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [
        {"index": n, "label": "LABEL_0", "probs": [model(ids)], "num_classes": 1} for n, ids in enumerate(sequences)
    ]
    return {"id": "classify-83a5", "object": "list", "created": 1795324641, "model": "tiny", "data": data, "usage": {}}


def vllm_pooling(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [{"index": n, "object": "pooling", "data": [model(ids)]} for n, ids in enumerate(sequences)]
    return {"id": "pooling-a543", "object": "list", "data": data, "usage": {}}


def vllm_every_token(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [
        {"index": n, "object": "pooling", "data": [*([0.1] for _ in ids[1:]), [model(ids)]]}
        for n, ids in enumerate(sequences)
    ]
    return {"id": "pooling-a543", "object": "list", "data": data, "usage": {}}


def sglang(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> Any:
    items = [{"embedding": [model(ids)], "meta_info": {"id": "45a5", "prompt_tokens": len(ids)}} for ids in sequences]
    return items if len(items) > 1 else items[0]


def embeddings(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [{"embedding": [model(ids)], "index": n, "object": "embedding"} for n, ids in enumerate(sequences)]
    return {"data": data, "model": "default", "object": "list", "usage": {}}


def lmdeploy(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [{"index": n, "object": "pooling", "data": model(ids)} for n, ids in enumerate(sequences)]
    return {"id": "pool-1", "object": "list", "data": data, "usage": {}}


def too_long(limit: int = 2048) -> dict[str, Any]:
    text = f"This model's maximum context length is {limit} tokens. (parameter=input_tokens, value={limit + 1})"
    return {"error": {"message": text, "type": "BadRequestError", "param": "input_tokens", "code": 400}}


ROUTES: dict[str, dict[str, Callable[..., Any]]] = {
    "vllm": {"/classify": vllm, "/pooling": vllm_pooling},
    "vllm-pooling": {"/pooling": vllm_every_token},
    "sglang": {"/classify": sglang, "/v1/embeddings": embeddings},
    "sglang-embeddings": {"/v1/embeddings": embeddings},
    "lmdeploy": {"/pooling": lmdeploy},
    "polar": {"/classify": vllm},
}


@dataclass
class Reply:
    """What the server sends; status 0 closes the connection instead."""

    status: int = 200
    body: Any = None
    """Bytes, or something for JSON."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0
    cut: int = 0
    """Bytes of the body that are promised and never come."""


Script = Callable[[int, str, list[Ids]], "Reply | None"]
"""From the number of the request, counted from 0, its path and its inputs to the reply; None for the honest one."""


class Fake:
    """A server on a free port of this machine.

    Args:
        kind: Which engine it is.
        script: Replies to use in place of the honest ones.
        says_so: Whether `/v1/models` tells the engine.
        model: Its rewards.
    """

    def __init__(
        self,
        kind: str = "vllm",
        script: Script | None = None,
        says_so: bool = True,
        model: Callable[[Ids], Any] = reward,
        port: int = 0,
    ) -> None:
        self.kind, self.script, self.says_so, self.model = kind, script, says_so, model
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.batches: list[list[Ids]] = []
        """Inputs of the requests, in their order; the first one holds the probes."""
        self.active = self.most_active = self.connections = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self}))
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
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

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def answer(self, path: str, body: dict[str, Any]) -> Reply:
        sequences = body.get("input_ids", body.get("input"))
        with self._lock:
            number = len(self.batches)
            self.paths.append(path)
            self.bodies.append(body)
            self.batches.append(sequences)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            reply = self.script(number, path, sequences) if self.script else None
            reply = reply or Reply()
            if reply.status == 200 and reply.body is None:
                route = ROUTES[self.kind].get(path)
                reply.status = 200 if route else 404
                reply.body = route(sequences, self.model) if route else {"detail": "Not Found"}
            time.sleep(reply.delay)
            return reply
        finally:
            with self._lock:
                self.active -= 1

    def tell(self, path: str) -> Any:
        family = self.kind.partition("-")[0]
        if path == "/v1/models" and self.says_so:
            return {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": family}]}
        if path == "/get_model_info" and family == "sglang":
            return {"model_path": "tiny", "is_generation": False}
        return {"version": "0.32.0"} if path == "/version" and family == "vllm" else None


class _Server(ThreadingHTTPServer):
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
    fake: Fake

    def setup(self) -> None:
        super().setup()
        self.fake.connections += 1

    def do_GET(self) -> None:
        found = self.fake.tell(self.path)
        self._send(Reply(404, {"detail": "Not Found"}) if found is None else Reply(body=found))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.fake.headers.append({name.lower(): value for name, value in self.headers.items()})
        self._send(self.fake.answer(self.path, body))

    def _send(self, reply: Reply) -> None:
        if reply.status == 0:
            self.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"content-length": str(len(body) + reply.cut), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or reply.cut > 0

    def log_message(self, *_: object) -> None:
        """Quiet."""
