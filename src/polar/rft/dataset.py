"""Data sets to files for reinforcement fine-tuning, streaming; rows that fail are counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from polar.core.errors import InputError
from polar.core.records import Message, prompt_id
from polar.corpus.references import read_answers
from polar.data.fields import Row
from polar.data.readers import ReadReport, rows
from polar.data.record_rows import label_of
from polar.data.writers import open_writer
from polar.rft.prompts import Task, UnusableError, answer_in, read_task

Framework = Literal["verl", "trl", "openrlhf", "swift"]
Layout = Callable[[Task, str, int], dict[str, Any]]
"""Function from a task, the name of its split and its number to its row."""

TEXT = pa.string()
TEXTS = pa.list_(TEXT)
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))

MALFORMED, UNREADABLE = "no row of a known format", "unreadable"


@dataclass(slots=True)
class DataReport:
    """Counts of the rows."""

    written: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    """Rows that are no tasks, counted by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of every reason."""

    def leave(self, reason: str, example: str) -> None:
        """Count a row that is no task."""
        self.set_aside[reason] += 1
        self.examples.setdefault(reason, example)


@dataclass(frozen=True, slots=True)
class Reading:
    """Files, and how their rows become tasks."""

    paths: tuple[str, ...]
    reference_column: str | None = None
    source: str | None = None
    """Name of the data set (default: that of the format)."""
    ability: str | None = None
    with_references: bool = True
    strict: bool = False
    """Raise at the first row that is no task."""


def read_tasks(reading: Reading, report: DataReport) -> Iterator[Task]:
    """Yield the tasks of some files, in the order of the files and their rows.

    Raises:
        InputError: a file cannot be read to its end; or a row is no task, where that is strict.
    """
    for path in reading.paths:
        read = ReadReport()
        for row in rows(path, on_bad_row="error" if reading.strict else "skip", report=read):
            try:
                yield _task(row, reading)
            except InputError as error:
                if reading.strict:
                    raise
                report.leave(error.reason if isinstance(error, UnusableError) else MALFORMED, str(error))
        if read.skipped:
            report.set_aside[UNREADABLE] += read.skipped
            report.examples.setdefault(UNREADABLE, read.first_reasons[0])


def _task(row: Row, reading: Reading) -> Task:
    task = read_task(row, reference_column=reading.reference_column, with_references=reading.with_references)
    return replace(task, source=reading.source or task.source, ability=reading.ability or task.ability)


def write_tasks(
    tasks: Iterable[Task],
    output: str,
    report: DataReport,
    *,
    framework: Framework = "verl",
    split: str = "train",
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write tasks, numbered from 0, in the columns of a framework; the file appears when it is complete.

    Args:
        tasks: With references.
        output: A Parquet or JSONL file.
        report: Counts the rows written.
        framework: The framework of the columns.
        split: Its name, as the rows of verl say it.
        progress: Called with the number of tasks that were just written.

    Raises:
        InputError: there is no task, or the disk refuses the file.
    """
    layout, schema = LAYOUTS[framework]
    with open_writer(output, schema) as writer:
        for index, task in enumerate(tasks):
            writer.write(layout(task, split, index))
            report.written += 1
            progress(1)
        if not report.written:
            reasons = "; ".join(f"{count:,}: {reason}" for reason, count in report.set_aside.most_common())
            raise InputError(f"{output}: no row can be used ({reasons or 'there is none'}), so nothing is written")


def first_examples(report: DataReport) -> Sequence[tuple[str, int, str]]:
    """Return reason, count and first row of the rows that failed, the most frequent reason first."""
    return [(reason, count, report.examples[reason]) for reason, count in report.set_aside.most_common()]


def _verl(task: Task, split: str, index: int) -> dict[str, Any]:
    prompt = _plain(task.prompt)
    return {
        "data_source": task.source,
        "prompt": prompt,
        "ability": task.ability,
        "reward_model": {"style": "polar", "ground_truth": task.references[0]},
        "extra_info": {
            "prompt": prompt,
            "reference": task.references[0],
            "references": list(task.references),
            "answer": task.answer,
            "ability": task.ability,
            "split": split,
            "index": index,
        },
    }


def _trl(task: Task, split: str, index: int) -> dict[str, Any]:
    return {
        "prompt": _plain(task.prompt),
        "reference": task.references[0],
        "references": list(task.references),
        "answer": task.answer,
    }


def _openrlhf(task: Task, split: str, index: int) -> dict[str, Any]:
    """Row to be read with --data.input_key prompt --data.label_key label --data.apply_chat_template."""
    prompt = _plain(task.prompt)
    return {"prompt": prompt, "label": label_of(prompt, task.references)}


def _swift(task: Task, split: str, index: int) -> dict[str, Any]:
    return {"messages": _plain(task.prompt), "references": list(task.references), "solution": task.answer}


LAYOUTS: dict[Framework, tuple[Layout, pa.Schema]] = {
    "verl": (
        _verl,
        pa.schema(
            [
                ("data_source", TEXT),
                ("prompt", MESSAGES),
                ("ability", TEXT),
                ("reward_model", pa.struct([("style", TEXT), ("ground_truth", TEXT)])),
                (
                    "extra_info",
                    pa.struct(
                        [
                            ("prompt", MESSAGES),
                            ("reference", TEXT),
                            ("references", TEXTS),
                            ("answer", TEXT),
                            ("ability", TEXT),
                            ("split", TEXT),
                            ("index", pa.int64()),
                        ]
                    ),
                ),
            ]
        ),
    ),
    "trl": (_trl, pa.schema([("prompt", MESSAGES), ("reference", TEXT), ("references", TEXTS), ("answer", TEXT)])),
    "openrlhf": (_openrlhf, pa.schema([("prompt", MESSAGES), ("label", TEXT)])),
    "swift": (_swift, pa.schema([("messages", MESSAGES), ("references", TEXTS), ("solution", TEXT)])),
}


def _plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def with_references(tasks: Iterable[Task], directory: Path, report: DataReport) -> Iterator[Task]:
    """The tasks with the references that a model gave for their prompts.

    Answers that were cut off at the token limit, and those that are nothing but thinking, are no references. Tasks
    without any, for this reason or because the model gave no answer, and those that repeat an earlier prompt are set
    aside.

    Args:
        tasks: The same, in the same order, as for `ask_for_references`.
        directory: The same.
        report: Counts the rows that are skipped.
    """
    answers = read_answers(directory)
    found_id, found = next(answers, ("", []))
    seen: set[str] = set()
    for number, task in enumerate(tasks):
        name = prompt_id(task.prompt)
        place = f"prompt {number} ({name})"
        if name in seen:
            report.leave("a prompt that repeats an earlier one", place)
            continue
        seen.add(name)
        if name != found_id:
            report.leave("no answer from the model", place)
            continue
        references = tuple(dict.fromkeys(filter(None, map(_reference, found))))
        found_id, found = next(answers, ("", []))
        if references:
            yield replace(task, references=references)
        else:
            report.leave("no usable reference from the model", place)


def _reference(row: dict[str, Any]) -> str:
    return "" if row["finish_reason"] == "length" else answer_in(row["output"]).strip()
