"""What the records of one evaluation say, computed from them alone: accuracies by data set, domain and slice.

A scorer's accuracy on an item is the share of its candidate pairs of unequal quality that it orders properly, ties one
half (`metrics.ordered_shares`). For right and wrong answers that is the area under the ROC curve within a prompt; the
area over all prompts together, which asks for rewards that compare between prompts, is reported beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polar.core.metrics import Estimate, area_under_curve, clustered_mean, paired_difference
from polar.core.references import AGGREGATES
from polar.evaluation.best_of_n import Point, curve
from polar.evaluation.columns import Numbers, Outcomes, Part
from polar.evaluation.diagnostics import Diagnosis, diagnose
from polar.evaluation.manifest import TASKS, Task, read_manifest
from polar.evaluation.official import official_scores
from polar.evaluation.records import MODEL, read_records
from polar.evaluation.survey import FIRST, Probed, Referenced, Survey, survey_of

SUMMARY = "summary.json"
"""The file that holds a summary, beside the manifest."""

RIVAL = "unigram F1"
"""The baseline that the model is compared with item by item."""


@dataclass(frozen=True, slots=True)
class Result:
    """Accuracies on a part of the records."""

    task: Task
    dataset: str | None
    """None for all data sets of the task together."""
    domain: str | None
    """None for all of them."""
    slice: str | None
    """A part that cuts across domains ("unseen prompts"); None for all items."""
    items: int
    """With candidates of unequal quality."""
    accuracy: dict[str, Estimate]
    """By scorer."""
    difference: Estimate | None
    """Accuracy of the model minus that of `RIVAL`, paired by item; None without a model."""
    rank_correlation: dict[str, Estimate] | None
    """Kendall's tau-b, where items have three or more candidates."""
    area: dict[str, Estimate] | None
    """Under the ROC curve over all prompts together; only for verifiable correctness."""
    reference_copies: int
    """Items in which a best candidate is the reference itself, word by word."""
    truncated: int
    """Items of which the model did not see all."""


@dataclass(frozen=True, slots=True)
class BestOfN:
    """The curves of a data set."""

    dataset: str
    curves: dict[str, list[Point]]
    """By scorer."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one transformation of the worse or of the better candidates does to the accuracy."""

    dataset: str
    probe: str
    before: dict[str, Estimate]
    """By scorer: how often the better candidate beats the worse one."""
    after: dict[str, Estimate]
    """How often it still does after one of the two was transformed."""
    change: dict[str, Estimate]
    """After minus before, paired by item: below zero, the scorer falls for it."""


@dataclass(frozen=True, slots=True)
class SeveralReferences:
    """Accuracies on the items that have several references, by what is made of the rewards against each."""

    dataset: str
    accuracy: dict[str, dict[str, Estimate]]
    """"the first reference alone", "max", "mean" and "softmax", each by scorer."""


@dataclass(frozen=True, slots=True)
class Official:
    """A benchmark's own numbers."""

    dataset: str
    scoring: str
    scores: dict[str, dict[str, float]]
    """By scorer: name of the number -> its value."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All of it."""

    results: tuple[Result, ...]
    sensitivity: tuple[Sensitivity, ...]
    several_references: tuple[SeveralReferences, ...]
    best_of_n: tuple[BestOfN, ...]
    official: tuple[Official, ...]
    diagnoses: tuple[Diagnosis, ...]
    """Of the model, by data set."""


def summarise(directory: str | Path) -> Summary:
    """Read the records of an evaluation one by one, without their texts, and summarise them.

    Raises:
        InputError: a file is damaged or missing.
    """
    return summary_of(survey_of(read_manifest(directory), read_records(directory)))


def summary_of(found: Survey) -> Summary:
    """The summary of what was kept of the records."""
    facts, scorers = found.manifest.datasets, found.manifest.scorers
    return Summary(
        tuple(_results(found)),
        tuple(_sensitivity(dataset, probe, own, scorers) for (dataset, probe), own in sorted(found.probed.items())),
        tuple(_several_references(dataset, own, scorers) for dataset, own in found.referenced.items()),
        tuple(
            BestOfN(dataset, {scorer: curve(own, scorer) for scorer in scorers}) for dataset, own in found.draws.items()
        ),
        tuple(
            Official(
                one.name,
                one.scoring,
                {name: official_scores(one.scoring, found.scored[one.name], name) for name in scorers},
            )
            for one in facts
            if one.scoring and one.name in found.scored
        ),
        tuple(
            diagnose(dataset, outcomes, MODEL)
            for outcomes in found.by_task.values()
            if MODEL in scorers
            for dataset in outcomes.datasets
        ),
    )


def _results(found: Survey) -> Iterator[Result]:
    """For every task: all data sets together if they are several, then each with its domains and slices."""
    for task in TASKS:
        if outcomes := found.by_task.get(task):
            if len(outcomes.datasets) > 1:
                yield _result(outcomes, Part(task))
            for dataset in outcomes.datasets:
                yield from (_result(outcomes, part) for part in outcomes.parts(dataset))


def _result(outcomes: Outcomes, part: Part) -> Result:
    items, scorers = outcomes.items(part), outcomes.scorers
    prompts, shares = outcomes.prompts[items], {name: values[items] for name, values in outcomes.shares.items()}
    several, correlations = (outcomes.candidates.count[items] > 2).any(), outcomes.correlations
    return Result(
        task=part.task,
        dataset=part.dataset,
        domain=part.domain,
        slice=part.slice,
        items=len(items),
        accuracy={name: clustered_mean(shares[name], prompts) for name in scorers},
        difference=paired_difference(shares[MODEL], shares[RIVAL], prompts) if MODEL in shares else None,
        rank_correlation={name: clustered_mean(correlations[name][items], prompts) for name in scorers}
        if correlations is not None and several
        else None,
        area=_areas(outcomes, items) or None,
        reference_copies=int(outcomes.copies[items].sum()),
        truncated=int(outcomes.cut[items].sum()),
    )


def _areas(outcomes: Outcomes, items: Numbers) -> dict[str, Estimate]:
    candidates, inside = outcomes.candidates, outcomes.candidates.of(items)
    prompts = np.repeat(outcomes.prompts, candidates.count)[inside]
    return {
        name: area_under_curve(candidates.best[inside], rewards[inside], prompts)
        for name, rewards in candidates.rewards.items()
    }


def _sensitivity(dataset: str, probe: str, own: Probed, scorers: Sequence[str]) -> Sensitivity:
    prompts = np.array(own.prompts)
    before, after = ({name: np.array(values[name]) for name in scorers} for values in (own.before, own.after))
    return Sensitivity(
        dataset,
        probe,
        {name: clustered_mean(before[name], prompts) for name in scorers},
        {name: clustered_mean(after[name], prompts) for name in scorers},
        {name: paired_difference(after[name], before[name], prompts) for name in scorers},
    )


def _several_references(dataset: str, own: Referenced, scorers: Sequence[str]) -> SeveralReferences:
    prompts = np.array(own.prompts)
    return SeveralReferences(
        dataset,
        {
            how: {name: clustered_mean(np.array(own.shares[how, name]), prompts) for name in scorers}
            for how in (FIRST, *AGGREGATES)
        },
    )
