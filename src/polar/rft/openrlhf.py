"""The reward function of OpenRLHF.

It is given as the path of this file::

    --reward.remote_url $(python -c "import polar.rft.openrlhf as f; print(f.__file__)")
    --data.label_key label

Its config has no place for settings, so they are in the environment (`polar.rft.reward`); on a Ray cluster that of the
workers. The label is the reference, or the label that `polar rft-data --for openrlhf` writes: the prompt without the
marks of the chat template, and one or more references. OpenRLHF logs an exception of this function and goes on without
the reward, until it stops for lack of it; with a floor it goes on with the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar.core.errors import InputError
from polar.core.text import opens_thinking, without_end
from polar.data.record_rows import label_fields
from polar.rft.reward import Sample, read_sample, reward_for


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None, **_: Any
) -> dict[str, Any]:
    """Return the rewards of responses; concurrent calls, from any thread, share requests.

    Args:
        queries: Prompt and response as one text, special tokens included.
        prompts: The prompts, as the chat template has rendered them.
        labels: The references (see the module), or lists of several.

    Returns:
        "rewards" and "scores": the same float32 tensor of shape (queries,); "extra_logs": failed and no_answer as such.

    Raises:
        InputError: a query does not begin with its prompt, or a label is no reference.
        RewardError: a reward failed, and no floor is set.
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
