"""The triples of one prompt: whose outputs are reference and positive, and which policies may give the negative.

Policies are drawn first and their distinct outputs second, so a policy that was sampled more often is not paired more
often. Two shortcuts let a discriminator win without comparing anything with the reference. Balance closes the first: a
policy that is more often positive than negative is recognised by its frequency. Length matching closes the second:
outputs of one policy are alike in length.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, permutations
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple, TypeVar, cast, get_args

from polar.core.baselines import length
from polar.core.errors import InputError
from polar.core.records import Group, Message, Text, Triple, Wrapper
from polar.data.fields import optional_string, string_at
from polar.data.readers import rows
from polar.data.record_rows import count_of

Rule = Literal["random", "family", "checkpoint"]
"""random: any other policy (paper 4.1). family: another policy of the same family, which is harder. checkpoint: a
policy of the same family at the next lower or next higher training step, which is hardest."""
Strategy = Rule | Literal["mixed"]
"""A rule, or for every draw one of those that are possible, at random."""
RULES: tuple[Rule, ...] = get_args(Rule)

TRIES = 50
"""Pairs of reference and positive that are tried for a negative on the side in length that is wanted."""
NEAREST_OF = 8
"""Length matching takes the nearest in length of this many policies. More would hide length hardly better, and leave
balance less to choose from."""

Option = tuple[float, str]
"""A text that may be the negative, and how far its closeness in length is from that of the positive."""
Value = TypeVar("Value", str, int)


class Sample(NamedTuple):
    """Prompt and output as they are stored; `decoded` gives them back."""

    prompt: str
    output: str


Outputs = dict[str, dict[str, Sample]]
"""Samples of one prompt: policy, text of the output, sample."""


@dataclass(frozen=True, slots=True)
class PromptOutputs:
    """All different outputs for one prompt under one wrapper."""

    prompt_id: str
    wrapper: Wrapper
    outputs: Outputs
    identical: int
    """How many more there were, with a text that the same policy gave before."""


def encoded(text: Text) -> str:
    """A text as one string: messages as JSON, which begins with "[", any other string behind an "="."""
    if isinstance(text, str):
        return f"={text}"
    return json.dumps([[message.role, message.content] for message in text], ensure_ascii=False)


def decoded(stored: str) -> Text:
    """Return the text that `encoded` made a string of."""
    if stored.startswith("="):
        return stored[1:]
    return tuple(Message(role, content) for role, content in json.loads(stored))


@dataclass(slots=True)
class PairReport:
    """Counts of `pair`; complete once the triples are consumed.

    A prompt counts once for each wrapper of its trajectories.
    """

    trajectories: int = 0
    """All that were read."""
    left_out: int = 0
    """Trajectories of policies or prompts that were not wanted."""
    identical: int = 0
    """Trajectories skipped because the same policy gave the same text for the same prompt before."""
    policies: int = 0
    policies_with_two_outputs: int = 0
    """Policies with two different outputs for at least one prompt: only they can give reference and positive."""
    prompts: int = 0
    prompts_with_one_policy: int = 0
    """No triple, because there is no other policy to take the negative from."""
    prompts_without_two_outputs: int = 0
    """No triple, because no policy has two different outputs."""
    prompts_without_rival: int = 0
    """No triple, because the strategy finds no other policy here for any policy with two different outputs."""
    prompts_without_negative: int = 0
    """No triple, because all outputs of the other policies equal the reference or the positive."""
    draws: int = 0
    """Drawn pairs of reference and positive."""
    draws_without_rival: int = 0
    """Policies with two different outputs for a prompt, for which the strategy finds no other policy there."""
    draws_without_negative: int = 0
    """The same, but all outputs of the other policies equal the reference or the positive."""
    triples: int = 0
    unknown_policies: int = 0
    """Policies that were asked for by name and never seen."""
    unknown_prompts: int = 0
    """Prompts that were asked for by id and never seen."""
    negatives_never_positive: int = 0
    """Triples whose negative is by a policy without two different outputs anywhere, which gives it away."""
    length_wins: float = 0
    """Triples in which the positive is closer in length to the reference (`polar.core.baselines`); ties one half."""
    strategies: Counter[Rule] = field(default_factory=Counter)
    """Triples of each strategy."""
    meetings: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Triples of each pair of policies, that of the positive first."""

    def positives(self) -> Counter[str]:
        """How often every policy gave the positive."""
        return self._sum(0)

    def negatives(self) -> Counter[str]:
        """How often every policy gave the negative."""
        return self._sum(1)

    def frequency_accuracy(self) -> float | None:
        """How often the policy that is positive more often, as a share of its triples, is the right one; ties one half.

        A discriminator that recognises policies and ignores the reference gets this far. None without triples.
        """
        if not self.triples:
            return None
        positives, negatives = self.positives(), self.negatives()
        share = {
            policy: positives[policy] / (positives[policy] + negatives[policy]) for policy in positives | negatives
        }
        wins = sum(
            n * ((share[good] > share[bad]) + (share[good] >= share[bad])) / 2
            for (good, bad), n in self.meetings.items()
        )
        return wins / self.triples

    def length_accuracy(self) -> float | None:
        """How often the positive is closer in length to the reference; None without triples."""
        return self.length_wins / self.triples if self.triples else None

    def _sum(self, side: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        for policies, number in self.meetings.items():
            counts[policies[side]] += number
        return counts


@dataclass(frozen=True, slots=True)
class Lineage:
    """Family and training step of a policy; None is unknown."""

    family: str | None = None
    step: int | None = None
    """Training step."""


@dataclass(slots=True)
class LineageEvidence:
    """The families and the steps that rows give to a policy: more than one of either is a contradiction."""

    families: set[str] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)

    def add(self, family: str | None, step: int | None) -> None:
        """Take note of one row."""
        if family is not None:
            self.families.add(family)
        if step is not None:
            self.steps.add(step)


def read_lineages(path: str | Path) -> dict[str, Lineage]:
    """Read a table of policies: rows with policy, family and step (either may be absent), as `data.readers` reads.

    Raises:
        InputError: For a bad row or file, or when two rows of one policy contradict each other.
    """
    evidence: dict[str, LineageEvidence] = {}
    for row in rows(path):
        seen = evidence.setdefault(string_at(row, "policy"), LineageEvidence())
        seen.add(optional_string(row, "family"), count_of(row, "step"))
    return {policy: _lineage(str(path), policy, seen, Lineage()) for policy, seen in evidence.items()}


def resolve_lineages(
    strategy: Strategy, evidence: Mapping[str, LineageEvidence], table: Mapping[str, Lineage]
) -> dict[str, Lineage]:
    """The lineage of every policy: what the table says, else what the rows say.

    Raises:
        InputError: The rows contradict each other and the table does not decide, or nothing is known that the strategy
            needs.
    """
    lineages = {
        policy: _lineage("trajectories", policy, seen, table.get(policy, Lineage()))
        for policy, seen in evidence.items()
    }
    for name in ("family",) if strategy == "family" else ("family", "step"):
        if all(getattr(lineage, name) is None for lineage in lineages.values()):
            raise InputError(
                f"strategy {strategy}: expected policies with a known {name}, found none; give the trajectories a "
                f'field "{name}", or name a table of the policies (rows with policy, family, step)'
            )
    return lineages


@dataclass(slots=True)
class PairSampler:
    """Samples the triples of one prompt after the other, and keeps what balancing and length matching need."""

    per_prompt: int | None
    negatives: int
    strategy: Strategy
    lineages: Mapping[str, Lineage]
    balanced: bool
    match_length: bool
    can_be_positive: Collection[str]
    """Policies with two different outputs for some prompt."""
    report: PairReport
    positives: Counter[str] = field(default_factory=Counter)
    """Triples so far in which a policy is positive."""
    balance: Counter[str] = field(default_factory=Counter)
    """The same minus those in which it is negative."""
    length_balance: int = 0
    """Triples in which the positive is closer in length to the reference minus those in which the negative is."""

    def sample(self, prompt: PromptOutputs, random: Random) -> Iterator[Triple]:
        """The triples of a prompt, counted."""
        report, outputs = self.report, prompt.outputs
        report.prompts += 1
        report.identical += prompt.identical
        if len(outputs) == 1:
            report.prompts_with_one_policy += 1
            return
        able = sorted(policy for policy, texts in outputs.items() if len(texts) > 1)
        if not able:
            report.prompts_without_two_outputs += 1
            return
        random.shuffle(able)
        if self.balanced:
            able.sort(key=lambda policy: (self.positives[policy], self.balance[policy]))
        draws = rivalries = 0
        for policy in able:
            triples, has_rival = self.draw(policy, prompt, random)
            draws += bool(triples)
            rivalries += has_rival
            report.draws_without_rival += not has_rival
            report.draws_without_negative += has_rival and not triples
            for triple in triples:
                self.count(triple)
                yield triple
            if draws == self.per_prompt:
                break
        report.draws += draws
        report.prompts_without_rival += not rivalries
        report.prompts_without_negative += rivalries > 0 and not draws

    def draw(self, policy: str, prompt: PromptOutputs, random: Random) -> tuple[list[Triple], bool]:
        """Triples of one reference and positive of `policy`, and whether the strategy finds any other policy."""
        outputs = prompt.outputs
        shuffled = cache(lambda name: random.sample(sorted(outputs[name]), len(outputs[name])))
        others = sorted(outputs.keys() - {policy})
        random.shuffle(others)
        if self.balanced:
            others.sort(key=lambda other: -self.balance[other])
        rules = random.sample(RULES, len(RULES)) if self.strategy == "mixed" else [self.strategy]
        has_rival = False
        for rule in rules:
            allowed = candidate_negatives(rule, policy, others, self.lineages)
            has_rival = has_rival or bool(allowed)
            tiers = [allowed]
            if self.balanced:
                tiers = [[name for name in allowed if (name in self.can_be_positive) is able] for able in (True, False)]
            for reference, positive, closer in self.attempts(shuffled(policy), random):
                chosen = choose_negatives(tiers, shuffled, reference, positive, closer, self.negatives)
                if chosen:
                    return [
                        Triple(
                            prompt=decoded(outputs[policy][reference].prompt),
                            reference=decoded(outputs[policy][reference].output),
                            positive=decoded(outputs[policy][positive].output),
                            negative=decoded(outputs[name][negative].output),
                            policy=policy,
                            negative_policy=name,
                            wrapper=prompt.wrapper,
                            strategy=rule,
                        )
                        for negative, name in chosen.items()
                    ], has_rival
        return [], has_rival

    def attempts(self, texts: Sequence[str], random: Random) -> Iterator[tuple[str, str, bool | None]]:
        """Reference, positive, and whether negatives have to be closer in length; nearly always the first will do."""
        if not self.match_length:
            yield from ((reference, positive, None) for reference, positive in permutations(texts, 2))
            return
        closer = self.length_balance > 0 or (self.length_balance == 0 and random.random() < 0.5)
        yield from ((reference, positive, closer) for reference, positive in islice(permutations(texts, 2), TRIES))
        yield from ((reference, positive, not closer) for reference, positive in permutations(texts, 2))

    def count(self, triple: Triple) -> None:
        """Count a triple in the report and in the balances."""
        policy, rival = cast(str, triple.policy), cast(str, triple.negative_policy)
        self.positives[policy] += 1
        self.balance[policy] += 1
        self.balance[rival] -= 1
        good, bad = length(Group(triple.prompt, triple.reference, (triple.positive, triple.negative)))
        self.length_balance += (good > bad) - (good < bad)
        self.report.triples += 1
        self.report.length_wins += ((good > bad) + (good >= bad)) / 2
        self.report.strategies[cast(Rule, triple.strategy)] += 1
        self.report.meetings[policy, rival] += 1
        self.report.negatives_never_positive += rival not in self.can_be_positive


def candidate_negatives(rule: Rule, policy: str, others: Iterable[str], lineages: Mapping[str, Lineage]) -> list[str]:
    """Those of the other policies that may give the negative for a reference by `policy`, in their order."""
    if rule == "random":
        return list(others)
    own = lineages[policy]
    relatives = [other for other in others if own.family is not None and lineages[other].family == own.family]
    if rule == "family":
        return relatives
    steps = {other: step for other in relatives if (step := lineages[other].step) is not None}
    if own.step is None:
        return []
    below = max((step for step in steps.values() if step < own.step), default=None)
    above = min((step for step in steps.values() if step > own.step), default=None)
    return [other for other, step in steps.items() if step in (below, above)]


def choose_negatives(
    tiers: Iterable[Sequence[str]],
    texts_of: Callable[[str], Sequence[str]],
    reference: str,
    positive: str,
    closer: bool | None,
    count: int,
) -> dict[str, str]:
    """Choose different texts that are neither the reference nor the positive, taken from the policies in turn.

    Args:
        tiers: Policies in their order; a later tier is used only when the ones before it do not suffice.
        texts_of: The texts of a policy in their order.
        reference: Not to be repeated.
        positive: Not to be repeated.
        closer: Only texts whose length is closer to that of the reference than the length of the positive is (False:
            farther; as close counts as both), from near ones on. None: of any length.
        count: At most this many.

    Returns:
        The texts and their policies.
    """

    @cache
    def options_of(policy: str) -> list[Option]:
        texts = [text for text in texts_of(policy) if text not in (reference, positive)]
        if closer is None or not texts:
            return [(0.0, text) for text in texts]
        own, *others = length(Group("", reference, (positive, *texts)))
        sided = [
            (abs(other - own), text)
            for other, text in zip(others, texts, strict=True)
            if (other >= own if closer else other <= own)
        ]
        return sorted(sided, key=itemgetter(0))

    chosen: dict[str, str] = {}
    for tier in tiers:
        policies = tier if closer is None else _nearest_first(tier, options_of)
        before = -1
        while before < len(chosen):
            before = len(chosen)
            for policy in policies:
                text = next((text for _, text in options_of(policy) if text not in chosen), None)
                if text is not None:
                    chosen[text] = policy
                if len(chosen) == count:
                    return chosen
    return chosen


def _nearest_first(policies: Iterable[str], options_of: Callable[[str], Sequence[Option]]) -> list[str]:
    """The policies, the first `NEAREST_OF` that have an option in the order of how near it is."""
    remaining = iter(policies)
    able = ((options[0][0], policy) for policy in remaining if (options := options_of(policy)))
    nearest = sorted(islice(able, NEAREST_OF), key=itemgetter(0))
    return [*(policy for _, policy in nearest), *remaining]


def _lineage(place: str, policy: str, seen: LineageEvidence, decided: Lineage) -> Lineage:
    return Lineage(
        decided.family if decided.family is not None else _only(place, policy, "family", seen.families),
        decided.step if decided.step is not None else _only(place, policy, "step", seen.steps),
    )


def _only(place: str, policy: str, name: str, values: set[Value]) -> Value | None:
    if len(values) > 1:
        first, second, *_ = sorted(values)
        raise InputError(
            f"{place}: expected one {name} for policy {policy!r}, found {first} and {second}; give every checkpoint a "
            "policy name of its own, or decide in a table of the policies"
        )
    return next(iter(values), None)
