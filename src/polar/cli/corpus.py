"""`polar corpus prompts` and `polar corpus report`: what policies are asked, and a page about what they answered."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from polar.cli.progress import progress_bar
from polar.core.errors import InputError
from polar.core.files import on_disk, write_text
from polar.core.html import visible
from polar.corpus.page import page
from polar.corpus.plan import load_tokenizer, prefixes
from polar.corpus.statistics import Sample, read_samples, statistics
from polar.data.fields import string_at
from polar.data.readers import OnBadRow, ReadReport, rows
from polar.data.writers import open_writer


def prompts(
    inputs: Annotated[Sequence[str], Parameter(negative="", allow_leading_hyphen=True)],
    /,
    *,
    output: str,
    column: str = "text",
    tokenizer: str | None = None,
    max_tokens: int = 1024,
    seed: int = 0,
) -> None:
    """Cut text prefixes for base policies to continue: one per document, its length uniform in 1 to 1024 tokens.

    A shorter document gives a prefix of at most all but one of its tokens. The cut is never inside a character.

    Examples:
      polar corpus prompts books.jsonl --output prefixes.parquet
      polar corpus prompts hf:HuggingFaceFW/fineweb:sample-10BT:train --output prefixes.parquet --seed 1

    Args:
        inputs: Files with one document per row (JSONL, also .gz and .zst, or Parquet), directories, hf: data sets.
        output: File for the prompts (.jsonl, .jsonl.gz, .jsonl.zst or .parquet).
        column: Column that holds the text.
        tokenizer: Counts the tokens: a tokenizer.json, a directory or a hub name (default: that of polar-nano).
        max_tokens: Longest prefix.
        seed: Another seed is another draw.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, found {max_tokens}")
    read = written = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for path in inputs:
            for row in rows(path):
                read += 1
                yield string_at(row, column)

    cuts = prefixes(documents(), load_tokenizer(tokenizer), max_tokens=max_tokens, seed=seed)
    with open_writer(output) as writer, progress_bar() as progress:
        for text in progress.track(cuts, description="cutting"):
            writer.write({"prompt": text, "wrapper": "pretrain"})
            written += 1
        if not written:
            raise InputError(f"{', '.join(inputs)}: no document has two tokens or more, so nothing was written")
    sys.stderr.write(f"wrote {written} prefixes to {output} ({read - written} documents were too short)\n")


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
