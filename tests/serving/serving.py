"""Servers for tests: in this process without a network, or as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from polar import EncodedGroup
from polar.serving.app import create_app
from polar.serving.batcher import Batcher
from polar.serving.checkpoint import Checkpoint, Loading, load_checkpoint
from polar.serving.metrics import Metrics
from polar.serving.middleware import RequestLimits
from polar.serving.service import Service

Result = TypeVar("Result")

JSON = {"Content-Type": "application/json"}
CPU = Loading(device="cpu")


@cache
def nano() -> Checkpoint:
    """The bundled model, loaded once."""
    return load_checkpoint("polar-nano", CPU)


def service(checkpoint: Checkpoint | None = None, *, max_queue: int = 1000, batch_tokens: int = 4096) -> Service:
    """A service around a model of this process."""
    metrics = Metrics()
    return Service(
        "polar-nano",
        checkpoint or nano(),
        lambda source: load_checkpoint(source, CPU),
        Batcher(batch_tokens, metrics).score,
        metrics,
        max_queue,
    )


def ask(
    questions: Callable[[httpx2.AsyncClient], Awaitable[Result]],
    of: Service | None = None,
    *,
    keys: Sequence[bytes] = (),
    limits: RequestLimits | None = None,
    peer: str = "127.0.0.1",
) -> Result:
    """Run questions to a server in this process; faults of it are answered, not raised."""

    async def run() -> Result:
        app = create_app(of or service(), keys, limits)
        transport = httpx2.ASGITransport(app=app, client=(peer, 1), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            return await questions(client)

    return asyncio.run(run())


def post(path: str, body: Any, of: Service | None = None, **more: Any) -> httpx2.Response:
    """One request."""
    content = json.dumps(body)  # ASCII: bodies may hold what UTF-8 cannot
    return ask(lambda client: client.post(path, content=content, headers=JSON), of, **more)


def flat(prompt: str, reference: str, *outputs: str) -> list[str]:
    """What the original client sends for the bundled model: one text per output, special tokens spelt."""
    return [f"{prompt}\n{reference}<|reward|>{prompt}\n{output}<|score|>" for output in outputs]


class Stalled:
    """An engine that answers when it is told to."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.started = 0
        self.cancelled = 0

    async def score(self, checkpoint: Checkpoint, groups: Sequence[EncodedGroup]) -> list[list[float]]:
        self.started += 1
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [[float(len(ids)) for ids in group.sequences()] for group in groups]

    def service(self, max_queue: int) -> Service:
        return Service("polar-nano", nano(), lambda source: nano(), self.score, Metrics(), max_queue)


@dataclass(frozen=True)
class Process:
    """`polar serve` in a process of its own."""

    popen: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """What it wrote to stderr from now to its end."""
        assert self.popen.stderr is not None
        return self.popen.stderr.read()


@contextmanager
def serving(*flags: str, model: str | Path = "polar-nano", port: int = 0, **environment: str) -> Iterator[Process]:
    """Start `polar serve` (port 0: on a free one) and wait until it listens; kill it at the end."""
    command = [sys.executable, "-m", "polar.cli.main", "serve", str(model), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLAR_API_KEYS": "", "COLUMNS": "200", **environment}
    popen = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert popen.stderr is not None
        lines = []
        for line in popen.stderr:
            lines.append(line)
            if found := re.search(r"listening on http://[^ ]*:(\d+)", line):
                yield Process(popen, int(found[1]))
                return
        raise AssertionError("".join(lines))
    finally:
        if popen.poll() is None:
            popen.send_signal(signal.SIGKILL)
        popen.communicate(timeout=30)
