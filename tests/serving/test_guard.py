import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import pytest
from starlette.types import Message

from polar import EncodedGroup, InputError
from polar.serving.app import create_app
from polar.serving.checkpoint import Checkpoint
from polar.serving.errors import RefusalError
from polar.serving.middleware import RequestLimits, parse_keys
from tests.serving.serving import JSON, Stalled, ask, flat, nano, post, service

BODY = {"prompt": "2+2?", "reference": "It is 4.", "candidates": ["4", "five"]}
KEYS = (b"first-key", b"second-key")
TEXT = flat("2+2?", "It is 4.", "4")[0]


async def chunks(count: int, size: int = 1 << 16, pause: float = 0) -> AsyncIterator[bytes]:
    for _ in range(count):
        await asyncio.sleep(pause)
        yield b" " * size


def test_a_thousand_concurrent_requests_on_a_queue_of_a_hundred() -> None:
    of = service(max_queue=100)
    texts = flat("How much is it?", "It is 4.", *(f"answer number {number}" for number in range(1000)))

    async def questions(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        return await asyncio.gather(*(client.post("/classify", json={"input": text}) for text in texts))

    answers = ask(questions, of)
    counts = Counter(answer.status_code for answer in answers)
    assert counts.keys() == {200, 429}
    assert counts[200] >= 100
    model = nano().model
    assert model is not None
    accepted = [number for number, answer in enumerate(answers) if answer.status_code == 200]
    group = nano().encode_inputs([texts[number] for number in accepted], "input")
    for number, (expected,) in zip(
        accepted, model.score_encoded([EncodedGroup([], [ids], []) for ids in group.branches]), strict=True
    ):
        assert answers[number].json()["data"][0]["probs"] == [pytest.approx(expected, abs=1e-5)]
    for answer in answers:
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["Retry-After"]) <= 120
            assert answer.json()["error"]["type"] == "RateLimitError"
    assert of.in_flight == 0


def test_the_refused_are_told_when_half_of_the_queue_will_be_done() -> None:
    of = service(max_queue=5)

    async def run() -> int:
        async with of.admit(1):
            await asyncio.sleep(0.2)
        of.in_flight = 100
        return of.wait()

    assert asyncio.run(run()) == pytest.approx(10, abs=3)


def test_a_request_of_many_inputs_is_accepted_whole_when_there_is_room_at_all() -> None:
    answer = post("/classify", {"input": [TEXT] * 50}, service(max_queue=1))
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 50


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_fifty_megabytes_is_refused_in_json_and_not_kept(declared: bool) -> None:
    content: Any = b" " * 50_000_000 if declared else chunks(800)
    answer = ask(lambda client: client.post("/v1/rewards", content=content, headers=JSON))
    assert answer.status_code == 413
    assert answer.json()["error"] == {
        "message": "the request is larger than 33,554,432 bytes; split it into several",
        "type": "RequestTooLargeError",
        "param": None,
        "code": 413,
    }


def test_large_bodies_at_once_are_bounded_together() -> None:
    limits = RequestLimits(body_bytes=1 << 20)

    async def questions(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        sending = (client.post("/v1/rewards", content=chunks(15, pause=0.01), headers=JSON) for _ in range(20))
        return await asyncio.gather(*sending)

    answers = ask(questions, limits=limits)
    counts = Counter(answer.status_code for answer in answers)
    assert counts.keys() == {422, 503}  # spaces are no JSON, but they have been read
    assert counts[422] >= 8
    assert ask(lambda client: client.post("/v1/rewards", json=BODY), limits=limits).status_code == 200


def test_a_body_that_does_not_arrive_in_time_is_refused() -> None:
    slow = RequestLimits(read_seconds=0.1)
    answer = ask(lambda client: client.post("/classify", content=chunks(20, 1, pause=0.05), headers=JSON), limits=slow)
    assert (answer.status_code, answer.json()["error"]["type"]) == (408, "RequestTimeoutError")


def test_a_request_is_cancelled_when_its_client_leaves() -> None:
    stalled = Stalled()
    of = stalled.service(max_queue=10)
    sent: list[Message] = []

    async def run() -> None:
        messages: list[Message] = [
            {"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            while len(messages) == 1 and not stalled.started:
                await asyncio.sleep(0.01)
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/rewards", "query_string": b"", "headers": headers}
        await create_app(of)(scope, receive, send)

    asyncio.run(run())
    assert (stalled.started, stalled.cancelled, of.in_flight, sent) == (1, 1, 0, [])


def test_while_draining_new_requests_are_refused_and_accepted_ones_are_answered() -> None:
    stalled = Stalled()
    of = stalled.service(max_queue=10)

    async def questions(client: httpx2.AsyncClient) -> list[int]:
        accepted = asyncio.create_task(client.post("/v1/rewards", json=BODY))
        while not stalled.started:
            await asyncio.sleep(0.01)
        ready = await client.get("/ready")
        of.draining = True
        states = [await client.get("/ready"), await client.post("/v1/rewards", json=BODY), await client.get("/health")]
        assert not of.idle
        stalled.free.set()
        return [ready.status_code, *(state.status_code for state in states), (await accepted).status_code]

    assert ask(questions, of) == [200, 503, 503, 200, 200]
    assert of.idle


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer first-key"}, 200),
        ({"authorization": "bearer  second-key"}, 200),
        ({"X-API-Key": "second-key"}, 200),
        ({"Authorization": "Bearer first-ke"}, 401),
        ({"Authorization": "Basic first-key"}, 401),
        ({"X-API-Key": ""}, 401),
        ({"X-API-Key": "first-key,second-key"}, 401),
        ({"X-API-Key": "schlüssel".encode()}, 401),
    ],
)
def test_a_key_is_asked_for_once_there_are_keys(headers: dict[str, Any], status: int) -> None:
    async def questions(client: httpx2.AsyncClient) -> list[int]:
        asked = [
            await client.post("/v1/rewards", json=BODY, headers=headers),
            await client.get("/metrics", headers=headers),
            await client.get("/openapi.json", headers=headers),
        ]
        opened = [await client.get(path) for path in ("/", "/health", "/ready")]
        assert [answer.status_code for answer in opened] == [200] * 3
        return [answer.status_code for answer in asked]

    assert ask(questions, keys=KEYS) == [status] * 3


def test_keys_come_from_a_variable_and_must_be_printable() -> None:
    assert parse_keys(" a-key, b-key ,,", "POLAR_API_KEYS") == (b"a-key", b"b-key")
    assert parse_keys("", "POLAR_API_KEYS") == ()
    for value in ("a,schlüssel", "a key"):
        with pytest.raises(InputError, match="POLAR_API_KEYS: key"):
            parse_keys(value, "POLAR_API_KEYS")


@pytest.mark.parametrize(
    ("keys", "key", "peer", "body", "status"),
    [
        ((), None, "127.0.0.1", None, 200),
        ((), None, "::1", {}, 200),
        ((), None, "10.0.0.7", None, 403),
        ((), None, "127.0.0.1", {"model": "/etc"}, 403),
        (KEYS, None, "127.0.0.1", None, 401),
        (KEYS, "first-key", "10.0.0.7", {"model": "polar-nano"}, 200),
        (KEYS, "first-key", "10.0.0.7", {"model": "/etc"}, 422),
    ],
)
def test_who_may_load_a_checkpoint(
    keys: tuple[bytes, ...], key: str | None, peer: str, body: object, status: int
) -> None:
    of = service()
    before = of.checkpoint
    headers = JSON | ({"X-API-Key": key} if key else {})
    answer = ask(
        lambda client: client.post("/v1/reload", content=json.dumps(body), headers=headers), of, keys=keys, peer=peer
    )
    assert answer.status_code == status
    assert (of.checkpoint is not before) == (status == 200)


def test_unknown_routes_methods_and_bodies_are_refused_in_the_same_shape() -> None:
    async def questions(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        post = client.post
        return [
            await client.get("/nowhere"),
            await client.delete("/v1/rewards"),
            await post("/v1/rewards", content=b"{", headers=JSON),
            await post("/v1/rewards", content=b"[" * 100_000, headers=JSON),
            await post("/v1/rewards", content=b'{"prompt": ' + b"9" * 5000 + b"}", headers=JSON),
            await post("/v1/rewards", content=b"\xff\xfe", headers=JSON),
            await post("/v1/rewards", content=b"null", headers=JSON),
            await post("/v1/rewards", content=json.dumps(BODY).encode()),
        ]

    answers = ask(questions)
    assert [answer.status_code for answer in answers] == [404, 405, 422, 400, 400, 422, 422, 422]
    for answer in answers:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.json()["error"]["code"] == answer.status_code


def test_a_fault_of_ours_is_answered_and_does_not_end_the_server() -> None:
    async def broken(checkpoint: Checkpoint, groups: Sequence[EncodedGroup]) -> list[list[float]]:
        raise RuntimeError("secret details")

    of = service()
    of.score = broken

    async def questions(client: httpx2.AsyncClient) -> tuple[httpx2.Response, httpx2.Response]:
        return await client.post("/v1/rewards", json=BODY), await client.get("/ready")

    answer, ready = ask(questions, of)
    assert (answer.status_code, ready.status_code) == (500, 200)
    assert "secret" not in answer.text
    assert of.in_flight == 0


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    content = json.loads(RefusalError(422, "a\nb \ud800 \x00").response().body)
    assert content["error"]["message"] == "a b \ud800 \x00"


def test_what_is_counted() -> None:
    of = service()
    long = "word " * 300

    async def questions(client: httpx2.AsyncClient) -> str:
        await client.post("/v1/rewards", json=BODY | {"candidates": ["a", long]})
        await client.post("/classify", json={"input": "x"})
        await client.get("/nowhere")
        return (await client.get("/metrics")).text

    text = ask(questions, of)
    assert "polar_rewards_total 2.0" in text
    assert "polar_truncated_total 1.0" in text
    assert 'polar_requests_total{route="/classify",status="400"} 1.0' in text
    assert 'polar_requests_total{route="other",status="404"} 1.0' in text
    assert "polar_inputs_in_flight 0.0" in text
    assert "polar_ready 1.0" in text
    assert "polar_batch_size_sum 2.0" in text
    assert 'polar_request_seconds_count{route="/v1/rewards"} 1.0' in text
