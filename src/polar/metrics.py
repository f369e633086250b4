"""Accuracies with standard errors that know that several items share a prompt.

Items of one prompt (several negatives, several pairs of a ranking) are not independent. Their standard error is the
clustered one of Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640: with s_ic item i of cluster c, n items
and m their mean, it is sqrt(sum over c of (sum over i of (s_ic - m))^2) / n.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "cannot tell"]

FEW_CLUSTERS = 10
"""With fewer prompts the standard error itself is not to be trusted, so there is no verdict."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over items and how sure it is."""

    mean: float
    standard_error: float | None
    """Clustered by prompt; None when there is only one prompt."""
    count: int
    """Items."""
    clusters: int
    """Prompts."""

    def verdict(self) -> Verdict:
        """What a difference says at two standard errors; "cannot tell" also with fewer than `FEW_CLUSTERS` prompts."""
        if self.standard_error is None or self.clusters < FEW_CLUSTERS or abs(self.mean) <= 2 * self.standard_error:
            return "cannot tell"
        return "better" if self.mean > 0 else "worse"


def outcomes(better: Sequence[float], worse: Sequence[float]) -> Values:
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


def clustered_mean(values: Sequence[float] | Values, clusters: Sequence[Hashable]) -> Estimate:
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
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    mean = float(items.mean())
    sums = np.bincount(index, weights=items - mean)
    error = float(np.sqrt(np.square(sums).sum()) / items.size) if len(numbers) > 1 else None
    return Estimate(mean, error, items.size, len(numbers))


def pairwise_accuracy(better: Sequence[float], worse: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """How often the better candidate has the higher reward; see `outcomes` and `clustered_mean`."""
    return clustered_mean(outcomes(better, worse), clusters)


def paired_difference(first: Values, second: Values, clusters: Sequence[Hashable]) -> Estimate:
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
