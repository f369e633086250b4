"""`polar rft-data`: data sets become the files that reinforcement fine-tuning reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from cyclopts import Parameter
from rich.console import Console

from polar.cli.common import Inputs, OnBadRow, progress_bar
from polar.core.errors import InputError
from polar.core.files import on_disk

if TYPE_CHECKING:
    from polar.corpus.references import Asking
    from polar.corpus.sample import SampleReport
    from polar.rft.dataset import Reading


def rft_data(
    inputs: Inputs,
    /,
    *,
    output: str,
    framework: Annotated[Literal["verl", "trl", "openrlhf", "swift"], Parameter(name=["--for"])] = "verl",
    split: str = "train",
    data_source: str | None = None,
    ability: str | None = None,
    reference_column: str | None = None,
    references_from: str | None = None,
    references_model: str | None = None,
    references_per_prompt: int = 1,
    references_key_env: str | None = None,
    references_dir: str | None = None,
    temperature: float = 0.7,
    max_tokens: int = 4096,
    concurrency: int = 64,
    deadline: float = 600,
    seed: int = 0,
    on_bad_row: OnBadRow = "skip",
) -> None:
    """Make the prompts and references of reinforcement fine-tuning from a data set.

    Rows may be transcripts of HH-RLHF, conversations (AM-DeepSeek-R1-Distilled, ShareGPT), chat messages, problems of
    MATH, questions of GSM8K, or our own: {"prompt", "reference"} or {"prompt", "references": [...]}. Thinking is taken
    out of references. Rows that are no tasks (turns out of order, empty questions or answers) are skipped, counted
    and shown.

    The file has the columns of the framework that --for names. For verl: data_source, prompt, ability, reward_model and
    extra_info, which holds prompt and references for polar.rft.verl.

    With --references-from an OpenAI-compatible server is asked for references, in place of those of the data; answers
    are kept as they come, and the same command goes on after a stop.

    Examples:
      polar rft-data hh-rlhf/train.jsonl.gz --output data/hh-rlhf/train.parquet
      polar rft-data MATH/train.jsonl --output data/math/train.parquet
      polar rft-data hf:openai/gsm8k:main:test --split test --output data/math/test.parquet
      polar rft-data rows.jsonl --for trl --output train.parquet
      polar rft-data prompts.jsonl --references-from https://api.example.com/v1 --references-model big-model
        --references-key-env BIG_MODEL_KEY --references-per-prompt 4 --output data/general/train.parquet

    Args:
        inputs: Files (JSONL, also .gz and .zst, JSON or Parquet), directories, hf: data sets, or - for stdin.
        output: File for the rows (.parquet, .jsonl, .jsonl.gz or .jsonl.zst); its directory is made.
        framework: Whose columns: verl, trl, openrlhf or swift.
        split: Name of the split, for the rows of verl.
        data_source: Name of the data set (default: that of the format).
        ability: Name of the ability (default: the row's, or that of the format).
        reference_column: For rows with a prompt: the column that holds the reference, or a list of several.
        references_from: Base URL of an OpenAI-compatible server, with its version (http://127.0.0.1:8000/v1).
        references_model: The model to ask there.
        references_per_prompt: References for every prompt.
        references_key_env: Environment variable that holds the key.
        references_dir: Directory for the answers as they come (default: that of the output, with .references added).
        temperature: Of the references.
        max_tokens: Longest answer; one that is cut off there is no reference.
        concurrency: Requests in flight.
        deadline: Seconds of trying again before a reference, or a server that never answers, is given up.
        seed: Another seed gives other references.
        on_bad_row: "error" stops at the first row that would be skipped.
    """
    from polar.corpus.references import Asking
    from polar.rft.dataset import DataReport, Reading, first_examples, read_tasks, with_references, write_tasks

    if references_per_prompt < 1:
        raise InputError(f"references_per_prompt must be at least 1, found {references_per_prompt}")
    reading = Reading(
        tuple(map(_expanded, inputs)),
        reference_column,
        data_source,
        ability,
        with_references=references_from is None,
        strict=on_bad_row == "error",
    )
    target = Path(output).expanduser()
    with on_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    report, console = DataReport(), Console(stderr=True)
    tasks = read_tasks(reading, report)
    shortfall = ""
    if references_from is not None:
        directory = Path(references_dir or f"{target}.references").expanduser()
        asking = Asking(
            references_from,
            references_model or _needed("references_model", "the model to ask"),
            references_per_prompt,
            references_key_env,
            temperature,
            max_tokens,
            concurrency,
            deadline,
            seed,
        )
        shortfall = _ask(reading, directory, asking, console)
        tasks = with_references(tasks, directory, report)
    elif references_model or references_key_env or references_dir:
        _needed("references_from", "the server to ask")
    with progress_bar(console) as progress:
        bar = progress.add_task("writing", total=None)
        write_tasks(
            tasks,
            str(target),
            report,
            framework=framework,
            split=split,
            progress=lambda count: progress.advance(bar, count),
        )
    for reason, count, example in first_examples(report):
        sys.stderr.write(f"skipped {count:,}: {reason}; the first: {example}\n")
    sys.stderr.write(f"wrote {report.written:,} rows to {target}\n")
    if shortfall:
        raise InputError(shortfall)


def _ask(reading: Reading, directory: Path, asking: Asking, console: Console) -> str:
    """Sample the references and return why some are missing, or an empty text.

    Raises:
        InputError: all of them are.
    """
    from polar.corpus.references import ask_for_references
    from polar.rft.dataset import DataReport, read_tasks

    if "-" in reading.paths:
        raise InputError("references_from needs files, because they are read twice; found - (stdin)")
    prompts = (task.prompt for task in read_tasks(reading, DataReport()))  # they are counted when they are read again
    with progress_bar(console) as progress:
        bar = progress.add_task("references", total=None)

        def begin(report: SampleReport) -> None:
            progress.reset(bar, total=report.expected - report.found)

        report = ask_for_references(
            prompts, directory, asking, begin=begin, progress=lambda count: progress.advance(bar, count)
        )
    shortfall = report.shortfall("references")
    if not report.found and not report.drawn:
        raise InputError(f"{shortfall}; nothing is written")
    return shortfall


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _needed(name: str, what: str) -> NoReturn:
    raise InputError(f"{name} is missing: {what}")
