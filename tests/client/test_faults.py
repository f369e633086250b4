"""Servers that die, stall, refuse and babble: no reward is lost that could be had, none is wrong."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polar import AsyncRewardModelClient, RewardError, Template
from polar.client.engines import ServerType
from polar.client.transport import Limits
from polar.core import http
from polar.core.errors import EngineError
from tests.client import fakes
from tests.client.fakes import Fake, Ids, Reply, reward, sigmoid
from tests.client.test_client import COMPARISONS

LIMITS = Limits(concurrency=4, batch_items=8, timeout=5, deadline=10)


@pytest.fixture(scope="session")
def expected(template: Template) -> list[float]:
    return [reward(template.encode(comparison).sequences()[0]) for comparison in COMPARISONS]


def score(
    served: Path, *addresses: str, limits: Limits = LIMITS, comparisons: Any = COMPARISONS, **more: Any
) -> list[float]:
    async def run() -> list[float]:
        async with AsyncRewardModelClient(served, server_address=list(addresses), limits=limits, **more) as client:
            return await client.score(comparisons)

    return asyncio.run(run())


def script(*replies: Reply | None, then: Callable[..., Reply | None] = lambda *_: None) -> fakes.Script:
    """These replies after the probe, one after the other, then others."""

    def answer(number: int, path: str, sequences: list[Ids]) -> Reply | None:
        if number == 0:
            return None
        return replies[number - 1] if number <= len(replies) else then(number, path, sequences)

    return answer


PASSING = {
    "500": Reply(500, {"error": "out of memory"}),
    "503": Reply(503, "starting"),
    "429": Reply(429, {"detail": "queue is full"}),
    "closed": Reply(0),
    "garbage": Reply(200, b"<html>bad gateway</html>"),
    "half a body": Reply(200, b'{"data": [', cut=500),
    "null": Reply(200, b"null"),
    "another count": Reply(200, fakes.vllm([[1, 2]] * 5)),
}


@pytest.mark.parametrize("fault", list(PASSING))
def test_a_passing_fault_loses_nothing(fault: str, served: Path, expected: list[float]) -> None:
    with Fake("vllm", script(PASSING[fault], None, PASSING[fault], None, PASSING[fault])) as fake:
        assert score(served, fake.address) == expected
    assert fake.most_active <= LIMITS.concurrency


def test_retry_after_is_honoured(served: Path, expected: list[float]) -> None:
    times: list[float] = []

    def busy_once(number: int, path: str, sequences: list[Ids]) -> Reply | None:
        times.append(time.monotonic())
        return Reply(429, "later", {"retry-after": "1"}) if number == 1 else None

    with Fake("vllm", busy_once) as fake:
        assert score(served, fake.address, limits=Limits(concurrency=1)) == expected
    assert times[2] - times[1] >= 1


def test_4xx_is_never_tried_again(served: Path) -> None:
    for status in (400, 401, 403, 404, 408, 409, 422):
        reply, reason = Reply(status, {"detail": "no"}), f"1 of 1 rewards failed: input 0: .*HTTP {status}: no"
        with Fake("vllm", script(*[reply] * 9)) as fake, pytest.raises(RewardError, match=reason):
            score(served, fake.address, comparisons=COMPARISONS[:1])
        assert len(fake.batches) == 2


def test_a_refused_key_is_not_asked_again_in_halves(served: Path) -> None:
    with Fake("vllm", script(then=lambda *_: Reply(401, "no"))) as fake, pytest.raises(RewardError) as caught:
        score(served, fake.address, comparisons=COMPARISONS[:8])
    assert len(fake.batches) == 2
    assert set(caught.value.failures) == set(range(8))


def too_long_for(limit: int) -> Callable[..., Reply | None]:
    def answer(number: int, path: str, sequences: list[Ids]) -> Reply | None:
        return Reply(400, fakes.too_long(limit)) if max(map(len, sequences)) > limit else None

    return answer


def test_an_overlong_input_fails_alone_though_the_server_refuses_its_whole_batch(served: Path) -> None:
    sequences = [[1, n, 3] for n in range(5, 69)]
    for place in (0, 17, 63):
        sequences[place] = [1, *range(5, 45), place, 3]
    with Fake("vllm", script(then=too_long_for(10))) as fake, pytest.raises(RewardError) as caught:
        asyncio.run(_score_ids(served, fake.address, sequences))
    assert set(caught.value.failures) == {0, 17, 63}
    assert all("maximum context length is 10" in reason for reason in caught.value.failures.values())
    for place, value in enumerate(caught.value.rewards):
        assert value == (None if place in (0, 17, 63) else reward(sequences[place]))
    assert len(fake.batches) < 50


def test_the_search_for_bad_inputs_is_bounded(served: Path) -> None:
    sequences = [[1, n, 3] for n in range(5, 261)]
    with Fake("vllm", script(then=lambda *_: Reply(422, "all of it"))) as fake, pytest.raises(RewardError) as caught:
        asyncio.run(_score_ids(served, fake.address, sequences, Limits(batch_items=256)))
    assert len(caught.value.failures) == 256
    assert any("(in a request of" in reason for reason in caught.value.failures.values())
    assert len(fake.batches) <= 2 + 2 * 32


def test_an_input_that_breaks_the_server_fails_alone(served: Path) -> None:
    sequences = [[1, n, 3] for n in range(5, 21)]

    def breaks(number: int, path: str, batch: list[Ids]) -> Reply | None:
        return Reply(500, "reshape of 0 elements") if sequences[6] in batch else None

    with Fake("sglang", script(then=breaks)) as fake, pytest.raises(RewardError) as caught:
        asyncio.run(_score_ids(served, fake.address, sequences))
    assert set(caught.value.failures) == {6}
    assert "HTTP 500: reshape" in caught.value.failures[6]


def test_nan_and_vectors_fail_alone_even_later(served: Path) -> None:
    sequences = [[1, n, 3] for n in range(5, 13)]

    def model(ids: Ids) -> Any:
        return {5: float("nan"), 6: [0.1] * 384, 7: None}.get(ids[1], reward(ids))

    with Fake("vllm", model=model) as fake, pytest.raises(RewardError) as caught:
        asyncio.run(_score_ids(served, fake.address, sequences))
    assert {place: reason.split("answers ")[1][:8] for place, reason in caught.value.failures.items()} == {
        0: "nan",
        1: "a vector",
        2: "'None', ",
    }
    assert caught.value.rewards[3:] == [reward(ids) for ids in sequences[3:]]


def test_a_stalled_server_costs_no_more_than_the_deadline(served: Path) -> None:
    started = time.monotonic()
    with Fake("vllm", script(then=lambda *_: Reply(delay=3))) as fake, pytest.raises(RewardError) as caught:
        score(served, fake.address, limits=Limits(timeout=0.2, deadline=0.6), comparisons=COMPARISONS[:4])
    assert time.monotonic() - started < 2.5
    assert set(caught.value.failures) == {0, 1, 2, 3}
    assert "given up at the deadline" in caught.value.failures[0]


@pytest.mark.parametrize("kind", ["auto", "vllm"])
def test_a_server_that_says_nothing_is_told_while_it_is_waited_for(
    kind: ServerType, served: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection is taken, and no reply comes: to the first question, or to the first request."""
    monkeypatch.setattr(http, "SILENT_SECONDS", 0.1)
    limits = Limits(timeout=0.4, deadline=1)
    with Fake("vllm", lambda *_: Reply(delay=3)) as fake, pytest.raises(RewardError) as caught:
        score(served, fake.address, limits=limits, comparisons=COMPARISONS[:2], server_type=kind)
    server, failure = f"http://{fake.address}", "no complete reply within 0.4 s"
    assert f"given up at the deadline: {server}: no answer yet, after {server}: {failure}" in str(caught.value)
    silent, failed, *_ = caplog.messages
    assert silent == f"{server}: no reply for 0.1 s; each is waited for up to 0.4 s"
    assert failed == f"{server}: {failure}; it is tried again later"
    assert sum("no reply for" in message for message in caplog.messages) == 1


def test_a_server_that_falls_silent_is_told_at_the_first_failure(
    served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Fake("vllm", script(then=lambda *_: Reply(delay=3))) as fake, pytest.raises(RewardError):
        score(served, fake.address, limits=Limits(timeout=0.2, deadline=1), comparisons=COMPARISONS[:4])
    assert caplog.messages[0] == f"http://{fake.address}: no complete reply within 0.2 s; it is tried again later"


def test_a_stalled_server_is_left_out(served: Path, expected: list[float]) -> None:
    with Fake("vllm", script(then=lambda *_: Reply(delay=5))) as stalled, Fake("vllm") as fake:
        limits = Limits(concurrency=2, batch_items=8, timeout=0.3, deadline=20)
        assert score(served, stalled.address, fake.address, limits=limits) == expected


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_nobody_there(served: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        RewardError, match=f"2 of 2 rewards failed: input 0: given up at the deadline: http://{address}"
    ):
        score(served, address, limits=Limits(deadline=0.3), comparisons=COMPARISONS[:2])

    async def connect() -> None:
        async with AsyncRewardModelClient(served, server_address=address) as client:
            await client.connect()

    with pytest.raises(EngineError, match="no server answers"):
        asyncio.run(connect())


def test_a_dead_address_beside_a_living_one_costs_nothing(served: Path, expected: list[float]) -> None:
    with Fake("vllm") as fake:
        assert score(served, f"127.0.0.1:{free_port()}", fake.address) == expected


def test_work_is_shared_between_servers(served: Path, expected: list[float]) -> None:
    with Fake("vllm", lambda *_: Reply(delay=0.01)) as first, Fake("sglang", lambda *_: Reply(delay=0.01)) as second:
        assert score(served, first.address, second.address) == expected
    assert min(len(first.batches), len(second.batches)) > 8


def test_a_server_that_dies_in_the_middle_loses_nothing(served: Path, expected: list[float]) -> None:
    dying = Fake("vllm", lambda number, *_: Reply(delay=0.02))

    def die_soon() -> None:
        while len(dying.batches) < 6:
            time.sleep(0.005)
        dying.stop()

    with dying, Fake("vllm", lambda *_: Reply(delay=0.02)) as other:
        thread = threading.Thread(target=die_soon)
        thread.start()
        assert score(served, dying.address, other.address) == expected
        thread.join()
    assert len(other.batches) > 20


def test_a_server_that_comes_back_is_proven_again_and_used(served: Path, expected: list[float]) -> None:
    port = free_port()
    first, second = Fake("vllm", lambda *_: Reply(delay=0.02), port=port), None

    def restart() -> None:
        nonlocal second
        while len(first.batches) < 6:
            time.sleep(0.005)
        first.stop()
        second = Fake("vllm", port=port)
        second.__enter__()

    thread = threading.Thread(target=restart)
    with first:
        thread.start()
        assert score(served, first.address) == expected
        thread.join()
    assert second is not None
    second.stop()
    assert first.batches[0] in second.batches  # the probes; a request that came before them counts after them


def test_a_server_that_comes_back_as_a_liar_is_not_used(served: Path, expected: list[float]) -> None:
    port = free_port()
    first, liar = Fake("vllm", lambda *_: Reply(delay=0.02), port=port), None

    def replace() -> None:
        nonlocal liar
        while len(first.batches) < 6:
            time.sleep(0.005)
        first.stop()
        liar = Fake("vllm", model=sigmoid, port=port)
        liar.__enter__()

    thread = threading.Thread(target=replace)
    with first, Fake("vllm", lambda *_: Reply(delay=0.05)) as other:
        thread.start()
        assert score(served, first.address, other.address) == expected
        thread.join()
    assert liar is not None
    liar.stop()
    strange = [batch for batch in liar.batches if batch != first.batches[0]]
    assert len(strange) <= LIMITS.concurrency  # on their way when it came up; their answers do not count


def test_the_last_server_gone_bad_fails_what_is_left_with_the_reason(served: Path) -> None:
    """The connection breaks, and what answers afterwards is another model."""
    state = {"broken": False}

    def answer(number: int, path: str, sequences: list[Ids]) -> Reply | None:
        if number == 2:
            state["broken"] = True
            return Reply(0)
        return None

    def model(ids: Ids) -> float:
        return sigmoid(ids) if state["broken"] else reward(ids)

    with Fake("vllm", answer, model=model) as fake, pytest.raises(RewardError, match="sigmoid") as caught:
        score(served, fake.address, limits=Limits(concurrency=1, batch_items=100, deadline=10))
    assert sum(value is not None for value in caught.value.rewards) == 100


async def _score_ids(served: Path, address: str, sequences: list[Ids], limits: Limits | None = None) -> list[float]:
    async with AsyncRewardModelClient(served, server_address=address, limits=limits) as client:
        return await client.score_ids(sequences)
