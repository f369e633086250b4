"""Where policies run: one small interface, and the engines behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from polar.core.records import Message
from polar.corpus.pool import HttpEngine, Policy, TransformersEngine


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw."""

    prompt: str | tuple[Message, ...]
    """The text that a base policy continues, or the messages that a chat policy answers."""
    seed: int
    """From 0 to 2^31 - 1; the same seed gives the same sample where the engine is deterministic."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample."""

    output: str
    finish_reason: str
    """"stop" at the policy's own end, "length" at max_tokens."""
    prompt_tokens: int | None
    """Tokens of the prompt with its chat template; None where a server does not tell."""
    output_tokens: int | None
    """Tokens of the output, with the end token if it has one."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that could not be drawn."""

    reason: str
    """One line."""


Result = Completion | Failure


class Engine(Protocol):
    """A policy that can be sampled."""

    in_flight: int
    """How many calls of `sample` may run at the same time."""

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        """One result per request, in their order. What fails for good is a `Failure`, never an exception."""

    async def close(self) -> None:
        """Free connections and memory."""


def open_engine(policy: Policy) -> Engine:
    """Connect to a policy, or load it into this process (which may take minutes and blocks).

    Raises:
        InputError: the model is missing, cannot be loaded or has no chat template though it is a chat policy.
    """
    if isinstance(policy.engine, HttpEngine):
        from polar.corpus.engines.http import HttpSampler

        return HttpSampler(policy, policy.engine)
    from polar.corpus.engines.local import TransformersSampler, VllmSampler

    if isinstance(policy.engine, TransformersEngine):
        return TransformersSampler(policy, policy.engine)
    return VllmSampler(policy, policy.engine)
