"""`polar corpus report`: an HTML page and a JSON file that say what a corpus of trajectories is like."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from polar.cli.progress import progress_bar
from polar.core.files import on_disk, write_text
from polar.core.html import visible
from polar.corpus.page import page
from polar.corpus.statistics import Sample, read_samples, statistics
from polar.data.readers import OnBadRow, ReadReport


def report(
    inputs: Annotated[Sequence[str], Parameter(negative="", allow_leading_hyphen=True)],
    /,
    *,
    output: str,
    seed: int = 0,
    on_bad_row: OnBadRow = "error",
) -> None:
    """Judge a corpus of trajectories: sizes, duplicates, lengths, and how easily its policies are told apart.

    Writes report.html, one page that needs no network, and report.json with the same numbers. Rows are {"prompt",
    "policy", "output"} and may have family, step, wrapper, finish_reason, prompt_tokens and output_tokens. The same
    rows give the same two files, in whatever order the rows come.

    Examples:
      polar corpus report samples/ --output report
      polar corpus report a.parquet b.jsonl.gz --output report --seed 1

    Args:
        inputs: Files (JSONL, also .gz and .zst, or Parquet), or directories of such files.
        output: Directory for report.html and report.json; it is made if need be, and older reports are replaced.
        seed: Another seed is another choice of prompts for triples and examples.
        on_bad_row: "skip" leaves unreadable rows out and says how many.
    """
    console = Console(stderr=True)
    directory = Path(output)
    with on_disk(output):
        directory.mkdir(parents=True, exist_ok=True)
    read = ReadReport()
    with progress_bar(console) as progress:
        samples = progress.track(_samples(inputs, on_bad_row, read), description="reading")
        found = statistics(samples, seed=seed, report=read)
    write_text(directory / "report.json", found.to_json())
    write_text(directory / "report.html", page(found))
    overview = found.overview
    sys.stderr.write(
        f"{overview.trajectories:,} trajectories of {overview.policies:,} policies for {overview.prompts:,} prompts\n"
    )
    for warning in found.warnings():
        console.print(Text(f"warning: {visible(warning)}"))
    sys.stderr.write(f"wrote {directory / 'report.html'} and report.json\n")


def _samples(inputs: Sequence[str], on_bad_row: OnBadRow, report: ReadReport) -> Iterator[Sample]:
    for path in inputs:
        yield from read_samples(path, on_bad_row=on_bad_row, report=report)
