"""The reward function of verl.

From verl 0.7.1 on, also in 0.9: one sample per call, many calls at a time (`compute_score`)::

    reward.custom_reward_function.path=pkg://polar.rft.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.address=127.0.0.1:30000

and `compute_score_batch` for verl 0.5 to 0.7.0, whose reward manager is "batch". Settings in reward_kwargs or in the
environment are those of `polar.rft.reward.Settings`. The data are those of `polar rft-data`: the prompt is read from
extra_info, the references from extra_info["references"], extra_info["reference"] or the ground truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from polar.core.errors import InputError
from polar.data.fields import describe, json_object
from polar.rft.reward import Sample, Scored, read_sample, reward_for


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | str | None = None,
    *,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **settings: Any,
) -> dict[str, float]:
    """Return the reward of one sample; concurrent calls share requests.

    Args:
        data_source: The data set, for messages.
        solution_str: Text of the policy, without special tokens.
        ground_truth: The reference, if extra_info has none: a text, messages, or a list of several references.
        extra_info: Holds the prompt; an object, or one in JSON.
        reward_router_address: Of a reward model that verl runs itself; not used.
        reward_model_tokenizer: Of the same; not used.
        settings: `polar.rft.reward.Settings`.

    Returns:
        score, failed (1: it is the floor) and no_answer (1: the output was nothing but thinking), always all three,
        because verl takes the keys of a batch from its first sample.

    Raises:
        InputError: the sample or a setting is wrong.
        RewardError: the reward failed, and no floor is set.
    """
    reward = await asyncio.to_thread(reward_for, settings)  # the first one may wait for the server
    return _result(await reward.score(_sample(data_source, solution_str, ground_truth, extra_info)))


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | str | None],
    **settings: Any,
) -> list[dict[str, float]]:
    """Return the rewards of a batch, in its order; one dictionary per sample, as in `compute_score`.

    Errors as in `compute_score`; `RewardError` keeps the rewards of the other samples.
    """
    reward = reward_for(settings)
    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    return [_result(scored) for scored in reward.score_all([_sample(*row) for row in rows])]


def _sample(data_source: str, solution: str, ground_truth: Any, extra_info: Mapping[str, Any] | str | None) -> Sample:
    extra: Mapping[str, Any] | None = extra_info if isinstance(extra_info, Mapping) else json_object(extra_info or "{}")
    if extra is None:
        raise InputError(f"{data_source}: expected an object in extra_info, found {describe(extra_info)}")
    return read_sample(
        {**{f"extra_info.{name}": value for name, value in extra.items()}, "ground_truth": ground_truth},
        solution,
        prompt="extra_info.prompt",
        references=("extra_info.references", "extra_info.reference", "ground_truth"),
        source=str(data_source),
        number=extra.get("index", 0),
    )


def _result(scored: Scored) -> dict[str, float]:
    return {"score": scored.reward, "failed": float(scored.failed), "no_answer": float(not scored.answered)}
