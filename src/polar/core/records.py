"""Records of all packages, and the aggregation of rewards against several references.

A text is either a string or a tuple of chat messages. The input format of the model joins the contents of messages
with newlines and drops the roles (`polar.core.template`), so `text_of` is all that scoring needs; the messages are kept
because other packages (sampling, reinforcement fine-tuning) need the roles.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Wrapper = Literal["sft", "pretrain"]
"""How prompt and response are joined: "sft" puts a newline between them, "pretrain" nothing (the response simply
continues the prompt, as in a pre-training document)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn."""

    role: str
    content: str


Text = str | tuple[Message, ...]


def text_of(text: Text) -> str:
    """Return the characters that the model reads: a string as it is, messages joined by newlines without roles."""
    if isinstance(text, str):
        return text
    return "\n".join(message.content for message in text)


def is_blank(text: Text) -> bool:
    """Return whether a text is only white space."""
    return not text_of(text).strip()


def prompt_id(prompt: Text) -> str:
    """Return sixteen hex digits that name a prompt, the same under another Unicode form, case or spacing.

    A plain string counts as a single user message.
    """
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    canonical = [
        [message.role, " ".join(unicodedata.normalize("NFKC", message.content).lower().split())] for message in messages
    ]
    payload = json.dumps(canonical, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.sha1(payload, usedforsecurity=False).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sampled output of one policy for one prompt."""

    prompt: Text
    policy: str
    output: Text
    sample: int = 0
    """Number of the sample of this policy for this prompt."""
    decoding: dict[str, object] = field(default_factory=dict)
    """Sampling parameters (temperature, top_p, ...), as far as they are known."""
    wrapper: Wrapper = "sft"
    """"pretrain" when the output continues the prompt as in a document."""
    family: str | None = None
    """Lineage of the policy (Llama, Qwen, ...): policies of one family make harder negatives."""
    step: int | None = None
    """Training step, if the policy is one of several checkpoints of a run."""


@dataclass(frozen=True, slots=True)
class Triple:
    """Pre-training example (paper 4.1, eq. 7): reference and positive by one policy, negative by another one."""

    prompt: Text
    reference: Text
    positive: Text
    negative: Text
    policy: str | None = None
    """The policy of reference and positive."""
    negative_policy: str | None = None
    wrapper: Wrapper = "sft"
    strategy: str | None = None
    """How the negative was chosen (`polar.corpus.pair`)."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Fine-tuning and evaluation example (paper 4.1, eq. 8): two or more answers, best first, beside a reference.

    `ranked` holds the answers from best to worst; the common pair is `(chosen, rejected)`.
    """

    prompt: Text
    reference: Text
    ranked: tuple[Text, ...]
    margin: float | None = None
    domain: str | None = None
    wrapper: Wrapper = "sft"

    @property
    def chosen(self) -> Text:
        """The best answer."""
        return self.ranked[0]

    @property
    def rejected(self) -> Text:
        """The worst answer."""
        return self.ranked[-1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One output to score against one reference."""

    prompt: Text
    reference: Text
    output: Text
    id: str | int | None = None
    wrapper: Wrapper = "sft"


@dataclass(frozen=True, slots=True)
class Group:
    """Candidates for one prompt and one reference, which share a prefix and one truncation budget."""

    prompt: Text
    reference: Text
    candidates: tuple[Text, ...]
    id: str | int | None = None
    wrapper: Wrapper = "sft"


# Several references for one prompt: a candidate is scored against each, and the rewards become one.
# One reference is one of many good answers; with more of them a candidate need not resemble that very one.

Aggregate = Literal["max", "mean", "softmax"]
"""How the rewards of one candidate against several references become one.

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
    """Return one group of all candidates per reference, in their order."""
    return tuple(Group(prompt, reference, candidates, id, wrapper) for reference in references)


def aggregated(rewards: Sequence[Sequence[float]], how: Aggregate) -> list[float]:
    """Return one reward per candidate.

    Args:
        rewards: For every reference the rewards of all candidates, as from `RewardModel.score_groups` for
            `groups_of`, on the scale of the result.
        how: See `Aggregate`.

    Raises:
        ValueError: There are no references, or they do not have the same candidates.
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
