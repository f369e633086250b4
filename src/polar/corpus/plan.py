"""What to sample, worked out before anything is sampled: a pure function of prompts, pool, design and seed.

A shard is a block of prompts. Its samples are numbered in the order in which its file will hold them, and grouped by
policy into batches, the unit that an engine works on and that is saved at once. As nothing here depends on what ran
before, or where, a job can be stopped, continued and spread over machines without changing the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from polar.core.errors import InputError
from polar.core.records import Message, Wrapper
from polar.corpus.engines import Request
from polar.corpus.pool import Policy, Pool, draw
from polar.corpus.prompts import Prompt

Design = Literal["paper", "grid"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How prompts meet policies."""

    pool: Pool
    design: Design = "paper"
    """"paper": two policies are drawn for every prompt, the first is sampled twice and the second once (D.1.1).
    "grid": every policy that takes the prompt is sampled `samples` times."""
    samples: int = 2
    """Samples of every policy and prompt in the grid design."""
    seed: int = 0

    def check(self, wrappers: set[Wrapper]) -> None:
        """Refuse a pool that has too few policies for the prompts.

        Raises:
            InputError: there are prompts that no policy takes, or only one where two are drawn.
        """
        for wrapper in sorted(wrappers):
            kind = "base" if wrapper == "pretrain" else "chat"
            needed, found = 2 if self.design == "paper" else 1, len(self.pool.of_kind(wrapper))
            if found < needed:
                raise InputError(
                    f"the pool has {found} {kind} policies, but there are prompts for them (wrapper {wrapper}) and the "
                    f"{self.design} design needs {needed}; add policies, or leave these prompts out"
                )

    def samples_per_prompt(self, wrapper: Wrapper) -> int:
        """How many samples a prompt gets."""
        return 3 if self.design == "paper" else self.samples * len(self.pool.of_kind(wrapper))

    def shard(self, number: int, prompts: Sequence[Prompt]) -> list[Batch]:
        """The batches of one block of prompts, in the order of the pool."""
        by_policy: dict[str, list[Item]] = {policy.name: [] for policy in self.pool.policies}
        row = 0
        for prompt in prompts:
            for policy, count in self._draw(prompt):
                for sample in range(count):
                    seed = sample_seed(self.seed, prompt, policy.name, sample)
                    by_policy[policy.name].append(Item(row, prompt, sample, seed))
                    row += 1
        batches: list[Batch] = []
        for policy in self.pool.policies:
            items, size = by_policy[policy.name], policy.engine.batch_size
            for start in range(0, len(items), size):
                batches.append(Batch(number, len(batches), policy, tuple(items[start : start + size])))
        return batches

    def _draw(self, prompt: Prompt) -> list[tuple[Policy, int]]:
        policies = self.pool.of_kind(prompt.wrapper)
        if self.design == "grid":
            return [(policy, self.samples) for policy in policies]
        first, second = draw(policies, 2, Random(f"{self.seed} {prompt.wrapper} {prompt.id}"))
        return [(first, 2), (second, 1)]


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to draw."""

    row: int
    """Its place in the shard."""
    prompt: Prompt
    sample: int
    """Which sample of this policy for this prompt."""
    seed: int

    def request(self, policy: Policy) -> Request:
        """What the engine is asked."""
        text = self.prompt.text
        if policy.kind == "base":
            assert isinstance(text, str)
            return Request(text, self.seed)
        messages = (Message("user", text),) if isinstance(text, str) else text
        system = () if policy.system is None else (Message("system", policy.system),)
        return Request((*system, *messages), self.seed)


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one policy that are drawn and saved together."""

    shard: int
    number: int
    """Within the shard."""
    policy: Policy
    items: tuple[Item, ...]


def sample_seed(seed: int, prompt: Prompt, policy: str, sample: int) -> int:
    """The seed of one sample, from 0 to 2^31 - 1 (what every engine takes)."""
    name = f"{seed}\0{prompt.wrapper}\0{prompt.id}\0{policy}\0{sample}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
