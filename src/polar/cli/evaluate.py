"""`polar eval`: how good a reward model is, beside simple baselines and with standard errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated, Literal, TypeVar

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text as Cell

from polar import __version__
from polar.errors import InputError
from polar.evaluation import evaluate as evaluation
from polar.evaluation.evaluate import MODEL, RIVAL, Evaluation, Result
from polar.metrics import FEW_CLUSTERS, Estimate
from polar.model.reward_model import BUNDLED_NAME, RewardModel
from polar.reading import ReadReport, read_preferences, read_triples
from polar.records import Preference, Triple
from polar.writing import open_writer

Record = TypeVar("Record")
Files = Annotated[Sequence[str], Parameter(negative="")]


def evaluate(
    *,
    model: str = BUNDLED_NAME,
    triples: Files = (),
    preferences: Files = (),
    output: str | None = None,
    reference_column: str | None = None,
    limit: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    device: str | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    max_response_length: int | None = None,
) -> None:
    """Measure a reward model beside simple baselines on the same items.

    On triples: how often the positive beats the negative (policy discrimination). On preferences: how often the chosen
    answer beats the rejected one, also per domain. Ties count one half. Accuracies are percentages with their standard
    errors, clustered by prompt; the last column says whether the model is better than the overlap of words with the
    reference (unigram F1), which needs no model at all.

    Examples:
      polar eval --triples held-out.jsonl --preferences preferences.jsonl
      polar eval --model runs/nano --preferences rewardbench.parquet --reference-column best --output nano.json
      polar eval --triples held-out.parquet --limit 500

    Args:
        model: Checkpoint directory, hub name, or polar-nano for the bundled model.
        triples: File of triples, as `polar pair` writes them; repeat the flag for more.
        preferences: File of preferences (prompt, reference, chosen, rejected, and other known formats); repeatable.
        output: JSON file for all numbers; the rewards of every item are written beside it (.items.jsonl).
        reference_column: Column of the preferences that holds the reference (default: reference).
        limit: At most this many items of each task, drawn at random (always the same ones).
        on_bad_row: "skip" leaves unreadable rows out and says how many.
        device: Torch device (default: a GPU if there is one).
        dtype: float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU).
        max_length: Longest input in tokens (default: the checkpoint's).
        max_response_length: Longest reference and answer in tokens (default: the checkpoint's).
    """
    if not triples and not preferences:
        raise InputError("nothing to evaluate: give --triples FILE or --preferences FILE")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, found {limit}")
    if output is not None and (Path(output).suffix != ".json" or not Path(output).parent.is_dir()):
        raise InputError(f"{output}: expected a file name that ends in .json, in a directory that exists")
    reports = {path: ReadReport() for path in (*triples, *preferences)}
    all_triples = [t for path in triples for t in read_triples(path, on_bad_row=on_bad_row, report=reports[path])]
    all_preferences = [
        preference
        for path in preferences
        for preference in read_preferences(
            path, reference_column=reference_column, on_bad_row=on_bad_row, report=reports[path]
        )
    ]
    reward_model = RewardModel.load(model, device=device, dtype=dtype)
    reward_model.template = reward_model.template.with_lengths(max_length, max_response_length)
    found = _evaluate(reward_model, _sample(all_triples, limit), _sample(all_preferences, limit))
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has no width, and the table fits into this one
    console.print(_table(found.results))
    for note in _notes(found.results, reports):
        console.print(Cell(note))
    if output is not None:
        settings = {
            "polar": __version__,
            "model": model,
            "device": str(reward_model.device),
            "dtype": str(reward_model.model.dtype),
            "max_length": reward_model.template.settings.max_length,
            "max_response_length": reward_model.template.settings.max_response_length,
            "limit": limit,
            "triples": list(triples),
            "preferences": list(preferences),
            "reference_column": reference_column,
            "inputs": {path: asdict(report) for path, report in reports.items()},
        }
        _save(Path(output), settings, found)


def _evaluate(model: RewardModel, triples: Sequence[Triple], preferences: Sequence[Preference]) -> Evaluation:
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("scoring", total=2 * (len(triples) + len(preferences)))
        return evaluation.evaluate(
            model, triples, preferences, progress=lambda candidates: progress.advance(task, candidates)
        )


def _sample(records: Sequence[Record], limit: int | None) -> Sequence[Record]:
    """At most `limit` records at random, always the same ones: files are often sorted by domain."""
    if limit is None or len(records) <= limit:
        return records
    return [records[number] for number in sorted(Random(0).sample(range(len(records)), limit))]


def _table(results: Sequence[Result]) -> Table:
    """One row per task and domain; percentages with standard errors."""
    scorers = list(results[0].accuracy)
    caption = (
        f"accuracy in % ± its standard error; cannot tell: within two of them, or fewer than {FEW_CLUSTERS} prompts"
    )
    table = Table("task, domain", box=SIMPLE_HEAD, pad_edge=False, caption=caption)
    for heading in ("items", "prompts", *scorers, f"{MODEL} - {RIVAL}"):
        table.add_column(heading, justify="right")
    table.add_column(f"{MODEL} than {RIVAL}")
    for result in results:
        difference = result.difference
        table.add_row(
            Cell(result.task if result.domain is None else f"  {result.domain}"),
            f"{result.items:,}",
            f"{result.accuracy[RIVAL].clusters:,}",
            *(_percent(result.accuracy[name]) for name in scorers),
            "" if difference is None else _percent(difference, "+"),
            "" if difference is None else difference.verdict(),
        )
    return table


def _percent(estimate: Estimate, sign: str = "") -> str:
    mean = f"{100 * estimate.mean:{sign}.1f}"
    return f"{mean}±{100 * estimate.standard_error:.1f}" if estimate.standard_error else mean


def _notes(results: Sequence[Result], reports: dict[str, ReadReport]) -> Iterator[str]:
    """What a reader of the table has to know about the data."""
    for result in results:
        if result.domain is None and result.reference_copies:
            yield (
                f"{result.task}: in {result.reference_copies} of {result.items} items the better candidate is the "
                f"reference itself, so {RIVAL} is right there by construction"
            )
        if result.domain is None and result.truncated:
            yield f"{result.task}: {result.truncated} of {result.items} items were cut to fit the model"
    for path, report in reports.items():
        if report.skipped:
            yield f"{path}: skipped {report.skipped} rows, used {report.read}; the first: {report.first_reasons[0]}"


def _save(path: Path, settings: dict[str, object], found: Evaluation) -> None:
    """Write the numbers as JSON and the items as JSONL beside it."""
    results = [
        {**asdict(result), "verdict": None if result.difference is None else result.difference.verdict()}
        for result in found.results
    ]
    with open_writer(path.with_suffix(".items.jsonl")) as writer:
        for item in found.items:
            writer.write(
                {
                    "task": item.task,
                    "prompt_id": item.group.id,
                    "domain": item.domain,
                    "policy": item.policy,
                    "negative_policy": item.negative_policy,
                    "copies_reference": item.copies_reference,
                    "truncated": item.truncated,
                    "rewards": {name: {"better": pair[0], "worse": pair[1]} for name, pair in item.rewards.items()},
                }
            )
    content = json.dumps({**settings, "results": results}, indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(content, "utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})") from error
