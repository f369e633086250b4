"""`polar eval`: how good a reward model is, beside baselines and with standard errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from polar.cli.evaluation_tables import show
from polar.cli.models import Model, open_model
from polar.cli.progress import progress_bar
from polar.client.engines import ServerType
from polar.core.checkpoint import BUNDLED_NAME
from polar.core.errors import InputError
from polar.core.files import write_json
from polar.core.version import __version__
from polar.data.readers import OnBadRow
from polar.evaluation.baselines import baselines, library_versions
from polar.evaluation.manifest import Manifest, commit, model_facts
from polar.evaluation.records import MODEL, WITHOUT_REFERENCE
from polar.evaluation.run import evaluate as run
from polar.evaluation.run import planned
from polar.evaluation.suites import Dataset, ReferenceSource, Suite, read_suite
from polar.evaluation.summary import SUMMARY, summarise

Files = Annotated[Sequence[str], Parameter(negative="")]


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
        model: Checkpoint directory, hub name, or polar-nano for the bundled model.
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
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width, and the tables fit into this one
    show(console, manifest, summary)


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
