"""Data sets become files for reinforcement fine-tuning, streaming, and what is set aside is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from polar.core.errors import InputError
from polar.data.fields import Row
from polar.data.readers import ReadReport, rows
from polar.data.writers import open_writer
from polar.rft.layouts import LAYOUTS, Framework
from polar.rft.prompts import Task, UnusableError, read_task

MALFORMED, UNREADABLE = "no row of a known format", "unreadable"


@dataclass(slots=True)
class DataReport:
    """What became of the rows."""

    written: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    """Rows that are no tasks, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of every reason."""

    def leave(self, reason: str, example: str) -> None:
        """Count a row that is set aside."""
        self.set_aside[reason] += 1
        self.examples.setdefault(reason, example)


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows become tasks."""

    paths: tuple[str, ...]
    reference_column: str | None = None
    source: str | None = None
    """The name of the data set, in place of the format's."""
    ability: str | None = None
    with_references: bool = True
    strict: bool = False
    """Raise at the first row that would be set aside."""


def read_tasks(reading: Reading, report: DataReport) -> Iterator[Task]:
    """The tasks of some files, in the order of the files and their rows.

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
        report: Counts what is written.
        framework: Whose columns.
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
    """Reason, count and first row of what was set aside, the most frequent first."""
    return [(reason, count, report.examples[reason]) for reason, count in report.set_aside.most_common()]
