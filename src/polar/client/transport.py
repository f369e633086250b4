"""Requests to one or several servers: balanced, bounded, tried again where that can help, never longer than allowed.

Every server is proven before it gets work, and again for every new connection before the answers that came over it
count, since after a restart something else may listen there. `polar serve` can load another checkpoint under a
connection that stays: every reward names its checkpoint, and a server that changes it is excluded. A server that is
unavailable (`polar.core.http`) rests for a jittered, growing time, or for as long as it asks; meanwhile the others do
its work, and afterwards one request tries it out. Other errors of a server and replies that make no sense count against
the request, which may be what breaks the server. A refusal is final.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tenacity import retry_if_exception_type, stop_after_attempt

from polar.client.engines import ENGINES, Answer, Engine, NonsenseError, ServerType
from polar.core.errors import EngineError, InputError
from polar.core.http import (
    CHECKPOINT_HEADER,
    NO_SUCH_PATH,
    BrokenError,
    Endpoint,
    HttpError,
    RefusedError,
    UnavailableError,
    api_key,
    error_message,
    parse_json,
    pause,
    retrying,
)

log = logging.getLogger(__name__)

KEY_VARIABLE = "POLAR_API_KEY"
QUESTION_SECONDS = 10.0
"""In which a server must say who it is."""
INPUT_STATUSES = (400, 413, 422, 500)
"""Statuses that may be the fault of one input of a request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is sent at a time, and for how long."""

    concurrency: int = 8
    """Requests in flight at each address."""
    batch_items: int = 64
    """Inputs of one request."""
    batch_tokens: int = 65_536
    """Tokens of one request; a longer input goes alone."""
    timeout: float = 300
    """Seconds for one request."""
    deadline: float = 1800
    """Seconds for one call with all its requests, tries and pauses."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise InputError(f"limits: {name} must be positive, found {getattr(self, name)}")


@dataclass(eq=False, slots=True)
class Server:
    """One server and what is known about it. All times are those of the event loop."""

    endpoint: Endpoint
    server_type: ServerType
    engine: Engine | None = None
    """How it is asked; None until it is proven."""
    checkpoint: str | None = None
    """Name that `polar serve` gives to the proven checkpoint; None for servers that name none."""
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0
    proving: asyncio.Lock = field(default_factory=asyncio.Lock)
    proven_at: float = 0
    connected_at: float = 0
    """When a request last opened a connection: something else may have answered since."""

    @property
    def address(self) -> str:
        """Its base URL."""
        return self.endpoint.address

    async def note_connection(self, event: str, _: Mapping[str, Any]) -> None:
        """Follow a request (the "trace" extension of httpx2)."""
        if event == "connection.connect_tcp.complete":
            self.connected_at = asyncio.get_running_loop().time()

    def rest(self, error: HttpError) -> None:
        """Let no requests through for a while."""
        if not error.status:
            self.engine = None  # what comes back is proven again
        now = asyncio.get_running_loop().time()
        if self.rests_until <= now:  # not for every request that was in flight when it failed
            self.failures += 1
        self.rests_until = max(self.rests_until, now + max(error.retry_after, pause(self.failures)))


def parse_addresses(server_address: str | Sequence[str], server_type: ServerType) -> list[tuple[str, ServerType]]:
    """Base URLs and types of the servers.

    Raises:
        InputError: there is none, or a type is unknown.
    """
    words = server_address.split(",") if isinstance(server_address, str) else server_address
    addresses: list[tuple[str, ServerType]] = []
    for word in map(str.strip, words):
        kind, equals, address = word.partition("=")
        if not equals or "/" in kind:
            kind, address = server_type, word
        if not address:
            raise InputError(f"server address {server_address!r}: expected host:port or a URL, found nothing")
        if kind != "auto" and kind not in ENGINES:
            raise InputError(f"server type {kind!r}: expected auto or one of {', '.join(ENGINES)}")
        url = address if "://" in address else f"http://{address}"
        addresses.append((url.rstrip("/"), cast(ServerType, kind)))
    if not addresses:
        raise InputError("server address: expected host:port or a URL, found none")
    return addresses


def open_servers(server_address: str | Sequence[str], server_type: ServerType, limits: Limits) -> list[Server]:
    """Return the servers at some addresses; no connection is made yet.

    Raises:
        InputError: an address, a type, or the key in the environment is unusable.
    """
    key = api_key(KEY_VARIABLE) if os.environ.get(KEY_VARIABLE) else None
    return [
        Server(Endpoint(address, key, limits.concurrency + 1), kind)
        for address, kind in parse_addresses(server_address, server_type)
    ]


class _NonsenseReplyError(BrokenError):
    """The server answered, but not in the format of its engine."""


class Transport:
    """Sends requests to whichever server has least to do.

    Args:
        servers: Where requests go.
        limits: See `Limits`.
        prove: Called with a server that is to be used; sets its engine or raises `EngineError`.
    """

    def __init__(self, servers: Sequence[Server], limits: Limits, prove: Callable[[Server], Awaitable[None]]) -> None:
        self.servers = servers
        self._limits = limits
        self._prove = prove
        self._freed = asyncio.Event()

    async def connect(self) -> list[str]:
        """Prove every server that is not proven yet, or was excluded.

        Returns:
            Why, for every server that cannot be reached now; it is tried again when there is work.

        Raises:
            EngineError: a server is of no use.
        """
        for server in self.servers:
            if server.endpoint.excluded:
                server.endpoint.include()
                server.engine = server.checkpoint = None
        unreachable = [reason for reason in await asyncio.gather(*map(self._try_to_prove, self.servers)) if reason]
        if excluded := self._excluded():
            raise EngineError(excluded)
        return unreachable

    async def close(self) -> None:
        """Close the connections."""
        for server in self.servers:
            await server.endpoint.close()

    async def ask(self, sequences: Sequence[list[int]], deadline: float, most_tries: int) -> list[Answer]:
        """Return the answers to some inputs, in their order.

        Args:
            sequences: The token ids of each input.
            deadline: Time of the event loop after which it is given up.
            most_tries: How often a server may answer with an error of its own (500) or with nonsense.

        Raises:
            RefusedError: the servers refuse the request, break on it, or the time is over.
        """
        last, failure = "no server was free", ""

        async def ask_until_one_answers() -> list[Answer]:
            nonlocal last, failure
            while True:
                server = await self._acquire()
                last = f"{server.address}: no answer yet{failure and f', after {failure}'}"
                try:
                    engine = await self._proven(server)
                    answers = await self.post(server, engine, sequences, {"trace": server.note_connection})
                    await self._proven(server)  # what answered may have come up in the meantime
                    return answers
                except (EngineError, UnavailableError) as error:
                    last = failure = f"{server.address}: {error}"
                    if isinstance(error, UnavailableError):
                        if not (error.status or server.failures):
                            log.warning("%s; it is tried again later", last)
                        server.rest(error)
                    else:
                        server.endpoint.exclude(str(error))
                except HttpError as error:
                    last = f"{server.address}: {error}"
                    raise type(error)(last, error.status) from None
                finally:
                    server.in_flight -= 1
                    self._freed.set()

        tries = retrying(retry_if_exception_type(BrokenError), stop_after_attempt(most_tries))
        try:
            async with asyncio.timeout_at(deadline):
                answers: list[Answer] = await tries(ask_until_one_answers)
                return answers
        except TimeoutError:
            raise RefusedError(f"given up at the deadline: {last}") from None
        except BrokenError:
            raise RefusedError(f"given up after {most_tries} tries: {last}", 500) from None

    async def post(
        self, server: Server, engine: Engine, sequences: Sequence[list[int]], extensions: dict[str, Any] | None = None
    ) -> list[Answer]:
        """Send one request to one server, once."""
        body = engine.body(sequences)
        content = await self._fetch(server, "POST", engine.path, self._limits.timeout, json=body, extensions=extensions)
        try:
            return engine.read(parse_json(content), sequences)
        except NonsenseError as error:
            raise _NonsenseReplyError(server.endpoint.line(f"{error}; it says: {error_message(content)}")) from None

    async def get(self, server: Server, path: str) -> Any:
        """Return the JSON at a path of a server, or None where it has none."""
        try:
            return parse_json(await self._fetch(server, "GET", path, min(QUESTION_SECONDS, self._limits.timeout)))
        except RefusedError as error:
            if error.status in NO_SUCH_PATH:
                return None
            raise

    async def _fetch(self, server: Server, method: str, path: str, timeout: float, **request: Any) -> bytes:
        try:
            reply = await server.endpoint.fetch(method, path, timeout, **request)
        except (BrokenError, RefusedError):
            server.failures = 0
            raise
        server.failures = 0
        self._require_same_checkpoint(server, reply.headers.get(CHECKPOINT_HEADER))
        return reply.content

    async def _acquire(self) -> Server:
        """The usable server with the fewest requests in flight, as soon as there is one."""
        while True:
            usable = [server for server in self.servers if not server.endpoint.excluded]
            if not usable:
                raise RefusedError(self._excluded())
            now = asyncio.get_running_loop().time()
            awake = [server for server in usable if server.rests_until <= now]
            if free := [server for server in awake if server.in_flight < self._room(server)]:
                server = min(free, key=lambda server: server.in_flight)
                server.in_flight += 1
                return server
            self._freed.clear()
            rests = [server.rests_until - now for server in usable if server not in awake]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), min(rests, default=None))

    def _excluded(self) -> str:
        """Which servers are not used any more, and why."""
        excluded = [server.endpoint for server in self.servers if server.endpoint.excluded]
        return "; ".join(f"{endpoint.address}: {endpoint.excluded}" for endpoint in excluded)

    def _room(self, server: Server) -> int:
        unsure = server.engine is None or server.failures > 0  # one request finds out whether it is back
        return 1 if unsure else self._limits.concurrency

    async def _proven(self, server: Server) -> Engine:
        async with server.proving:
            if server.engine is None or server.proven_at <= server.connected_at:
                started = asyncio.get_running_loop().time()
                await self._prove(server)
                server.proven_at = started
        assert server.engine is not None
        return server.engine

    async def _try_to_prove(self, server: Server) -> str:
        """Return why the server cannot be reached now; an empty string when it can, or is excluded."""
        try:
            await self._proven(server)
        except (EngineError, RefusedError, _NonsenseReplyError) as error:
            server.endpoint.exclude(str(error))
        except HttpError as error:
            server.rest(error)
            reason = f"{server.address}: {error}"
            log.warning("%s; it is tried again later", reason)
            return reason
        return ""

    def _require_same_checkpoint(self, server: Server, checkpoint: str | None) -> None:
        """Refuse answers of another checkpoint than those before, even if its rewards of the probes are close."""
        if checkpoint is None:
            return
        if server.checkpoint not in (None, checkpoint):
            raise EngineError(
                f"the server has loaded another checkpoint ({checkpoint} in place of "
                f"{server.checkpoint}), so its rewards do not compare with those before; connect() proves it anew"
            )
        server.checkpoint = checkpoint
