"""Wire formats: every recorded reply is read, everything that is no reward is refused with its reason."""

import asyncio
import json
import math
from typing import Any

import pytest

from polar.client.engines import ENGINES, FAMILIES, NonsenseError, ways_to_ask
from polar.core.errors import EngineError
from tests.client import fakes
from tests.client.fakes import reward

SEQUENCES = [[1, 5, 6, 3], [1, 7, 3], [1, 8, 8, 8, 3]]
REPLIES = {
    "polar": fakes.vllm,
    "vllm": fakes.vllm,
    "vllm-pooling": fakes.vllm_pooling,
    "sglang": fakes.sglang,
    "sglang-embeddings": fakes.embeddings,
    "lmdeploy": fakes.lmdeploy,
}


@pytest.mark.parametrize("name", list(ENGINES))
def test_a_reply_becomes_rewards_in_order(name: str) -> None:
    reply = json.loads(json.dumps(REPLIES[name](SEQUENCES)))
    assert ENGINES[name].read(reply, SEQUENCES) == [reward(ids) for ids in SEQUENCES]


def test_every_engine_is_asked_with_token_ids_and_for_raw_scores() -> None:
    bodies = {name: engine.body(SEQUENCES) for name, engine in ENGINES.items()}
    assert bodies["sglang"] == {"input_ids": SEQUENCES}
    assert bodies["lmdeploy"] == {"input": SEQUENCES}
    assert bodies["vllm"] == bodies["vllm-pooling"] == {"input": SEQUENCES, "use_activation": False}


def test_a_single_answer_of_sglang_is_an_object() -> None:
    reply = fakes.sglang(SEQUENCES[:1])
    assert isinstance(reply, dict)
    assert ENGINES["sglang"].read(reply, SEQUENCES[:1]) == [reward(SEQUENCES[0])]


def test_scores_of_every_token_give_the_last_one() -> None:
    reply = fakes.vllm_every_token(SEQUENCES)
    assert ENGINES["vllm-pooling"].read(reply, SEQUENCES) == [reward(ids) for ids in SEQUENCES]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (math.nan, "answers nan"),
        (math.inf, "answers inf"),
        (10**400, "answers inf"),
        (None, "'None', not a number"),
        ("0.5", "'0.5', not a number"),
        (True, "'True', not a number"),
        ([0.1] * 384, "a vector of 384 values"),
        ([[0.1] * 384] * 3, "a vector of 3 values"),
        ([[0.1], [0.2]], "a vector of 2 values"),  # scores of every token, but for another number of tokens
        ([], "a vector of 0 values"),
    ],
)
@pytest.mark.parametrize("name", ["vllm", "lmdeploy"])
def test_an_answer_that_is_no_reward_fails_alone(name: str, answer: Any, reason: str) -> None:
    reply = REPLIES[name](SEQUENCES)
    field = ENGINES[name].answer
    reply["data"][1][field] = answer if name == "lmdeploy" or isinstance(answer, list) else [answer]
    first, second, third = ENGINES[name].read(reply, SEQUENCES)
    assert (first, third) == (reward(SEQUENCES[0]), reward(SEQUENCES[2]))
    assert isinstance(second, str)
    assert reason in second


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda reply: reply["data"].pop(), "2 answers to 3 inputs"),
        (lambda reply: reply["data"].append(reply["data"][0]), "4 answers to 3 inputs"),
        (lambda reply: reply["data"].reverse(), "out of order: index 2 at place 0"),
        (lambda reply: reply["data"][0].pop("probs"), 'expected a list of items with "probs"'),
        (lambda reply: reply.update(data=None), "not an answer"),
        (lambda reply: reply.update(data=[1, 2, 3]), "not an answer"),
    ],
)
def test_a_reply_out_of_step_is_nonsense_as_a_whole(change: Any, reason: str) -> None:
    reply = fakes.vllm(SEQUENCES)
    change(reply)
    with pytest.raises(NonsenseError, match=reason):
        ENGINES["vllm"].read(reply, SEQUENCES)


@pytest.mark.parametrize("reply", [None, "fine", 3, [], {}, {"error": "no"}, [[0.5]] * 3])
def test_other_json_is_nonsense(reply: Any) -> None:
    for engine in ENGINES.values():
        with pytest.raises(NonsenseError):
            engine.read(reply, SEQUENCES)


def ways(server_type: Any, pages: dict[str, Any]) -> Any:
    async def get(path: str) -> Any:
        return pages.get(path)

    return asyncio.run(ways_to_ask(server_type, get))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_server_says_what_it_is(family: str) -> None:
    assert ways("auto", {"/v1/models": {"data": [{"id": "x", "owned_by": family}]}}) == FAMILIES[family]


def test_a_server_that_does_not_say_is_known_by_its_routes() -> None:
    proxy = {"/v1/models": {"data": [{"id": "x", "owned_by": "somebody"}]}}
    assert ways("auto", {**proxy, "/get_model_info": {"is_generation": False}}) == FAMILIES["sglang"]
    assert ways("auto", {**proxy, "/version": {"version": "0.32.0"}}) == FAMILIES["vllm"]
    with pytest.raises(EngineError, match="give its type: polar, vllm"):
        ways("auto", proxy)
    assert ways("lmdeploy", {}) == [ENGINES["lmdeploy"]]
