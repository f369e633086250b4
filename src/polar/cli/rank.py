"""`polar rank`: candidates in the order of their rewards; best-of-N and rejection sampling."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import groupby
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
from polar.core.checkpoint import BUNDLED_NAME, scaling
from polar.core.errors import InputError
from polar.core.records import Group, text_of
from polar.data.fields import Row, as_text

if TYPE_CHECKING:
    from polar.data.readers import ReadReport
    from polar.evaluation.scorers import Model

ADDED = ("rank", "reward", "zscore", "candidate")
"""The fields that a result has beside those of its row."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of one prompt, each with the row of its result."""

    group: Group
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """Which candidates of a prompt are kept."""

    top_k: int | None = None
    min_reward: float | None = None
    min_zscore: float | None = None


@dataclass(slots=True)
class Counts:
    """How many candidates were read, kept and dropped."""

    prompts: int = 0
    candidates: int = 0
    kept: int = 0
    below_limit: int = 0
    beyond_top_k: int = 0
    """Above the limits, but not among the best k."""
    empty_prompts: int = 0
    """Prompts without a kept candidate."""


def rank(
    inputs: Inputs = (),
    /,
    *,
    prompt: Annotated[str | None, Verbatim] = None,
    reference: Annotated[str | None, Verbatim] = None,
    candidate: Annotated[Sequence[str], Verbatim] = (),
    output: Annotated[str | None, Verbatim] = None,
    top_k: int | None = None,
    min_reward: float | None = None,
    min_zscore: float | None = None,
    model: str = BUNDLED_NAME,
    reference_column: str | None = None,
    on_bad_row: OnBadRow = "error",
    flags: ScoringFlags = ScoringFlags(),  # noqa: B008 (frozen)
    to: Annotated[str | None, Parameter(allow_leading_hyphen=True, show=False)] = None,
) -> None:
    """Rank the candidates of every prompt, best first; keep the best, or those above a limit.

    Rows are {"prompt", "reference", "candidates": [...]}, or {"prompt", "reference", "output"} where the rows of one
    prompt are adjacent. A result is one row per kept candidate, with all other columns of its row, its output, its
    rank (1 is the best; equal rewards keep their order) and its reward. Limits are applied to each candidate, then the
    best k of a prompt are taken. Dropped candidates are counted on stderr. Without --output a terminal gets a table, a
    pipe gets JSONL.

    Examples:
      polar rank --prompt "Capital of China?" --reference Beijing. --candidate "It is Beijing." --candidate Shanghai.
      polar rank samples.jsonl --top-k 1 --output best.jsonl
      polar rank samples.parquet --model runs/rm --min-zscore 1 --top-k 4 --output kept.parquet
      polar rank samples.parquet --model ./rm --server-address gpu1:8000,gpu2:8000 --top-k 1 --output best.parquet

    Args:
        inputs: Files (JSONL, also .gz and .zst, or Parquet), directories, or - for stdin.
        prompt: Prompt of a single group given by flags.
        reference: Reference of that group.
        candidate: A candidate of that group; repeat the flag for more.
        output: File for the results (.jsonl, .jsonl.gz, .jsonl.zst or .parquet; - for JSONL on stdout).
        top_k: Keep this many candidates of each prompt (1 is best-of-N).
        min_reward: Keep candidates whose reward is at least this (rejection sampling).
        min_zscore: Keep candidates whose z-score is at least this; the checkpoint must be calibrated (polar calibrate).
        model: Checkpoint directory, hub name, or polar-mini or polar-nano, which are bundled.
        reference_column: Column of the reference (default: reference).
        on_bad_row: "skip" leaves unreadable rows out and says how many.
        flags: Where and how rewards are computed.
        to: Old name of output.
    """
    from polar.data.readers import ReadReport
    from polar.data.writers import open_writer
    from polar.evaluation.scorers import open_model

    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, found {top_k}")
    refuse_unknown_flags(inputs, "rank")
    if to is not None:
        renamed_flag("--to", "--output")
        if output is not None:
            raise InputError("--output and --to are the same: give --output alone")
        output = to
    reports, counts = [ReadReport() for _ in inputs], Counts()
    if inputs:
        if prompt is not None or reference is not None or candidate:
            raise InputError("give either input files or --prompt, --reference and --candidate, not both")
        waiting = _from_files(inputs, reference_column, on_bad_row, reports)
    else:
        waiting = iter([_from_flags(prompt, reference, candidate)])
    waiting = checked(waiting)
    limits = Limits(top_k, min_reward, min_zscore)
    with open_model(model, **asdict(flags)) as reward_model, progress_bar() as progress:
        ranked = _rank(reward_model, waiting, limits, counts, progress)
        if output is None and sys.stdout.isatty():
            table = _table(ranked)
        else:
            table = None
            with open_writer(output or "-") as writer:
                for kept in ranked:
                    for row in kept:
                        writer.write(row)
    if table is not None:
        Console().print(table)
    sys.stderr.write(_summary(counts, limits))
    tell_skipped(inputs, reports)


def _from_flags(prompt: str | None, reference: str | None, candidates: Sequence[str]) -> Candidates:
    given = {"--prompt": prompt is not None, "--reference": reference is not None, "--candidate": bool(candidates)}
    require_flags(given, "rank")
    assert prompt is not None
    assert reference is not None
    row = Row("flags", 1, {"prompt": prompt, "reference": reference, "candidates": list(candidates)})
    return Candidates(Group(prompt, reference, tuple(candidates)), _rows_of(row))


def _from_files(
    inputs: Sequence[str], reference_column: str | None, on_bad_row: OnBadRow, reports: Sequence[ReadReport]
) -> Iterator[Candidates]:
    """Rows with a single output become one group for as long as prompt and reference stay the same.

    To find a prompt that comes back later, 16 bytes are kept of every one (about 100 in memory).
    """
    from polar.data.readers import convert_rows

    read = (
        item
        for path, report in zip(inputs, reports, strict=True)
        for item in convert_rows(
            path, lambda row: _candidates(row, reference_column), on_bad_row=on_bad_row, report=report
        )
    )
    seen: set[bytes] = set()
    for (single, *_), items in groupby(read, key=_shared):
        if not single:
            yield from (candidates for _, candidates in items)
            continue
        places, members = zip(*items, strict=True)
        group = members[0].group
        key = blake2b(repr((group.prompt, group.reference, group.wrapper)).encode(), digest_size=16).digest()
        if key in seen:
            raise InputError(
                f"{places[0]}: this prompt with this reference is in earlier rows already; expected the rows of one "
                "prompt one after the other, so sort the file by prompt"
            )
        seen.add(key)
        outputs = tuple(one.group.candidates[0] for one in members)
        yield Candidates(
            Group(group.prompt, group.reference, outputs, wrapper=group.wrapper),
            tuple(row for one in members for row in one.rows),
        )


def _shared(item: tuple[str, Candidates]) -> tuple[object, ...]:
    """Key of rows with single outputs: neighbours with equal keys are one group."""
    group = item[1].group
    if "candidate" in item[1].rows[0]:
        return (False,)
    return True, group.prompt, group.reference, group.wrapper


def _candidates(row: Row, reference_column: str | None) -> tuple[str, Candidates]:
    """The place of a row, its group, and one row for each of its candidates."""
    from polar.data import record_rows

    if taken := [name for name in ADDED if name in row.fields]:
        raise row.error(taken[0], "no field of this name, because results have one", "one; rename it")
    if row.has("candidates") and row.has("output"):
        raise row.error("output", "either candidates or output", "both")
    _, (group,) = record_rows.group(row, reference_column)
    return row.place, Candidates(group, _rows_of(row))


def _rows_of(row: Row) -> tuple[dict[str, Any], ...]:
    if not row.has("candidates"):
        return (row.fields,)
    others = {name: value for name, value in row.fields.items() if name not in ("candidates", "output")}
    candidates = row.fields["candidates"]
    assert isinstance(candidates, list)
    return tuple({**others, "output": output, "candidate": number} for number, output in enumerate(candidates))


def _rank(
    model: Model,
    waiting: Iterator[Candidates],
    limits: Limits,
    counts: Counts,
    progress: Progress,
) -> Iterator[list[dict[str, Any]]]:
    """For every prompt the rows that are kept, best first."""
    zscore = None if limits.min_zscore is None else scaling("zscore", model.calibration)
    for candidates, _, (rewards,) in scored(model, waiting, lambda one: (one.group,), progress):
        values = [{"reward": reward} for reward in rewards]
        if zscore is not None:
            values = [{**value, "zscore": z} for value, z in zip(values, zscore(rewards), strict=True)]
        order = sorted(range(len(rewards)), key=lambda number: -rewards[number])
        rows = [{**candidates.rows[number], "rank": place, **values[number]} for place, number in enumerate(order, 1)]
        yield _kept(rows, limits, counts)


def _kept(rows: Sequence[dict[str, Any]], limits: Limits, counts: Counts) -> list[dict[str, Any]]:
    good = [
        row
        for row in rows
        if (limits.min_reward is None or row["reward"] >= limits.min_reward)
        and (limits.min_zscore is None or row["zscore"] >= limits.min_zscore)
    ]
    kept = good[: limits.top_k]
    counts.prompts += 1
    counts.candidates += len(rows)
    counts.kept += len(kept)
    counts.below_limit += len(rows) - len(good)
    counts.beyond_top_k += len(good) - len(kept)
    counts.empty_prompts += not kept
    return kept


def _summary(counts: Counts, limits: Limits) -> str:
    dropped = []
    if limits.min_reward is not None or limits.min_zscore is not None:
        dropped.append(f"{counts.below_limit:,} below the limit")
    if limits.top_k is not None:
        dropped.append(f"{counts.beyond_top_k:,} not among the best {limits.top_k}")
    text = f"{counts.prompts:,} prompts, {counts.candidates:,} candidates, {counts.kept:,} kept"
    if dropped:
        text += f"; dropped: {', '.join(dropped)}; {counts.empty_prompts:,} prompts keep nothing"
    return text + "\n"


def _table(ranked: Iterable[Sequence[dict[str, Any]]]) -> Table:
    """Ranks and rewards beside the beginning of the outputs."""
    table = Table("rank", "reward", expand=True)
    table.add_column("output", no_wrap=True, overflow="ellipsis", ratio=1)
    for kept in ranked:
        for row in kept:
            output = text_of(as_text(Row("table", 1, row), "output", row["output"]))
            table.add_row(str(row["rank"]), f"{row['reward']:+.3f}", Cell(" ".join(output.split())))
        table.add_section()
    return table
