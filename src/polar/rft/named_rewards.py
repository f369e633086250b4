"""The rewards that `polar rft` knows by name, and the verifier, all as TRL calls reward functions."""

from __future__ import annotations

import re
from typing import Any

from polar.core.errors import InputError
from polar.core.references import aggregated, groups_of
from polar.core.text import strip_thinking
from polar.rft.config import RftConfig
from polar.rft.sample import Thinking, as_scored
from polar.rft.trl import RewardFunction, output_of, polar_reward, samples_of

ADDRESS = re.compile(r"https?://.+|[\w.-]+:\d+(,.+)?")
"""host:port or a URL, or several of them."""


def named_reward(config: RftConfig, thinking: Thinking = "strip") -> RewardFunction:
    """The reward that the settings name.

    Args:
        config: The settings.
        thinking: "opened" if the chat template of the policy opens the block of thinking.

    Raises:
        InputError: there is no such checkpoint, or a package is missing.
    """
    if config.reward == "exact":
        return verifier(config.answer_pattern, thinking)
    if config.reward == "rouge-l":
        return rouge_l_reward(config, thinking)
    served = ADDRESS.fullmatch(config.reward)
    return polar_reward(
        config.served_checkpoint if served else config.reward,
        server_address=config.reward if served else None,
        scale=config.scale,
        aggregate=config.aggregate,
        thinking=thinking,
    )


def rouge_l_reward(config: RftConfig, thinking: Thinking = "strip") -> RewardFunction:
    """ROUGE-L F1 of a completion with its references, 0 to 1: a baseline.

    Raises:
        InputError: rapidfuzz is not installed.
    """
    try:
        import rapidfuzz  # noqa: F401
    except ImportError as error:
        raise InputError("the reward rouge-l needs rapidfuzz: pip install 'polar-rm[eval]'") from error
    from polar.evaluation.baselines import rouge_l

    def rouge(**batch: Any) -> list[float]:
        rewards = []
        for sample in (as_scored(sample, thinking) for sample in samples_of(batch)):
            groups = groups_of(sample.prompt, sample.references, (sample.output,))
            rewards += aggregated([rouge_l(group) for group in groups], config.aggregate)
        return rewards

    return rouge


def verifier(pattern: str, thinking: Thinking = "strip") -> RewardFunction:
    """1 where the last match of the pattern in the answer of a completion is the wanted answer, else 0."""
    compiled = re.compile(pattern)

    def verifier(completions: list[Any], answer: list[str], **batch: Any) -> list[float]:
        texts = [str(output_of(completion, number)) for number, completion in enumerate(completions)]
        outputs = [str(strip_thinking(text, opened=thinking == "opened")) for text in texts]
        return [float(extracted(compiled, output) == wanted) for output, wanted in zip(outputs, answer, strict=True)]

    return verifier


def extracted(pattern: re.Pattern[str], output: str) -> str | None:
    """The last match in an output, of its first group if the pattern has one; None if there is none."""
    found = None
    for match in pattern.finditer(output):
        found = match[1] if pattern.groups else match[0]
    return found
