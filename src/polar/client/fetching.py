"""What clients need of a checkpoint, from the `polar serve` that has it, where it is not on this machine."""

from __future__ import annotations

import json
import logging
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import httpx2

from polar.client.servers import connection, parse_addresses, pause, server_key
from polar.client.transport import MOST_BYTES, NO_SUCH_PATH, QUESTION
from polar.core.checkpoint import CHECKPOINT_FILE
from polar.core.errors import EngineError
from polar.core.http import error_message, one_line, parse_json

log = logging.getLogger(__name__)

PATH = "/v1/checkpoint"


def fetch_checkpoint(server_address: str, directory: Path, deadline: float) -> None:
    """Write the tokenizer.json and the polar.json of the checkpoint that servers have into a directory.

    The first server that answers is believed; the probes of its checkpoint prove the others. Servers that cannot be
    reached are asked again, so this blocks until the deadline.

    Args:
        server_address: As for `AsyncRewardModelClient`.
        directory: Where the files go.
        deadline: Seconds after which it is given up.

    Raises:
        InputError: an address or the key is unusable.
        EngineError: none can be reached, or a server is no `polar serve`, does not let us in or tells no such thing.
    """
    end = time.monotonic() + deadline
    key = server_key()
    with ExitStack() as stack:
        servers = [
            stack.enter_context(httpx2.Client(**connection(address, key), timeout=min(QUESTION, deadline)))
            for address, _ in parse_addresses(server_address, "auto")
        ]
        for tries in count(1):
            for server in servers:
                try:
                    content = _answer(server, PATH)
                except (httpx2.HTTPError, _UnavailableError) as error:
                    last = one_line(f"{_address(server)}: {error or type(error).__name__}", key)
                    log.log(logging.WARNING if tries == 1 else logging.DEBUG, "%s; it is tried again later", last)
                    continue
                except EngineError as error:
                    raise EngineError(one_line(str(error), key)) from None
                _write(content, server, directory)
                return
            if time.monotonic() + pause(tries) > end:
                raise EngineError(f"no server answers: {last}")
            time.sleep(pause(tries))


class _UnavailableError(Exception):
    """The server cannot answer now."""


def _answer(server: httpx2.Client, path: str) -> Any:
    """The JSON at a path of a server, or None where it has none."""
    with server.stream("GET", path) as response:
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > MOST_BYTES:
                raise EngineError(f"{_address(server)}: a reply of more than {MOST_BYTES:,} bytes")
    status = response.status_code
    if response.is_success:
        return parse_json(bytes(content))
    if status in NO_SUCH_PATH:
        return None
    reason = f"HTTP {status}: {error_message(bytes(content)) or response.reason_phrase}"
    if response.is_server_error or status == 429:
        raise _UnavailableError(reason)
    raise EngineError(f"{_address(server)}: {reason}")


def _write(content: Any, server: httpx2.Client, directory: Path) -> None:
    match content:
        case {"checkpoint": dict(facts), "tokenizer": str(tokenizer)}:
            (directory / CHECKPOINT_FILE).write_text(json.dumps(facts), "utf-8")
            (directory / "tokenizer.json").write_text(tokenizer, "utf-8")
        case _:
            raise EngineError(f"{_address(server)}: no `polar serve`, which would tell its checkpoint at {PATH}")


def _address(server: httpx2.Client) -> str:
    return str(server.base_url).rstrip("/")
