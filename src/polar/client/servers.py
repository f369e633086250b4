"""The servers that a client asks: addresses, limits, and what is known about each of them."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx2

from polar.client.engines import ENGINES, Engine, ServerType
from polar.core.errors import InputError
from polar.core.http import api_key, is_local

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
