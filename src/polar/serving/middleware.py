"""Checks before the routes: keys, the size of a request, the time it takes to arrive, clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polar.core.errors import InputError
from polar.serving.errors import RefusalError
from polar.serving.metrics import Metrics

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Need no key: the page (it asks for the key), and what an orchestrator asks."""
BODIES_AT_ONCE = 8
"""Bodies of the largest size that may be in memory together; further ones are asked to come later."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of a request."""

    body_bytes: int = 32 << 20
    read_seconds: float = 30.0
    """Time for the whole of a request to arrive."""


def parse_keys(value: str, variable: str) -> tuple[bytes, ...]:
    """Return the API keys of an environment variable, separated by commas; none when it is empty.

    Raises:
        InputError: A key is not made of printable ASCII characters.
    """
    keys = [key.strip() for key in value.split(",") if key.strip()]
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{variable}: key {number}: expected printable ASCII characters without spaces")
    return tuple(key.encode("ascii") for key in keys)


class Guard:
    """ASGI middleware around the whole application.

    The body is read here, so that its limits hold for every route and for bodies of unknown length, and so that the
    next message can only be that the client has gone: then the request is cancelled.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[bytes], limits: RequestLimits, metrics: Metrics) -> None:
        self.app, self.keys, self.limits, self.metrics = app, keys, limits, metrics
        self._held = 0
        """Bytes of bodies in memory."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = 499, time.monotonic()  # 499: the client left first

        async def send_and_note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        body = bytearray()
        try:
            self._check_key(scope)
            if await self._read(body, _length(scope), receive):
                start = time.monotonic()
                await self._run(scope, bytes(body), receive, send_and_note)
        except RefusalError as refusal:
            await refusal.response()(scope, receive, send_and_note)
        finally:
            self._held -= len(body)
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count_request(route, status, time.monotonic() - start)

    def _check_key(self, scope: Scope) -> None:
        if not self.keys or scope["path"] in OPEN_PATHS:
            return
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # Every key is compared, each in constant time, so that the time gives nothing away about them.
        if not sum(hmac.compare_digest(given, key) for key in self.keys):
            raise RefusalError(
                401,
                "expected a valid API key, as Authorization: Bearer KEY or as X-API-Key: KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, body: bytearray, declared: int | None, receive: Receive) -> bool:
        """Read the body; returns whether the client is still there."""
        limit = self.limits.body_bytes
        too_large = RefusalError(413, f"the request is larger than {limit:,} bytes; split it into several")
        if declared is not None and declared > limit:
            raise too_large
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    chunk = message.get("body", b"")
                    if len(body) + len(chunk) > limit:
                        raise too_large
                    if self._held + len(chunk) > BODIES_AT_ONCE * limit:
                        raise RefusalError(
                            503, "too many large requests at once; try again", headers={"Retry-After": "1"}
                        )
                    body += chunk
                    self._held += len(chunk)
                    if not message.get("more_body", False):
                        return True
        raise RefusalError(
            408, f"the request did not arrive within {self.limits.read_seconds:g} s", headers={"Connection": "close"}
        )

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application, unless the client leaves first."""

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        request = asyncio.ensure_future(self.app(scope, replay, send))
        gone: asyncio.Future[Any] = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((request, gone), return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                request.cancel()
                with suppress(asyncio.CancelledError):
                    await request
            else:
                request.result()  # raises what the application raised
        finally:
            request.cancel()
            gone.cancel()


def _length(scope: Scope) -> int | None:
    """The length of the body that the client announced, if it did."""
    value = dict(scope["headers"]).get(b"content-length", b"")
    return int(value) if value.isdigit() else None
