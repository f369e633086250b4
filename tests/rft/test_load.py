"""A step of verl against a real server: 1,024 samples at a time, also while the server is killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from polar import Comparison, Message, RewardModel
from polar.rft.verl import compute_score
from tests.client.test_faults import free_port
from tests.serving.serving import serving

ROWS = [(f"What is {n} plus {n % 7}?", f"It is {n + n % 7}.", f"I say {n + n % 5}, of {n % 97}.") for n in range(1024)]


class Proxy:
    """Passes connections on to a server, and counts the requests that it hands over to it."""

    def __init__(self, port: int) -> None:
        self.port, self.requests = port, Counter[str]()
        self._loop = asyncio.new_event_loop()
        server = self._loop.run_until_complete(asyncio.start_server(self._pass_on, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _pass_on(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        writers = [client_out]
        with contextlib.suppress(OSError):
            server_in, server_out = await asyncio.open_connection("127.0.0.1", self.port)
            writers.append(server_out)
            ways = [self._copy(client_in, server_out, count=True), self._copy(server_in, client_out)]
            await asyncio.wait(map(asyncio.ensure_future, ways), return_when=asyncio.FIRST_COMPLETED)
        for writer in writers:
            writer.close()

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, count: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if count and data.startswith(b"POST "):  # clients write the head of a request by itself
                    self.requests[data.split(b" ", 2)[1].decode()] += 1
                target.write(data)
                await target.drain()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy(free_port())
    yield proxy
    proxy.close()


async def step(address: str, **settings: Any) -> list[dict[str, float]]:
    """All samples at once, as verl's reward workers ask."""
    return await asyncio.gather(
        *(
            compute_score(
                data_source="sums",
                solution_str=output,
                ground_truth=reference,
                extra_info={"prompt": [{"role": "user", "content": prompt}], "index": number},
                address=address,
                **settings,
            )
            for number, (prompt, reference, output) in enumerate(ROWS)
        )
    )


@pytest.mark.slow
def test_a_step_of_1024_samples_through_a_killed_and_restarted_server(proxy: Proxy) -> None:
    """In order, complete, without a default, and in few requests."""
    expected = RewardModel.load("polar-nano", device="cpu").score(
        [Comparison((Message("user", prompt),), reference, output) for prompt, reference, output in ROWS]
    )
    assert len(set(expected)) > 1000  # so that another order would be seen
    killed = threading.Event()

    def kill_and_restart() -> None:
        while proxy.requests["/classify"] < 6:  # the probes, and requests with samples
            time.sleep(0.002)
        os.kill(first.popen.pid, signal.SIGKILL)
        first.popen.wait()
        killed.set()
        restarted.enter_context(serving(port=proxy.port))

    with serving(port=proxy.port) as first, contextlib.ExitStack() as restarted:
        thread = threading.Thread(target=kill_and_restart)
        thread.start()
        found = asyncio.run(step(proxy.address, deadline=120, concurrency=4))
        thread.join()
    assert killed.is_set()
    assert [one["score"] for one in found] == pytest.approx(expected, abs=1e-4)
    assert all(one["failed"] == 0 and one["no_answer"] == 0 for one in found)
    assert 16 < proxy.requests["/classify"] <= 48  # 16 of 64, the probes twice, and what was asked again
