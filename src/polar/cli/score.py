"""`polar score`: rewards for outputs, from files, from stdin or from flags."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text as Cell

from polar.cli.progress import progress_bar
from polar.client.engines import ServerType
from polar.core.checkpoint import BUNDLED_NAME, Scale, scaling, with_reference
from polar.core.errors import InputError
from polar.core.records import Aggregate, Group, aggregated, groups_of, text_of
from polar.core.template import Compat, EncodedGroup
from polar.data.readers import ReadReport, read_groups_by_reference
from polar.data.writers import open_writer
from polar.evaluation.scorers import Model, open_model

WINDOW = 256
"""Groups that are read, scored and written at a time, so that memory stays flat."""

Verbatim = Parameter(allow_leading_hyphen=True, negative="")
"""Texts may begin with a hyphen, and "-" is stdin."""


def score(
    inputs: Annotated[Sequence[str], Verbatim] = (),
    /,
    *,
    prompt: Annotated[str | None, Verbatim] = None,
    reference: Annotated[Sequence[str], Verbatim] = (),
    output: Annotated[Sequence[str], Verbatim] = (),
    to: Annotated[str | None, Verbatim] = None,
    model: str = BUNDLED_NAME,
    scale: Scale = "raw",
    aggregate: Aggregate = "max",
    explain: bool = False,
    on_bad_row: Literal["error", "skip"] = "error",
    server_address: str | None = None,
    engine: ServerType = "auto",
    device: str | None = None,
    dtype: str | None = None,
    compat: Compat | None = None,
    max_length: int | None = None,
    max_response_length: int | None = None,
    batch_tokens: int | None = None,
) -> None:
    """Score outputs against references: the higher the reward, the closer the output is to the reference.

    Rows are {"prompt", "reference", "output"} or {"prompt", "reference", "candidates": [...]}, with an optional "id";
    "references": [...] in place of "reference" scores against each and takes the highest reward (--aggregate). Texts
    are strings or lists of chat messages. Ids and order are kept. Without --to a terminal gets a table, a pipe gets
    JSONL.

    Examples:
      polar score --prompt "Capital of China?" --reference Beijing. --output "It is Beijing." --output Shanghai.
      polar score answers.jsonl --to rewards.jsonl
      polar score answers.parquet --to rewards.parquet --explain --on-bad-row skip
      cat answers.jsonl | polar score - | jq .reward
      polar score answers.jsonl --model ./rm --server-address gpu1:8000,gpu2:8000 --engine vllm --to rewards.jsonl

    Args:
        inputs: Files (JSONL, also .gz and .zst, or Parquet), directories, or - for stdin.
        prompt: Prompt of a single group given by flags.
        reference: Reference of that group; repeat the flag for several.
        output: An output of that group; repeat the flag for several candidates.
        to: File for the results (.jsonl, .jsonl.gz, .jsonl.zst or .parquet; - for JSONL on stdout).
        model: Checkpoint directory, hub name, or polar-mini or polar-nano, which are bundled.
        scale: "zscore" is (reward - mean) / std of the checkpoint's calibration (polar calibrate). "probability" is
            that of being preferred to the reference itself by the Bradley-Terry model, at the calibrated temperature or
            at 1 without one.
        aggregate: What becomes of the rewards of one output against several references: "max", "mean", or "softmax",
            the mean weighted by exp(reward).
        explain: Add how many tokens were read, how many were cut from prompt, reference and output (over all
            references), and the rewards by reference.
        on_bad_row: "skip" leaves unreadable rows out and says how many.
        server_address: host:port or URL of a server that gives the rewards, several separated by commas; the model is
            then the directory of the checkpoint that it serves. A key is taken from POLAR_API_KEY.
        engine: What serves there; auto finds out.
        device: Torch device (default: a GPU if there is one).
        dtype: float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU).
        compat: "seed" builds the inputs exactly as the original POLAR client does.
        max_length: Longest input in tokens (default: the checkpoint's).
        max_response_length: Longest reference and output in tokens (default: the checkpoint's).
        batch_tokens: Tokens of one forward pass (default: 4096 on a CPU, 16384 elsewhere).
    """
    reports = [ReadReport() for _ in inputs]
    groups = _groups(inputs, reports, on_bad_row, prompt, reference, output)
    first = list(islice(groups, 1))  # a mistake in the input shows before a large model is loaded
    groups = chain(first, groups)
    opened = open_model(
        model,
        server_address=server_address,
        engine=engine,
        device=device,
        dtype=dtype,
        max_length=max_length,
        max_response_length=max_response_length,
        batch_tokens=batch_tokens,
        compat=compat,
    )
    with opened as reward_model, progress_bar() as progress:
        rows = _score(reward_model, groups, scale, aggregate, explain, progress)
        if to is None and sys.stdout.isatty():
            table = _table(rows, explain)
        else:
            table = None
            with open_writer(to or "-") as writer:
                for _, row in rows:
                    writer.write(row)
    if table is not None:
        Console().print(table)
    for path, report in zip(inputs, reports, strict=True):
        if report.skipped:
            sys.stderr.write(f"{path}: skipped {report.skipped} unreadable rows, scored {report.read}\n")


def _groups(
    inputs: Sequence[str],
    reports: Sequence[ReadReport],
    on_bad_row: Literal["error", "skip"],
    prompt: str | None,
    references: Sequence[str],
    outputs: Sequence[str],
) -> Iterator[tuple[Group, ...]]:
    """One group per reference for every row."""
    if unknown := [word for word in inputs if word.startswith("-") and word != "-"]:
        raise InputError(f"unknown flag {unknown[0]} (see polar score --help)")
    by_flags = {"--prompt": prompt is not None, "--reference": bool(references), "--output": bool(outputs)}
    if inputs and any(by_flags.values()):
        raise InputError("give either input files or --prompt, --reference and --output, not both")
    if inputs:
        return (
            several
            for path, report in zip(inputs, reports, strict=True)
            for several in read_groups_by_reference(path, on_bad_row=on_bad_row, report=report)
        )
    if missing := [flag for flag, given in by_flags.items() if not given]:
        raise InputError(f"nothing to score: {', '.join(missing)} missing (or name an input file, or - for stdin)")
    assert prompt is not None
    return iter([groups_of(prompt, references, tuple(outputs))])


def _score(
    model: Model,
    groups: Iterator[tuple[Group, ...]],
    scale: Scale,
    aggregate: Aggregate,
    explain: bool,
    progress: Progress,
) -> Iterator[tuple[Group, dict[str, Any]]]:
    """One result row per candidate, in the order of the input; only one window of groups is in memory."""
    in_scale = scaling(scale, model.calibration)
    task = progress.add_task("scoring", total=None)
    while window := list(islice(groups, WINDOW)):
        asked = [with_reference(group) if scale == "probability" else group for row in window for group in row]
        encoded = [model.template.encode_group(group) for group in asked]
        scored = model.score_encoded(encoded, progress=lambda count: progress.advance(task, count))
        results = iter(zip(encoded, map(in_scale, scored), strict=True))
        for several in window:
            inputs, rewards = zip(*islice(results, len(several)), strict=True)
            group = several[0]
            for number, reward in enumerate(aggregated(rewards, aggregate)):
                row: dict[str, Any] = {} if group.id is None else {"id": group.id}
                if len(group.candidates) > 1:
                    row["candidate"] = number
                row["reward"] = reward
                if explain:
                    row |= _explained(number, inputs, rewards)
                yield group, row


def _explained(number: int, inputs: Sequence[EncodedGroup], rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What was read and cut of a candidate, over all references, and its reward against each."""
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
    table.add_column("output", no_wrap=True, overflow="ellipsis", ratio=2)
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
