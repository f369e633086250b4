"""What a model's mistakes depend on: length, truncation, quality of the reference, and how sure the model is.

One pair of each item is looked at: its best candidate and its worst one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polar.core.metrics import Estimate, Values, clustered_mean
from polar.evaluation.columns import Candidates, Names, Outcomes, Part

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
    """Accuracy of one scorer on one data set, by other things than the domain."""

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
    """The diagnosis of the model on the items of a data set.

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
