"""Choosing the best of N by reward: what the true quality does while N, and so the reward, rises."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from polar.core.metrics import Estimate, Values, Verdict, clustered_mean
from polar.evaluation.columns import prompt_name
from polar.evaluation.records import Record

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
    """The curve of a scorer over N = 1, 2, 4 ... 64, as far as items have as many candidates.

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
    """What choosing by reward among some of the candidates gives on average.

    Exact, without simulation: of all draws without replacement, the share in which the highest reward is at most r
    follows from counting. Equal rewards are chosen among at random.

    Args:
        quality: Of all candidates.
        rewards: Of the same candidates.
        draws: How many of them are drawn, 1 to all.

    Returns:
        Expected quality and expected reward of the chosen candidate.
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
