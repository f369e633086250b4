"""Analyses beyond accuracies: comparisons of scorers, best of N, diagnoses, and the worst mistakes.

Everything is computed from columns of numbers (`polar.evaluation.columns`); only the texts of the few worst mistakes
are looked up in the records.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polar.core.html import Excerpt
from polar.core.metrics import FEW_CLUSTERS, Estimate, Values, Verdict, clustered_mean
from polar.evaluation.columns import Candidates, Names, Outcomes, Part, digest, prompt_name
from polar.evaluation.manifest import Manifest
from polar.evaluation.records import MODEL, WITHOUT_REFERENCE, Record, read_records

# Comparisons: scorers item by item (`polar.core.metrics.ordered_shares`) on the items that both have, by a bootstrap
# over prompts: items of one prompt stay together, and the interval needs no normal distribution.

RESAMPLES = 4_000
CONFIDENCE = 0.95
MAX_NUMBERS_AT_ONCE = 1 << 22
"""Most numbers that a bootstrap holds at a time."""


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation."""

    directory: str
    label: str
    """Names its model; no two runs have the same."""
    manifest: Manifest

    def name_of(self, scorer: str) -> str:
        """Return the name of a scorer in the report; baselines have the same in all runs."""
        if scorer == WITHOUT_REFERENCE:
            return f"{self.label}, {scorer}"
        return self.label if scorer == MODEL else scorer


class Side(NamedTuple):
    """A scorer in a comparison."""

    label: str
    outcomes: Outcomes
    scorer: str
    """Its name in the outcomes."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Accuracy of the first scorer minus that of the second on the items of a part that both have."""

    part: Part
    first: str
    second: str
    difference: Estimate
    low: float
    """The interval of the bootstrap, at `CONFIDENCE`."""
    high: float
    left_out: int
    """Items of either one that the other does not have."""

    @property
    def verdict(self) -> Verdict:
        """Verdict on the first scorer by the interval; "cannot tell" also with fewer than `FEW_CLUSTERS` prompts."""
        if self.difference.clusters < FEW_CLUSTERS or self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if self.low > 0 else "worse"


def compare(parts: Iterable[Part], first: Side, second: Side) -> Iterator[Comparison]:
    """Compare two scorers on every part where they have items in common.

    Args:
        parts: Of the task of both outcomes.
        first: Of one run.
        second: Of another run, or of the same one.
    """
    ours, theirs = first.outcomes, second.outcomes
    partner = _places(ours.keys, theirs.keys)
    for part in parts:
        inside = ours.items(part)
        mine = inside[partner[inside] >= 0]
        if not len(mine):
            continue
        differences = ours.shares[first.scorer][mine] - theirs.shares[second.scorer][partner[mine]]
        prompts = ours.prompts[mine]
        low, high = bootstrap(differences, prompts)
        left_out = len(inside) + len(theirs.items(part)) - 2 * len(mine)
        difference = clustered_mean(differences, prompts)
        yield Comparison(part, first.label, second.label, difference, low, high, left_out)


def _places(wanted: Names, there: Names) -> npt.NDArray[np.int64]:
    """Return the place of every wanted key among others, -1 for missing ones; keys are unique."""
    order = np.argsort(there)
    found = np.clip(np.searchsorted(there, wanted, sorter=order), 0, len(there) - 1)
    places: npt.NDArray[np.int64] = np.where(there[order[found]] == wanted, order[found], -1)
    return places


def bootstrap(values: Values, clusters: Sequence[str] | Names, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the mean of resampled whole clusters (Efron and Tibshirani 1993).

    Clusters with the same sum and size are exchangeable, so how often each kind is drawn is one multinomial number:
    this is exact, and fast for accuracies, which have few kinds.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    clustered = np.column_stack([np.bincount(index, weights=values).round(9), np.bincount(index)])
    kinds, counts = np.unique(clustered, axis=0, return_counts=True)
    random, total = np.random.default_rng(seed), int(counts.sum())
    means: list[float] = []
    while len(means) < RESAMPLES:
        size = min(RESAMPLES - len(means), max(1, MAX_NUMBERS_AT_ONCE // len(kinds)))
        drawn = random.multinomial(total, counts / total, size) @ kinds
        means.extend((drawn[:, 0] / drawn[:, 1]).tolist())
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


# Best of N: true quality by N, while the reward rises.

DRAWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Point:
    """One N of the curve of one scorer."""

    draws: int
    quality: Estimate
    """Of the candidate that the scorer chooses."""
    gain: Estimate
    """The same minus the mean quality of the candidates, on the same items."""
    best: float
    """The mean quality if the best were chosen."""
    reward: float
    """Mean reward of the chosen candidate: it always rises."""
    change: Verdict | None
    """Quality beside that at half of N, on the items that have both; "worse" is over-optimisation."""


@dataclass(slots=True)
class Draws:
    """The items of a data set as numbers, one for each N of `DRAWS`; NaN where an item has fewer candidates."""

    prompts: array[int] = field(default_factory=lambda: array("Q"))
    mean: array[float] = field(default_factory=lambda: array("d"))
    """Quality of an item's candidates."""
    best: array[float] = field(default_factory=lambda: array("d"))
    """[items x N] The quality if the best were chosen."""
    quality: defaultdict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    """[items x N] By scorer: of what it chooses."""
    rewards: defaultdict[str, Values] = field(default_factory=lambda: defaultdict(lambda: np.zeros(len(DRAWS))))
    """By scorer: sums of the rewards of what it chooses, over the items."""

    def add(self, records: Sequence[Record]) -> None:
        """Take some records."""
        for record in records:
            able = [draws for draws in DRAWS if draws <= len(record.quality)]
            missing = [np.nan] * (len(DRAWS) - len(able))
            self.prompts.append(prompt_name(record))
            self.mean.append(float(np.mean(record.quality)))
            self.best.extend([best_of(record.quality, record.quality, draws)[0] for draws in able] + missing)
            for scorer, own in record.rewards.items():
                chosen = np.array([best_of(record.quality, own, draws) for draws in able])
                self.quality[scorer].extend([*chosen[:, 0], *missing])
                self.rewards[scorer][: len(able)] += chosen[:, 1]


def curve(items: Draws, scorer: str) -> list[Point]:
    """Return the curve of a scorer over N = 1, 2, 4 ... 64, as far as items have as many candidates.

    Items with fewer than N candidates are left out of that point, so points differ in their items where `quality.count`
    does; `gain` and `change` compare on the same items.
    """
    prompts, mean = np.array(items.prompts), np.array(items.mean)
    best, quality = (np.reshape(each, (-1, len(DRAWS))) for each in (items.best, items.quality[scorer]))
    points: list[Point] = []
    for place, draws in enumerate(DRAWS):
        able = np.flatnonzero(~np.isnan(quality[:, place]))
        if not len(able):
            break
        own, clusters = quality[able, place], prompts[able]
        half = quality[able, max(place - 1, 0)]
        points.append(
            Point(
                draws=draws,
                quality=clustered_mean(own, clusters),
                gain=clustered_mean(own - mean[able], clusters),
                best=float(best[able, place].mean()),
                reward=float(items.rewards[scorer][place] / len(able)),
                change=clustered_mean(own - half, clusters).verdict() if draws > 1 else None,
            )
        )
    return points


def best_of(quality: Sequence[float], rewards: Sequence[float], draws: int) -> tuple[float, float]:
    """Return the expected quality and reward when the candidate with the highest reward of a random draw is chosen.

    Exact, without simulation: of all draws without replacement, the share in which the highest reward is at most r
    follows from counting. Equal rewards are chosen among at random.

    Args:
        quality: Of all candidates.
        rewards: Of the same candidates.
        draws: How many of them are drawn, 1 to all.

    """
    values, counts = np.unique(np.asarray(rewards, np.float64), return_counts=True)
    if not 1 <= draws <= counts.sum():
        raise ValueError(f"expected 1 to {counts.sum()} draws, found {draws}")
    below = np.concatenate([[0], np.cumsum(counts)])
    steps = np.arange(draws)
    at_most = np.prod(np.clip(below[:, None] - steps, 0, None) / (counts.sum() - steps), axis=1)
    chances = np.diff(at_most)
    blocks = np.searchsorted(values, np.asarray(rewards, np.float64))
    means = np.bincount(blocks, weights=np.asarray(quality, np.float64)) / counts
    return float(chances @ means), float(chances @ values)


# Diagnoses: length, truncation, quality of the reference, and confidence. One pair of each item counts: its
# best candidate and its worst one.

LENGTH_RATIOS = (0.5, 0.8, 1.25, 2.0)
"""Length of the better candidate over that of the worse one."""
CONFIDENCES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""sigmoid(|margin|), the probability that Bradley and Terry give to the candidate with the higher reward."""


@dataclass(frozen=True, slots=True)
class Bin:
    """The items between two limits."""

    low: float | None
    """None: no limit on this side."""
    high: float | None
    mean: float
    """Of the quantity that the bins divide."""
    accuracy: Estimate


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Accuracy of one scorer on one data set by length, reference quality, truncation and confidence."""

    dataset: str
    scorer: str
    length_correlation: float | None
    """Spearman's, of reward and length of candidates, both beside the mean of their item; None when one is constant."""
    by_length: tuple[Bin, ...]
    """Ratio of the lengths of the better and the worse candidate, between `LENGTH_RATIOS`."""
    by_reference_quality: tuple[Bin, ...]
    """Thirds of the items by the known quality of their reference; empty when it is not known."""
    by_truncation: dict[str, Estimate]
    """"whole" and "cut"."""
    by_confidence: tuple[Bin, ...]
    """Between `CONFIDENCES`; calibrated rewards have an accuracy equal to the mean."""
    calibration_error: float
    """Expected calibration error: mean distance of confidence and accuracy over those bins, weighted by items."""


def diagnose(dataset: str, outcomes: Outcomes, scorer: str) -> Diagnosis:
    """Return the diagnosis of the model on the items of a data set.

    Args:
        dataset: Its name.
        outcomes: Of its task.
        scorer: How the model is called.
    """
    items = outcomes.items(Part(outcomes.task, dataset))
    margins, prompts = outcomes.margins[items], outcomes.prompts[items]
    right = (np.sign(margins) + 1) / 2
    by_confidence = _bins(1 / (1 + np.exp(-np.abs(margins))), CONFIDENCES, right, prompts)
    quality, cut = outcomes.reference_quality[items], outcomes.cut[items]
    known = np.flatnonzero(~np.isnan(quality))
    thirds = tuple(np.unique(np.quantile(quality[known], (1 / 3, 2 / 3)))) if known.size else ()
    return Diagnosis(
        dataset=dataset,
        scorer=scorer,
        length_correlation=_length_correlation(outcomes.candidates, outcomes.candidates.of(items)),
        by_length=_bins(outcomes.length_ratios[items], LENGTH_RATIOS, right, prompts),
        by_reference_quality=_bins(quality[known], thirds, right[known], prompts[known]),
        by_truncation={
            name: clustered_mean(right[mask], prompts[mask])
            for name, mask in (("whole", ~cut), ("cut", cut))
            if mask.any()
        },
        by_confidence=by_confidence,
        calibration_error=sum(abs(bin_.mean - bin_.accuracy.mean) * bin_.accuracy.count for bin_ in by_confidence)
        / max(len(items), 1),
    )


def _bins(values: Values, limits: Sequence[float], right: Values, prompts: Names) -> tuple[Bin, ...]:
    """Accuracy between the limits; empty bins are left out."""
    edges: list[float | None] = [None, *limits, None]
    place: npt.NDArray[np.int64] = np.searchsorted(np.array(limits), values, side="right")
    return tuple(
        Bin(
            edges[number],
            edges[number + 1],
            float(values[inside].mean()),
            clustered_mean(right[inside], prompts[inside]),
        )
        for number in range(len(limits) + 1)
        if (inside := np.flatnonzero(place == number)).size
    )


def _length_correlation(candidates: Candidates, inside: npt.NDArray[np.bool_]) -> float | None:
    from scipy.stats import spearmanr  # takes a second to import

    centred = candidates.centred_reward[inside], candidates.centred_length[inside]
    found = float(spearmanr(*centred).statistic) if all(np.ptp(each) > 0 for each in centred) else float("nan")
    return None if np.isnan(found) else found


# Mistakes: the pairs that models get most wrong, with their texts, for people to read.

MAX_MISTAKES = 12
"""Of each model."""
EXCERPT_CHARACTERS = 4000
"""Most characters of a text that are shown."""

WrongPair = tuple[float, str, int, int, int, int]
"""How far the better candidate's reward is below the other one's; the item's data set and number, the two candidates,
and the item's digest."""
Key = tuple[int, int]
"""Identity of an item in two runs: its digest, and its number among equal items."""


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
    """Yield the mistakes of the model of a run, at most one for each item."""
    for record in records:
        if MODEL in record.rewards:
            gap, better, worse = _worst_pair(record.quality, record.rewards[MODEL])
            if gap > 0:
                yield gap, record.dataset, record.number, better, worse, digest(record)


def _worst_pair(quality: Sequence[float], rewards: Sequence[float]) -> tuple[float, int, int]:
    """Return the pair of unequal quality that is most in the wrong order; the gap is minus infinity without one."""
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
    return Excerpt((text or "")[:EXCERPT_CHARACTERS], len(text or ""))
