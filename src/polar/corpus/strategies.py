"""Which outputs may be the negative: the policies that a strategy allows, and among them the choice by length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Literal, TypeVar, get_args

from polar.core.baselines import length
from polar.core.errors import InputError
from polar.core.records import Group
from polar.data.fields import optional_string, string_at
from polar.data.readers import rows
from polar.data.record_rows import count_of

Rule = Literal["random", "family", "checkpoint"]
"""random: any other policy (paper 4.1). family: another policy of the same family, which is harder. checkpoint: a
policy of the same family at the next lower or next higher training step, which is hardest."""
Strategy = Rule | Literal["mixed"]
"""A rule, or for every draw one of those that are possible, at random."""
RULES: tuple[Rule, ...] = get_args(Rule)

NEAREST_OF = 8
"""Length matching takes the nearest in length of this many policies. More would hide length hardly better, and leave
balance less to choose from."""

Option = tuple[float, str]
"""A text that may be the negative, and how far its closeness in length is from that of the positive."""
Value = TypeVar("Value", str, int)


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a policy descends from; None is unknown."""

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
