"""The summary of one evaluation, from its records alone: accuracies by data set, domain and slice.

A scorer's accuracy on an item is the share of its candidate pairs of unequal quality that it orders properly, ties one
half (`metrics.ordered_shares`). For right and wrong answers that is the area under the ROC curve within a prompt; the
area over all prompts together, which asks for rewards that compare between prompts, is reported beside it.
"""

from __future__ import annotations

import heapq
import shutil
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polar.core.files import new_directory, on_disk, write_json
from polar.core.metrics import Estimate, area_under_curve, clustered_mean, ordered_shares, outcomes, paired_difference
from polar.core.records import AGGREGATES, aggregated
from polar.evaluation.analysis import MAX_MISTAKES, Diagnosis, Draws, Point, WrongPair, curve, diagnose, wrong_pairs
from polar.evaluation.columns import Collected, Numbers, Outcomes, Part, chunks, prompt_name
from polar.evaluation.manifest import TASKS, Manifest, Task, read_manifest, write_manifest
from polar.evaluation.official import official_scores
from polar.evaluation.records import MODEL, RECORDS, Record, read_records

SUMMARY = "summary.json"
"""The file that holds a summary, beside the manifest."""

COMPARED_BASELINE = "unigram F1"
"""The baseline that the model is compared with item by item."""

FIRST_REFERENCE = "the first reference alone"


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
    """Accuracy of the model minus that of `COMPARED_BASELINE`, paired by item; None without a model."""
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
    """Accuracy before and after one transformation of the worse or of the better candidates."""

    dataset: str
    probe: str
    """Name of the perturbation; the files of summaries keep this key."""
    before: dict[str, Estimate]
    """By scorer: how often the better candidate beats the worse one."""
    after: dict[str, Estimate]
    """How often it still does after one of the two was transformed."""
    change: dict[str, Estimate]
    """After minus before, paired by item: below zero, the scorer falls for it."""


@dataclass(frozen=True, slots=True)
class SeveralReferences:
    """Accuracies on the items that have several references, by how the rewards against each become one."""

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


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Summary:
    """The results of one evaluation."""

    manifest: Manifest
    results: tuple[Result, ...]
    sensitivity: tuple[Sensitivity, ...]
    several_references: tuple[SeveralReferences, ...]
    best_of_n: tuple[BestOfN, ...]
    official: tuple[Official, ...]
    diagnoses: tuple[Diagnosis, ...]
    """Of the model, by data set."""
    directory: Path
    """Of manifest and records; a temporary one, as old as this object, if the evaluation was given none."""

    def table(self, width: int = 160) -> str:
        """Return the text tables that `polar eval` prints, in lines of at most `width` characters."""
        from polar.evaluation.tables import text_tables

        return text_tables(self, width)

    def content(self) -> dict[str, Any]:
        """Return what `summary.json` holds."""
        content = asdict(self)
        del content["manifest"], content["directory"]
        return {"scorers": self.manifest.scorers, **content}

    def save(self, directory: str | Path) -> None:
        """Write manifest, records and summary to a new directory, as `polar eval --output` does.

        Raises:
            InputError: the directory is in use, or the disk refuses it.
        """
        with new_directory(Path(directory)) as target:
            with on_disk(directory):
                shutil.copytree(self.directory / RECORDS, target / RECORDS)
            write_manifest(target, self.manifest)
            write_json(target / SUMMARY, self.content())


@dataclass(slots=True)
class Perturbed:
    """The items of one perturbation on one data set."""

    prompts: array[int] = field(default_factory=lambda: array("Q"))
    before: defaultdict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    """By scorer: whether the better candidate beats the worse one."""
    after: defaultdict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    """Whether it still does after one of the two was changed."""

    def add(self, records: Sequence[Record]) -> None:
        """Take records of a better candidate, a worse one, and one of them changed, which is of the same quality."""
        self.prompts.extend(map(prompt_name, records))
        better_changed = np.array([record.quality[2] == record.quality[0] for record in records])
        for scorer in records[0].rewards:
            better, worse, changed = np.array([record.rewards[scorer] for record in records]).T
            after = np.where(better_changed, changed, better), np.where(better_changed, worse, changed)
            self.before[scorer].extend(outcomes(better, worse))
            self.after[scorer].extend(outcomes(*after))


@dataclass(slots=True)
class Referenced:
    """The items of a data set that have several references."""

    prompts: array[int] = field(default_factory=lambda: array("Q"))
    shares: defaultdict[tuple[str, str], array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    """By what was made of the rewards (`FIRST_REFERENCE`, or an aggregate) and scorer: pairs in the right order."""

    def add(self, records: Sequence[Record]) -> None:
        """Take the records that have several references, and candidates of unequal quality."""
        items = [record for record in records if record.by_reference and len(set(record.quality)) > 1]
        self.prompts.extend(map(prompt_name, items))
        quality = [item.quality for item in items]
        for scorer in items[0].rewards if items else ():
            rewards = [(item.by_reference or {})[scorer] for item in items]
            self.shares[FIRST_REFERENCE, scorer].extend(ordered_shares(quality, [each[0] for each in rewards]))
            for how in AGGREGATES:
                self.shares[how, scorer].extend(ordered_shares(quality, [aggregated(each, how) for each in rewards]))


@dataclass(frozen=True, slots=True)
class Survey:
    """Numbers of the records that a summary needs."""

    manifest: Manifest
    by_task: dict[Task, Outcomes]
    """Of all tasks but sensitivity."""
    perturbed: dict[tuple[str, str], Perturbed]
    """By data set and perturbation."""
    referenced: dict[str, Referenced]
    """By data set."""
    draws: dict[str, Draws]
    """Best of N, by data set."""
    scored: dict[str, list[Record]]
    """The records of benchmarks with rules of their own, without their texts: benchmarks have a fixed size."""
    worst: list[WrongPair]
    """The worst mistakes of the model, worst first."""


def survey_of(manifest: Manifest, records: Iterable[Record]) -> Survey:
    """Read records once, in their order."""
    collected: defaultdict[Task, Collected] = defaultdict(Collected)
    perturbed: defaultdict[tuple[str, str], Perturbed] = defaultdict(Perturbed)
    referenced: defaultdict[str, Referenced] = defaultdict(Referenced)
    draws: defaultdict[str, Draws] = defaultdict(Draws)
    scored: defaultdict[str, list[Record]] = defaultdict(list)
    worst: list[WrongPair] = []
    official = {facts.name for facts in manifest.datasets if facts.scoring}
    for chunk in chunks(records):
        task, dataset = chunk[0].task, chunk[0].dataset
        if task == "sensitivity":
            for perturbation, own in _by_domain(chunk):
                perturbed[dataset, perturbation].add(own)
            continue
        collected[task].add(chunk)
        if any(record.by_reference for record in chunk):
            referenced[dataset].add(chunk)
        if task == "best of N":
            draws[dataset].add(chunk)
        if dataset in official:
            scored[dataset] += chunk
        worst = heapq.nlargest(MAX_MISTAKES, [*worst, *wrong_pairs(chunk)])
    by_task = {task: columns.outcomes(task, manifest.scorers) for task, columns in collected.items()}
    return Survey(
        manifest,
        {task: found for task, found in by_task.items() if found is not None},
        dict(perturbed),
        {dataset: found for dataset, found in referenced.items() if found.prompts},
        dict(draws),
        dict(scored),
        worst,
    )


def _by_domain(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    domains = dict.fromkeys(record.domain or "" for record in records)
    return ((domain, [record for record in records if (record.domain or "") == domain]) for domain in domains)


def summarise(directory: str | Path) -> Summary:
    """Read the records of an evaluation one by one, without their texts, and summarise them.

    Raises:
        InputError: a file is damaged or missing.
    """
    return summary_of(survey_of(read_manifest(directory), read_records(directory)), directory)


def summary_of(found: Survey, directory: str | Path) -> Summary:
    """Return the summary of what was kept of the records in a directory."""
    facts, scorers = found.manifest.datasets, found.manifest.scorers
    return Summary(
        found.manifest,
        tuple(_results(found)),
        tuple(_sensitivity(*key, own, scorers) for key, own in sorted(found.perturbed.items())),
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
        Path(directory),
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
        difference=paired_difference(shares[MODEL], shares[COMPARED_BASELINE], prompts) if MODEL in shares else None,
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


def _sensitivity(dataset: str, perturbation: str, own: Perturbed, scorers: Sequence[str]) -> Sensitivity:
    prompts = np.array(own.prompts)
    before, after = ({name: np.array(values[name]) for name in scorers} for values in (own.before, own.after))
    return Sensitivity(
        dataset,
        perturbation,
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
            for how in (FIRST_REFERENCE, *AGGREGATES)
        },
    )
