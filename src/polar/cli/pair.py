"""`polar pair`: trajectories of many policies become triples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from polar.cli.common import Inputs, OnBadRow, progress_bar
from polar.core.errors import InputError
from polar.core.records import Wrapper
from polar.corpus.strategies import PairReport, Strategy

if TYPE_CHECKING:
    from polar.data.readers import ReadReport

MAX_POLICIES_SHOWN = 5
"""How many of the most lopsided policies the report names."""


def pair(
    inputs: Inputs,
    /,
    *,
    output: str,
    per_prompt: int | None = None,
    negatives: int = 1,
    strategy: Strategy = "random",
    policies_table: str | None = None,
    balance: bool = True,
    match_length: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    exclude_policies: str | None = None,
    policies: str | None = None,
    prompt_ids: str | None = None,
    wrapper: Wrapper | None = None,
    on_bad_row: OnBadRow = "error",
    temp: Path | None = None,
    policy_counts: str | None = None,
) -> None:
    """Draw triples for pre-training: reference and positive by one policy, the negative by another one.

    Rows are {"prompt", "policy", "output"}, with "family", "step" and "wrapper" if known; texts are strings or lists of
    chat messages. The same rows and the same seed give the same triples, in whatever order the rows come. The rows may
    be far more than memory holds. Counts of what was drawn, and why prompts gave none, go to stderr.

    Examples:
      polar pair samples.parquet --output triples.jsonl
      polar pair samples/ --output triples.parquet --per-prompt 2 --negatives 3 --seed 1
      polar pair samples/ --output hard.parquet --strategy mixed --policies-table policies.jsonl --match-length
      polar pair samples/ --output test.jsonl --prompt-ids held-out.txt --exclude-policies "^gpt-4"

    Args:
        inputs: Files (JSONL, also .gz and .zst, or Parquet), or directories of such files.
        output: File for the triples (.jsonl, .jsonl.gz, .jsonl.zst or .parquet).
        per_prompt: At most this many policies of a prompt give a reference and a positive
            (default: every policy with two different outputs gives one).
        negatives: Triples per reference and positive, with negatives of different policies as far as there are.
        strategy: Where negatives come from: "random" any other policy; "family" another one of the same family
            (harder); "checkpoint" the same family at the next lower or higher step (hardest); "mixed" one of these
            for every draw.
        policies_table: File with rows {"policy", "family", "step"}, which overrides what the trajectories say.
        balance: Make every policy positive as often as negative, as far as possible, so that none is recognised by its
            frequency.
        match_length: Choose negatives so that closeness in length to the reference does not reveal the positive.
        seed: Another seed is another draw.
        exclude_policies: Leave out policies in whose name this regular expression is found.
        policies: File with one policy a line: only these.
        prompt_ids: File with one prompt id a line: only these prompts.
        wrapper: Overrides the rows: "pretrain" when outputs continue their prompts as in a document, without a
            newline between, else "sft".
        on_bad_row: "skip" leaves unreadable rows out and says how many.
        temp: Directory for temporary files, about as large as the texts (default: where the output is).
        policy_counts: File (.jsonl or .parquet) for how often every policy is positive and negative.
    """
    from polar.corpus import pair as pairing
    from polar.data.readers import ReadReport, read_trajectories
    from polar.data.writers import open_writer, record_to_dict

    read, report = ReadReport(), PairReport()
    console = Console(stderr=True)
    rows = (row for path in inputs for row in read_trajectories(path, on_bad_row=on_bad_row, report=read))
    with open_writer(output) as writer, progress_bar(console) as progress:
        triples = pairing.pair(
            progress.track(rows, description="reading"),
            per_prompt=per_prompt,
            negatives=negatives,
            strategy=strategy,
            lineages=policies_table,
            balance=balance,
            match_length=match_length,
            seed=seed,
            exclude_policies=exclude_policies,
            policies=None if policies is None else _lines(policies),
            prompt_ids=None if prompt_ids is None else _lines(prompt_ids),
            wrapper=wrapper,
            temporary=temp or (None if output == "-" else Path(output).parent),
            report=report,
        )
        for triple in progress.track(triples, description="pairing"):
            writer.write(record_to_dict(triple))
        progress.stop()
        console.print(_table(report, read))
        if not report.triples:
            raise InputError(f"{', '.join(inputs)}: no triple could be drawn, so nothing was written: {_lack(report)}")
    if policy_counts is not None:
        with open_writer(policy_counts) as writer:
            for row in _counts(report):
                writer.write(row)
    sys.stderr.write(f"wrote {report.triples} triples to {output}\n")


def _lines(path: str) -> set[str]:
    """Return the lines of a file that are not blank."""
    try:
        lines = {line.strip() for line in Path(path).read_text("utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text ({error}); expected one name a line") from error
    if not lines:
        raise InputError(f"{path}: no names in it; expected one a line")
    return lines


def _lack(report: PairReport) -> str:
    """Say what the input lacks."""
    if report.policies and not report.policies_with_two_outputs:
        return (
            f"none of the {report.policies} policies has two different outputs for any prompt, so they can give "
            "negatives but never reference and positive; sample policies at least twice for each prompt"
        )
    return (
        "a prompt needs two different outputs of one policy and another output of another policy that the strategy "
        "allows (the table above says what was missing)"
    )


def _counts(report: PairReport) -> list[dict[str, str | int]]:
    """Return how often every policy was drawn on either side, the most lopsided first."""
    positives, negatives = report.positives(), report.negatives()
    lopsided = sorted(positives | negatives, key=lambda policy: (-abs(positives[policy] - negatives[policy]), policy))
    return [{"policy": name, "positive": positives[name], "negative": negatives[name]} for name in lopsided]


def _table(report: PairReport, read: ReadReport) -> Table:
    """Counts; details (indented) only where there are some."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right")
    for number, what in (
        (report.trajectories, "trajectories"),
        (read.skipped, "  unreadable rows beside them, skipped"),
        (report.left_out, "  left out by policy or prompt"),
        (report.identical, "  skipped: their policy gave the same text before"),
        (report.policies, "policies"),
        (
            report.policies - report.policies_with_two_outputs,
            "  only negatives: never two different outputs for a prompt",
        ),
        (report.unknown_policies, "  asked for, but not in the input"),
        (report.prompts, "prompts"),
        (report.unknown_prompts, "  asked for, but not in the input"),
        (report.prompts_with_one_policy, "  without triples: only one policy"),
        (report.prompts_without_two_outputs, "  without triples: no policy with two different outputs"),
        (report.prompts_without_rival, "  without triples: no other policy that the strategy allows"),
        (report.prompts_without_negative, "  without triples: other policies only repeat reference or positive"),
        (report.draws, "pairs of reference and positive"),
        (report.draws_without_rival, "  not drawn: no other policy that the strategy allows"),
        (report.draws_without_negative, "  not drawn: other policies only repeat reference or positive"),
        (report.triples, "triples"),
        *((number, f"  by strategy {rule}") for rule, number in sorted(report.strategies.items())),
        (report.negatives_never_positive, "  with a negative by a policy that is never positive"),
    ):
        if number or not what.startswith(" "):
            table.add_row(f"{number:,}", what)
    frequency, length = report.frequency_accuracy(), report.length_accuracy()
    if frequency is not None and length is not None:
        table.add_row(f"{frequency:.1%}", "are solved by knowing how often each policy is positive (50% is best)")
        for row in _counts(report)[:MAX_POLICIES_SHOWN]:
            table.add_row("", f"  {row['policy']}: {row['positive']} times positive, {row['negative']} times negative")
        table.add_row(f"{length:.1%}", "are solved by closeness in length to the reference (50% is best)")
    return table
