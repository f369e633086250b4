"""`polar eval` and `polar eval report`: how good a reward model is, beside baselines and with standard errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from cyclopts import App, Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text as Cell

from polar.cli.models import Model, open_model
from polar.cli.progress import progress_bar
from polar.client.engines import ServerType
from polar.core.checkpoint import BUNDLED_NAME
from polar.core.errors import InputError
from polar.core.files import on_disk, write_json, write_text
from polar.core.html import visible
from polar.core.metrics import FEW_CLUSTERS, Estimate
from polar.core.version import __version__
from polar.data.readers import OnBadRow
from polar.evaluation.baselines import baselines, library_versions
from polar.evaluation.manifest import TASKS, Manifest, commit, model_facts
from polar.evaluation.records import MODEL, WITHOUT_REFERENCE
from polar.evaluation.report import build_report
from polar.evaluation.run import evaluate as run
from polar.evaluation.run import planned
from polar.evaluation.suites import Dataset, ReferenceSource, Suite, read_suite
from polar.evaluation.summary import (
    RIVAL,
    SUMMARY,
    BestOfN,
    Official,
    Result,
    Sensitivity,
    SeveralReferences,
    Summary,
    summarise,
)

Files = Annotated[Sequence[str], Parameter(negative="")]
MANY_NUMBERS = 9
"""Most columns of a benchmark's own numbers; all of them are in the summary."""


def evaluate(
    suite: str | None = None,
    /,
    *,
    model: str = BUNDLED_NAME,
    triples: Files = (),
    preferences: Files = (),
    output: str | None = None,
    data: str | None = None,
    reference_column: str | None = None,
    references: str | None = None,
    generator: str | None = None,
    chosen_as_reference: bool = False,
    seen: Files = (),
    families: str | None = None,
    limit: int | None = None,
    baselines_only: bool = False,
    without_reference: bool = False,
    reference_free: bool = False,
    embedding: str | None = None,
    on_bad_row: OnBadRow = "error",
    server_address: str | None = None,
    engine: ServerType = "auto",
    device: str | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    max_response_length: int | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure a reward model beside baselines on the same items, and keep a record of every item.

    On triples: how often the positive beats the negative (policy discrimination). On preferences: how often the better
    answer beats the worse one, also per domain. Suites (YAML) have further tasks: right and wrong answers, best of N,
    and the formats and rules of RewardBench 1 and 2, RM-Bench, JudgeBench, PPE and RMB. Ties count one half. Accuracies
    are percentages with their standard errors, clustered by prompt; the last column says whether the model is better
    than the overlap of words with the reference (unigram F1), which needs no model at all.

    With --output, rewards are written as they come: the same command goes on after a crash, and `polar eval report`
    compares any number of such directories without a model.

    Examples:
      polar eval --triples held-out.jsonl --preferences preferences.jsonl
      polar eval --triples held-out.parquet --seen train.parquet --limit 500
      polar eval suite.yaml --model runs/nano --output results/nano
      polar eval rewardbench-2 --references answers.jsonl --generator gpt-4o --output results/rb2
      polar eval suite.yaml --model ./rm --server-address gpu1:8000,gpu2:8000 --engine vllm --output results/rm

    Args:
        suite: A YAML file, or rewardbench, rewardbench-2, rm-bench, judgebench, ppe, rmb.
        model: Checkpoint directory, hub name, or polar-mini or polar-nano, which are bundled.
        triples: File of triples, as `polar pair` writes them; repeat the flag for more.
        preferences: File of preferences (prompt, reference, chosen, rejected, and other known formats); repeatable.
        output: Directory for records, manifest and summary.
        data: Directory that the paths of the suite are relative to (default: where its file is).
        reference_column: Column of the preferences that holds the reference (default: reference).
        references: File of references (rows: prompt, reference) for data that have none.
        generator: Who wrote the references, in words; recorded and shown.
        chosen_as_reference: Take the chosen answer as its own reference. This gives the answer away.
        seen: Training data, to report unseen prompts and policies apart; repeatable.
        families: File of rows with policy and family, to report negatives of the same family apart.
        limit: At most this many items of each data set, drawn at random (always the same ones).
        baselines_only: Do not load a model.
        without_reference: Score with an empty reference too: what the model knows without one.
        reference_free: The model was trained without references, so it reads empty ones; the baselines read the true.
        embedding: A sentence-transformers model for one more baseline.
        on_bad_row: "skip" leaves unreadable rows out and says how many.
        server_address: host:port or URL of a server that gives the rewards, several separated by commas; the model is
            then the directory of the checkpoint that it serves. A key is taken from POLAR_API_KEY.
        engine: What serves there; auto finds out.
        device: Torch device (default: a GPU if there is one).
        dtype: float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU).
        max_length: Longest input in tokens (default: the checkpoint's).
        max_response_length: Longest reference and answer in tokens (default: the checkpoint's).
        as_json: Print the summary as JSON in place of tables.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, found {limit}")
    if output is not None and (Path(output).is_file() or Path(output).suffix == ".json"):
        raise InputError(f"{output}: expected a directory for the records; the summary in it is {SUMMARY}")
    if sum((reference_column is not None, references is not None, chosen_as_reference)) > 1:
        raise InputError("give one of --reference-column, --references and --chosen-as-reference")
    if baselines_only and server_address is not None:
        raise InputError("give either --baselines-only or --server-address: a server has a model")
    source = ReferenceSource(
        column=reference_column, file=references, chosen_as_reference=chosen_as_reference, generator=generator
    )
    chosen = _suite(suite, data, triples, preferences, source, tuple(seen), families)
    scorers = baselines(embedding)
    opened: AbstractContextManager[Model | None] = nullcontext()
    if not baselines_only:
        opened = open_model(
            model,
            server_address=server_address,
            engine=engine,
            device=device,
            dtype=dtype,
            max_length=max_length,
            max_response_length=max_response_length,
        )
    with opened as rewarding, TemporaryDirectory(prefix="polar-eval-") as temporary, progress_bar() as progress:
        own = [] if rewarding is None else [MODEL, *([WITHOUT_REFERENCE] if without_reference else [])]
        manifest = Manifest(
            polar=__version__,
            commit=commit(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            suite=suite or "flags",
            model=None if rewarding is None else model_facts(model, rewarding.template, rewarding.local, engine),
            scorers=(*own, *scorers),
            settings={
                "limit": limit,
                "on_bad_row": on_bad_row,
                "reference_free": reference_free,
                "embedding": embedding,
                "datasets": [dataset.model_dump(mode="json", exclude_defaults=True) for dataset in chosen.datasets],
            },
            versions=dict(library_versions()),
            datasets=planned(chosen),
        )
        directory = Path(output or temporary)
        task = progress.add_task("items", total=None)
        manifest = run(
            chosen,
            directory,
            manifest,
            rewarding,
            scorers,
            limit=limit,
            reference_free=reference_free,
            on_bad_row=on_bad_row,
            progress=lambda items: progress.advance(task, items),
        )
        summary = summarise(directory)
        content = {"scorers": manifest.scorers, **asdict(summary)}
        write_json(directory / SUMMARY, content)
    if as_json:
        sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width, and the tables fit into this one
    _show(console, manifest, summary)


def report(
    runs: Annotated[Sequence[str], Parameter(negative="")], /, *, output: str, without_texts: bool = False
) -> None:
    """Compare evaluations, from the records that `polar eval --output` wrote; no model is loaded.

    Every model stands beside the baselines and beside the first model, with a paired bootstrap over prompts that says
    better, worse or cannot tell, for every data set, domain and slice. The page needs no network: its tables sort and
    can be searched, and it shows the worst mistakes to read. Beside it stand the same numbers as JSON, and a section
    for the model card in Markdown.

    Examples:
      polar eval report runs/nano --output report.html
      polar eval report runs/new runs/old runs/without-pretraining --output reports/july.html

    Args:
        runs: Directories of evaluations; models are compared with that of the first one.
        output: File for the page (.html); a .json and a .md of the same name are written beside it.
        without_texts: Leave the worst mistakes out, for a report on data whose texts may not be passed on.
    """
    from polar.evaluation.page import model_card, page  # needs matplotlib, which --help does not

    target = Path(output)
    if target.suffix != ".html":
        raise InputError(f"{output}: expected a file name that ends in .html")
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise InputError("a run is given twice; expected different directories")
    found = build_report(runs, texts=not without_texts)
    contents = {".json": found.to_json(), ".md": model_card(found), ".html": page(found)}
    with on_disk(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        write_text(target.with_suffix(suffix), content)
    console = Console(stderr=True)
    for warning in found.warnings:
        console.print(Cell(f"warning: {visible(warning)}"))
    sys.stderr.write(f"wrote {target}, {target.stem}.json and {target.stem}.md\n")


def _suite(
    name: str | None,
    data: str | None,
    triples: Sequence[str],
    preferences: Sequence[str],
    source: ReferenceSource,
    seen: tuple[str, ...],
    families: str | None,
) -> Suite:
    if name is not None:
        if triples or preferences or seen or families:
            raise InputError("give either a suite or --triples and --preferences, with --seen and --families, not both")
        return read_suite(name, data, source)
    if not triples and not preferences:
        raise InputError("nothing to evaluate: give a suite, --triples FILE or --preferences FILE")
    names: list[str] = []
    for path in (*triples, *preferences):
        stem = re.sub(r"[^\w.-]+", "-", Path(path).name.split(".")[0]) or "data"
        taken = sum(each == stem or each.startswith(f"{stem}_") for each in names)
        names.append(f"{stem}_{taken + 1}" if taken else stem)
    datasets = [
        Dataset(name=names[place], path=path, task="policy discrimination", seen=seen, families=families)
        for place, path in enumerate(triples)
    ]
    datasets += [
        Dataset(name=names[len(triples) + place], path=path, task="preference accuracy", reference=source, seen=seen)
        for place, path in enumerate(preferences)
    ]
    return Suite(datasets=tuple(datasets))


def _show(console: Console, manifest: Manifest, summary: Summary) -> None:
    """Print a summary: accuracies for every task, best of N, benchmarks' own numbers, and what has to be known."""
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
    for note in _notes(manifest, summary):
        console.print(Cell(note))


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
            f"; difference: {MODEL} minus {RIVAL}; cannot tell: within two standard errors, "
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
    caption = "accuracy in % on the items that have several references, by what becomes of the rewards against each"
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
    names = list(next(iter(official.scores.values())))[:MANY_NUMBERS]
    table = _table(f"{official.dataset}, by the rules of {official.scoring}, in %", ["scorer", *names])
    for scorer, scores in official.scores.items():
        table.add_row(scorer, *(f"{100 * scores[name]:.1f}" for name in names))
    return table


def _notes(manifest: Manifest, summary: Summary) -> Iterator[str]:
    """What a reader of the tables has to know about the data."""
    for dataset in manifest.datasets:
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
                f"reference itself, so {RIVAL} is right there by construction"
            )
        if result.truncated:
            yield f"{result.dataset}: {result.truncated} of {result.items} items were cut to fit the model"


app = App(name="eval", help_format="plaintext", version_flags=[])
app.default(evaluate)
app.command(report, help="Write an HTML page that compares evaluations, from their records.")
