"""`polar corpus prompts`, `clean` and `report`: what policies are asked, and what is made of their answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polar.cli.common import Files, Inputs, OnBadRow, progress_bar
from polar.core.errors import InputError
from polar.core.files import on_disk, write_text

if TYPE_CHECKING:
    from polar.corpus.clean import CleanReport, Counts, Drop
    from polar.data.readers import ReadReport

MAX_NGRAMS_SHOWN = 5
"""Shared n-grams in the table; the report has more."""


def prompts(
    inputs: Inputs,
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
    from polar.corpus.plan import load_tokenizer, prefixes
    from polar.data.fields import string_at
    from polar.data.readers import rows
    from polar.data.writers import open_writer

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


def clean(
    inputs: Inputs,
    /,
    *,
    output: Annotated[str, Parameter(allow_leading_hyphen=True)],
    cut_endings: Literal["known", "guess", "never"] = "known",
    drop: Files = (),
    keep_near_duplicates: Annotated[bool, Parameter(negative="")] = False,
    near_duplicate_threshold: float = 0.8,
    decontaminate: Files = (),
    ngram: int = 13,
    report: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> None:
    """Clean sampled trajectories: end repetition loops, cut incomplete endings, take out what does not belong.

    Rows are {"prompt", "policy", "output"} as polar sample writes them; other columns stay as they are, and so does
    the order. Of prompts that nearly repeat one another only the first keeps its trajectories. Empty outputs, refusals
    and exact duplicates are counted and stay, unless --drop names them. Counts go to stderr and to a JSON file.

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
    from polar.corpus import clean as cleaning
    from polar.corpus.overlap import Decontaminator, NearDuplicates
    from polar.data.readers import ReadReport
    from polar.data.writers import open_writer

    drops = _drops(drop)
    if report is None and output != "-":
        report = f"{output}.report.json"
    read, found, console = ReadReport(), cleaning.CleanReport(), Console(stderr=True)
    near_duplicates = None if keep_near_duplicates else NearDuplicates(near_duplicate_threshold)
    evaluation = Decontaminator(decontaminate, ngram) if decontaminate else None
    with open_writer(output) as writer, progress_bar(console) as progress:
        cleaned = cleaning.clean(
            cleaning.read_rows(inputs, on_bad_row=on_bad_row, report=read),
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


def report(
    inputs: Inputs,
    /,
    *,
    output: str,
    seed: int = 0,
    on_bad_row: OnBadRow = "error",
) -> None:
    """Judge a corpus of trajectories: sizes, duplicates, lengths, and how easily its policies can be distinguished.

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
    from polar.core.html import visible
    from polar.corpus.report import page
    from polar.corpus.statistics import read_samples, statistics
    from polar.data.readers import ReadReport

    console = Console(stderr=True)
    directory = Path(output)
    with on_disk(output):
        directory.mkdir(parents=True, exist_ok=True)
    read = ReadReport()
    with progress_bar(console) as progress:
        samples = (row for path in inputs for row in read_samples(path, on_bad_row=on_bad_row, report=read))
        found = statistics(progress.track(samples, description="reading"), seed=seed, report=read)
    write_text(directory / "report.json", found.to_json())
    write_text(directory / "report.html", page(found))
    overview = found.overview
    sys.stderr.write(
        f"{overview.trajectories:,} trajectories of {overview.policies:,} policies for {overview.prompts:,} prompts\n"
    )
    for warning in found.warnings():
        console.print(Text(f"warning: {visible(warning)}"))
    sys.stderr.write(f"wrote {directory / 'report.html'} and report.json\n")


def _drops(words: Sequence[str]) -> set[Drop]:
    from polar.corpus.clean import Drop

    known: dict[str, Drop] = {name: name for name in get_args(Drop)}
    names = [name.strip() for word in words for name in word.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"--drop {name}: expected {', '.join(known)}")
    return {known[name] for name in names}


def _table(total: Counts, report: CleanReport, read: ReadReport) -> Table:
    """Counts; details (indented) only where there are some."""
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
    for ngram, number in sorted(report.shared_ngrams.items(), key=lambda item: -item[1])[:MAX_NGRAMS_SHOWN]:
        table.add_row(f"{number:,}", Text(f"  removed by “{ngram}”"))
    return table
