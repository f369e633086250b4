"""The items of an evaluation as columns of numbers, the source of summaries, diagnoses and comparisons.

Records come one by one and are forgotten; of each, a few numbers stay (about 130 bytes with seven scorers, where the
record itself takes two kilobytes), so that memory hardly grows with the data.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from polar.core.metrics import Values, ordered_shares, rank_correlations
from polar.evaluation.manifest import Task
from polar.evaluation.records import MODEL, SHARD_ITEMS, Record

Numbers = npt.NDArray[np.int64]
Names = npt.NDArray[np.uint64]
"""Hashes of names."""
STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the items; None does not narrow it down."""

    task: Task
    dataset: str | None = None
    domain: str | None = None
    slice: str | None = None

    @property
    def whole(self) -> bool:
        """All items of a data set, or of a task."""
        return self.domain is None and self.slice is None


Label = tuple[str, str | None, tuple[str, ...]]
"""Data set, domain and slices of an item."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The items of one task that have candidates of unequal quality, in order; every column has an entry for each."""

    task: Task
    labels: tuple[Label, ...]
    label: Numbers
    """Which of the labels."""
    keys: Names
    """Identity of an item in two runs: a hash of its labels and lengths, and its number among equal items.
    References may differ, because runs with different references are compared."""
    prompts: Names
    """By which items are clustered."""
    shares: dict[str, Values]
    """By scorer: the share of an item's pairs that are in the right order (`polar.core.metrics.ordered_shares`)."""
    correlations: dict[str, Values] | None
    """Kendall's tau-b, if items have three or more candidates."""
    margins: Values
    """Of the model: reward of the best candidate minus that of the worst; NaN without a model."""
    length_ratios: Values
    """Characters of the best candidate over those of the worst, each plus one."""
    reference_quality: Values
    """NaN where it is not known."""
    cut: npt.NDArray[np.bool_]
    """The model did not see all of the item."""
    copies: npt.NDArray[np.bool_]
    """A best candidate is the reference itself, word by word."""
    candidates: Candidates

    @property
    def scorers(self) -> tuple[str, ...]:
        """Those that have rewards here."""
        return tuple(self.shares)

    @property
    def datasets(self) -> tuple[str, ...]:
        """In the order of the records."""
        return tuple(dict.fromkeys(label[0] for label in self.labels))

    def items(self, part: Part) -> Numbers:
        """Return the numbers of the items in a part of the task."""
        return np.flatnonzero(np.isin(self.label, [i for i, label in enumerate(self.labels) if _belongs(label, part)]))

    def parts(self, dataset: str) -> Iterator[Part]:
        """Yield a data set, then its domains and slices, except those that hold all of its items."""
        whole = Part(self.task, dataset)
        own = [label for label in self.labels if label[0] == dataset]
        domains = sorted({domain for _, domain, _ in own if domain is not None})
        slices = sorted({name for _, _, slices in own for name in slices})
        yield whole
        narrower = [Part(self.task, dataset, domain) for domain in domains]
        narrower += [Part(self.task, dataset, slice=name) for name in slices]
        yield from (part for part in narrower if any(not _belongs(label, part) for label in own))


@dataclass(frozen=True, slots=True)
class Candidates:
    """All candidates of the items one after the other."""

    count: Numbers
    """Per item."""
    best: npt.NDArray[np.bool_]
    """Whether it is as good as the best one of its item."""
    rewards: dict[str, Values]
    """By scorer; only for verifiable correctness, where rewards are compared between items."""
    centred_reward: Values
    """Of the model: minus the mean of its item."""
    centred_length: Values
    """log(1 + characters), minus the mean of its item."""

    def of(self, items: Numbers) -> npt.NDArray[np.bool_]:
        """Return a mask of the candidates of some items."""
        chosen = np.zeros(len(self.count), bool)
        chosen[items] = True
        return np.repeat(chosen, self.count)


def _belongs(label: Label, part: Part) -> bool:
    dataset, domain, slices = label
    return (
        part.dataset in (None, dataset)
        and part.domain in (None, domain)
        and (part.slice is None or part.slice in slices)
    )


def digest(record: Record) -> int:
    """Return a hash of an item's labels and lengths, the same within this process."""
    what = (record.dataset, record.task, record.domain, record.prompt_id, record.quality, record.lengths)
    return hash(what) & (2**64 - 1)


def prompt_name(record: Record) -> int:
    """Return a hash of the prompt's id, the same in all runs."""
    return int.from_bytes(hashlib.blake2b(record.prompt_id.encode(), digest_size=8).digest(), "big")


def chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield up to `SHARD_ITEMS` records of one data set and task at a time; perturbed items come between the others."""
    for _, own in groupby(records, lambda record: record.dataset):
        while read := list(islice(own, SHARD_ITEMS)):
            for task in dict.fromkeys(record.task for record in read):
                yield [record for record in read if record.task == task]


@dataclass(slots=True)
class Collected:
    """Columns while they grow, in pieces, by the names of their fields."""

    labels: dict[Label, int] = field(default_factory=dict)
    columns: defaultdict[str, list[npt.NDArray[np.generic]]] = field(default_factory=lambda: defaultdict(list))
    correlations: defaultdict[str, list[Values]] = field(default_factory=lambda: defaultdict(list))
    """By scorer: of the items that have three or more candidates; that of two follows from their share."""

    def add(self, records: Sequence[Record]) -> None:
        """Take the numbers of some records of one task; those without candidates of unequal quality are left out."""
        items = [record for record in records if len(set(record.quality)) > 1]
        if not items:
            return
        quality = [item.quality for item in items]
        best, worst = [int(np.argmax(each)) for each in quality], [int(np.argmin(each)) for each in quality]
        several = [place for place, each in enumerate(quality) if len(each) > 2]
        label = [self.labels.setdefault((item.dataset, item.domain, item.slices), len(self.labels)) for item in items]
        self.put("label", label, np.int64)
        self.put("keys", list(map(digest, items)), np.uint64)
        self.put("prompts", list(map(prompt_name, items)), np.uint64)
        self.put("reference_quality", [_number(item.reference_quality) for item in items])
        self.put("cut", [any(item.cut_tokens) for item in items], bool)
        self.put("copies", [_best_is_reference(item) for item in items], bool)
        self.put("count", list(map(len, quality)), np.int64)
        ratios = [(i.lengths[b] + 1) / (i.lengths[w] + 1) for i, b, w in zip(items, best, worst, strict=True)]
        self.put("length_ratios", ratios)
        self.put("centred_length", np.concatenate([_centred(np.log1p(item.lengths)) for item in items]))
        self.put("best", [each == max(own) for own in quality for each in own], bool)
        for scorer in items[0].rewards:
            rewards = [item.rewards[scorer] for item in items]
            self.put(f"share {scorer}", ordered_shares(quality, rewards))
            if several:
                own = rank_correlations([quality[i] for i in several], [rewards[i] for i in several])
                self.correlations[scorer].append(own)
            if items[0].task == "verifiable correctness":
                self.put(f"reward {scorer}", np.concatenate(rewards))
        model = [item.rewards.get(MODEL, (np.nan,) * len(item.quality)) for item in items]
        self.put("margins", [own[b] - own[w] for own, b, w in zip(model, best, worst, strict=True)])
        self.put("centred_reward", np.concatenate([_centred(np.array(own)) for own in model]))

    def put(self, column: str, values: npt.ArrayLike, kind: npt.DTypeLike = np.float64) -> None:
        """Append a piece to a column."""
        self.columns[column].append(np.asarray(values, kind))

    def outcomes(self, task: Task, scorers: Sequence[str]) -> Outcomes | None:
        """Return the complete columns; None without an item that has candidates of unequal quality."""
        if not self.columns:
            return None
        whole = {name: np.concatenate(self.columns.pop(name)) for name in list(self.columns)}

        def by_scorer(prefix: str) -> dict[str, Values]:
            return {name: whole[f"{prefix} {name}"] for name in scorers if f"{prefix} {name}" in whole}

        return Outcomes(
            task=task,
            labels=tuple(self.labels),
            keys=_made_unique(whole["keys"]),
            shares=by_scorer("share"),
            correlations={name: self._correlations(name, whole) for name in scorers if name in self.correlations}
            or None,
            candidates=Candidates(
                rewards=by_scorer("reward"),
                **{name: whole[name] for name in ("count", "best", "centred_reward", "centred_length")},
            ),
            **{
                name: whole[name]
                for name in ("label", "prompts", "margins", "length_ratios", "reference_quality", "cut", "copies")
            },
        )

    def _correlations(self, scorer: str, whole: dict[str, Any]) -> Values:
        """Of all items: with two candidates it is 1, 0 for a tie or -1, where the share is 1, one half or 0."""
        values: Values = 2 * whole[f"share {scorer}"] - 1
        values[whole["count"] > 2] = np.concatenate(self.correlations.pop(scorer))
        return values


def _made_unique(keys: Names) -> Names:
    """Return the keys with repeated ones changed by their place among equals."""
    order = np.argsort(keys, kind="stable")
    ordered, place = keys[order], np.arange(len(keys))
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    nth = place - np.maximum.accumulate(np.where(new, place, 0))
    result = np.empty_like(keys)
    result[order] = ordered + nth.astype(np.uint64) * STEP
    return result


def _centred(values: Values) -> Values:
    centred: Values = values - values.mean()
    return centred


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _best_is_reference(item: Record) -> bool:
    best = max(item.quality)
    return any(copy and quality == best for copy, quality in zip(item.copies_reference, item.quality, strict=True))
