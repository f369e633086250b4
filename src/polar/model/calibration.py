"""The scale of a checkpoint's rewards, measured on reference data.

Bradley-Terry training only sees differences between rewards of one prompt and reference, so zero and unit of the raw
reward mean nothing by themselves and differ between checkpoints. A calibration measures them: mean and standard
deviation for z-scores, and the temperature T that makes sigmoid(margin / T) the probability that the better one of two
answers wins (temperature scaling: Guo et al. 2017, arXiv 1706.04599, section 4.2, here with one logit, the margin).
The weights stay as they are; `polar.core.checkpoint` keeps the result and applies it.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polar.core.checkpoint import BUNDLED, Calibration, save_calibration
from polar.core.errors import InputError
from polar.core.files import new_directory, on_disk
from polar.core.records import Group, Preference
from polar.data import formats, record_rows
from polar.data.fields import Row
from polar.data.readers import OnBadRow, ReadReport, rows

LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Levels of the quantiles."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Candidates whose rewards are measured."""

    group: Group
    ranked: bool
    """The candidates are ordered, best first, so that each two of them are a pair."""


def read_samples(
    path: str, *, reference_column: str | None = None, on_bad_row: OnBadRow = "error", report: ReadReport | None = None
) -> Iterator[Sample]:
    """Yield samples from comparisons, groups, triples and preferences, recognised row by row.

    Raises:
        InputError: for a bad row or file.
    """
    report = ReadReport() if report is None else report
    for row in rows(path, on_bad_row=on_bad_row, report=report):
        try:
            samples = _samples(row, reference_column)
        except InputError as error:
            if on_bad_row != "skip" and not isinstance(error, formats.TieError):
                raise
            report.skip(error)
            continue
        report.read += 1
        report.look_for_empty(
            row,
            [sample.group.reference for sample in samples],
            [answer for sample in samples if sample.ranked for answer in sample.group.candidates[:-1]],
        )
        yield from samples
    report.tell_doubts(path)


def _samples(row: Row, reference_column: str | None) -> list[Sample]:
    if row.has("output") or row.has("candidates"):
        return [Sample(group, ranked=False) for group in record_rows.group(row, reference_column)[1]]
    ranked: list[Preference]
    if row.has("positive") or row.has("negative"):
        triples = record_rows.triple(row)[1]
        ranked = [Preference(t.prompt, t.reference, (t.positive, t.negative), wrapper=t.wrapper) for t in triples]
    else:
        ranked = formats.preference(row, reference_column)[1]
    return [Sample(Group(p.prompt, p.reference, p.ranked, wrapper=p.wrapper), ranked=True) for p in ranked]


def calibrate(measured: Iterable[tuple[Sample, Sequence[float]]], data: Sequence[str] = ()) -> Calibration:
    """Return the scale of a checkpoint's rewards; eight bytes of memory for each reward and each pair.

    Args:
        measured: Samples with the raw rewards of their candidates.
        data: Names of the files they come from.

    Raises:
        InputError: all rewards are the same, or there are fewer than two.
    """
    rewards, margins = array("d"), array("d")
    for sample, values in measured:
        rewards.extend(values)
        if sample.ranked:
            margins.extend(better - worse for better, worse in combinations(values, 2))
    all_rewards, all_margins = np.asarray(rewards), np.asarray(margins)
    if len(all_rewards) < 2 or all_rewards.min() == all_rewards.max():
        raise InputError(f"expected two rewards or more that differ, found {len(all_rewards)}: they have no scale")
    return Calibration(
        mean=float(all_rewards.mean()),
        std=float(all_rewards.std(ddof=1)),
        count=len(all_rewards),
        quantiles={str(level): float(np.quantile(all_rewards, level)) for level in LEVELS},
        temperature=fit_temperature(all_margins),
        pairs=len(all_margins),
        accuracy=float((np.sign(all_margins) + 1).mean() / 2) if len(all_margins) else None,
        data=list(data),
    )


def fit_temperature(margins: npt.NDArray[np.float64]) -> float | None:
    """The T with which sigmoid(margin / T) fits best: the logistic regression of "the better answer wins", one weight.

    Args:
        margins: Reward of the better answer minus that of the worse one.

    Returns:
        T, or None where the likelihood has no maximum at a positive T: without pairs, when no margin is below zero
        (then the smaller T, the better), and when margins are not above zero on average (then no T is good).
    """
    if not len(margins) or margins.min() >= 0 or margins.mean() <= 0:
        return None
    from scipy.optimize import brentq
    from scipy.special import expit

    def slope(weight: float) -> float:
        """Slope of the negative log-likelihood in 1 / T, which is convex: below zero at 0, above zero in the end."""
        return -float(np.mean(margins * expit(-weight * margins)))

    unit = float(np.abs(margins).mean())
    high = 1 / unit
    while slope(high) < 0:
        high *= 2
    return 1 / float(brentq(slope, 0, high, xtol=1e-12 / unit, rtol=1e-12))


def save_calibrated_copy(source: Path, target: Path, calibration: Calibration) -> None:
    """Copy the files of a checkpoint, and calibrate the copy; it appears complete or not at all.

    Raises:
        InputError: the target is in use or cannot be written.
    """
    with new_directory(target) as written, on_disk(target):
        for file in source.iterdir():
            if file.is_file():  # the state of a training run stays where it is
                shutil.copyfile(file, written / file.name)
        save_calibration(written, calibration)


def require_own(model: str) -> None:
    """Raise an `InputError` for the bundled model and for hub names, which are not ours to write to."""
    if model in BUNDLED or not Path(model).expanduser().is_dir():
        raise InputError(f"{model}: not a directory of yours; give --output DIR for a calibrated copy")
