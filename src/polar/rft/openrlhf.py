"""The reward function of OpenRLHF.

It is given as the path of this file::

    --reward.remote_url $(python -c "import polar.rft.openrlhf as f; print(f.__file__)")
    --data.label_key label

There is no place for settings in its config, so they stand in the environment (`polar.rft.reward`); on a Ray cluster
that is the environment of the workers. The label is the reference, or what `polar rft-data --for openrlhf` writes: the
prompt without the marks of the chat template, and one or more references. OpenRLHF logs an exception of this function
and goes on without the reward, until it stops for want of it; with a floor it goes on with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar.core.errors import InputError
from polar.core.text import opens_thinking, without_end
from polar.data.record_rows import label_fields
from polar.rft.reward import reward_for
from polar.rft.sample import Sample, read_sample


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None, **_: Any
) -> dict[str, Any]:
    """Rewards of responses; calls at the same time, from any thread, share their requests.

    Args:
        queries: Prompt and response as one text, special tokens included.
        prompts: The prompts, as the chat template has rendered them.
        labels: The references (see the module), or lists of several.

    Returns:
        "rewards" and "scores": the same float32 tensor of shape (queries,); "extra_logs": failed and no_answer as such.

    Raises:
        InputError: a query does not begin with its prompt, or a label is no reference.
        RewardError: rewards could not be had, and no floor is set.
    """
    import torch

    if labels is None:
        raise InputError("OpenRLHF: expected labels, found none: name the column of the references in --data.label_key")
    reward = reward_for({})
    special = reward.template.special_tokens
    samples = [_sample(number, *row, special) for number, row in enumerate(zip(queries, prompts, labels, strict=True))]
    scored = reward.score_all(samples)
    rewards = torch.tensor([one.reward for one in scored])
    logs = {
        "failed": torch.tensor([float(one.failed) for one in scored]),
        "no_answer": torch.tensor([float(not one.answered) for one in scored]),
    }
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


def _sample(number: int, query: str, prompt: str, label: Any, special_tokens: Sequence[str]) -> Sample:
    if not query.startswith(prompt):
        raise InputError(f"OpenRLHF:{number}: expected a query that begins with its prompt, found {query[:40]!r}")
    return read_sample(
        label_fields(label) or {"prompt": prompt, "references": label},
        without_end(query.removeprefix(prompt), special_tokens),
        prompt="prompt",
        references=("references",),
        source="OpenRLHF",
        number=number,
        opened=opens_thinking(prompt),
    )
