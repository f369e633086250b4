"""Requests to HTTP servers that fail: bounded in time and size, with errors by what helps against them.

`Endpoint.fetch` sends one request once. `retrying` is tenacity's loop with our pauses: growing and random, or as long
as the server asks for (Retry-After). Which errors are worth another try, how often and until when, is for the caller
to say: a reward server that is down costs nothing while others answer, a policy has one server only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, NamedTuple

import httpx2
from tenacity import AsyncRetrying, RetryCallState
from tenacity.retry import retry_base
from tenacity.stop import stop_base

from polar.core.errors import InputError

log = logging.getLogger(__name__)

CHECKPOINT_HEADER = "polar-checkpoint"
"""Header with which `polar serve` names the checkpoint that computed an answer."""
MAX_MESSAGE_CHARACTERS = 300
"""Of a server's message in an error."""
MAX_REPLY_BYTES = 1 << 26
CONNECT_SECONDS = 30.0
"""In which a server must take a connection; one that drops packets would keep silent until the timeout."""
SILENT_SECONDS = 30.0
"""Without any reply, after which a message names the server that is waited for."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
UNAVAILABLE = (429, 502, 503, 504)
"""Statuses of servers that are overloaded, starting, or behind a broken gateway."""
NO_SUCH_PATH = (404, 405, 501)


class HttpError(Exception):
    """No usable reply.

    Args:
        reason: One line, without the key.
        status: HTTP status; 0 when there was no complete reply.
        retry_after: Seconds for which the server asks not to be asked.
    """

    def __init__(self, reason: str, status: int = 0, retry_after: float = 0) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after


class UnavailableError(HttpError):
    """The server cannot answer now: no connection, no complete reply in time, or a status in `UNAVAILABLE`."""


class BrokenError(HttpError):
    """The server answered with an error of its own (any other 5xx), or with a reply that makes no sense."""


class RefusedError(HttpError):
    """The server understood the request and refused it (3xx, 4xx, or a path that it does not have)."""


class Reply(NamedTuple):
    """The reply to a request that succeeded."""

    content: bytes
    headers: httpx2.Headers


class Endpoint:
    """One HTTP server: its address and key, its connections, and whether it is still used.

    Redirections are not followed, so that texts and key stay with the address that was given. Proxies and certificates
    come from the environment, but there is no proxy for this machine's own addresses.

    Args:
        address: Base URL.
        key: Sent as a bearer token; never part of a message.
        connections: Most connections at the same time.

    Raises:
        InputError: the address is not one.
    """

    def __init__(self, address: str, key: str | None = None, connections: int = 1) -> None:
        url = _url(address)
        self.address = one_line(address, key)
        self.excluded = ""
        """Why the server is not used any more; empty while it is."""
        self._exclusion = asyncio.Event()
        self._replies = 0
        self._silence_told = False
        self._key = key
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # `fetch` limits the whole request
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
            trust_env=not is_local(url.host),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def fetch(self, method: str, path: str, timeout: float, **request: Any) -> Reply:
        """Send one request once.

        Args:
            method: Of HTTP.
            path: Behind the address.
            timeout: Seconds until the reply must be complete.
            request: For httpx2, such as json.

        Raises:
            HttpError: one of its kinds above.
        """
        silence = asyncio.get_running_loop().call_later(SILENT_SECONDS, self._tell_silence, self._replies, timeout)
        try:
            async with asyncio.timeout(timeout), self._http.stream(method, path, **request) as response:
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_REPLY_BYTES:
                        raise httpx2.ReadError(f"a reply of more than {MAX_REPLY_BYTES:,} bytes")
        except TimeoutError:
            raise UnavailableError(f"no complete reply within {timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise UnavailableError(self.line(f"{type(error).__name__}: {error}")) from None
        finally:
            silence.cancel()
        self._replies += 1
        if response.is_success:
            return Reply(bytes(content), response.headers)
        status = response.status_code
        reason = f"HTTP {status}: {error_message(content) or response.reason_phrase}"
        if response.has_redirect_location:
            reason = f"HTTP {status}: redirected to {response.headers['location']}; give the final address"
        kind: type[HttpError] = RefusedError
        if status in UNAVAILABLE:
            kind = UnavailableError
        elif response.is_server_error and status not in NO_SUCH_PATH:
            kind = BrokenError
        raise kind(self.line(reason), status, _retry_after(response))

    def exclude(self, reason: str) -> None:
        """Say why the server is not used any more; whoever pauses in `sleep` wakes up."""
        if not self.excluded:
            log.error("%s is not used any more: %s", self.address, reason)
        self.excluded = reason
        self._exclusion.set()

    def include(self) -> None:
        """Use the server again."""
        self.excluded = ""
        self._exclusion.clear()

    async def sleep(self, seconds: float) -> None:
        """Pause, at most until the server is excluded."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exclusion.wait(), seconds)

    def _tell_silence(self, replies: int, timeout: float) -> None:
        """Say once that a server takes requests and gives no replies."""
        if self._replies == replies and not self._silence_told:
            self._silence_told = True
            log.warning("%s: no reply for %g s; each is waited for up to %g s", self.address, SILENT_SECONDS, timeout)

    def line(self, text: str) -> str:
        """Return one short line without the key, which a server may echo."""
        return one_line(text, self._key)


def retrying(
    retry: retry_base,
    stop: stop_base,
    *,
    deadline: float = math.inf,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    before_sleep: Callable[[RetryCallState], None] | None = None,
) -> AsyncRetrying:
    """Return tenacity's loop with our pauses; it raises the last error.

    Args:
        retry: Which errors are worth another try.
        stop: When there is none.
        deadline: Seconds since the first try, beyond which no pause lasts.
        sleep: How to pause.
        before_sleep: Called before every pause.
    """

    def wait(state: RetryCallState) -> float:
        error = state.outcome and state.outcome.exception()
        asked = error.retry_after if isinstance(error, HttpError) else 0
        left = deadline - (state.seconds_since_start or 0)
        return max(0, min(left, max(asked, pause(state.attempt_number))))

    return AsyncRetrying(retry=retry, stop=stop, wait=wait, sleep=sleep, before_sleep=before_sleep, reraise=True)


def pause(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row: exponential, with jitter."""
    return random.uniform(0.5, 1) * min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1))


def api_key(variable: str) -> str:
    """Return the key in an environment variable.

    Raises:
        InputError: there is none, or it is not one word of printable ASCII characters.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise InputError(
            f"environment variable {variable}: expected a key of printable ASCII characters without spaces"
        )
    return key


def is_local(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_json(content: bytes | bytearray) -> Any:
    """Return the JSON of a body, or None if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def error_message(content: bytes | bytearray) -> str:
    """Return what an error says: the usual places in JSON, or all of it."""
    found = parse_json(content)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    if isinstance(found, str):
        return found
    return json.dumps(found, ensure_ascii=False) if found else content.decode("utf-8", "replace")


def one_line(text: str, key: str | None = None) -> str:
    """Return one short line of printable characters, without the key."""
    if key:
        text = text.replace(key, "[key]")
    line = " ".join(valid_unicode(text[: 4 * MAX_MESSAGE_CHARACTERS]).split())
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else f"{line[:MAX_MESSAGE_CHARACTERS]}..."


def valid_unicode(text: str) -> str:
    """Return a text with U+FFFD for halves of surrogate pairs, which neither UTF-8 nor Parquet can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _url(address: str) -> httpx2.URL:
    try:
        url = httpx2.URL(address)
        url.host.encode("idna")  # what the socket module does, where a bad name is no error of httpx2
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise InputError(f"server address {address}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"server address {address}: expected host:port or a URL")
    if url.port is not None and not 0 < url.port < 65536:
        raise InputError(f"server address {address}: expected a port from 1 to 65535")
    return url


def _retry_after(response: httpx2.Response) -> float:
    """Seconds until the server wants to be asked again, given as seconds or as a date; 0 if it does not say."""
    value = response.headers.get("retry-after", "")
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0
    return (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
