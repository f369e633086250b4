"""Trajectories become triples: two samples of one policy and one of another policy, for the same prompt (paper 4.1).

Policies are drawn first and their distinct outputs second, so a policy that was sampled more often is not paired more
often. Every prompt has random numbers of its own, made from the seed and the prompt, and prompts are taken in the order
of their ids: the order of the input changes nothing.

Two shortcuts let a discriminator win without comparing anything with the reference. Balance closes the first: a policy
that is more often positive than negative is recognised by its frequency. Length matching closes the second: outputs of
one policy are alike in length.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, permutations
from pathlib import Path
from random import Random
from typing import cast

from polar.core.baselines import length
from polar.core.errors import InputError
from polar.core.records import Group, Trajectory, Triple, Wrapper, prompt_id
from polar.corpus.sorting import PromptOutputs, PromptSorter, decoded, open_sorter
from polar.corpus.strategies import (
    RULES,
    Lineage,
    LineageEvidence,
    Rule,
    Strategy,
    candidate_negatives,
    choose_negatives,
    resolve_lineages,
)

TRIES = 50
"""Pairs of reference and positive that are tried for a negative on the side in length that is wanted."""


@dataclass(slots=True)
class PairReport:
    """What `pair` counted; complete once the triples are consumed.

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


def pair(
    trajectories: Iterable[Trajectory],
    *,
    per_prompt: int | None = None,
    negatives: int = 1,
    strategy: Strategy = "random",
    lineages: Mapping[str, Lineage] | None = None,
    balance: bool = True,
    match_length: bool = False,
    seed: int = 0,
    exclude_policies: str | None = None,
    policies: Collection[str] | None = None,
    prompt_ids: Collection[str] | None = None,
    wrapper: Wrapper | None = None,
    temporary: Path | None = None,
    report: PairReport | None = None,
) -> Iterator[Triple]:
    """Draw triples in bounded memory: trajectories are sorted on disk and come back one prompt at a time.

    Reference and positive are two different texts of one policy. The negative is a text of another policy and differs
    from both: as no positive ever repeats its reference, a negative that does would teach that a copy is wrong.
    All outputs of one prompt, and a count for every pair of policies that meet, have to fit into memory.

    Args:
        trajectories: Samples of several policies, in any order. They are read when the first triple is asked for.
        per_prompt: At most this many policies of a prompt give a reference and a positive: if balanced, those that
            did so least so far, else chosen at random. Default: every policy with two different outputs gives one.
        negatives: Triples per drawn reference and positive. They follow one another and differ in the negative, which
            comes from as many different policies as there are; there are fewer when the outputs do not suffice.
        strategy: Where negatives come from (`polar.corpus.strategies`). Policies without a known family take no part
            in "family" and "checkpoint", those without a step none in "checkpoint"; a policy for which the strategy
            finds no other one gives no triple and is counted.
        lineages: Family and step of policies; overrides what the trajectories say.
        balance: Take as negative the policy that was positive most often so far beyond being negative, and one that
            can never be positive only when there is no other. Then other prompts matter for the triples of a prompt.
        match_length: Choose negatives near the positive in length, closer to that of the reference in one half of the
            triples and farther in the other half, as far as there are any. No reference and positive is lost for it;
            of several negatives some may be. Here, too, other prompts matter.
        seed: Another seed is another draw.
        exclude_policies: Leave out policies in whose name this regular expression is found.
        policies: Only these policies.
        prompt_ids: Only the prompts with these ids (`polar.core.records.prompt_id`).
        wrapper: Overrides the wrapper of the trajectories. Trajectories of different wrappers never share a triple.
        temporary: An existing directory for the temporary files; default: that of the system.
        report: Counts are added here.

    Returns:
        The triples, ordered by prompt id.

    Raises:
        InputError: A number is below 1 or the regular expression is not one (at once); a policy has two families or
            steps, none is known that the strategy needs, or the sort finds no room on disk (while iterating).
    """
    for name, number in (("per_prompt", per_prompt), ("negatives", negatives)):
        if number is not None and number < 1:
            raise InputError(f"pair: {name} must be at least 1, found {number}")
    try:
        excluded = None if exclude_policies is None else re.compile(exclude_policies)
    except re.error as error:
        raise InputError(
            f"pair: exclude_policies {exclude_policies!r} is not a regular expression ({error})"
        ) from error
    report = PairReport() if report is None else report
    wanted_policies, wanted_prompts = _set(policies), _set(prompt_ids)

    @cache
    def wanted(policy: str) -> bool:
        unasked = wanted_policies is not None and policy not in wanted_policies
        return not unasked and (excluded is None or not excluded.search(policy))

    def sort(sorter: PromptSorter) -> dict[str, LineageEvidence]:
        """Fill the sorter; return what the trajectories say about each policy that is wanted."""
        evidence: dict[str, LineageEvidence] = {}
        unseen_policies, unseen_prompts = set(wanted_policies or ()), set(wanted_prompts or ())
        for trajectory in trajectories:
            report.trajectories += 1
            policy, prompt = trajectory.policy, prompt_id(trajectory.prompt)
            unseen_policies.discard(policy)
            unseen_prompts.discard(prompt)
            if not wanted(policy) or (wanted_prompts is not None and prompt not in wanted_prompts):
                report.left_out += 1
                continue
            evidence.setdefault(policy, LineageEvidence()).add(trajectory.family, trajectory.step)
            sorter.add(prompt, wrapper or trajectory.wrapper, trajectory)
        report.unknown_policies += len(unseen_policies)
        report.unknown_prompts += len(unseen_prompts)
        return evidence

    def triples() -> Iterator[Triple]:
        with open_sorter(temporary) as sorter:
            evidence = sort(sorter)
            known = {} if strategy == "random" else resolve_lineages(strategy, evidence, lineages or {})
            can_be_positive = sorter.policies_with_two_outputs()
            report.policies += len(evidence)
            report.policies_with_two_outputs += len(can_be_positive)
            sampler = _PairSampler(
                per_prompt, negatives, strategy, known, balance, match_length, can_be_positive, report
            )
            for prompt in sorter.prompts():
                yield from sampler.sample(prompt, Random(f"{seed} {prompt.prompt_id} {prompt.wrapper}"))

    return triples()


@dataclass(slots=True)
class _PairSampler:
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


def _set(names: Collection[str] | None) -> set[str] | None:
    return None if names is None else set(names)
