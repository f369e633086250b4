"""What every HTTP client here needs: keys from the environment, replies of bounded size, errors as one safe line."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any

import httpx2

from polar.core.errors import InputError

CHECKPOINT_HEADER = "polar-checkpoint"
"""Header with which `polar serve` names the checkpoint that computed an answer."""
SHOWN = 300
"""Characters of a server's message that a line keeps."""


def api_key(variable: str) -> str:
    """The key in an environment variable.

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
    """Whether a host is this machine, for which no proxy is asked."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def read_content(response: httpx2.Response, most_bytes: int) -> bytes:
    """The body of a streamed response.

    Raises:
        httpx2.ReadError: it has more than `most_bytes`.
    """
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > most_bytes:
            raise httpx2.ReadError(f"a reply of more than {most_bytes:,} bytes")
    return bytes(content)


def retry_after(response: httpx2.Response) -> float:
    """Seconds until the server wants to be asked again, given as seconds or as a date; 0 if it does not say."""
    value = response.headers.get("retry-after", "")
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0
    return (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


def parse_json(content: bytes) -> Any:
    """The JSON of a body, or None if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def error_message(content: bytes) -> str:
    """What an error says: the usual places in JSON, or all of it."""
    found = parse_json(content)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    if isinstance(found, str):
        return found
    return json.dumps(found, ensure_ascii=False) if found else content.decode("utf-8", "replace")


def one_line(text: str, key: str | None = None) -> str:
    """One short line of printable characters, without the key, which a server may echo."""
    if key:
        text = text.replace(key, "[key]")
    line = " ".join(valid_unicode(text[: 4 * SHOWN]).split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def valid_unicode(text: str) -> str:
    """Half of a surrogate pair, left by a token boundary, becomes U+FFFD: neither UTF-8 nor Parquet can hold it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
