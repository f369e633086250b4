"""Training examples, their batches, and checks of pairs that teach nothing and of texts that are cut."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from polar.core.errors import InputError
from polar.core.records import Group, Preference, Text, Triple, text_of
from polar.core.template import EncodedGroup, Template
from polar.model.tree import require_fit, row_length, tree_batch
from polar.training.objectives import Objective, lexical_targets

log = logging.getLogger(__name__)

NAME_CHARACTERS = 40
"""Characters of a prompt in the name of an example."""


@dataclass(frozen=True, slots=True)
class Example:
    """An encoded group and its pairs of a better and a worse candidate."""

    group: EncodedGroup
    pairs: tuple[tuple[int, int], ...]
    """(better, worse) as positions in `group.branches`."""
    name: str
    """Number of its first record in the order of reading, and beginning of its prompt; for messages."""
    margin: float = 0.0
    """Least difference of the rewards of a pair."""


def examples_from_triples(triples: Iterable[Triple], template: Template) -> Iterator[Example]:
    """Yield one example per run of consecutive triples that share prompt, reference and positive."""
    current: Triple | None = None
    negatives: list[Text] = []
    name = ""
    for number, triple in enumerate(triples, 1):
        if current is not None and (
            (triple.prompt, triple.reference, triple.positive, triple.wrapper)
            == (current.prompt, current.reference, current.positive, current.wrapper)
        ):
            negatives.append(triple.negative)
            continue
        if current is not None:
            yield _one_against_all(current, negatives, template, name)
        current, negatives, name = triple, [triple.negative], _name(number, triple.prompt)
    if current is not None:
        yield _one_against_all(current, negatives, template, name)


def examples_from_preferences(preferences: Iterable[Preference], template: Template) -> Iterator[Example]:
    """Yield one example per preference; a ranked list of K answers gives all K (K - 1) / 2 pairs."""
    for number, preference in enumerate(preferences, 1):
        group = Group(preference.prompt, preference.reference, preference.ranked, wrapper=preference.wrapper)
        yield Example(
            template.encode_group(group),
            tuple(combinations(range(len(preference.ranked)), 2)),
            _name(number, preference.prompt),
            preference.margin or 0.0,
        )


def _name(number: int, prompt: Text) -> str:
    words = " ".join(text_of(prompt).split())
    return f'{number} ("{words[:NAME_CHARACTERS]}{"..." if len(words) > NAME_CHARACTERS else ""}")'


def _one_against_all(triple: Triple, negatives: Sequence[Text], template: Template, name: str) -> Example:
    group = Group(triple.prompt, triple.reference, (triple.positive, *negatives), wrapper=triple.wrapper)
    return Example(template.encode_group(group), tuple((0, number) for number in range(1, len(negatives) + 1)), name)


@dataclass(frozen=True, slots=True)
class Collator:
    """Function from examples to the keyword arguments of `Discriminator.forward`: tensors and names."""

    lexical: bool = False
    objective: Objective = field(default_factory=Objective)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Lay the examples' groups out as one row and number their candidates through the batch."""
        if not examples:
            raise InputError("an empty batch: there are no training examples")
        batch = tree_batch([example.group for example in examples])
        better, worse, offset = [], [], 0
        for example in examples:
            better += [offset + first for first, _ in example.pairs]
            worse += [offset + second for _, second in example.pairs]
            offset += len(example.group.branches)
        margins = [example.margin for example in examples for _ in example.group.branches]
        inputs: dict[str, Any] = {
            "batch": batch,
            "better_P": torch.tensor(better),
            "worse_P": torch.tensor(worse),
            "margin_N": torch.tensor(margins),
            # Trainer counts the labels of all micro-batches and machines of a step: its number of comparisons.
            "labels": self.objective.winners(torch.tensor(better)),
            "names": [example.name for example in examples],
        }
        return {**inputs, **_lexical_targets(examples)} if self.lexical else inputs


def _lexical_targets(examples: Sequence[Example]) -> dict[str, Tensor]:
    tokens = sum(row_length(example.group) for example in examples)
    overlap_1T, closeness_1T3 = torch.zeros(1, tokens), torch.zeros(1, tokens, 3)
    select_1T = torch.zeros(1, tokens, dtype=torch.bool)
    start = 0
    for example in examples:
        start += len(example.group.prefix)
        for overlap, closeness in lexical_targets(example.group):
            end = start + len(overlap)
            overlap_1T[0, start:end] = torch.from_numpy(overlap)
            closeness_1T3[0, start:end] = torch.from_numpy(closeness)
            select_1T[0, start:end] = True
            start = end
    return {"overlap_BT": overlap_1T, "closeness_BT3": closeness_1T3, "select_BT": select_1T}


def require_several_policies(triples: Iterable[Triple]) -> Iterator[Triple]:
    """Yield the same triples; check that negatives are by other policies than positives, where policies are named.

    Raises:
        InputError: positive and negative of a triple are by the same policy, or (at the end) all triples name one
            policy only.
    """
    number, positives, negatives = 0, set(), set()
    for number, triple in enumerate(triples, 1):
        if triple.policy is not None and triple.policy == triple.negative_policy:
            raise InputError(
                f"triple {number}: positive and negative are both by the policy {triple.policy!r}, so the reference "
                "cannot tell them apart; take negatives from another policy (polar pair does)"
            )
        positives.add(triple.policy)
        negatives.add(triple.negative_policy)
        yield triple
    named = (positives | negatives) - {None}
    if len(named) == 1:
        raise InputError(
            f"all {number:,} triples name the same single policy, {named.pop()!r}; expected negatives by another one, "
            "named in negative_policy (or triples that name no policies)"
        )
    if len(positives) == 1 and named:
        log.warning(
            "all references and positives are by the policy %r: it can be recognised without the reference, so little "
            "may be learned about comparing",
            *positives,
        )


def drop_equal_pairs(examples: Iterable[Example]) -> Iterator[Example]:
    """Yield the examples without comparisons of two equal candidates, whose number is reported at the end.

    Candidates are equal if the model reads the same tokens: two equal texts, or texts that are cut to the same
    beginning. Their gradient is zero and their loss log 2, whatever the model.

    Raises:
        InputError: all comparisons are of that kind (at the end).
    """
    comparisons = equal = 0
    for example in examples:
        branches = example.group.branches
        pairs = tuple((better, worse) for better, worse in example.pairs if branches[better] != branches[worse])
        comparisons += len(example.pairs)
        equal += len(example.pairs) - len(pairs)
        if pairs:
            yield replace(example, pairs=pairs)
    if equal == comparisons > 0:
        raise InputError(
            f"both candidates are the same in all {equal:,} comparisons (after cutting to max_response_length); "
            "nothing can be learned from them"
        )
    if equal:
        log.warning(
            "both candidates are the same in %d of %d comparisons: they teach nothing and are left out",
            *(equal, comparisons),
        )


def require_all_fit(examples: Iterable[Example], model: Any) -> Iterator[Example]:
    """The same examples, each of which the model can take.

    Raises:
        InputError: one is longer than the attention of the model sees; it is named.
    """
    for example in examples:
        try:
            require_fit(model, len(example.group.prefix) + max(map(len, example.group.branches)))
        except InputError as error:
            raise InputError(f"record {example.name}: {error}") from error
        yield example


@dataclass(slots=True)
class Cut:
    """Numbers of examples that were cut to fit the model, in all and by part (`Template.encode_group`)."""

    examples: int = 0
    prompt: int = 0
    reference: int = 0
    answers: int = 0

    def count(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the same examples; report the cut ones at the end."""
        total = 0
        for example in examples:
            total += 1
            cuts = [cut for cut in example.group.truncations if cut]
            self.examples += bool(cuts)
            self.prompt += any(cut.prompt for cut in cuts)
            self.reference += any(cut.reference for cut in cuts)
            self.answers += any(cut.output for cut in cuts)
            yield example
        if self.examples:
            log.warning(
                "%d of %d examples were cut to fit the model: the prompt of %d, the reference of %d, answers of %d; "
                "max_length and max_response_length say how much fits",
                *(self.examples, total, self.prompt, self.reference, self.answers),
            )
