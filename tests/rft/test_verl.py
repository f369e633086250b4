"""The functions that verl calls, in its own shapes."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar import Comparison, InputError, Message, RewardError, Template
from polar.rft.verl import compute_score, compute_score_batch
from tests.client.fakes import Fake, Ids, Reply, reward

PROMPT = [{"role": "user", "content": "What is the capital of China?"}]
MESSAGES = (Message("user", "What is the capital of China?"),)


@pytest.fixture
def truth(template: Template) -> Any:
    def value(output: str, reference: Any = "It is Beijing.") -> float:
        return reward(template.encode(Comparison(MESSAGES, reference, output)).sequences()[0])

    return value


def score(fake: Fake, model: Path, output: str = "Shanghai.", ground_truth: Any = "It is Beijing.", **more: Any) -> Any:
    """As the naive reward manager of verl 0.9 calls it."""
    extra_info = more.pop("extra_info", {"prompt": PROMPT, "index": 7})
    settings = {"address": fake.address, "model": str(model), "deadline": 5, **more}
    return asyncio.run(
        compute_score(
            data_source="capitals",
            solution_str=output,
            ground_truth=ground_truth,
            extra_info={**extra_info, "num_turns": None, "rollout_reward_scores": {}},
            **settings,
        )
    )


def test_verl_sees_that_it_is_async() -> None:
    assert inspect.iscoroutinefunction(compute_score)
    assert not inspect.iscoroutinefunction(compute_score_batch)


def refuse(number: int, path: str, sequences: list[Ids]) -> Reply | None:
    return Reply(400, {"detail": "no"}) if len(sequences) == 1 else None  # not the probes


def test_keys_are_the_same_for_every_outcome(fake: Fake, served: Path, truth: Any) -> None:
    assert score(fake, served) == {"score": truth("Shanghai."), "failed": 0, "no_answer": 0}
    assert score(fake, served, "<think>north") == {"score": truth(""), "failed": 0, "no_answer": 1}
    with Fake("vllm", refuse) as refusing:
        assert score(refusing, served, floor=-20) == {"score": -20, "failed": 1, "no_answer": 0}
        with pytest.raises(RewardError, match="capitals:7: .*HTTP 400: no"):
            score(refusing, served)


@pytest.mark.parametrize(
    ("ground_truth", "extra", "reference"),
    [
        ("北京", {}, "北京"),
        ([{"role": "assistant", "content": "北京"}], {}, (Message("assistant", "北京"),)),
        ('[{"role": "assistant", "content": "北京"}]', {}, (Message("assistant", "北京"),)),
        ("42", {"reference": "北京"}, "北京"),
        ("42", {"reference": "43", "references": ["北京"]}, "北京"),
        ("42", {"reference": "43", "references": np.array(["北京"], dtype=object)}, "北京"),
        ("北京", {"reference": None, "references": None}, "北京"),
        (np.array([{"role": "assistant", "content": "北京"}], dtype=object), {}, (Message("assistant", "北京"),)),
    ],
)
def test_where_the_reference_is(
    fake: Fake, served: Path, truth: Any, ground_truth: Any, extra: dict[str, Any], reference: Any
) -> None:
    extra_info = {"prompt": PROMPT, "index": 7, **extra}
    found = score(fake, served, "Beijing.", ground_truth, extra_info=extra_info)
    assert found["score"] == truth("Beijing.", reference)


def test_a_list_of_ground_truths_is_several_references(fake: Fake, served: Path, truth: Any) -> None:
    references = ["It is Beijing.", "北京", "Not Shanghai."]
    best = max(truth("Beijing.", reference) for reference in references)
    for several in (references, np.array(references, dtype=object)):
        assert score(fake, served, "Beijing.", several)["score"] == best


@pytest.mark.parametrize(
    ("ground_truth", "extra", "message"),
    [
        ("北京", {"index": 7}, 'capitals:7: field "extra_info.prompt": expected a string or a list of messages'),
        (None, {"prompt": PROMPT}, "capitals:0: expected a reference in one of extra_info.references"),
        ([], {"prompt": PROMPT}, 'capitals:0: field "ground_truth"'),
        ("", {"prompt": PROMPT}, "capitals:0: expected a reference with an answer"),
        (42, {"prompt": PROMPT}, 'capitals:0: field "ground_truth": .*found the number 42'),
    ],
)
def test_a_row_without_prompt_or_reference_is_named(
    fake: Fake, served: Path, ground_truth: Any, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        score(fake, served, "Beijing.", ground_truth, extra_info=extra)


def test_extra_info_in_json(fake: Fake, served: Path, truth: Any) -> None:
    def compute(extra_info: Any) -> Any:
        settings = {"address": fake.address, "model": str(served), "deadline": 5}
        return asyncio.run(compute_score("capitals", "Shanghai.", "It is Beijing.", extra_info, **settings))

    assert compute(json.dumps({"prompt": PROMPT}))["score"] == truth("Shanghai.")
    for wrong in ("{", "[]", 3):
        with pytest.raises(InputError, match="capitals: expected an object in extra_info, found"):
            compute(wrong)


def test_what_verl_adds_for_its_own_reward_models_is_no_setting(fake: Fake, served: Path, truth: Any) -> None:
    more = {"reward_router_address": "10.0.0.1:80", "reward_model_tokenizer": object()}
    assert score(fake, served, **more)["score"] == truth("Shanghai.")


def test_a_mistyped_setting_is_an_error(fake: Fake, served: Path) -> None:
    with pytest.raises(InputError, match="reward setting adress: unknown"):
        score(fake, served, adress="a:1")


def test_a_batch_for_the_older_versions(fake: Fake, served: Path, truth: Any) -> None:
    outputs = [f"answer {n}" for n in range(200)]
    found = compute_score_batch(
        data_sources=np.array(["capitals"] * 200, dtype=object),
        solution_strs=outputs,
        ground_truths=["It is Beijing."] * 200,
        extra_infos=np.array([{"prompt": PROMPT, "index": n} for n in range(200)], dtype=object),
        address=fake.address,
        model=str(served),
    )
    assert found == [{"score": truth(output), "failed": 0, "no_answer": 0} for output in outputs]
    assert len(fake.batches) < 12
