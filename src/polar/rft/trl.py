"""The reward function of TRL: GRPOTrainer, RLOOTrainer, and others that call reward functions as they do (TRL 1.16).

    from polar.rft.trl import polar_reward

    trainer = GRPOTrainer(model, reward_funcs=polar_reward("path/to/reward-model"), train_dataset=dataset, args=...)

The data set has the columns prompt and reference (or references). A reference is a string, messages, or a list of
several references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polar.core.checkpoint import BUNDLED_NAME, Scale
from polar.core.errors import InputError
from polar.core.records import Aggregate, Group, Text, aggregated, groups_of
from polar.core.text import opens_thinking
from polar.data.fields import Row, as_content
from polar.model.reward_model import RewardModel
from polar.rft.reward import Reward, Sample, Settings, Thinking, as_scored, read_sample, read_settings, reward_for

RewardFunction = Callable[..., list[float]]
"""Function of prompts, completions and other columns of the data set, by keyword; one reward per completion."""

REFERENCES = ("references", "reference")


def polar_reward(
    model: str | Path | RewardModel | None = None,
    *,
    server_address: str | Sequence[str] | None = None,
    scale: Scale | None = None,
    aggregate: Aggregate | None = None,
    thinking: Thinking | None = None,
    **server: Any,
) -> RewardFunction:
    """Return a reward function that scores completions by their closeness to the references of their prompts.

    Completions that share prompt and references are scored as one group, so the shared part of their inputs is computed
    once. Scale, aggregate and thinking that are left out are looked up in the environment (`polar.rft.reward`).

    Args:
        model: A reward model or a checkpoint: a directory, a hub name, or the name of a bundled one
            (default: polar-mini). It runs in this process, unless there is a server; then the default is what that has.
        server_address: Where servers of this checkpoint listen: host:port or a URL, or several of them.
        scale: Of the rewards; see `polar.core.checkpoint.Scale`.
        aggregate: How the rewards against several references become one.
        thinking: Its treatment in completions and references (`polar.core.text`). Take "opened" if the chat
            template of the policy opens the block itself and prompts are conversations; prompts that are texts show it.
        server: Further settings of requests to a server.

    Raises:
        InputError: the checkpoint, an address or a setting is unusable. The function itself raises it when a row has no
            reference, and RewardError or FloatingPointError when a reward failed. It never returns None,
            which TRL would leave out of the batch.
    """
    score: Callable[[Sequence[Sample]], list[float]]
    given = {"scale": scale, "aggregate": aggregate, "thinking": thinking}
    if server_address is not None:
        if isinstance(model, RewardModel):
            raise InputError("server_address: name the checkpoint that is served there in place of a loaded model")
        served = None if model is None else str(model)
        score = partial(_on_server, reward_for({"address": server_address, "model": served, **given, **server}))
    else:
        if server:
            raise InputError(f"{', '.join(sorted(server))}: a setting of servers, but there is no server_address")
        settings = read_settings(given)
        local = model if isinstance(model, RewardModel) else RewardModel.load(model or BUNDLED_NAME)
        score = partial(score_locally, local, settings)

    def polar(**batch: Any) -> list[float]:  # its name is that of the reward in TRL's logs
        return score(samples_of(batch))

    return polar


def samples_of(batch: Mapping[str, Any]) -> list[Sample]:
    """Return the samples in the arguments of a reward function of TRL.

    Raises:
        InputError: a row has no reference, or a value is no text.
    """
    prompts, completions = batch["prompts"], batch["completions"]
    columns = {name: batch[name] for name in REFERENCES if name in batch}
    samples = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        fields = {"prompt": prompt, **{name: values[number] for name, values in columns.items()}}
        samples.append(
            read_sample(
                fields,
                output_of(completion, number),
                prompt="prompt",
                references=REFERENCES,
                source="completion",
                number=number,
                opened=isinstance(prompt, str) and opens_thinking(prompt),
            )
        )
    return samples


def output_of(completion: object, number: int = 0) -> object:
    """Return the text of a completion: of a conversation the assistant's lines, without its tool calls.

    Raises:
        InputError: the content of a turn is no text.
    """
    if not isinstance(completion, list):
        return completion
    row = Row("completion", number, {})
    return "\n".join(
        as_content(row, f"output[{place}].content", turn["content"])
        for place, turn in enumerate(completion)
        if turn.get("role") == "assistant" and turn.get("content")
    )


def score_locally(model: RewardModel, settings: Settings, samples: Sequence[Sample]) -> list[float]:
    """Return the rewards of samples, in their order; those with the same prompt and references are scored together.

    Only the settings scale, aggregate and thinking count here.

    Raises:
        InputError: a reference has no answer, or the checkpoint has no calibration for the scale.
        FloatingPointError: a reward is not finite.
    """
    samples = [as_scored(sample, settings.thinking) for sample in samples]
    together: dict[tuple[Text, tuple[Text, ...]], list[int]] = {}
    for number, sample in enumerate(samples):
        together.setdefault((sample.prompt, sample.references), []).append(number)
    groups: list[Group] = []
    for (prompt, references), numbers in together.items():
        groups += groups_of(prompt, references, tuple(samples[number].output for number in numbers))
    scored = iter(model.score_groups(groups, scale=settings.scale))
    rewards = [0.0] * len(samples)
    for (_, references), numbers in together.items():
        own = aggregated([next(scored) for _ in references], settings.aggregate)
        for number, value in zip(numbers, own, strict=True):
            rewards[number] = value
    return rewards


def _on_server(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    return [scored.reward for scored in reward.score_all(samples)]
