"""`polar calibrate`: the range of a checkpoint's rewards, measured on data and saved beside its weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from polar.cli.progress import progress_bar
from polar.cli.score import WINDOW
from polar.client.engines import ServerType
from polar.core.checkpoint import CHECKPOINT_FILE, Calibration, checkpoint_directory, save_calibration
from polar.core.files import require_new
from polar.data.readers import OnBadRow, ReadReport
from polar.evaluation.scorers import Model, open_model
from polar.model import calibration as calibrating
from polar.model.calibration import Sample, read_samples

FEW_PAIRS = 200
"""With fewer, the temperature is a guess."""


def calibrate(
    model: str,
    /,
    *,
    data: Annotated[Sequence[str], Parameter(negative="", consume_multiple=True)],
    output: str | None = None,
    reference_column: str | None = None,
    on_bad_row: OnBadRow = "error",
    server_address: str | None = None,
    engine: ServerType = "auto",
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int | None = None,
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
        server_address: host:port or URL of a server that gives the rewards, several separated by commas; the model is
            then the directory of the checkpoint that it serves. A key is taken from POLAR_API_KEY.
        engine: What serves there; auto finds out.
        device: Torch device (default: a GPU if there is one).
        dtype: float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU).
        batch_tokens: Tokens of one forward pass (default: 4096 on a CPU, 16384 elsewhere).
    """
    if output is None:
        calibrating.require_own(model)
    else:
        require_new(Path(output))
    reports = [ReadReport() for _ in data]
    samples = (
        sample
        for path, report in zip(data, reports, strict=True)
        for sample in read_samples(path, reference_column=reference_column, on_bad_row=on_bad_row, report=report)
    )
    first = list(islice(samples, 1))  # a mistake in the input shows before a large model is loaded
    opened = open_model(
        model, server_address=server_address, engine=engine, device=device, dtype=dtype, batch_tokens=batch_tokens
    )
    with opened as reward_model, progress_bar() as progress:
        measured = _measure(reward_model, chain(first, samples), progress)
        found = calibrating.calibrate(measured, [Path(path).name for path in data])
    target = checkpoint_directory(model) if output is None else Path(output)
    if output is None:
        save_calibration(target, found)
    else:
        calibrating.save_calibrated_copy(checkpoint_directory(model), target, found)
    _show(found)
    for path, report in zip(data, reports, strict=True):
        if report.skipped:
            sys.stderr.write(f"{path}: skipped {report.skipped} rows, used {report.read}\n")
    sys.stderr.write(f"wrote {target / CHECKPOINT_FILE}\n")


def _measure(model: Model, samples: Iterable[Sample], progress: Progress) -> Iterator[tuple[Sample, list[float]]]:
    task = progress.add_task("scoring", total=None)
    waiting = iter(samples)
    while window := list(islice(waiting, WINDOW)):
        encoded = [model.template.encode_group(sample.group) for sample in window]
        rewards = model.score_encoded(encoded, progress=lambda count: progress.advance(task, count))
        yield from zip(window, rewards, strict=True)


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
    elif 0 < found.pairs < FEW_PAIRS:
        sys.stderr.write(f"warning: a temperature from {found.pairs} pairs is a guess; give {FEW_PAIRS} or more\n")
