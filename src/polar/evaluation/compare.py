"""Whether one scorer is better than another, on every part of what two evaluations have in common.

Scorers are compared item by item (`polar.core.metrics.ordered_shares`) on the items that both have, by a bootstrap over
prompts: items of one prompt stay together, and the interval needs no normal distribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polar.core.metrics import FEW_CLUSTERS, Estimate, Values, Verdict, clustered_mean
from polar.evaluation.columns import Names, Outcomes, Part
from polar.evaluation.manifest import Manifest
from polar.evaluation.records import MODEL, WITHOUT_REFERENCE

RESAMPLES = 4_000
CONFIDENCE = 0.95
CELLS = 1 << 22
"""Most numbers that a bootstrap holds at a time."""


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation."""

    directory: str
    label: str
    """Names its model; no two runs have the same."""
    manifest: Manifest

    def name_of(self, scorer: str) -> str:
        """What a scorer of its records is called in the report: baselines are the same in all runs."""
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
        """What the interval says about the first one; "cannot tell" also with fewer than `FEW_CLUSTERS` prompts."""
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
    """Where each of some different keys stands among others; -1 for those that are not there."""
    order = np.argsort(there)
    found = np.clip(np.searchsorted(there, wanted, sorter=order), 0, len(there) - 1)
    places: npt.NDArray[np.int64] = np.where(there[order[found]] == wanted, order[found], -1)
    return places


def bootstrap(values: Values, clusters: Sequence[str] | Names, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean when whole clusters are drawn with replacement (Efron and Tibshirani 1993).

    Clusters with the same sum and size are exchangeable, so how often each kind is drawn is one multinomial number:
    this is exact, and fast for accuracies, which have few kinds.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    clustered = np.column_stack([np.bincount(index, weights=values).round(9), np.bincount(index)])
    kinds, counts = np.unique(clustered, axis=0, return_counts=True)
    random, total = np.random.default_rng(seed), int(counts.sum())
    means: list[float] = []
    while len(means) < RESAMPLES:
        size = min(RESAMPLES - len(means), max(1, CELLS // len(kinds)))
        drawn = random.multinomial(total, counts / total, size) @ kinds
        means.extend((drawn[:, 0] / drawn[:, 1]).tolist())
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
