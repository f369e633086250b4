"""The real OpenRLHF and ms-swift call our rewards with their own code; `make test-frameworks` runs these."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import polar.rft.openrlhf
from polar import Comparison, Message, RewardModel
from polar.core.checkpoint import BUNDLED
from polar.data.record_rows import label_of
from tests.serving.serving import Process, serving

pytestmark = pytest.mark.slow
needs_openrlhf = pytest.mark.skipif(
    not importlib.util.find_spec("openrlhf"), reason="OpenRLHF is not installed here: make test-frameworks"
)
needs_swift = pytest.mark.skipif(
    not importlib.util.find_spec("swift"), reason="ms-swift is not installed here: make test-frameworks"
)

QUESTION = "What is the capital of China?"
PROMPT = f"user\n{QUESTION}\nassistant\n"
OUTPUTS = ["It is Beijing.", "It is Shanghai.", "<think>north</think>Beijing."]
ANSWERS = ["It is Beijing.", "It is Shanghai.", "Beijing."]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with serving() as process:
        yield process


def expected(prompt: Any, answers: list[str], reference: str = "Beijing.") -> Any:
    rewards = RewardModel.load("polar-nano", device="cpu").score(
        [Comparison(prompt, reference, answer) for answer in answers]
    )
    return pytest.approx(rewards, abs=1e-4)


def rollout(output: str, label: str, remote_rm_url: Any) -> Any:
    """One rollout of OpenRLHF's own executor, with an engine that has its answer ready, as a sample for its trainer."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(BUNDLED["polar-nano"] / "tokenizer.json"))
    answer = tokenizer.encode(output, add_special_tokens=False)

    class Engine:
        async def generate(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer, finish_reason="stop", logprobs=None)])

    params = SimpleNamespace(max_tokens=64, logprobs=None)
    return asyncio.run(SingleTurnAgentExecutor(remote_rm_url).execute(PROMPT, label, params, 512, tokenizer, Engine()))


def as_experience(response: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What its trainer makes of a rollout; vLLM, which the module imports, is not needed for that."""
    for name in ("vllm", "openrlhf.trainer.ray.vllm_engine"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    return SamplesGenerator.__new__(SamplesGenerator)._process_response_into_experience(response, max_len=512)


@needs_openrlhf
def test_openrlhf_loads_the_function_from_its_file(server: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_REWARD_ADDRESS", server.url)
    label = label_of([{"role": "user", "content": QUESTION}], ["Beijing."])
    samples = [as_experience(rollout(output, label, polar.rft.openrlhf.__file__), monkeypatch) for output in OUTPUTS]
    assert torch.cat([sample.rewards for sample in samples]).tolist() == expected((Message("user", QUESTION),), ANSWERS)
    assert all(sample.rewards.shape == sample.scores.shape == (1,) for sample in samples)
    assert [sample.info["failed"].item() for sample in samples] == [0, 0, 0]


@needs_openrlhf
def test_openrlhf_asks_the_route_of_the_server(server: Process) -> None:
    for output in OUTPUTS[:2]:
        response = rollout(output, "Beijing.", [f"{server.url}/get_reward"])
        assert response["reward"] == response["scores"] == expected(PROMPT, [output])
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    executor = SingleTurnAgentExecutor([f"{server.url}/get_reward"] * 3)
    queries = [PROMPT + output for output in OUTPUTS[:2]]
    shards = asyncio.run(executor._fetch_rewards_via_http(queries, [PROMPT] * 2, ["Beijing."] * 2))
    assert [reward for shard in shards for reward in shard["rewards"]] == expected(PROMPT, OUTPUTS[:2])


@needs_openrlhf
def test_a_failure_leaves_no_reward_in_openrlhf(monkeypatch: pytest.MonkeyPatch) -> None:
    """It swallows the exception; what matters is that nothing stands in its place."""
    monkeypatch.setenv("POLAR_REWARD_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("POLAR_REWARD_MODEL", "polar-nano")
    monkeypatch.setenv("POLAR_REWARD_DEADLINE", "0.5")
    response = rollout(OUTPUTS[0], "Beijing.", polar.rft.openrlhf.__file__)
    assert response["reward"] is None
    monkeypatch.setenv("POLAR_REWARD_FLOOR", "-20")
    sample = as_experience(rollout(OUTPUTS[0], "Beijing.", polar.rft.openrlhf.__file__), monkeypatch)
    assert (sample.rewards.tolist(), sample.info["failed"].tolist()) == ([-20], [1])


@needs_swift
def test_swift_calls_the_reward_on_its_samples(server: Process, tmp_path: Path, monkeypatch: Any) -> None:
    """The plugin of the documentation, loaded and called by ms-swift's own code."""
    monkeypatch.setenv("POLAR_REWARD_ADDRESS", server.url)
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from swift.rewards import orms\nfrom polar.rft.swift import PolarReward\norms['polar'] = PolarReward\n"
    )
    from swift.rewards import orms
    from swift.rl_core.data import GRPOSample
    from swift.rl_core.grpo_algorithm import compute_rewards_per_func
    from swift.utils import import_external_file

    import_external_file(str(plugin))
    messages = [[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": output}] for output in OUTPUTS]
    samples = [GRPOSample.from_row({"messages": each, "solution": "Beijing."}) for each in messages]
    found = compute_rewards_per_func(samples, [orms["polar"](args=None)], [None], torch.device("cpu"))
    assert found[:, 0].tolist() == expected((Message("user", QUESTION),), ANSWERS)
