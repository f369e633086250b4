"""One pass over the records of an evaluation: of each, what the summary and the report need is kept as numbers."""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from polar.core.metrics import ordered_shares, outcomes
from polar.core.references import AGGREGATES, aggregated
from polar.evaluation.best_of_n import Draws
from polar.evaluation.columns import Collected, Outcomes, chunks, prompt_name
from polar.evaluation.manifest import Manifest, Task
from polar.evaluation.mistakes import MISTAKES, WrongPair, wrong_pairs
from polar.evaluation.records import Record

FIRST = "the first reference alone"


@dataclass(slots=True)
class Probed:
    """The items of one probe on one data set."""

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
    """By what was made of the rewards (`FIRST`, or an aggregate) and scorer: pairs in the right order."""

    def add(self, records: Sequence[Record]) -> None:
        """Take the records that have several references, and candidates of unequal quality."""
        items = [record for record in records if record.by_reference and len(set(record.quality)) > 1]
        self.prompts.extend(map(prompt_name, items))
        quality = [item.quality for item in items]
        for scorer in items[0].rewards if items else ():
            rewards = [(item.by_reference or {})[scorer] for item in items]
            self.shares[FIRST, scorer].extend(ordered_shares(quality, [each[0] for each in rewards]))
            for how in AGGREGATES:
                self.shares[how, scorer].extend(ordered_shares(quality, [aggregated(each, how) for each in rewards]))


@dataclass(frozen=True, slots=True)
class Survey:
    """What is kept of the records."""

    manifest: Manifest
    by_task: dict[Task, Outcomes]
    """Of all tasks but sensitivity."""
    probed: dict[tuple[str, str], Probed]
    """By data set and probe."""
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
    probed: defaultdict[tuple[str, str], Probed] = defaultdict(Probed)
    referenced: defaultdict[str, Referenced] = defaultdict(Referenced)
    draws: defaultdict[str, Draws] = defaultdict(Draws)
    scored: defaultdict[str, list[Record]] = defaultdict(list)
    worst: list[WrongPair] = []
    official = {facts.name for facts in manifest.datasets if facts.scoring}
    for chunk in chunks(records):
        task, dataset = chunk[0].task, chunk[0].dataset
        if task == "sensitivity":
            for probe, own in _by_domain(chunk):
                probed[dataset, probe].add(own)
            continue
        collected[task].add(chunk)
        if any(record.by_reference for record in chunk):
            referenced[dataset].add(chunk)
        if task == "best of N":
            draws[dataset].add(chunk)
        if dataset in official:
            scored[dataset] += chunk
        worst = heapq.nlargest(MISTAKES, [*worst, *wrong_pairs(chunk)])
    by_task = {task: columns.outcomes(task, manifest.scorers) for task, columns in collected.items()}
    return Survey(
        manifest,
        {task: found for task, found in by_task.items() if found is not None},
        dict(probed),
        {dataset: found for dataset, found in referenced.items() if found.prompts},
        dict(draws),
        dict(scored),
        worst,
    )


def _by_domain(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    domains = dict.fromkeys(record.domain or "" for record in records)
    return ((domain, [record for record in records if (record.domain or "") == domain]) for domain in domains)
