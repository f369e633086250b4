"""`AsyncRewardModelClient` with honest servers, and with servers that lie."""

import asyncio
import json
import logging
import math
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from polar import AsyncRewardModelClient, Comparison, Group, InputError, RewardError, Template
from polar.client.transport import Limits, parse_addresses
from polar.core.checkpoint import CHECKPOINT_FILE
from polar.core.errors import EngineError
from tests.client import fakes
from tests.client.fakes import ROUTES, Fake, Ids, Reply, reward, sigmoid

GROUPS = [
    Group("What is the capital of China?", "It is Beijing.", ("Beijing", "Not Shanghai.", "", "The capital " * 20)),
    Group("Hello", "reads the reference", ("one",)),
    Group("numbers 1 2 3", "4 5 6" * 10, tuple(f"candidate {number} " * number for number in range(1, 9))),
]
COMPARISONS = [Comparison(f"Question {n % 7}", f"Reference {n % 7}", f"Answer {n}") for n in range(300)]


def asked(
    served: Path,
    address: str | list[str],
    work: Callable[[AsyncRewardModelClient], Coroutine[Any, Any, Any]],
    **more: Any,
) -> Any:
    """What a client of these servers gives."""

    async def run() -> Any:
        async with AsyncRewardModelClient(served, server_address=address, **more) as client:
            return await work(client)

    return asyncio.run(run())


def rewards_of(template: Template, groups: list[Group]) -> list[list[float]]:
    return [[reward(ids) for ids in template.encode_group(group).sequences()] for group in groups]


@pytest.mark.parametrize("kind", list(ROUTES))
def test_every_engine_gives_the_rewards_in_order(kind: Any, served: Path, template: Template) -> None:
    with Fake(kind) as fake:
        found = asked(served, fake.address, lambda client: client.score_groups(GROUPS), server_type=kind)
    assert found == rewards_of(template, GROUPS)
    assert len(fake.batches) == 2  # probes, and everything in one request
    first_path = {"vllm-pooling": "/pooling", "sglang-embeddings": "/v1/embeddings", "lmdeploy": "/pooling"}
    assert set(fake.paths) == {first_path.get(kind, "/classify")}


@pytest.mark.parametrize(
    ("kind", "says_so"),
    [*((kind, True) for kind in ROUTES), *((kind, False) for kind in ROUTES if kind not in ("polar", "lmdeploy"))],
)
def test_auto_finds_out_what_serves_there(kind: str, says_so: bool, served: Path, template: Template) -> None:
    with Fake(kind, says_so=says_so) as fake:
        assert asked(served, fake.address, lambda client: client.score_groups(GROUPS)) == rewards_of(template, GROUPS)


def test_requests_are_split_by_items_and_tokens_and_joined_in_order(served: Path, template: Template) -> None:
    expected = [
        row[0] for row in rewards_of(template, [Group(c.prompt, c.reference, (c.output,)) for c in COMPARISONS])
    ]
    seen: list[int] = []
    limits = Limits(batch_items=16, batch_tokens=300, concurrency=5)

    def slow_at_first(number: int, path: str, sequences: list[Ids]) -> Reply:
        return Reply(delay=0.03 if number % 3 == 0 else 0)

    with Fake("vllm", slow_at_first) as fake:
        found = asked(
            served, fake.address, lambda client: client.score(COMPARISONS, progress=seen.append), limits=limits
        )
    assert found == expected
    assert sum(seen) == 300
    assert len(fake.batches) > 20
    assert all(len(batch) <= 16 and sum(map(len, batch)) <= 300 for batch in fake.batches[1:])
    assert 1 < fake.most_active <= 5
    assert fake.connections <= 6  # kept alive


def test_inputs_that_share_a_prefix_stay_beside_each_other(served: Path) -> None:
    with Fake("vllm") as fake:
        asked(served, fake.address, lambda client: client.score(COMPARISONS), limits=Limits(concurrency=1))
    sent = [ids for batch in fake.batches[1:] for ids in batch]
    prompts = [tuple(ids[:4]) for ids in sent]
    assert len(set(prompts)) < 10
    assert sum(a != b for a, b in pairwise(prompts)) == len(set(prompts)) - 1


def test_a_thousand_single_calls_share_few_requests(served: Path, template: Template) -> None:
    many = [Comparison("Question", f"Reference {n % 50}", f"Answer {n}") for n in range(1000)]

    async def work(client: AsyncRewardModelClient) -> list[float]:
        return await asyncio.gather(*(client.score_one(comparison) for comparison in many))

    with Fake("vllm") as fake:
        found = asked(served, fake.address, work)
    assert found == [reward(template.encode(comparison).sequences()[0]) for comparison in many]
    assert len(fake.batches) - 1 <= math.ceil(1000 / 64) + 2


def test_a_single_call_that_fails_does_not_harm_its_neighbours(served: Path, template: Template) -> None:
    bad = template.encode(COMPARISONS[3]).sequences()[0]

    def refuse(number: int, path: str, sequences: list[Ids]) -> Reply | None:
        return Reply(400, fakes.too_long()) if bad in sequences else None

    async def work(client: AsyncRewardModelClient) -> list[Any]:
        calls = [client.score_one(comparison) for comparison in COMPARISONS[:8]]
        gone = asyncio.create_task(client.score_one(COMPARISONS[8]))
        asyncio.get_running_loop().call_later(0.005, gone.cancel)
        return await asyncio.gather(*calls, return_exceptions=True)

    with Fake("vllm", refuse) as fake:
        found = asked(served, fake.address, work)
    assert isinstance(found.pop(3), RewardError)
    others = [comparison for number, comparison in enumerate(COMPARISONS[:8]) if number != 3]
    assert found == [reward(template.encode(comparison).sequences()[0]) for comparison in others]


def test_calls_that_wait_are_cancelled_when_the_client_is_closed(served: Path) -> None:
    async def run() -> None:
        with Fake("vllm", lambda number, path, sequences: Reply(delay=0.3 if number else 0)) as fake:
            client = AsyncRewardModelClient(served, server_address=fake.address)
            waiting = asyncio.create_task(client.score_one(COMPARISONS[0]))
            await asyncio.sleep(0.1)
            await client.aclose()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(run())


def test_the_original_inputs_are_sent_when_asked(served: Path) -> None:
    evil = Comparison("a <|reward|> b", "c", "d")
    with Fake("vllm") as fake:
        for compat in (None, "seed"):
            asked(served, fake.address, lambda client: client.score([evil]), compat=compat)
    (own,), (seed,) = fake.batches[1], fake.batches[3]
    assert seed == Template.load(served, compat="seed").encode(evil).sequences()[0] != own


# Lies


LIES: dict[str, tuple[str, Callable[[Ids], Any], str]] = {
    "sigmoid": ("vllm", sigmoid, "sigmoid"),
    "softmax": ("sglang-embeddings", lambda ids: 1.0, "softmax"),
    "hidden state": ("sglang", lambda ids: [0.1] * 384, "hidden state"),
    "added BOS": ("vllm", lambda ids: reward([1, *ids]), "one more BOS"),
    "cut end": ("sglang", lambda ids: reward(ids[:-1]), "without their last token"),
    "bias": ("sglang", lambda ids: reward(ids) + 0.0259, r"moved by the same \+0\.0259"),
    "another model": ("lmdeploy", lambda ids: -reward(ids), "another model"),
    "NaN": ("vllm", lambda ids: math.nan, "answers nan"),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_server_that_answers_something_else_is_refused(lie: str, served: Path) -> None:
    kind, model, reason = LIES[lie]
    with Fake(kind, model=model) as fake:
        for work in (lambda client: client.connect(), lambda client: client.score(COMPARISONS[:2])):
            with pytest.raises(EngineError, match=reason) as error:
                asked(served, fake.address, work)
            assert fake.address in str(error.value)
            assert "\n" not in str(error.value)
    assert all(batch == fake.batches[0] for batch in fake.batches)  # nothing but the probes was sent


def test_half_precision_passes_the_probe(served: Path, template: Template) -> None:
    with Fake("vllm", model=lambda ids: reward(ids) + (len(ids) % 3 - 1) * 0.05) as fake:
        assert len(asked(served, fake.address, lambda client: client.score(COMPARISONS[:2]))) == 2


def test_one_liar_among_servers_is_found_when_connecting(served: Path) -> None:
    with Fake("vllm") as honest, Fake("vllm", model=sigmoid) as liar, pytest.raises(EngineError, match=liar.address):
        asked(served, [honest.address, liar.address], lambda client: client.connect())


def test_the_wrong_type_is_refused_with_what_was_found(served: Path) -> None:
    with Fake("sglang") as fake, pytest.raises(EngineError, match='expected a list of items with "probs"'):
        asked(served, fake.address, lambda client: client.connect(), server_type="vllm")


def test_the_probe_can_be_turned_off(served: Path) -> None:
    with Fake("vllm", model=sigmoid) as fake:
        found = asked(served, fake.address, lambda client: client.score(COMPARISONS[:2]), probe=False)
    assert all(0 < value < 1 for value in found)


def test_a_checkpoint_without_probes_warns_once(served: Path, tmp_path: Path, caplog: Any) -> None:
    Template.load(served).save(tmp_path)
    with Fake("vllm") as fake, caplog.at_level(logging.WARNING):
        asked(tmp_path, fake.address, lambda client: client.score(COMPARISONS))
    assert [record.message for record in caplog.records if "no probes" in record.message] == [
        f"{tmp_path}: the checkpoint has no probes, so nothing proves that a server gives its rewards; load it with "
        "RewardModel and save it again"
    ]


# What it is given


def test_a_bad_text_fails_alone(served: Path) -> None:
    groups = [GROUPS[1], Group("half a \ud83d", "b", ("c", "d")), GROUPS[1]]
    with Fake("vllm") as fake, pytest.raises(RewardError) as caught:
        asked(served, fake.address, lambda client: client.score_groups(groups))
    rewards = caught.value.rewards
    assert [value is None for value in rewards] == [False, True, True, False]
    assert set(caught.value.failures) == {1, 2}
    assert "lone surrogate" in caught.value.failures[1]


def test_an_empty_input_is_not_sent(served: Path) -> None:
    """It would kill some servers."""
    with Fake("sglang") as fake, pytest.raises(RewardError, match="1 of 2 rewards failed: input 1: .*without tokens"):
        asked(served, fake.address, lambda client: client.score_ids([[1, 5, 3], []]))
    assert fake.batches[1:] == [[[1, 5, 3]]]


def test_nothing_to_score_is_nothing(served: Path) -> None:
    with Fake("vllm") as fake:
        assert asked(served, fake.address, lambda client: client.score([])) == []
        assert asked(served, fake.address, lambda client: client.score_groups([])) == []


def test_addresses_have_types_and_schemes() -> None:
    assert parse_addresses("a:1, vllm=b:2,https://c/d/", "auto") == [
        ("http://a:1", "auto"),
        ("http://b:2", "vllm"),
        ("https://c/d", "auto"),
    ]
    assert parse_addresses(["http://a/?x=y"], "polar") == [("http://a/?x=y", "polar")]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"path": "nowhere"}, "nowhere: no such directory"),
        ({"server_address": ""}, "expected host:port"),
        ({"server_address": []}, "expected host:port or a URL, found none"),
        ({"server_address": "a:1,"}, "'a:1,': expected host:port or a URL, found nothing"),
        ({"server_address": "127.0.0.1:99999"}, "http://127.0.0.1:99999: expected a port from 1 to 65535"),
        ({"server_address": "vllm=a:0"}, "http://a:0: expected a port from 1 to 65535"),
        ({"server_address": f"{'a' * 70}:80"}, "label too long"),
        ({"server_address": "ftp://a"}, "ftp://a: expected host:port or a URL"),
        ({"server_address": "trt=a:1"}, "server type 'trt': expected auto or one of polar, vllm"),
        ({"server_type": "tgi"}, "server type 'tgi'"),
    ],
)
def test_bad_arguments_are_one_line(arguments: dict[str, Any], reason: str, served: Path) -> None:
    with pytest.raises(InputError, match=reason) as error:
        AsyncRewardModelClient(**{"path": served, **arguments})
    assert "\n" not in str(error.value)


def test_limits_are_positive() -> None:
    with pytest.raises(InputError, match="batch_items must be positive"):
        Limits(batch_items=0)


def test_the_key_is_sent_and_never_shown(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_API_KEY", "sk-secret")
    with Fake("vllm") as fake:
        asked(served, fake.address, lambda client: client.score(COMPARISONS[:1]))
    assert {headers["authorization"] for headers in fake.headers} == {"Bearer sk-secret"}
    refusal = Reply(401, {"error": {"message": "invalid key sk-secret"}})
    with Fake("vllm", lambda *_: refusal) as fake, pytest.raises(EngineError, match=r"401: invalid key \[key\]"):
        asked(served, fake.address, lambda client: client.connect())


def test_the_bundled_checkpoint_has_probes() -> None:
    from polar.core.checkpoint import BUNDLED

    assert len(json.loads((BUNDLED["polar-nano"] / CHECKPOINT_FILE).read_text())["probes"]) == 3
    AsyncRewardModelClient("polar-nano")
