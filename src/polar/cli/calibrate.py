"""`polar calibrate`: the range of a checkpoint's rewards, measured on data and saved beside its weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from polar.cli.common import ComputeFlags, OnBadRow, checked, progress_bar, scored, tell_skipped
from polar.core.checkpoint import CHECKPOINT_FILE, Calibration, checkpoint_directory, save_calibration
from polar.core.files import require_new

MIN_PAIRS = 200
"""With fewer, the temperature is a guess."""


def calibrate(
    model: str,
    /,
    *,
    data: Annotated[Sequence[str], Parameter(negative="", consume_multiple=True)],
    output: str | None = None,
    reference_column: str | None = None,
    on_bad_row: OnBadRow = "error",
    flags: ComputeFlags = ComputeFlags(),  # noqa: B008 (frozen)
) -> None:
    """Measure the rewards of a checkpoint on reference data: mean, standard deviation, quantiles, and temperature.

    They are saved in the checkpoint's polar.json, under "calibration"; the weights are not touched. Scoring and serving
    can then answer z-scores. Rows are comparisons, triples or preferences, and kinds may be mixed. Triples and
    preferences also give pairs: to them the temperature is fitted that turns a difference of two rewards into the
    probability that the first answer is the better one. Take data like those that the model will score.

    Examples:
      polar calibrate runs/rm --data preferences.jsonl
      polar calibrate runs/rm --data outputs.parquet --data triples.jsonl
      polar calibrate polar-mini --data answers.jsonl --output ./calibrated-mini

    Args:
        model: Checkpoint directory; also a hub name or a bundled model, with --output.
        data: Files (JSONL, also .gz and .zst, or Parquet) or directories; repeat the flag for more.
        output: Leave the checkpoint as it is, and write a calibrated copy to this directory.
        reference_column: Column of the reference (default: reference).
        on_bad_row: "skip" leaves unreadable rows out and says how many.
        flags: Where and how rewards are computed.
    """
    from polar.data.readers import ReadReport
    from polar.evaluation.scorers import open_model
    from polar.model import calibration as calibrating

    if output is None:
        calibrating.require_own(model)
    else:
        require_new(Path(output))
    reports = [ReadReport() for _ in data]
    samples = checked(
        sample
        for path, report in zip(data, reports, strict=True)
        for sample in calibrating.read_samples(
            path, reference_column=reference_column, on_bad_row=on_bad_row, report=report
        )
    )
    with open_model(model, **asdict(flags)) as reward_model, progress_bar() as progress:
        measured = scored(reward_model, samples, lambda sample: (sample.group,), progress)
        found = calibrating.calibrate(
            ((sample, rewards) for sample, _, (rewards,) in measured), [Path(path).name for path in data]
        )
    target = checkpoint_directory(model) if output is None else Path(output)
    if output is None:
        save_calibration(target, found)
    else:
        calibrating.save_calibrated_copy(checkpoint_directory(model), target, found)
    _show(found)
    tell_skipped(data, reports)
    sys.stderr.write(f"wrote {target / CHECKPOINT_FILE}\n")


def _show(found: Calibration) -> None:
    table = Table("rewards", "value", box=None, pad_edge=False)
    table.add_row("measured", f"{found.count:,}")
    table.add_row("mean", f"{found.mean:+.3f}")
    table.add_row("standard deviation", f"{found.std:.3f}")
    for level, reward in found.quantiles.items():
        table.add_row(f"{float(level):.0%} are below", f"{reward:+.3f}")
    if found.accuracy is not None:
        table.add_row("pairs", f"{found.pairs:,}")
        table.add_row("pairs in the right order", f"{found.accuracy:.1%}")
        table.add_row("temperature", "none fits" if found.temperature is None else f"{found.temperature:.3f}")
    Console(stderr=True).print(table)
    if found.pairs and found.temperature is None:
        sys.stderr.write(
            "warning: no temperature fits: either all pairs are in the right order, or the better answers have no "
            "higher rewards on average; probabilities take temperature 1\n"
        )
    elif 0 < found.pairs < MIN_PAIRS:
        sys.stderr.write(f"warning: a temperature from {found.pairs} pairs is a guess; give {MIN_PAIRS} or more\n")
