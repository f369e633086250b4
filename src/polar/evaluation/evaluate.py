"""Evaluate a reward model beside baselines on the same items.

Two tasks, each with a better and a worse candidate per item:

- policy discrimination: on a triple, does the positive (by the reference's own policy) beat the negative?
- preference accuracy: does the chosen answer beat the rejected one (paper 4.2)? Also per domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from polar.baselines import BASELINES
from polar.errors import InputError
from polar.metrics import Estimate, outcomes, paired_difference, pairwise_accuracy
from polar.records import Group, Preference, Triple, prompt_id, text_of

if TYPE_CHECKING:  # the baselines alone need no torch
    from polar.model.reward_model import RewardModel

Task = Literal["policy discrimination", "preference accuracy"]

MODEL = "model"
"""The model's name among the scorers; the others are the `BASELINES`."""
RIVAL = "unigram F1"
"""The baseline that the model is compared with item by item."""


@dataclass(frozen=True, slots=True)
class Item:
    """A better and a worse candidate, and their rewards."""

    task: Task
    group: Group
    """The better candidate, then the worse one; the id is that of the prompt."""
    domain: str | None = None
    policy: str | None = None
    negative_policy: str | None = None
    rewards: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By scorer: rewards of the better and of the worse candidate."""
    truncated: bool = False
    """The model did not see all of it."""

    @property
    def copies_reference(self) -> bool:
        """The better candidate is the reference word by word, so any measure of overlap prefers it."""
        return text_of(self.group.candidates[0]) == text_of(self.group.reference)


@dataclass(frozen=True, slots=True)
class Result:
    """Accuracies on one task, or on one domain of it."""

    task: Task
    domain: str | None
    """None for the whole task."""
    accuracy: dict[str, Estimate]
    """By scorer."""
    difference: Estimate | None
    """Accuracy of the model minus that of `RIVAL`, paired by item; None without a model."""
    items: int
    reference_copies: int
    """Items whose better candidate is the reference itself."""
    truncated: int
    """Items of which the model did not see all."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results, and the items from which they can be computed again."""

    results: tuple[Result, ...]
    items: tuple[Item, ...]


def evaluate(
    model: RewardModel | None,
    triples: Iterable[Triple],
    preferences: Iterable[Preference],
    *,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Score every item with the model and with the baselines, and compare.

    Args:
        model: None for the baselines alone.
        triples: Items of policy discrimination.
        preferences: Items of preference accuracy; of a longer ranking the best and the worst answer are compared.
        progress: Called with the number of candidates that the model has just scored.

    Raises:
        InputError: there are no items, or a text is not valid Unicode.
        FloatingPointError: a reward is not finite.
    """
    items = [*map(_discrimination, triples), *map(_preference, preferences)]
    if not items:
        raise InputError("evaluate: there are no items; give at least one triple or preference")
    groups = [item.group for item in items]
    rewards = {name: [baseline(group) for group in groups] for name, baseline in BASELINES.items()}
    truncated = [False] * len(groups)
    if model is not None:
        rewards = {MODEL: model.score_groups(groups, progress=progress), **rewards}
        truncated = [any(model.template.encode_group(group).truncations) for group in groups]
    scored = tuple(
        replace(
            item,
            rewards={name: (values[index][0], values[index][1]) for name, values in rewards.items()},
            truncated=truncated[index],
        )
        for index, item in enumerate(items)
    )
    return Evaluation(tuple(_results(scored)), scored)


def _discrimination(triple: Triple) -> Item:
    candidates = (triple.positive, triple.negative)
    group = Group(triple.prompt, triple.reference, candidates, prompt_id(triple.prompt), triple.wrapper)
    return Item("policy discrimination", group, policy=triple.policy, negative_policy=triple.negative_policy)


def _preference(preference: Preference) -> Item:
    candidates = (preference.chosen, preference.rejected)
    group = Group(preference.prompt, preference.reference, candidates, prompt_id(preference.prompt), preference.wrapper)
    return Item("preference accuracy", group, domain=preference.domain)


def _results(items: tuple[Item, ...]) -> Iterator[Result]:
    tasks: tuple[Task, ...] = ("policy discrimination", "preference accuracy")
    for task in tasks:
        of_task = [item for item in items if item.task == task]
        if of_task:
            yield _result(task, None, of_task)
        for domain in sorted({item.domain for item in of_task if item.domain is not None}):
            yield _result(task, domain, [item for item in of_task if item.domain == domain])


def _result(task: Task, domain: str | None, items: list[Item]) -> Result:
    prompts = [item.group.id for item in items]
    better = {name: [item.rewards[name][0] for item in items] for name in items[0].rewards}
    worse = {name: [item.rewards[name][1] for item in items] for name in items[0].rewards}
    wins = {name: outcomes(better[name], worse[name]) for name in (MODEL, RIVAL) if name in better}
    return Result(
        task=task,
        domain=domain,
        accuracy={name: pairwise_accuracy(better[name], worse[name], prompts) for name in better},
        difference=paired_difference(wins[MODEL], wins[RIVAL], prompts) if MODEL in wins else None,
        items=len(items),
        reference_copies=sum(item.copies_reference for item in items),
        truncated=sum(item.truncated for item in items),
    )
