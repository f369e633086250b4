"""Rewards of samples: thinking, references, scales, failures, and callers of all kinds."""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from polar import Comparison, InputError, Message, RewardError, Template
from polar.rft.reward import Reward, Sample, Scored, reward_for
from tests.client.fakes import Fake, Ids, Reply, reward, sigmoid
from tests.client.test_faults import free_port


def sample(output: str, *references: Any, prompt: Any = "What is the capital of China?", **more: Any) -> Sample:
    return Sample(prompt, references or ("It is Beijing.",), output, "capitals:7", **more)


@pytest.fixture
def truth(template: Template) -> Callable[..., float]:
    """What the model of the fakes says."""

    def value(output: str, reference: Any = "It is Beijing.", prompt: Any = "What is the capital of China?") -> float:
        return reward(template.encode(Comparison(prompt, reference, output)).sequences()[0])

    return value


def opened(fake: Fake, model: Path, **settings: Any) -> Reward:
    return reward_for({"address": fake.address, "model": str(model), "deadline": 5, **settings})


def scored(reward: Reward, one: Sample) -> Scored:
    """By both ways, which agree."""
    (found,) = reward.score_all([one])
    assert asyncio.run(reward.score(one)) == found
    return found


def test_a_sample_gets_the_reward_of_its_comparison(fake: Fake, served: Path, truth: Any) -> None:
    assert scored(opened(fake, served), sample("Shanghai.")) == Scored(truth("Shanghai."), failed=False, answered=True)


@pytest.mark.parametrize(
    ("thinking", "output", "answer"),
    [
        ("strip", "<think>north</think>Beijing.", "Beijing."),
        ("strip", "north</think>Beijing.", "Beijing."),
        ("strip", "<think>north or", ""),
        ("strip", "north or", "north or"),
        ("opened", "north or", ""),
        ("opened", "north</think>Beijing.", "Beijing."),
        ("keep", "<think>north</think>Beijing.", "<think>north</think>Beijing."),
        ("strip", "", ""),
    ],
)
def test_thinking_is_not_scored(fake: Fake, served: Path, truth: Any, thinking: str, output: str, answer: str) -> None:
    found = scored(opened(fake, served, thinking=thinking), sample(output))
    assert found == Scored(truth(answer), failed=False, answered=bool(answer))


def test_the_prompt_of_a_sample_may_open_its_thinking(fake: Fake, served: Path, truth: Any) -> None:
    assert scored(opened(fake, served), sample("north or", opened=True)).reward == truth("")


def test_references_lose_their_thinking_too(fake: Fake, served: Path, truth: Any) -> None:
    messages = (Message("assistant", "<think>north</think>It is Beijing."),)
    for reference in ("<think>north</think>It is Beijing.", "north</think> It is Beijing.", messages):
        assert scored(opened(fake, served), sample("Beijing.", reference)).reward == truth("Beijing.")


@pytest.mark.parametrize("reference", ["", " \n", "<think>north", "<think>north</think>", (Message("assistant", ""),)])
def test_a_reference_without_an_answer_is_an_error_also_with_a_floor(fake: Fake, served: Path, reference: Any) -> None:
    with pytest.raises(InputError, match=r"capitals:7: expected a reference with an answer"):
        opened(fake, served, floor=-20).score_all([sample("Beijing.", "It is Beijing.", reference)])


@pytest.mark.parametrize(("aggregate", "expected"), [("max", max), ("mean", lambda values: sum(values) / 3)])
def test_several_references_become_one_reward(
    fake: Fake, served: Path, truth: Any, aggregate: str, expected: Callable[[list[float]], float]
) -> None:
    references = ("It is Beijing.", "Beijing, in the north.", "北京")
    found = scored(opened(fake, served, aggregate=aggregate), sample("Beijing.", *references))
    assert found.reward == pytest.approx(expected([truth("Beijing.", reference) for reference in references]))


def test_scales_come_from_the_calibration(fake: Fake, calibrated: Path, served: Path, truth: Any) -> None:
    raw, own = truth("Shanghai."), truth("It is Beijing.")
    zscore = scored(opened(fake, calibrated, scale="zscore"), sample("Shanghai.")).reward
    assert zscore == pytest.approx((raw + 3) / 2)
    probability = scored(opened(fake, calibrated, scale="probability"), sample("Shanghai.")).reward
    assert probability == pytest.approx(1 / (1 + math.exp(-(raw - own) / 1.5)))
    with pytest.raises(InputError, match="z-scores need"):
        opened(fake, served, scale="zscore")


def test_probabilities_with_several_references_compare_with_each_of_them(
    fake: Fake, calibrated: Path, truth: Any
) -> None:
    references = ("It is Beijing.", "北京")
    found = scored(opened(fake, calibrated, scale="probability", aggregate="mean"), sample("Shanghai.", *references))
    margins = [truth("Shanghai.", reference) - truth(reference, reference) for reference in references]
    assert found.reward == pytest.approx(sum(1 / (1 + math.exp(-margin / 1.5)) for margin in margins) / 2)


def test_outputs_of_one_prompt_see_the_same_of_a_prompt_that_is_too_long(
    fake: Fake, served: Path, template: Template
) -> None:
    prompt = "numbers 1 2 3 4 5 6 7 8 9 0 " * 60
    outputs = ["4", "4 5 6 " * 30]
    opened(fake, served).score_all([sample(output, prompt=prompt) for output in outputs])
    sent = [ids for batch in fake.batches[1:] for ids in batch]
    split = template.settings.split_token_id
    first, second = ({tuple(ids[: ids.index(split)])} for ids in sent)
    assert first == second
    assert max(map(len, sent)) <= template.settings.max_length


def test_a_failure_is_an_exception_that_names_the_sample_and_keeps_the_others(
    served: Path, template: Template, truth: Any
) -> None:
    bad = template.encode(Comparison("What is the capital of China?", "It is Beijing.", "bad")).sequences()[0]

    def refuse(number: int, path: str, batch: list[Ids]) -> Reply | None:
        return Reply(400, {"detail": "no"}) if bad in batch else None

    with Fake("vllm", refuse) as fake:
        reward = opened(fake, served)
        with pytest.raises(RewardError, match=r"1 of 3 rewards failed: input 1: capitals:7: .*HTTP 400: no") as caught:
            reward.score_all([sample("a"), sample("bad"), sample("c")])
        assert caught.value.rewards == [truth("a"), None, truth("c")]
        with pytest.raises(RewardError, match=r"capitals:7: .*HTTP 400: no"):
            asyncio.run(reward.score(sample("bad")))


def test_a_floor_takes_the_place_of_a_failure_and_says_so(
    served: Path, truth: Any, caplog: pytest.LogCaptureFixture, template: Template
) -> None:
    bad = template.encode(Comparison("What is the capital of China?", "北京", "a")).sequences()[0]

    def refuse(number: int, path: str, batch: list[Ids]) -> Reply | None:
        return Reply(400, {"detail": "no"}) if bad in batch else None

    with Fake("vllm", refuse) as fake, caplog.at_level(logging.WARNING, "polar.rft"):
        reward = opened(fake, served, floor=-20)
        found = reward.score_all([sample("a", "It is Beijing.", "北京"), sample("a")])
    assert found == [Scored(-20, failed=True, answered=True), Scored(truth("a"), failed=False, answered=True)]
    assert "capitals:7: no reward, -20 (the floor) in its place: " in caplog.text


def test_nobody_there_fails_at_the_deadline(served: Path) -> None:
    reward = reward_for({"address": f"127.0.0.1:{free_port()}", "model": str(served), "deadline": 0.3})
    with pytest.raises(RewardError, match=r"capitals:7: given up at the deadline"):
        asyncio.run(reward.score(sample("a")))


def test_a_server_of_another_model_is_an_error_also_with_a_floor(served: Path) -> None:
    with Fake("vllm", model=sigmoid) as fake, pytest.raises(InputError, match="sigmoid"):
        opened(fake, served, floor=-20).score_all([sample("a")])


def test_callers_in_loops_and_threads_share_requests(fake: Fake, served: Path, truth: Any) -> None:
    """Three event loops and eight threads at a time."""
    settings = {"address": fake.address, "model": str(served), "deadline": 20}
    found: dict[int, float] = {}

    async def in_a_loop(numbers: range) -> None:
        scored = await asyncio.gather(*(reward_for(settings).score(sample(f"loop {n}")) for n in numbers))
        found.update({n: one.reward for n, one in zip(numbers, scored, strict=True)})

    def in_a_thread(n: int) -> None:
        (one,) = reward_for(settings).score_all([sample(f"loop {n}")])
        found[n] = one.reward

    loops = [threading.Thread(target=lambda k=k: asyncio.run(in_a_loop(range(k * 50, k * 50 + 50)))) for k in range(3)]
    with ThreadPoolExecutor(8) as pool:
        for loop in loops:
            loop.start()
        list(pool.map(in_a_thread, range(150, 200)))
    for loop in loops:
        loop.join()
    assert found == {n: truth(f"loop {n}") for n in range(200)}
    assert len(fake.batches) < 40


def test_a_caller_that_goes_away_harms_nobody(fake: Fake, served: Path, truth: Any) -> None:
    async def run() -> list[Any]:
        reward = opened(fake, served)
        tasks = [asyncio.create_task(reward.score(sample(f"answer {n}"))) for n in range(6)]
        await asyncio.sleep(0.002)
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(run())
    assert isinstance(found.pop(2), asyncio.CancelledError)
    assert [one.reward for one in found] == [truth(f"answer {n}") for n in (0, 1, 3, 4, 5)]


def test_settings_have_one_client_each(fake: Fake, served: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        same = set(pool.map(lambda _: opened(fake, served), range(32)))
    assert len(same) == 1
    assert opened(fake, served, aggregate="mean") not in same


def test_a_forked_process_has_its_own_client(fake: Fake, served: Path, truth: Any) -> None:
    settings = {"address": fake.address, "model": str(served), "deadline": 10}
    reward_for(settings).score_all([sample("a")])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(reward_for(settings).score_all([sample("b")])[0].reward))
    child.start()
    assert results.get(timeout=20) == truth("b")
    child.join(20)
    assert child.exitcode == 0
