"""`polar score`: rewards for candidates, from files, from stdin or from flags."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text as Cell

from polar.cli.common import (
    Inputs,
    OnBadRow,
    ScoringFlags,
    Verbatim,
    checked,
    progress_bar,
    refuse_unknown_flags,
    renamed_flag,
    require_flags,
    scored,
    tell_skipped,
)
from polar.core.checkpoint import BUNDLED_NAME, Scale, scaling, with_reference
from polar.core.errors import InputError
from polar.core.records import Aggregate, Group, aggregated, groups_of, text_of
from polar.core.template import Compat, EncodedGroup

if TYPE_CHECKING:
    from polar.evaluation.scorers import Model

DATA_SUFFIXES = (".jsonl", ".gz", ".zst", ".parquet")


def score(
    inputs: Inputs = (),
    /,
    *,
    prompt: Annotated[str | None, Verbatim] = None,
    reference: Annotated[Sequence[str], Verbatim] = (),
    candidate: Annotated[Sequence[str], Verbatim] = (),
    output: Annotated[Sequence[str], Verbatim] = (),
    model: str = BUNDLED_NAME,
    scale: Scale = "raw",
    aggregate: Aggregate = "max",
    explain: bool = False,
    on_bad_row: OnBadRow = "error",
    compat: Compat | None = None,
    flags: ScoringFlags = ScoringFlags(),  # noqa: B008 (frozen)
    to: Annotated[str | None, Parameter(allow_leading_hyphen=True, show=False)] = None,
) -> None:
    """Score candidates against references: the higher the reward, the closer the candidate is to the reference.

    Rows are {"prompt", "reference", "output"} or {"prompt", "reference", "candidates": [...]}, with an optional "id";
    "references": [...] in place of "reference" scores against each and takes the highest reward (--aggregate). Texts
    are strings or lists of chat messages. Ids and order are kept. Without --output a terminal gets a table, a pipe gets
    JSONL.

    Examples:
      polar score --prompt "Capital of China?" --reference Beijing. --candidate "It is Beijing." --candidate Shanghai.
      polar score answers.jsonl --output rewards.jsonl
      polar score answers.parquet --output rewards.parquet --explain --on-bad-row skip
      cat answers.jsonl | polar score - | jq .reward
      polar score answers.jsonl --model ./rm --server-address gpu1:8000,gpu2:8000 --engine vllm --output rewards.jsonl

    Args:
        inputs: Files (JSONL, also .gz and .zst, or Parquet), directories, or - for stdin.
        prompt: Prompt of a single group given by flags.
        reference: Reference of that group; repeat the flag for several.
        candidate: A candidate of that group; repeat the flag for more.
        output: File for the results (.jsonl, .jsonl.gz, .jsonl.zst or .parquet; - for JSONL on stdout).
        model: Checkpoint directory, hub name, or polar-mini or polar-nano, which are bundled.
        scale: "zscore" is (reward - mean) / std of the checkpoint's calibration (polar calibrate). "probability" is
            that of being preferred to the reference itself by the Bradley-Terry model, at the calibrated temperature or
            at 1 without one.
        aggregate: How the rewards of one candidate against several references become one: "max", "mean", or "softmax",
            the mean weighted by exp(reward).
        explain: Add how many tokens were read, how many were cut from prompt, reference and candidate (over all
            references), and the rewards by reference.
        on_bad_row: "skip" leaves unreadable rows out and says how many.
        flags: Where and how rewards are computed.
        compat: "seed" builds the inputs exactly as the original POLAR client does.
        to: Old name of output.
    """
    from polar.data.readers import ReadReport, read_groups_by_reference
    from polar.data.writers import open_writer
    from polar.evaluation.scorers import open_model

    refuse_unknown_flags(inputs, "score")
    candidates, target = _candidates_and_target(inputs, candidate, output, to)
    reports = [ReadReport() for _ in inputs]
    groups: Iterator[tuple[Group, ...]]
    if inputs:
        if prompt is not None or reference or candidates:
            raise InputError("give either input files or --prompt, --reference and --candidate, not both")
        groups = (
            several
            for path, report in zip(inputs, reports, strict=True)
            for several in read_groups_by_reference(path, on_bad_row=on_bad_row, report=report)
        )
    else:
        given = {"--prompt": prompt is not None, "--reference": bool(reference), "--candidate": bool(candidates)}
        require_flags(given, "score")
        assert prompt is not None
        groups = iter([groups_of(prompt, reference, candidates)])
    groups = checked(groups)
    with open_model(model, compat=compat, **asdict(flags)) as reward_model, progress_bar() as progress:
        rows = _score(reward_model, groups, scale, aggregate, explain, progress)
        if target is None and sys.stdout.isatty():
            table = _table(rows, explain)
        else:
            table = None
            with open_writer(target or "-") as writer:
                for _, row in rows:
                    writer.write(row)
    if table is not None:
        Console().print(table)
    tell_skipped(inputs, reports, "scored")


def _candidates_and_target(
    inputs: Sequence[str], candidates: Sequence[str], outputs: Sequence[str], to: str | None
) -> tuple[tuple[str, ...], str | None]:
    """Return candidates and target; --output once was the text of a candidate, and --to the file.

    The old meaning is taken only where the new one is impossible: without files and without --candidate.
    """
    if to is not None:
        renamed_flag("--to", "--output")
    if outputs and not inputs and not candidates:
        if named := [text for text in outputs if text == "-" or text.endswith(DATA_SUFFIXES)]:
            raise InputError(
                f"--output {named[0]}: expected --candidate for the texts; --output is the file of results"
            )
        renamed_flag("--output for a text", "--candidate")
        return tuple(outputs), to
    targets = [*outputs, *([] if to is None else [to])]
    if len(targets) > 1:
        raise InputError(
            f"--output: expected one file for the results, found {', '.join(targets)}; texts are --candidate"
        )
    return tuple(candidates), targets[0] if targets else None


def _score(
    model: Model,
    groups: Iterator[tuple[Group, ...]],
    scale: Scale,
    aggregate: Aggregate,
    explain: bool,
    progress: Progress,
) -> Iterator[tuple[Group, dict[str, Any]]]:
    """One result row per candidate, in the order of the input."""
    in_scale = scaling(scale, model.calibration)

    def asked(several: tuple[Group, ...]) -> Sequence[Group]:
        return [with_reference(group) for group in several] if scale == "probability" else several

    for several, inputs, raw in scored(model, groups, asked, progress):
        rewards, group = list(map(in_scale, raw)), several[0]
        for number, reward in enumerate(aggregated(rewards, aggregate)):
            row: dict[str, Any] = {} if group.id is None else {"id": group.id}
            if len(group.candidates) > 1:
                row["candidate"] = number
            row["reward"] = reward
            if explain:
                row |= _explained(number, inputs, rewards)
            yield group, row


def _explained(number: int, inputs: Sequence[EncodedGroup], rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Tokens that were read and cut of a candidate, over all references, and its reward against each."""
    cuts = [one.truncations[number] for one in inputs]
    return {
        "tokens": sum(len(one.prefix) + len(one.branches[number]) for one in inputs),
        "cut_prompt": sum(cut.prompt for cut in cuts),
        "cut_reference": sum(cut.reference for cut in cuts),
        "cut_output": sum(cut.output for cut in cuts),
        "by_reference": [each[number] for each in rewards],
    }


def _table(rows: Iterable[tuple[Group, dict[str, Any]]], explain: bool) -> Table:
    """Rewards beside the beginning of their texts, best first within a group."""
    extra = ["tokens", "cut_prompt", "cut_reference", "cut_output"] if explain else []
    table = Table("reward", expand=True)
    table.add_column("candidate", no_wrap=True, overflow="ellipsis", ratio=2)
    table.add_column("reference", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in extra:
        table.add_column(name, justify="right")
    groups: dict[int, list[tuple[Group, dict[str, Any]]]] = {}
    for group, row in rows:
        groups.setdefault(id(group), []).append((group, row))
    for members in groups.values():
        for group, row in sorted(members, key=lambda member: -member[1]["reward"]):
            output = text_of(group.candidates[row.get("candidate", 0)])
            table.add_row(
                f"{row['reward']:+.3f}",
                Cell(" ".join(output.split())),
                Cell(" ".join(text_of(group.reference).split())),
                *(str(row[name]) for name in extra),
            )
        table.add_section()
    return table
