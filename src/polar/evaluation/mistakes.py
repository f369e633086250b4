"""The pairs that models get most wrong, with their texts: for people to read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from polar.corpus.report import Excerpt
from polar.evaluation.columns import Part, digest
from polar.evaluation.compare import Run
from polar.evaluation.records import MODEL, Record, read_records

MISTAKES = 12
"""Of each model."""
EXCERPT = 4000
"""Most characters of a text that are shown."""

WrongPair = tuple[float, str, int, int, int, int]
"""How far the better candidate's reward is below the other one's; the item's data set and number, the two candidates,
and the item's digest."""
Key = tuple[int, int]
"""What makes an item the same in two runs: its digest, and which one of equal items it is."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """Two candidates that a model puts in the wrong order."""

    part: Part
    id: str | None
    models: tuple[str, ...]
    """To whose worst mistakes it belongs."""
    prompt: Excerpt
    reference: Excerpt
    better: Excerpt
    worse: Excerpt
    policies: tuple[str | None, str | None]
    """Of the better and of the worse candidate."""
    quality: tuple[float, float]
    rewards: dict[str, tuple[float, float]]
    """By name of the scorer: of the better and of the worse candidate."""


def wrong_pairs(records: Sequence[Record]) -> Iterator[WrongPair]:
    """The mistakes of the model of a run, one for each item at most."""
    for record in records:
        if MODEL in record.rewards:
            gap, better, worse = _worst_pair(record.quality, record.rewards[MODEL])
            if gap > 0:
                yield gap, record.dataset, record.number, better, worse, digest(record)


def _worst_pair(quality: Sequence[float], rewards: Sequence[float]) -> tuple[float, int, int]:
    """The pair of unequal quality that is most in the wrong order; minus infinity when all are equal."""
    known, values = np.asarray(quality), np.asarray(rewards)
    gaps = np.where(known[:, None] > known[None, :], values[None, :] - values[:, None], -np.inf)
    better, worse = np.unravel_index(int(gaps.argmax()), gaps.shape)
    return float(gaps[better, worse]), int(better), int(worse)


def read_mistakes(found: Sequence[tuple[Run, Sequence[WrongPair]]]) -> Iterator[Mistake]:
    """Look up the texts of mistakes, and the rewards of all scorers; a pair that several models get wrong comes once.

    Args:
        found: Every run with its worst pairs.
    """
    digests = {pair[-1] for _, pairs in found for pair in pairs}
    wanted: defaultdict[tuple[Key, int, int], list[str]] = defaultdict(list)
    records: dict[Key, Record] = {}
    rewards: defaultdict[Key, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for run, pairs in found if digests else ():
        met: Counter[int] = Counter()
        keys: dict[tuple[str, int], Key] = {}
        for record in read_records(run.directory, texts=True):
            if (name := digest(record)) in digests:
                met[name] += 1
                key = keys[record.dataset, record.number] = name, met[name]
                records.setdefault(key, record)
                named = {run.name_of(scorer): values for scorer, values in record.rewards.items()}
                rewards[key] = named | rewards[key]
        for _, dataset, number, better, worse, _ in pairs:
            wanted[keys[dataset, number], better, worse].append(run.label)
    for (key, better, worse), models in wanted.items():
        record, candidates = records[key], records[key].candidates or ()
        yield Mistake(
            part=Part(record.task, record.dataset, record.domain),
            id=record.id,
            models=tuple(models),
            prompt=_excerpt(record.prompt),
            reference=_excerpt(record.reference),
            better=_excerpt(candidates[better]),
            worse=_excerpt(candidates[worse]),
            policies=(record.policies[better], record.policies[worse]),
            quality=(record.quality[better], record.quality[worse]),
            rewards={name: (values[better], values[worse]) for name, values in rewards[key].items()},
        )


def _excerpt(text: str | None) -> Excerpt:
    return Excerpt((text or "")[:EXCERPT], len(text or ""))
