"""`HttpSampler` against a server that misbehaves on purpose."""

import asyncio
import logging
import math
import re
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from pydantic import ValidationError

from polar.core import http
from polar.core.errors import InputError
from polar.core.records import Message
from polar.corpus.engines import Completion, Failure, Request, Result
from polar.corpus.engines.http import HttpSampler
from polar.corpus.pool import HttpEngine, Policy
from tests.servers import Reply, Script, Server

KEY = "sk-not-for-anybody-else"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(http, "LONGEST_PAUSE_SECONDS", 0.01)


def policy(url: str, kind: str = "base", **settings: Any) -> Policy:
    decoding = settings.pop("decoding", {})
    engine = {"type": "http", "base_url": url, "model": "tiny", "timeout": 5, "deadline": 5, **settings}
    return Policy.model_validate({"name": "far", "kind": kind, "engine": engine, "decoding": decoding})


def sampler(url: str, **settings: Any) -> HttpSampler:
    far = policy(url, **settings)
    assert isinstance(far.engine, HttpEngine)
    return HttpSampler(far, far.engine)


def numbered(count: int) -> list[Request]:
    return [Request(f"text {number}", number) for number in range(count)]


def draw(script: Script, requests: Sequence[Request], **settings: Any) -> tuple[list[Result], Server]:
    """Sample the requests as one batch, from a server with this script."""

    async def run(server: Server) -> list[Result]:
        engine = sampler(server.url, **settings)
        results = await engine.sample(requests)
        await engine.close()
        return results

    with Server(script) as server:
        return asyncio.run(run(server)), server


def completion(text: object = "fine", finish_reason: object = "stop", **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    return {"choices": [{"text": text, "finish_reason": finish_reason}], "usage": usage, **more}


def answer(finish_reason: str = "stop", **message: object) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish_reason}]}


def echo(number: int, body: dict[str, Any]) -> Reply:
    return Reply(body=completion(f"after {body['prompt']}"))


FINE = Completion("fine", "stop", 3, 5)


# What is asked, and what comes back


def test_a_base_policy_continues_a_text() -> None:
    results, server = draw(lambda n, body: Reply(body=completion()), [Request("Once", 7)], decoding={"max_tokens": 9})
    assert results == [FINE]
    assert server.paths == ["/v1/completions"]
    sampling = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 9, "seed": 7}
    assert server.bodies == [{"model": "tiny", "prompt": "Once", **sampling}]


def test_a_chat_policy_answers_messages() -> None:
    prompt = (Message("system", "Be brief."), Message("user", "Hi"))
    results, server = draw(lambda n, body: Reply(body=answer(content="Ho")), [Request(prompt, 7)], kind="chat")
    assert results == [Completion("Ho", "stop", None, None)]
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_what_is_none_is_not_sent_and_extra_fields_replace_others() -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 8, "chat_template_kwargs": {"enable_thinking": False}}
    _, server = draw(echo, numbered(1), decoding={"top_k": None}, extra_body=extra)
    assert not {"top_k", "max_tokens"} & server.bodies[0].keys()
    assert server.bodies[0]["max_completion_tokens"] == 8
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_results_stay_in_the_order_of_the_requests() -> None:
    def last_first(number: int, body: dict[str, Any]) -> Reply:
        return Reply(body=completion(f"after {body['prompt']}"), delay=0.01 * (8 - body["seed"]))

    results, _ = draw(last_first, numbered(8))
    assert [result.output for result in results if isinstance(result, Completion)] == [
        f"after text {number}" for number in range(8)
    ]


def test_the_limit_of_requests_in_flight_holds_over_all_batches() -> None:
    async def run(server: Server) -> None:
        engine = sampler(server.url, concurrency=5, batch_size=3)
        assert engine.in_flight == math.ceil(5 / 3) + 1
        batches = [engine.sample(numbered(6)) for _ in range(4)]
        assert all(result == FINE for batch in await asyncio.gather(*batches) for result in batch)
        await engine.close()

    with Server(lambda n, body: Reply(body=completion(), delay=0.1)) as server:
        asyncio.run(run(server))
    assert server.most_active == 5


def test_connections_are_used_again() -> None:
    results, server = draw(echo, numbered(20), concurrency=2)
    assert not any(isinstance(result, Failure) for result in results)
    assert server.connections == 2


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (answer(content=""), Completion("", "stop", None, None)),
        (answer("length", content="half a"), Completion("half a", "length", None, None)),
        (answer("content_filter", content=None), Completion("", "content_filter", None, None)),
        (answer("length", content=None, reasoning_content="Hmm"), Completion("", "length", None, None)),
        (answer(content="Yes.", reasoning="Hmm"), Completion("Yes.", "stop", None, None)),
        ({**answer(content="a"), "usage": {"prompt_tokens": "many"}}, Completion("a", "stop", None, None)),
    ],
)
def test_odd_but_honest_answers_are_taken(reply: dict[str, Any], expected: Completion) -> None:
    results, server = draw(lambda n, body: Reply(body=reply), [Request((Message("user", "Hi"),), 1)], kind="chat")
    assert results == [expected]
    assert len(server.bodies) == 1


def test_half_characters_become_replacement_characters() -> None:
    text = b'{"choices": [{"text": "a\\ud83d b \\ud83d\\ude00 \\ude00", "finish_reason": "length"}]}'
    results, _ = draw(lambda n, body: Reply(body=text), numbered(1))
    assert results == [Completion("a� b 😀 �", "length", None, None)]


# Faults that pass


@pytest.mark.parametrize("status", [0, 408, 409, 425, 429, 500, 502, 503])
def test_a_request_is_sent_again_as_it_was_after_a_passing_fault(status: int) -> None:
    replies = [Reply(status, "busy"), Reply(status, "busy"), Reply(body=completion())]
    results, server = draw(lambda n, body: replies[n], [Request("Once", 7)])
    assert results == [FINE]
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[1] == server.bodies[2]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>busy</html>",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b"[]",
        b'"text"',
        {},
        {"choices": []},
        {"choices": None},
        {"choices": {"0": 1}},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"text": "no finish_reason"}]},
        {"error": {"message": "overloaded"}},
        completion(text=None),
        completion(text=5),
        completion(text=["a"]),
        completion(finish_reason=None),
        completion(finish_reason="abort"),
        completion(usage=[1]),
    ],
    ids=repr,
)
def test_a_garbled_reply_is_asked_for_again(body: Any) -> None:
    results, server = draw(lambda n, _: Reply(body=completion() if n else body), [Request("Once", 7)])
    assert results == [FINE]
    assert len(server.bodies) == 2


@pytest.mark.parametrize("message", [None, {}, {"content": None}, {"content": [{"type": "text"}]}, "hello"])
def test_a_garbled_answer_is_asked_for_again(message: object) -> None:
    garbled = {"choices": [{"message": message, "finish_reason": "stop"}]}
    requests = [Request((Message("user", "Hi"),), 1)]
    results, server = draw(lambda n, _: Reply(body=answer(content="a") if n else garbled), requests, kind="chat")
    assert results == [Completion("a", "stop", None, None)]
    assert len(server.bodies) == 2


@pytest.mark.parametrize("reply", [Reply(body=completion(), delay=60), Reply(body=completion(), trickle=0.02)])
def test_a_reply_that_stalls_or_trickles_is_cut_off_and_asked_for_again(reply: Reply) -> None:
    results, _ = draw(lambda n, _: Reply(body=completion()) if n else reply, numbered(1), timeout=0.2)
    assert results == [FINE]


def test_a_reply_of_absurd_size_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 1000)
    results, _ = draw(lambda n, _: Reply(body=b" " * 10_000_000), numbered(1), deadline=0.05)
    assert "a reply of more than 1,000 bytes" in failure(results)


@pytest.mark.parametrize(
    ("retry_after", "shortest", "longest"),
    [
        ("20", 20, 20),
        (format_datetime(datetime.now(UTC) + timedelta(seconds=250), usegmt=True), 30, 250),
        ("100000", 290, 300),  # not longer than the deadline
        ("-1", 0, 0.01),
        ("soon", 0, 0.01),
        ("nan", 0, 0.01),
        ("", 0, 0.01),
    ],
    ids=["seconds", "date", "too long", "negative", "word", "nan", "empty"],  # a date would differ between workers
)
def test_the_pause_that_a_server_asks_for_is_kept(
    retry_after: str, shortest: float, longest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def note(self: http.Endpoint, seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(http.Endpoint, "sleep", note)
    refusal = Reply(429, {"error": {"message": "slow down"}}, {"retry-after": retry_after})
    results, _ = draw(lambda n, _: Reply(body=completion()) if n else refusal, numbered(1), deadline=300)
    assert results == [FINE]
    assert len(pauses) == 1
    assert shortest <= pauses[0] <= longest


# Faults that stay


def failure(results: list[Result]) -> str:
    (result,) = results
    assert isinstance(result, Failure)
    assert len(result.reason.splitlines()) == 1
    assert len(result.reason) < 500
    named = re.fullmatch(r"http://127.0.0.1:\d+/v1/\S*completions: (.*)", result.reason)
    assert named, result.reason
    return named[1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "too\nlong  a prompt", "code": 400}}, "too long a prompt"),
        ({"error": "too long"}, "too long"),
        ({"message": "too long"}, "too long"),
        ({"detail": [{"loc": ["prompt"], "msg": "too long"}]}, '[{"loc": ["prompt"], "msg": "too long"}]'),
        (b"too " * 1000, "too too"),
        (b"", "Bad Request"),
    ],
)
def test_a_refused_request_fails_at_once_and_alone(body: Any, message: str) -> None:
    def refuse_one(number: int, request: dict[str, Any]) -> Reply:
        return Reply(400, body) if request["seed"] == 1 else Reply(body=completion())

    results, server = draw(refuse_one, numbered(4))
    refused = failure([results.pop(1)])
    assert refused.startswith("HTTP 400: ")
    assert message in refused
    assert results == [FINE] * 3
    assert len(server.bodies) == 4


@pytest.mark.parametrize("status", [401, 402, 403, 404, 308])
def test_a_refusal_that_concerns_all_requests_is_met_once(status: int) -> None:
    refusal = Reply(status, {"error": {"message": "not for you"}}, {"location": "http://elsewhere.example/v1"})
    results, server = draw(lambda n, body: refusal, numbered(9), concurrency=1)
    assert len(server.bodies) == 1
    assert "not for you" in failure(results[:1]) or "http://elsewhere.example/v1" in failure(results[:1])
    assert {failure([result]) for result in results[1:]} == {f"endpoint excluded: {failure(results[:1])}"}


def test_a_moderated_prompt_fails_alone() -> None:
    def moderate_one(number: int, body: dict[str, Any]) -> Reply:
        return Reply(403, {"error": "flagged"}) if body["seed"] == 2 else Reply(body=completion())

    results, _ = draw(moderate_one, numbered(6), concurrency=1)
    assert failure([results.pop(2)]) == "HTTP 403: flagged"
    assert results == [FINE] * 5


def test_a_refused_connection_is_told_after_the_deadline() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        engine = sampler(f"http://127.0.0.1:{unused.getsockname()[1]}/v1", deadline=0.1)
        results = asyncio.run(engine.sample(numbered(1)))
    assert failure(results).startswith("given up after 0.1 s of trying: ConnectError: ")


def test_a_silent_endpoint_is_reported_at_the_first_failure_and_not_at_every_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, server = draw(lambda n, body: Reply(503, "loading"), numbered(3), concurrency=2, deadline=0.3)
    assert len(server.bodies) > 3
    first, *others = [record.getMessage() for record in caplog.records if "gives no answers" in record.getMessage()]
    assert not others
    address = f"{server.url}/completions"
    assert first == (
        f"policy far: {address} gives no answers: HTTP 503: loading; every request is tried again for up to 0.3 s"
    )
    assert any("is not used any more" in record.getMessage() for record in caplog.records)


def test_an_endpoint_that_answers_is_not_reported_for_a_busy_moment(caplog: pytest.LogCaptureFixture) -> None:
    draw(lambda n, body: Reply(429, "busy") if n in (5, 9) else Reply(body=completion()), numbered(12), concurrency=1)
    assert "gives no answers" not in caplog.text


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(500, {"error": {"message": "out of order"}}), "HTTP 500: out of order"),
        (Reply(0), "RemoteProtocolError"),
        (Reply(body=b"garbage"), "not a completion: garbage"),
        (Reply(body={"choices": []}), 'not a completion: {"choices": []}'),
        (Reply(body=completion(), delay=60), "no complete reply within 0.3 s"),
    ],
)
def test_a_fault_that_stays_is_told_after_the_deadline(reply: Reply, reason: str) -> None:
    results, server = draw(lambda n, body: reply, numbered(1), deadline=0.5, timeout=0.3)
    assert reason in failure(results)
    assert len(server.bodies) > 1


def test_an_endpoint_that_dies_is_set_aside_for_all_further_requests() -> None:
    def dies(number: int, body: dict[str, Any]) -> Reply:
        return Reply(body=completion()) if number < 10 else Reply(503, "shutting down")

    results, server = draw(dies, numbered(500), concurrency=4, deadline=0.2)
    assert results[:6] == [FINE] * 6
    assert sum(result == FINE for result in results) == 10
    reasons = [failure([result]) for result in results if isinstance(result, Failure)]
    tried = {body["seed"] for body in server.bodies}
    assert len(tried) < 20
    assert reasons[-1] == "endpoint excluded: nothing succeeded for 0.2 s; last: HTTP 503: shutting down"
    assert reasons.count(reasons[-1]) >= 480


def test_whoever_waits_when_the_endpoint_is_set_aside_wakes_up() -> None:
    """The first request is told to wait for an hour, the second one that the key is wrong."""

    def script(number: int, body: dict[str, Any]) -> Reply:
        return Reply(429, "", {"retry-after": "3600"}) if body["seed"] == 0 else Reply(401, "bad key", delay=0.05)

    results, _ = draw(script, numbered(2), deadline=7200)
    assert failure(results[:1]) == "endpoint excluded: HTTP 401: bad key"


def test_one_prompt_that_always_fails_does_not_take_the_endpoint_down() -> None:
    def poisoned(number: int, body: dict[str, Any]) -> Reply:
        return Reply(500, "crash") if body["seed"] in (0, 7) else Reply(body=completion())

    for concurrency in (1, 4):
        results, _ = draw(poisoned, numbered(12), concurrency=concurrency, deadline=0.1)
        assert (
            failure([results.pop(7)]) == failure([results.pop(0)]) == "given up after 0.1 s of trying: HTTP 500: crash"
        )
        assert results == [FINE] * 10


# The key, and other traps


@pytest.mark.parametrize(
    "reply",
    [
        Reply(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
        Reply(400, {"error": {"message": "x" * 285 + KEY}}),  # half of it would be left by shortening
        Reply(500, f"Traceback: Authorization: Bearer {KEY}".encode()),
        Reply(body={"error": {"authorization": [f"Bearer {KEY}"]}}),
        Reply(body=b"Bearer " + KEY.encode()),
        Reply(0),
    ],
    ids=["401", "shortened", "500", "nested", "garbage", "closed"],
)
def test_the_key_is_sent_but_never_told(
    reply: Reply, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAR_KEY", f"{KEY}\n")  # as read from a file
    caplog.set_level(logging.DEBUG)
    results, server = draw(lambda n, body: reply, numbered(3), api_key_env="FAR_KEY", deadline=0.1, concurrency=1)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    told = caplog.text + repr(results)
    assert KEY[:8] not in told
    assert "HTTP Request" in told or "POST" in told  # the client did log


def test_the_key_is_not_told_with_the_target_of_a_redirection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    redirection = Reply(307, "", {"location": f"http://elsewhere.example/{KEY}"})
    results, _ = draw(lambda n, body: redirection, numbered(1), api_key_env="FAR_KEY")
    assert "http://elsewhere.example/[key]" in failure(results)
    assert KEY not in caplog.text


def test_the_key_is_not_part_of_the_sampler_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    engine = sampler("http://127.0.0.1:1/v1", api_key_env="FAR_KEY")
    assert KEY not in f"{engine!r} {engine} {engine.endpoint._http!r} {engine.endpoint._http.headers!r}"


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "a\nb", "a\x00b"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    if "\x00" not in key:
        monkeypatch.setenv("FAR_KEY", key)
    with pytest.raises(InputError, match="^environment variable FAR_KEY: expected a key") as error:
        sampler("http://127.0.0.1:1/v1", api_key_env="FAR_KEY")
    assert not key.strip() or key not in str(error.value)


def test_proxies_of_the_environment_are_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    results, _ = draw(lambda n, body: Reply(body=completion()), numbered(1))
    assert results == [FINE]


@pytest.mark.parametrize(
    ("url", "local"),
    [("http://localhost:1/v1", True), ("http://[::1]:1/v1", True), ("http://10.0.0.7/v1", False)],
)
def test_proxies_of_the_environment_are_for_other_machines(
    url: str, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert bool(sampler(url).endpoint._http._mounts) is not local


def test_an_address_with_an_impossible_port_is_the_users_mistake() -> None:
    with pytest.raises(ValidationError, match="Port"):  # which the reader of a pool makes an `InputError` of
        sampler("http://127.0.0.1:port/v1")


def test_cancelling_ends_requests_in_flight() -> None:
    async def run(server: Server) -> None:
        engine = sampler(server.url, timeout=60)
        task = asyncio.create_task(engine.sample(numbered(3)))
        while len(server.bodies) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.close()

    with Server(lambda n, body: Reply(body=completion(), delay=60)) as server:
        asyncio.run(run(server))
    assert len(server.bodies) == 3
