"""The summary of one evaluation as text tables, for a terminal or a notebook."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text as Cell

from polar.core.metrics import FEW_CLUSTERS, Estimate
from polar.evaluation.manifest import TASKS
from polar.evaluation.records import MODEL
from polar.evaluation.summary import (
    COMPARED_BASELINE,
    BestOfN,
    Official,
    Result,
    Sensitivity,
    SeveralReferences,
    Summary,
)

MAX_OFFICIAL_NUMBERS = 9
"""Columns for a benchmark's own numbers; all of them are in the summary."""


def text_tables(summary: Summary, width: int) -> str:
    """Return a table of accuracies for every task, best of N, benchmarks' own numbers, and notes on the data."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for task in TASKS:
        if results := [result for result in summary.results if result.task == task]:
            console.print(_accuracies(task, results))
    if summary.several_references:
        console.print(_several_references(summary.several_references))
    if summary.sensitivity:
        console.print(_sensitivities(summary.sensitivity))
    for best in summary.best_of_n:
        console.print(_curves(best))
    for official in summary.official:
        console.print(_official(official))
    for note in _notes(summary):
        console.print(Cell(note))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _table(title: str, headings: Sequence[str], caption: str | None = None) -> Table:
    table = Table(title=Cell(title), box=SIMPLE_HEAD, pad_edge=False, caption=caption, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    return table


def _accuracies(task: str, results: Sequence[Result]) -> Table:
    scorers = list(results[0].accuracy)
    headings = ["data", "items", "prompts", *scorers, "difference", "verdict"]
    caption = "accuracy in % ± its standard error"
    if MODEL in scorers:
        caption += (
            f"; difference: {MODEL} minus {COMPARED_BASELINE}; cannot tell: within two standard errors, "
            f"or fewer than {FEW_CLUSTERS} prompts"
        )
    table = _table(task, headings if MODEL in scorers else headings[:-2], caption)
    for result in results:
        difference = result.difference
        compared = [] if difference is None else [_percent(difference, "+"), difference.verdict()]
        counts = f"{result.items:,}", f"{result.accuracy[scorers[0]].clusters:,}"
        numbers = [_percent(result.accuracy[name]) for name in scorers]
        table.add_row(Cell(_name(result)), *counts, *numbers, *compared)
        for label, estimates in (("  Kendall's tau", result.rank_correlation), ("  AUC, all prompts", result.area)):
            if estimates is not None and result.domain is None and result.slice is None:
                table.add_row(label, "", "", *(_percent(estimates[name]) for name in scorers))
    return table


def _name(result: Result) -> str:
    if result.dataset is None:
        return "all"
    return f"  {result.domain or result.slice}" if result.domain or result.slice else result.dataset


def _percent(estimate: Estimate, sign: str = "") -> str:
    mean = f"{100 * estimate.mean:{sign}.1f}"
    return f"{mean}±{100 * estimate.standard_error:.1f}" if estimate.standard_error else mean


def _several_references(results: Sequence[SeveralReferences]) -> Table:
    scorers = list(next(iter(results[0].accuracy.values())))
    caption = "accuracy in % on the items that have several references, by how the rewards against each become one"
    table = _table("several references", ["data", "rewards", "items", *scorers], caption)
    for result in results:
        for how, accuracy in result.accuracy.items():
            numbers = [_percent(accuracy[name]) for name in scorers]
            table.add_row(result.dataset, how, f"{accuracy[scorers[0]].count:,}", *numbers)
    return table


def _sensitivities(results: Sequence[Sensitivity]) -> Table:
    scorers = list(results[0].change)
    caption = "accuracy in % after the worse answer was changed (reworded, paraphrase: the better one); its difference"
    table = _table("sensitivity", ["data", "change", "items", *scorers], caption)
    for result in results:
        numbers = [f"{100 * result.after[name].mean:.1f} ({_percent(result.change[name], '+')})" for name in scorers]
        table.add_row(result.dataset, result.probe, f"{result.after[scorers[0]].count:,}", *numbers)
    return table


def _curves(best: BestOfN) -> Table:
    points = next(iter(best.curves.values()))
    caption = "true quality of the candidate with the highest reward among N; ↓: worse than at half of N"
    table = _table(f"best of N: {best.dataset}", ["scorer", *(f"N={point.draws}" for point in points)], caption)
    for scorer, curve in best.curves.items():
        table.add_row(scorer, *(f"{'↓' if point.change == 'worse' else ''}{point.quality.mean:.3f}" for point in curve))
    table.add_row("the best", *(f"{point.best:.3f}" for point in points))
    table.add_row("items", *(f"{point.quality.count:,}" for point in points))
    return table


def _official(official: Official) -> Table:
    names = list(next(iter(official.scores.values())))[:MAX_OFFICIAL_NUMBERS]
    table = _table(f"{official.dataset}, by the rules of {official.scoring}, in %", ["scorer", *names])
    for scorer, scores in official.scores.items():
        table.add_row(scorer, *(f"{100 * scores[name]:.1f}" for name in names))
    return table


def _notes(summary: Summary) -> Iterator[str]:
    """Yield notes on the data: references, skipped rows, copies of references, truncation."""
    for dataset in summary.manifest.datasets:
        if dataset.task != "policy discrimination":
            yield f"{dataset.name}: references: {dataset.reference}"
        if dataset.skipped:
            yield f"{dataset.name}: skipped {dataset.skipped} rows; the first: {dataset.first_reasons[0]}"
    for result in summary.results:
        if result.dataset is None or result.domain is not None or result.slice is not None:
            continue
        if result.reference_copies:
            yield (
                f"{result.dataset}: in {result.reference_copies} of {result.items} items the better candidate is the "
                f"reference itself, so {COMPARED_BASELINE} is right there by construction"
            )
        if result.truncated:
            yield f"{result.dataset}: {result.truncated} of {result.items} items were cut to fit the model"
