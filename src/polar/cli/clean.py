"""`polar corpus clean`: trajectories without loops, broken ends, duplicates and evaluation data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polar.cli.progress import progress_bar
from polar.core.errors import InputError
from polar.core.files import write_text
from polar.corpus import clean as cleaning
from polar.corpus.clean import CleanReport, Counts, CutEndings, Drop, read_rows
from polar.corpus.overlap import Decontaminator, NearDuplicates
from polar.data.readers import OnBadRow, ReadReport
from polar.data.writers import open_writer

SHOWN = 5
"""Shared n-grams in the table; the report has more."""


def clean(
    inputs: Annotated[Sequence[str], Parameter(negative="", allow_leading_hyphen=True)],
    /,
    *,
    output: Annotated[str, Parameter(allow_leading_hyphen=True)],
    cut_endings: CutEndings = "known",
    drop: Annotated[Sequence[str], Parameter(negative="")] = (),
    keep_near_duplicates: Annotated[bool, Parameter(negative="")] = False,
    near_duplicate_threshold: float = 0.8,
    decontaminate: Annotated[Sequence[str], Parameter(negative="")] = (),
    ngram: int = 13,
    report: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> None:
    """Clean sampled trajectories: end repetition loops, cut incomplete endings, take out what does not belong.

    Rows are {"prompt", "policy", "output"} as polar sample writes them; other columns stay as they are, and so does
    the order. Of prompts that nearly repeat one another only the first keeps its trajectories. Empty outputs, refusals
    and exact duplicates are counted and stay, unless --drop names them. What was found goes to stderr and, for every
    policy, to a JSON file.

    Examples:
      polar corpus clean corpus/ --output clean.parquet
      polar corpus clean corpus/ --output clean.parquet --drop empty,refused --decontaminate eval.jsonl
      polar corpus clean a.jsonl b.jsonl --output clean.jsonl --cut-endings guess --keep-near-duplicates

    Args:
        inputs: Files (JSONL, also .gz and .zst, or Parquet), or directories of such files.
        output: File for the rows that stay (.jsonl, .jsonl.gz, .jsonl.zst or .parquet).
        cut_endings: Cut outputs back to their last complete sentence or line: "known" those that the token limit cut
            (finish_reason length), "guess" also those without a finish_reason that seem to break off, "never" none.
        drop: Remove what is otherwise only counted: empty, refused, duplicate (the same policy gave the same output
            before). Repeat the flag, or separate by commas.
        keep_near_duplicates: Keep the trajectories of all prompts.
        near_duplicate_threshold: Least Jaccard similarity (of five-word shingles) of near duplicates.
        decontaminate: Evaluation set: trajectories that share an n-gram with its texts are removed. Any file with
            fields such as prompt, question, reference, chosen, rejected, answer or text. Repeat for more.
        ngram: Words per n-gram; twice as many where they are Chinese or Japanese characters.
        report: JSON file with all counts (default: the output with .report.json behind it).
        on_bad_row: "skip" leaves unreadable rows out and says how many.
    """
    drops = _drops(drop)
    if report is None and output != "-":
        report = f"{output}.report.json"
    read, found, console = ReadReport(), CleanReport(), Console(stderr=True)
    near_duplicates = None if keep_near_duplicates else NearDuplicates(near_duplicate_threshold)
    evaluation = Decontaminator(decontaminate, ngram) if decontaminate else None
    with open_writer(output) as writer, progress_bar(console) as progress:
        cleaned = cleaning.clean(
            read_rows(inputs, on_bad_row=on_bad_row, report=read),
            cut_endings=cut_endings,
            drop=drops,
            near_duplicates=near_duplicates,
            evaluation=evaluation,
            report=found,
        )
        for row in progress.track(cleaned, description="cleaning"):
            writer.write(row)
        progress.stop()
        total = found.total
        console.print(_table(total, found, read))
        if not total.kept:
            raise InputError(f"{', '.join(inputs)}: no row was left, so nothing was written (the table above says why)")
    if report is not None:
        write_text(Path(report), found.to_json())
    sys.stderr.write(f"wrote {total.kept} rows to {output}{f', counts to {report}' if report else ''}\n")


def _drops(words: Sequence[str]) -> set[Drop]:
    known: dict[str, Drop] = {name: name for name in get_args(Drop)}
    names = [name.strip() for word in words for name in word.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"--drop {name}: expected {', '.join(known)}")
    return {known[name] for name in names}


def _table(total: Counts, report: CleanReport, read: ReadReport) -> Table:
    """What was counted; details (indented) only where there are some."""
    removed = total.removed
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    lines = [
        (total.rows, "trajectories"),
        (read.skipped, "  unreadable rows beside them, skipped"),
        (len(report.policies), "policies"),
        (report.prompts, "prompts"),
        (report.prompts_removed.get("contaminated prompt", 0), "  in an evaluation set"),
        (report.prompts_removed.get("near-duplicate prompt", 0), "  near duplicates of earlier ones"),
        (total.loops, f"outputs ended in a repetition loop ({total.loop_characters:,} characters cut)"),
        (total.endings, f"incomplete endings cut ({total.ending_characters:,} characters)"),
        (total.endings_left, "  not cut: no complete sentence or line in the second half"),
        (total.endings_unknown, "  outputs without finish_reason, so complete or not (see --cut-endings)"),
        (total.empty, "empty outputs"),
        (total.refused, "refusals"),
        (total.duplicates, "duplicates: the same policy gave the same output before"),
        (report.shared_outputs, "different outputs that several policies gave"),
        (sum(removed.values()), "trajectories removed"),
        *((number, f"  {reason}") for reason, number in removed.items()),
        (total.kept, "trajectories kept"),
    ]
    for number, what in lines:
        if number or not what.startswith(" "):
            table.add_row(f"{number:,}", what)
    for file, number in report.evaluation_ngrams.items():
        table.add_row(f"{number:,}", Text(f"n-grams in {file}"))
    if report.evaluation_ngrams:
        table.add_row(f"{report.evaluation_boilerplate:,}", "  of them do not count: under three or more prompts")
    for ngram, number in sorted(report.shared_ngrams.items(), key=lambda item: -item[1])[:SHOWN]:
        table.add_row(f"{number:,}", Text(f"  removed by “{ngram}”"))
    return table
