"""Requests to one or several servers: balanced, bounded, tried again where that can help, never longer than allowed.

Every server is proven before it gets work, and again for every new connection before the answers that came over it
count, since after a restart something else may listen there. `polar serve` can load another checkpoint under a
connection that stays: every reward names its checkpoint, and a server that changes it is refused. A server that cannot
be reached, is overloaded (429) or behind a broken gateway (502 to 504) rests for a jittered, growing time, or for as
long as it asks (Retry-After); meanwhile the others do its work, and afterwards one request tries it out. Any other 5xx
and replies that make no sense count against the request, which may be what breaks the server. A 4xx is final: the
server understood and refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx2

from polar.client.engines import ENGINES, Answer, Engine, NonsenseError, ServerType
from polar.core.errors import EngineError, InputError
from polar.core.http import (
    CHECKPOINT_HEADER,
    api_key,
    error_message,
    is_local,
    one_line,
    parse_json,
    read_content,
    retry_after,
)

log = logging.getLogger(__name__)

KEY_VARIABLE = "POLAR_API_KEY"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds."""


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
    """One address and what is known about it."""

    address: str
    server_type: ServerType
    http: httpx2.AsyncClient
    engine: Engine | None = None
    """How it is asked; None until it is proven."""
    checkpoint: str | None = None
    """What `polar serve` calls the checkpoint that was proven; None for servers that do not name theirs."""
    refused: str = ""
    """Why it is not used any more."""
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0
    """Time of the event loop, as all times here."""
    proving: asyncio.Lock = field(default_factory=asyncio.Lock)
    proven_at: float = 0
    connected_at: float = 0
    """When a request last opened a connection: something else may have answered since."""

    async def note_connection(self, event: str, _: Mapping[str, Any]) -> None:
        """Follows a request (the "trace" extension of httpx2)."""
        if event == "connection.connect_tcp.complete":
            self.connected_at = asyncio.get_running_loop().time()

    def rest(self, at_least: float = 0) -> None:
        """Let no requests through for a while: a growing random time, or as many seconds as the server asks for."""
        now = asyncio.get_running_loop().time()
        if self.rests_until <= now:  # not for every request that was in flight when it failed
            self.failures += 1
        self.rests_until = max(self.rests_until, now + max(at_least, pause(self.failures)))


def pause(failures: int) -> float:
    """Seconds to wait after so many failures, exponential with jitter."""
    return random.uniform(0.5, 1) * min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (failures - 1))


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


def server_key() -> str | None:
    """The key of the servers, if there is one in the environment.

    Raises:
        InputError: it is none.
    """
    return api_key(KEY_VARIABLE) if os.environ.get(KEY_VARIABLE) else None


def open_server(address: str, server_type: ServerType, key: str | None, limits: Limits) -> Server:
    """A server with its connections, none of which is made yet.

    Raises:
        InputError: the address is none.
    """
    connections = limits.concurrency + 1
    http = httpx2.AsyncClient(
        **connection(address, key),
        timeout=None,  # one limit around the whole request, see Transport
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
    )
    return Server(address, server_type, http)


def connection(address: str, key: str | None) -> dict[str, Any]:
    """What a client of httpx2 is told about a server.

    Raises:
        InputError: the address is none.
    """
    try:
        url = httpx2.URL(address)
        url.host.encode("idna")  # what the socket module does, where a bad name is no error of httpx2
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise InputError(f"server address {address}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"server address {address}: expected host:port or a URL")
    if url.port is not None and not 0 < url.port < 65536:
        raise InputError(f"server address {address}: expected a port from 1 to 65535")
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "follow_redirects": False,  # texts and key stay with the address that was given
        "trust_env": not is_local(url.host),
    }


MOST_BYTES = 1 << 26
"""Of one reply."""
QUESTION = 10.0
"""Seconds that a server may take to say who it is."""
UNAVAILABLE = (429, 502, 503, 504)
NO_SUCH_PATH = (404, 405, 501)
ABOUT_ITEMS = (400, 413, 422, 500)
"""What may be the fault of one input of a request."""


class RefusedError(Exception):
    """No answer to a request, for good."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status
        """HTTP status; 500 for nonsense too, 0 when no server could be asked."""


class _UnavailableError(Exception):
    """The server cannot answer now."""

    def __init__(self, reason: str, after: float = 0, lost: bool = False) -> None:
        super().__init__(reason)
        self.after = after
        self.lost = lost


class _BrokenError(Exception):
    """The server answered with an error of its own."""


class _NonsenseReplyError(_BrokenError):
    """The server answered, but not in the format of its engine."""


class _ChangedError(EngineError):
    """The server has loaded another checkpoint than the one that was proven."""


class Transport:
    """Sends requests to whichever server has least to do.

    Args:
        servers: Where requests go.
        key: The servers' key, so that it is never shown.
        limits: See `Limits`.
        prove: Called with a server that is to be used; sets its engine or raises `EngineError`.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        key: str | None,
        limits: Limits,
        prove: Callable[[Server], Awaitable[None]],
    ) -> None:
        self.servers = servers
        self._key = key
        self._limits = limits
        self._prove = prove
        self._freed = asyncio.Event()

    async def connect(self) -> list[str]:
        """Prove every server that is not proven yet, or was refused.

        Returns:
            Why, for every server that cannot be reached now; it is tried again when there is work.

        Raises:
            EngineError: a server is of no use.
        """
        for server in self.servers:
            if server.refused:
                server.refused, server.engine, server.checkpoint = "", None, None
        unreachable = [reason for reason in await asyncio.gather(*map(self._try_to_prove, self.servers)) if reason]
        if refused := [server.refused for server in self.servers if server.refused]:
            raise EngineError("; ".join(refused))
        return unreachable

    async def close(self) -> None:
        """Close the connections."""
        for server in self.servers:
            await server.http.aclose()

    async def ask(self, sequences: Sequence[list[int]], deadline: float, most_tries: int) -> list[Answer]:
        """Answers to some inputs, in their order.

        Args:
            sequences: The token ids of each input.
            deadline: Time of the event loop after which it is given up.
            most_tries: How often a server may answer with an error of its own (500) or with nonsense.

        Raises:
            RefusedError: the servers refuse the request, break on it, or the time is over.
        """
        tries, last = 0, "no server was free"
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    server = await self._acquire()
                    last = f"{server.address}: no answer yet"
                    try:
                        engine = await self._proven(server)
                        answers = await self.post(server, engine, sequences, {"trace": server.note_connection})
                        await self._proven(server)  # what answered may have come up in the meantime
                        return answers
                    except EngineError as error:
                        server.refused = last = str(error)
                        log.error("%s; it is not used any more", error)
                    except _UnavailableError as error:
                        last = str(error)
                        self._rest(server, error)
                    except _BrokenError as error:
                        tries, last = tries + 1, str(error)
                    finally:
                        server.in_flight -= 1
                        self._freed.set()
                    if tries == most_tries:
                        raise RefusedError(f"given up after {tries} tries: {last}", 500)
                    await asyncio.sleep(pause(tries) if tries else 0)
        except TimeoutError:
            raise RefusedError(f"given up at the deadline: {last}") from None

    async def post(
        self, server: Server, engine: Engine, sequences: Sequence[list[int]], extensions: dict[str, Any] | None = None
    ) -> list[Answer]:
        """One request to one server, without another try."""
        body = engine.body(sequences)
        content = await self._fetch(server, self._limits.timeout, "POST", engine.path, json=body, extensions=extensions)
        try:
            return engine.read(parse_json(content), sequences)
        except NonsenseError as error:
            raise _NonsenseReplyError(self._line(server, f"{error}; it says: {error_message(content)}")) from None

    async def get(self, server: Server, path: str) -> Any:
        """The JSON at a path of a server, or None where it has none."""
        try:
            return parse_json(await self._fetch(server, min(QUESTION, self._limits.timeout), "GET", path))
        except RefusedError as error:
            if error.status in NO_SUCH_PATH:
                return None
            raise

    async def _fetch(self, server: Server, timeout: float, method: str, path: str, **request: Any) -> bytes:
        try:
            async with (
                asyncio.timeout(timeout),
                server.http.stream(method, path, **request) as response,
            ):
                content = await read_content(response, MOST_BYTES)
        except TimeoutError:
            reason = f"no complete answer within {timeout:g} s"
            raise _UnavailableError(self._line(server, reason), lost=True) from None
        except httpx2.HTTPError as error:
            raise _UnavailableError(self._line(server, f"{type(error).__name__}: {error}"), lost=True) from None
        status = response.status_code
        if status not in UNAVAILABLE:
            server.failures = 0
        if response.is_success:
            self._require_same_checkpoint(server, response.headers.get(CHECKPOINT_HEADER))
            return content
        reason = self._line(server, f"HTTP {status}: {error_message(content) or response.reason_phrase}")
        if status in UNAVAILABLE:
            raise _UnavailableError(reason, after=retry_after(response))
        if response.is_server_error and status not in NO_SUCH_PATH:
            raise _BrokenError(reason)
        raise RefusedError(reason, status)

    async def _acquire(self) -> Server:
        """The usable server with the fewest requests in flight, as soon as there is one."""
        while True:
            usable = [server for server in self.servers if not server.refused]
            if not usable:
                raise RefusedError("; ".join(server.refused for server in self.servers))
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

    def _room(self, server: Server) -> int:
        unsure = server.engine is None or server.failures > 0  # one request finds out whether it is back
        return 1 if unsure else self._limits.concurrency

    async def _proven(self, server: Server) -> Engine:
        async with server.proving:
            if server.engine is None or server.proven_at <= server.connected_at:
                started = asyncio.get_running_loop().time()
                try:
                    await self._prove(server)
                except _ChangedError:
                    raise
                except EngineError as error:
                    raise EngineError(f"{server.address}: {error}") from None
                server.proven_at = started
        assert server.engine is not None
        return server.engine

    async def _try_to_prove(self, server: Server) -> str:
        """Why the server cannot be reached now; empty when it can, or is refused for good."""
        try:
            await self._proven(server)
        except (EngineError, RefusedError, _NonsenseReplyError) as error:
            server.refused = str(error)
        except (_UnavailableError, _BrokenError) as error:
            self._rest(server, error)
            log.warning("%s; it is tried again later", error)
            return str(error)
        return ""

    def _require_same_checkpoint(self, server: Server, checkpoint: str | None) -> None:
        """Refuse answers of another checkpoint than those before, even if its rewards of the probes are close."""
        if checkpoint is None:
            return
        if server.checkpoint not in (None, checkpoint):
            raise _ChangedError(
                self._line(
                    server,
                    f"the server has loaded another checkpoint ({checkpoint} in place of {server.checkpoint}), so its "
                    "rewards do not compare with those before; connect() proves it anew",
                )
            )
        server.checkpoint = checkpoint

    def _rest(self, server: Server, error: _UnavailableError | _BrokenError) -> None:
        if isinstance(error, _UnavailableError) and error.lost:
            server.engine = None  # what comes back is proven again
        server.rest(error.after if isinstance(error, _UnavailableError) else 0)

    def _line(self, server: Server, text: str) -> str:
        return one_line(f"{server.address}: {text}", self._key)
