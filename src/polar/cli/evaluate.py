"""`polar eval` and `polar eval report`: how good a reward model is, beside baselines and with standard errors."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.text import Text as Cell

from polar.cli.common import Files, OnBadRow, ScoringFlags, progress_bar
from polar.core.checkpoint import BUNDLED_NAME
from polar.core.errors import InputError
from polar.core.files import on_disk, write_text


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
    flags: ScoringFlags = ScoringFlags(),  # noqa: B008 (frozen)
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
        flags: Where and how rewards are computed.
        as_json: Print the summary as JSON in place of tables.
    """
    from polar.evaluation import run
    from polar.evaluation.suites import ReferenceSource, Suite

    if sum((reference_column is not None, references is not None, chosen_as_reference)) > 1:
        raise InputError("give one of --reference-column, --references and --chosen-as-reference")
    source = ReferenceSource(
        column=reference_column, file=references, chosen_as_reference=chosen_as_reference, generator=generator
    )
    if suite is None:
        chosen: str | Suite = Suite.of_files(
            triples=triples, preferences=preferences, reference=source, seen=seen, families=families
        )
    elif triples or preferences or seen or families:
        raise InputError("give either a suite or --triples and --preferences, with --seen and --families, not both")
    else:
        chosen = suite
    with progress_bar() as progress:
        task = progress.add_task("items", total=None)
        summary = run.evaluate(
            None if baselines_only else model,
            chosen,
            output=output,
            data=data,
            reference=source,
            limit=limit,
            without_reference=without_reference,
            reference_free=reference_free,
            embedding=embedding,
            on_bad_row=on_bad_row,
            **asdict(flags),
            progress=lambda items: progress.advance(task, items),
        )
    if as_json:
        sys.stdout.write(json.dumps(summary.content(), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(summary.table(Console().width) if sys.stdout.isatty() else summary.table())


def report(runs: Files, /, *, output: str, without_texts: bool = False) -> None:
    """Compare evaluations, from the records that `polar eval --output` wrote; no model is loaded.

    Every model is compared with the baselines and with the first model for every data set, domain and slice, by a
    paired bootstrap over prompts: better, worse or cannot tell. The page needs no network: its tables sort and
    can be searched, and it shows the worst mistakes to read. The same numbers are written as JSON, and as a section
    for the model card in Markdown.

    Examples:
      polar eval report runs/nano --output report.html
      polar eval report runs/new runs/old runs/without-pretraining --output reports/july.html

    Args:
        runs: Directories of evaluations; models are compared with that of the first one.
        output: File for the page (.html); a .json and a .md of the same name are written beside it.
        without_texts: Leave the worst mistakes out, for a report on data whose texts may not be passed on.
    """
    from polar.core.html import visible
    from polar.evaluation.page import model_card, page
    from polar.evaluation.report import build_report

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


app = App(name="eval", help_format="plaintext", version_flags=[])
app.default(evaluate)
app.command(report, help="Write an HTML page that compares evaluations, from their records.")
