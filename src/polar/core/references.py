"""Several references for one prompt: a candidate is scored against each, and the rewards become one.

One reference is one of many good answers; with more of them a candidate need not resemble that very one. Scoring,
serving, evaluation and reinforcement fine-tuning share these rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from polar.core.records import Group, Text, Wrapper

Aggregate = Literal["max", "mean", "softmax"]
"""What becomes of the rewards of one candidate against several references.

max: the closest reference counts. mean: all count alike. softmax: between the two, the mean weighted by exp(reward), so
a reference counts more the closer the candidate is to it; on a scale with a small range it is nearly the mean.
"""

AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)


def groups_of(
    prompt: Text,
    references: Sequence[Text],
    candidates: tuple[Text, ...],
    id: str | int | None = None,
    wrapper: Wrapper = "sft",
) -> tuple[Group, ...]:
    """The candidates as one group per reference, in their order."""
    return tuple(Group(prompt, reference, candidates, id, wrapper) for reference in references)


def aggregated(rewards: Sequence[Sequence[float]], how: Aggregate) -> list[float]:
    """One reward per candidate.

    Args:
        rewards: For every reference the rewards of all candidates, as `RewardModel.score_groups` gives them for
            `groups_of`; all on the scale that is wanted in the end.
        how: See `Aggregate`.

    Raises:
        ValueError: there are no references, or they do not have the same candidates.
    """
    if not rewards:
        raise ValueError("expected the rewards against at least one reference")
    return [_AGGREGATES[how](own) for own in zip(*rewards, strict=True)]


def _mean(rewards: Sequence[float]) -> float:
    return math.fsum(rewards) / len(rewards)


def _softmax(rewards: Sequence[float]) -> float:
    highest = max(rewards)
    weights = [math.exp(reward - highest) for reward in rewards]
    return math.fsum(reward * weight for reward, weight in zip(rewards, weights, strict=True)) / math.fsum(weights)


_AGGREGATES: dict[Aggregate, Callable[[Sequence[float]], float]] = {"max": max, "mean": _mean, "softmax": _softmax}
