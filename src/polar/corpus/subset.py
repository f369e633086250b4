"""A sampled subset of prompts with all their texts, for what needs texts: triples and examples to read.

Which prompts are in it depends on the corpus and the seed, never on the order of the rows.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

from polar.core.baselines import chance, first_word, length, unigram_f1
from polar.core.html import Excerpt
from polar.core.metrics import Values, clustered_mean, outcomes
from polar.core.records import Group, Trajectory, Triple, prompt_id, text_of
from polar.corpus.pair import pair
from polar.corpus.report import Contrast, Contrasts, Discrimination, Example, Feature

PROMPTS = 2_000
"""Most prompts of the subset."""
CHARACTERS = 100_000_000
"""Most characters of the subset, prompts and outputs together; this bounds its memory."""
TRIPLES = 10_000
"""Triples, about; fewer when the subset has not so many."""
FEATURES = {"length": length, "first word": first_word, "unigram F1": unigram_f1, "chance": chance}
"""What a reward could be without understanding anything."""
ENOUGH_TRIPLES, ENOUGH_PROMPTS, LISTED = 20, 10, 10
"""Policies and pairs of them are compared from so many triples of so many prompts on; most that a list has."""

EXAMPLES, POLICIES_SHOWN, OUTPUTS_SHOWN, TEXT_SHOWN = 6, 6, 2, 4_000
"""Prompts to read, policies of each, outputs of each policy, characters of each text."""


@dataclass(slots=True)
class Subset:
    """The prompts whose hash with the seed is smallest, as many as the limits allow, with all their trajectories."""

    seed: int
    prompts: dict[str, list[Trajectory]] = field(default_factory=lambda: defaultdict(list))
    """Prompt id -> trajectories."""
    characters: int = 0
    _heap: list[tuple[int, str]] = field(default_factory=list)
    """Minus the hash, prompt id: the prompt to drop next is the first."""
    _limit: int = 1 << 64
    """Smallest hash that was dropped. A dropped prompt never returns, so the subset is a prefix of all prompts in the
    order of their hashes, whatever the order of the rows."""

    def add(self, prompt: str, trajectory: Trajectory) -> None:
        """Keep a trajectory if its prompt belongs to the subset; `prompt` is the prompt's id."""
        rank = _hash(self.seed, prompt)
        if rank >= self._limit:
            return
        if prompt not in self.prompts:
            heapq.heappush(self._heap, (-rank, prompt))
        self.prompts[prompt].append(trajectory)
        self.characters += _characters(trajectory)
        while len(self.prompts) > PROMPTS or self.characters > CHARACTERS:
            rank, last = heapq.heappop(self._heap)
            self._limit = -rank
            self.characters -= sum(map(_characters, self.prompts.pop(last)))

    def discrimination(self) -> Discrimination:
        """Draw triples and let the trivial features judge them."""
        shared = {
            prompt: trajectories
            for prompt, trajectories in self.prompts.items()
            if len({trajectory.policy for trajectory in trajectories}) > 1
        }
        per_prompt = math.ceil(TRIPLES / max(1, len(shared)))
        triples = list(pair(chain.from_iterable(shared.values()), per_prompt=per_prompt, seed=self.seed))
        clusters = [prompt_id(triple.prompt) for triple in triples]
        judged = {name: _judge(triples, feature) for name, feature in FEATURES.items()}
        overlap = judged["unigram F1"]
        return Discrimination(
            prompts=len(self.prompts),
            triples=len(triples),
            features=tuple(_feature(name, values, clusters) for name, values in judged.items() if triples),
            policies=_contrasts([(str(t.policy),) for t in triples], overlap, clusters),
            pairs=_contrasts([_pair(t) for t in triples], overlap, clusters),
        )

    def examples(self) -> tuple[Example, ...]:
        """Prompts to read: those with the smallest hashes."""
        smallest = heapq.nsmallest(EXAMPLES, self.prompts, key=partial(_hash, self.seed))
        return tuple(self._example(prompt) for prompt in smallest)

    def _example(self, prompt: str) -> Example:
        outputs: dict[str, set[str]] = defaultdict(set)
        for trajectory in self.prompts[prompt]:
            outputs[trajectory.policy].add(text_of(trajectory.output))
        by_hash = partial(_hash, self.seed)
        shown = heapq.nsmallest(POLICIES_SHOWN, outputs, key=lambda policy: by_hash(prompt + policy))
        drawn = {policy: heapq.nsmallest(OUTPUTS_SHOWN, outputs[policy], key=by_hash) for policy in sorted(shown)}
        chosen = tuple((policy, tuple(map(_excerpt, texts))) for policy, texts in drawn.items())
        # One prompt may be spelt in several ways; which spelling is shown must not depend on the order of the rows.
        return Example(prompt, _excerpt(min(text_of(t.prompt) for t in self.prompts[prompt])), chosen)


def _hash(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha1(f"{seed} {name}".encode(), usedforsecurity=False).digest()[:8], "big")


def _characters(trajectory: Trajectory) -> int:
    return len(text_of(trajectory.prompt)) + len(text_of(trajectory.output))


def _excerpt(text: str) -> Excerpt:
    return Excerpt(text[:TEXT_SHOWN], len(text))


def _judge(triples: Sequence[Triple], feature: Callable[[Group], list[float]]) -> Values:
    """1 where the feature prefers the positive, 0 where the negative, one half for a tie."""
    rewards = [feature(Group(t.prompt, t.reference, (t.positive, t.negative))) for t in triples]
    return outcomes([better for better, _ in rewards], [worse for _, worse in rewards])


def _feature(name: str, values: Values, clusters: Sequence[str]) -> Feature:
    accuracy = clustered_mean(values, clusters)
    return Feature(name, accuracy, replace(accuracy, mean=accuracy.mean - 0.5).verdict())


def _pair(triple: Triple) -> tuple[str, ...]:
    return tuple(sorted((str(triple.policy), str(triple.negative_policy))))


def _contrasts(policies: Sequence[tuple[str, ...]], values: Values, clusters: Sequence[str]) -> Contrasts:
    """Compare those policies (or pairs) that have enough triples; both lists together name none twice."""
    items: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, names in enumerate(policies):
        items[names].append(number)
    contrasts = [
        Contrast(names, clustered_mean(values[numbers], [clusters[number] for number in numbers]))
        for names, numbers in items.items()
        if len(numbers) >= ENOUGH_TRIPLES and len({clusters[number] for number in numbers}) >= ENOUGH_PROMPTS
    ]
    contrasts.sort(key=lambda contrast: (contrast.accuracy.mean, contrast.policies))
    listed = min(LISTED, (len(contrasts) + 1) // 2)
    return Contrasts(len(contrasts), tuple(contrasts[:listed]), tuple(contrasts[listed:][-LISTED:][::-1]))
