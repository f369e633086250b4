"""Accuracies, rank correlations and areas under curves, with standard errors that are clustered by prompt.

Items of one prompt (several negatives, several pairs of a ranking) are not independent. Their standard error is the
clustered one of Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640: with s_ic item i of cluster c, n items
and m their mean, it is sqrt(sum over c of (sum over i of (s_ic - m))^2) / n.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Lists = Sequence[Sequence[float]]
"""Numbers of the candidates of every item."""
Clusters = Sequence[Hashable] | npt.NDArray[np.generic]
"""The prompt of every item; an array of numbers takes less memory than names."""
Verdict = Literal["better", "worse", "cannot tell"]

FEW_CLUSTERS = 10
"""Least number of prompts for a verdict: with fewer the standard error itself is unreliable."""

STRETCH = 512
"""Items whose pairs are in memory together."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over items with its standard error."""

    mean: float
    standard_error: float | None
    """Clustered by prompt; None when there is only one prompt."""
    count: int
    """Items."""
    clusters: int
    """Prompts."""

    def verdict(self) -> Verdict:
        """Verdict on a difference at two standard errors; "cannot tell" also with fewer than `FEW_CLUSTERS` prompts."""
        if self.standard_error is None or self.clusters < FEW_CLUSTERS or abs(self.mean) <= 2 * self.standard_error:
            return "cannot tell"
        return "better" if self.mean > 0 else "worse"


def outcomes(better: Sequence[float] | Values, worse: Sequence[float] | Values) -> Values:
    """1 where the better candidate has the higher reward, 0 where it has the lower one, one half for a tie.

    Args:
        better: Rewards of the candidates that should win, one per item.
        worse: Rewards of the others, in the same order.

    Raises:
        ValueError: the numbers of rewards differ or a reward is not finite.
    """
    first, second = np.asarray(better, np.float64), np.asarray(worse, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} rewards of better candidates, but {second.size} of worse ones")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a reward is not finite, so it cannot be compared")
    return (np.sign(first - second) + 1) / 2


def clustered_mean(values: Sequence[float] | Values, clusters: Clusters) -> Estimate:
    """The mean of the items and its clustered standard error (module docstring).

    Args:
        values: One per item.
        clusters: The prompt of every item.

    Raises:
        ValueError: there are no items, or the lengths differ.
    """
    items = np.asarray(values, np.float64)
    if not items.size or len(clusters) != items.size:
        raise ValueError(f"expected a cluster for each of at least one item, found {len(clusters)} for {items.size}")
    index, count = _numbered(clusters)
    mean = float(items.mean())
    sums = np.bincount(index, weights=items - mean)
    error = float(np.sqrt(np.square(sums).sum()) / items.size) if count > 1 else None
    return Estimate(mean, error, items.size, count)


def pairwise_accuracy(better: Sequence[float], worse: Sequence[float], clusters: Clusters) -> Estimate:
    """Return the share of items whose better candidate has the higher reward; see `outcomes` and `clustered_mean`."""
    return clustered_mean(outcomes(better, worse), clusters)


def paired_difference(first: Values, second: Values, clusters: Clusters) -> Estimate:
    """Accuracy of the first scorer minus that of the second on the same items.

    Differences are taken item by item, so what both find hard or easy cancels and the standard error is that of the
    difference (Miller 2024, section on paired differences).

    Args:
        first: `outcomes` of one scorer.
        second: `outcomes` of the other, in the same order.
        clusters: The prompt of every item.
    """
    if first.shape != second.shape:
        raise ValueError(f"{first.size} items of the first scorer, but {second.size} of the second")
    return clustered_mean(first - second, clusters)


def ordered_shares(quality: Lists, rewards: Lists) -> Values:
    """For every item, the share of its candidate pairs of unequal quality that the rewards put in the same order.

    A tie of rewards counts one half. With two candidates this is `outcomes`; with right and wrong ones it is the area
    under the ROC curve within the item. NaN for an item whose candidates are all of the same quality.

    Args:
        quality: Of every item's candidates.
        rewards: Of the same candidates.
    """
    return _by_count(quality, rewards, lambda gaps, signs, pairs: (np.sum(gaps * signs, axis=(1, 2)) / pairs + 1) / 2)


def rank_correlations(quality: Lists, rewards: Lists) -> Values:
    """Kendall's tau-b of quality and reward for every item, -1 to 1; 0 when all rewards are tied.

    NaN for an item whose candidates are all of the same quality.
    """

    def tau(gaps: Values, signs: Values, pairs: Values) -> Values:
        ordered = np.abs(signs).sum(axis=(1, 2))
        products: Values = np.sum(gaps * signs, axis=(1, 2)) / np.sqrt(pairs * np.where(ordered, ordered, 1))
        return products

    return _by_count(quality, rewards, tau)


def _by_count(quality: Lists, rewards: Lists, score: Callable[[Values, Values, Values], Values]) -> Values:
    """A score of every item from the signs of all pairs of its candidates, for all items of a size at a time."""
    if list(map(len, quality)) != list(map(len, rewards)):
        raise ValueError("expected a reward for every candidate")
    result = np.full(len(quality), np.nan)
    sizes = np.array([len(each) for each in quality])
    for size in np.unique(sizes):
        for start in range(0, len(chosen := np.flatnonzero(sizes == size)), STRETCH):
            part = chosen[start : start + STRETCH]
            values = [np.array([lists[i] for i in part], np.float64) for lists in (quality, rewards)]
            if not all(np.isfinite(each).all() for each in values):
                raise ValueError("a reward or quality is not finite, so it cannot be compared")
            gaps, signs = (np.sign(each[:, :, None] - each[:, None, :]) for each in values)
            pairs = np.abs(gaps).sum(axis=(1, 2))
            sound = pairs > 0
            result[part[sound]] = score(gaps[sound], signs[sound], pairs[sound])
    return result


def area_under_curve(right: npt.ArrayLike, rewards: npt.ArrayLike, clusters: Clusters) -> Estimate:
    """Return the share of pairs of a right and a wrong answer, also of different prompts, whose rewards are in order.

    The standard error is clustered by prompt (Obuchowski 1997, Biometrics 53, without the factor C/(C-1) for C
    clusters); for clusters of one it is about that of DeLong et al. 1988.

    Args:
        right: Whether each answer is right.
        rewards: Of the answers.
        clusters: Their prompts.

    Raises:
        ValueError: all answers are right, or all are wrong.
    """
    from scipy.stats import rankdata  # takes a second to import, and few need it

    labels, values = np.asarray(right, bool), np.asarray(rewards, np.float64)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        raise ValueError("expected right and wrong answers, found only one kind")
    ranks = rankdata(values)
    # For each answer: the share of answers of the other kind that are on its right side.
    placement = np.empty(values.size)
    placement[labels] = (ranks[labels] - rankdata(values[labels])) / negatives
    placement[~labels] = 1 - (ranks[~labels] - rankdata(values[~labels])) / positives
    area = float(placement[labels].mean())
    index, count = _numbered(clusters)
    influence = np.bincount(index, weights=(placement - area) / np.where(labels, positives, negatives))
    error = float(np.sqrt(np.square(influence).sum())) if count > 1 else None
    return Estimate(area, error, values.size, count)


def _numbered(clusters: Clusters) -> tuple[npt.NDArray[np.int64], int]:
    """Every item's cluster as a number, and how many clusters there are."""
    if isinstance(clusters, np.ndarray):
        names, index = np.unique(clusters, return_inverse=True)
        return index, len(names)
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.int64), len(numbers)
