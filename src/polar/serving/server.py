"""A server from a checkpoint to its socket: loading, the time that requests may take to arrive, and signals.

SIGTERM and Ctrl-C drain: new requests and `/ready` get 503, what was accepted is answered, then the process ends with
exit code 0. A second signal does not wait. SIGHUP loads the checkpoint again.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from polar.core.checkpoint import BUNDLED_NAME
from polar.core.errors import InputError
from polar.serving.app import create_app
from polar.serving.batcher import Batcher
from polar.serving.checkpoint import Loading, load_checkpoint, load_served
from polar.serving.errors import RefusalError
from polar.serving.metrics import Metrics
from polar.serving.middleware import RequestLimits
from polar.serving.service import Score, Service, score_elsewhere

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
"""Time of idle connections; longer than clients keep them, so that none is closed under a request on its way."""
CLOSING_SECONDS = 1
"""Time at the end of draining for answers that are still being sent."""


@dataclass(frozen=True, slots=True)
class RewardServer:
    """A loaded checkpoint with its application, for `serve` here or for any other ASGI server."""

    app: FastAPI
    service: Service
    limits: RequestLimits

    async def serve(self, listener: socket.socket, *, drain_seconds: float = 30.0) -> None:
        """Serve until a signal ends it, or the task is cancelled; arguments as in `serve`."""
        await serve(
            self.app,
            self.service,
            listener,
            drain_seconds=drain_seconds,
            read_seconds=self.limits.read_seconds,
        )


def create_server(
    model: str = BUNDLED_NAME,
    *,
    backends: Sequence[str] = (),
    name: str | None = None,
    keys: Sequence[bytes] = (),
    loading: Loading | None = None,
    batch_tokens: int | None = None,
    max_queue: int = 4096,
    limits: RequestLimits | None = None,
) -> RewardServer:
    """Load a checkpoint and build the server around it, as `polar serve` does.

    Example:
        >>> server = create_server("runs/reward-model")
        >>> asyncio.run(server.serve(bind("127.0.0.1", 30000, protected=False)))

    Args:
        model: Checkpoint directory, hub name, or polar-mini or polar-nano, which are bundled.
        backends: Servers that compute in place of this process, such as `vllm=HOST:PORT,HOST:PORT`.
        name: The model's name in requests and answers (default: the last part of `model`).
        keys: API keys; without any, every client may ask.
        loading: Device, precision and lengths.
        batch_tokens: Tokens of one forward pass (default: 4096 on a CPU, 16384 elsewhere).
        max_queue: Inputs that may be in flight.
        limits: Size and time of requests.

    Raises:
        InputError: The checkpoint or an address is unusable.
    """
    loading, limits, metrics = loading or Loading(), limits or RequestLimits(), Metrics()
    if backends:
        load = partial(load_served, loading=loading, backends=backends)
    else:
        load = partial(load_checkpoint, loading=loading)
    checkpoint = load(model)
    if checkpoint.model is None:
        score: Score = score_elsewhere
    else:
        default = 4096 if checkpoint.model.device.type == "cpu" else 16384
        score = Batcher(batch_tokens or default, metrics).score
    service = Service(name or Path(model).name, checkpoint, load, score, metrics, max_queue)
    return RewardServer(create_app(service, keys, limits), service, limits)


def bind(host: str, port: int, *, protected: bool) -> socket.socket:
    """Return a socket to listen on, so that a mistake shows before a model is loaded.

    Args:
        host: Name or address.
        port: 0 for any free one.
        protected: Whether clients need a key, or the user said that they do not.

    Raises:
        InputError: The address is reachable from other machines without a key, or it cannot be had.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would take the rest of a division
        raise InputError(f"--port {port}: expected 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if not protected and not ip_address(address[0]).is_loopback:
            raise InputError(
                f"--host {host}: other machines could reach the server; put API keys into POLAR_API_KEYS (separated by "
                "commas), or say --allow-no-key where the network keeps others out"
            )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error})") from error
    return listener


async def serve(
    app: FastAPI,
    service: Service,
    listener: socket.socket,
    *,
    drain_seconds: float,
    read_seconds: float,
) -> None:
    """Prove the servers of a gateway, then serve until a signal ends it.

    Args:
        app: The application.
        service: What it asks.
        listener: From `bind`.
        drain_seconds: Most time for requests that are in flight when a signal comes.
        read_seconds: Most time for a request to arrive.

    Raises:
        EngineError: A server behind the gateway does not give the checkpoint's rewards, or none can be reached.
    """
    config = uvicorn.Config(
        app,
        http=_timed_protocol(read_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    server, loop = uvicorn.Server(config), asyncio.get_running_loop()
    background: set[asyncio.Task[None]] = set()

    def end(sig: int, frame: FrameType | None) -> None:
        if service.draining:
            server.should_exit = server.force_exit = True
            return
        service.draining = True
        log.info("shutting down: %d inputs are in flight", service.in_flight)
        loop.call_soon_threadsafe(lambda: background.add(loop.create_task(_drain(server, service, drain_seconds))))

    _keep_freed_memory()
    await service.checkpoint.connect()
    running = loop.create_task(server.serve([listener]))
    try:
        while not (server.started or running.done()):
            await asyncio.sleep(0.01)
        # Other threads get no signals, and Windows has no SIGHUP.
        with suppress(AttributeError, NotImplementedError, RuntimeError, ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):  # in place of uvicorn's, which restores the former ones
                signal.signal(number, end)
            loop.add_signal_handler(signal.SIGHUP, lambda: background.add(loop.create_task(_reload(service))))
        host, port = listener.getsockname()[:2]
        log.info("%s: listening on http://%s:%d", service.name, f"[{host}]" if ":" in host else host, port)
        await running
    finally:
        running.cancel()


async def _drain(server: uvicorn.Server, service: Service, seconds: float) -> None:
    """End the server when no request is in flight, or after so many seconds."""
    deadline = time.monotonic() + seconds - CLOSING_SECONDS
    while not service.idle and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    if not service.idle:
        log.error("%d inputs are given up after %g s", service.in_flight, seconds)
    server.should_exit = True


async def _reload(service: Service) -> None:
    with suppress(RefusalError):  # it has been logged
        await service.reload()


def _keep_freed_memory() -> None:
    """Ask glibc to keep up to 1 GiB of freed tensors: the kernel would have to clear the pages of the next ones."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(ctypes.c_int(-3), ctypes.c_int(32 * 2**20))  # M_MMAP_THRESHOLD, the largest that glibc takes
        mallopt(ctypes.c_int(-1), ctypes.c_int(2**30))  # M_TRIM_THRESHOLD


def _timed_protocol(read_seconds: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP/1.1 with a limit on the time from the first byte of a connection or request to its last.

    uvicorn itself closes idle connections only between requests, so clients that send a byte now and then would hold
    theirs for ever. The application refuses slow bodies with a message of its own, a little earlier.
    """

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(read_seconds + 1, self.transport.abort)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return TimedProtocol
