"""Training data that teach nothing are refused; single comparisons of that kind, and what is cut, are counted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from polar.core.errors import InputError
from polar.core.records import Triple
from polar.training.batches import Example

log = logging.getLogger(__name__)


def of_several_policies(triples: Iterable[Triple]) -> Iterator[Triple]:
    """The same triples, if negatives come from other policies than positives, as far as policies are named.

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


def told_apart(examples: Iterable[Example]) -> Iterator[Example]:
    """The same examples; comparisons of two equal candidates are counted and reported at the end.

    Candidates are equal if the model reads the same tokens: two equal texts, or texts that are cut to the same
    beginning. Their gradient is zero and their loss log 2, whatever the model.

    Raises:
        InputError: all comparisons are of that kind (at the end).
    """
    comparisons = equal = 0
    for example in examples:
        branches = example.group.branches
        comparisons += len(example.pairs)
        equal += sum(branches[better] == branches[worse] for better, worse in example.pairs)
        yield example
    if equal == comparisons > 0:
        raise InputError(
            f"both candidates are the same in all {equal:,} comparisons (after cutting to max_response_length); "
            "nothing can be learned from them"
        )
    if equal:
        log.warning("both candidates are the same in %d of %d comparisons: they teach nothing", equal, comparisons)


@dataclass(slots=True)
class Cut:
    """How many examples were cut to fit the model, on the whole and by part (`Template.encode_group`)."""

    examples: int = 0
    prompt: int = 0
    reference: int = 0
    answers: int = 0

    def count(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The same examples; what was cut is reported at the end."""
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
