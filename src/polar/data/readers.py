"""Streaming readers: data files of any size become records, in constant memory, and nothing is dropped silently.

A path is a file (JSONL, NDJSON, a JSON array, each also as .gz or .zst; Parquet), "-" for JSONL on standard input, a
directory or a glob of such files (in sorted order), a directory written by `datasets.save_to_disk`, or
"hf:NAME[:CONFIG]:SPLIT" for a data set of the Hugging Face hub. In place of a path, readers take rows in memory:
dictionaries, records, a data set that is loaded.

Every reader is a generator, so errors appear while iterating. A bad row raises `InputError`, or with
`on_bad_row="skip"` is counted in the `ReadReport` that the caller passes; a fault of the file itself (missing,
truncated, not Parquet) always raises. The formats of rows are in `polar.data.formats`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from polar.core.errors import InputError
from polar.core.records import Comparison, Group, Preference, Text, Trajectory, Triple, is_blank
from polar.data import formats, record_rows
from polar.data.fields import Row
from polar.data.sources import IN_MEMORY, in_memory, sources

__all__ = [
    "OnBadRow",
    "ReadReport",
    "Row",
    "Rows",
    "convert_rows",
    "read_comparisons",
    "read_groups",
    "read_groups_by_reference",
    "read_preferences",
    "read_trajectories",
    "read_triples",
    "rows",
]

log = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]
Rows = str | Path | Iterable[Mapping[str, Any] | Triple | Preference | Trajectory | Comparison | Group]
"""A path (see the module), or rows in memory."""
Noun = TypeVar("Noun")

MAX_REASONS = 5
"""Skipped rows that are logged and kept as examples."""


@dataclass(slots=True)
class ReadReport:
    """Counts of a reader so far; pass one in and look at it at any time."""

    read: int = 0
    """Rows that became records."""
    skipped: int = 0
    """Rows that were left out: bad ones under `on_bad_row="skip"`, and ties."""
    format: str = ""
    """The formats that were met, in order, separated by semicolons."""
    first_reasons: list[str] = field(default_factory=list)
    """Errors of the first few skipped rows."""
    doubtful: Counter[str] = field(default_factory=Counter)
    """Rows that were read though a text in them is empty, by which."""

    def skip(self, error: InputError) -> None:
        """Count a skipped row; the first few are logged as warnings."""
        self.skipped += 1
        if len(self.first_reasons) < MAX_REASONS:
            self.first_reasons.append(str(error))
            log.warning("row skipped: %s", error)
        elif self.skipped == MAX_REASONS + 1:
            log.warning("more rows are skipped; they are counted but not shown")

    def look_for_empty(self, row: Row, references: Iterable[Text], preferred: Iterable[Text]) -> None:
        """Count a row with an empty reference, or an empty answer that it prefers to another; the first is logged."""
        for what, texts in (("an empty reference", references), ("an empty answer that is preferred", preferred)):
            if any(map(is_blank, texts)):
                self.doubtful[what] += 1
                if self.doubtful[what] == 1:
                    log.warning("%s: %s; such rows are used, and counted", row.place, what)

    def tell_doubts(self, path: str | Path) -> None:
        """Log how many rows of an input were doubtful."""
        for what, count in self.doubtful.items():
            log.warning("%s: %d of %d rows have %s", path, count, self.read, what)


def read_comparisons(
    path: Rows,
    *,
    reference_column: str | None = None,
    on_bad_row: OnBadRow = "error",
    report: ReadReport | None = None,
) -> Iterator[Comparison]:
    """Yield outputs to score, one per row (`record_rows.comparison`)."""
    return _read(path, lambda row: record_rows.comparison(row, reference_column), on_bad_row, report)


def read_groups(
    path: Rows,
    *,
    reference_column: str | None = None,
    on_bad_row: OnBadRow = "error",
    report: ReadReport | None = None,
) -> Iterator[Group]:
    """Yield candidates that share prompt and reference, one group per row (`record_rows.group`)."""
    return _read(path, lambda row: record_rows.group(row, reference_column), on_bad_row, report)


def read_groups_by_reference(
    path: Rows, *, on_bad_row: OnBadRow = "error", report: ReadReport | None = None
) -> Iterator[tuple[Group, ...]]:
    """Yield candidates with one reference or several: for each row a group per reference (`record_rows.groups`)."""
    return _read(path, record_rows.groups, on_bad_row, report)


def read_triples(path: Rows, *, on_bad_row: OnBadRow = "error", report: ReadReport | None = None) -> Iterator[Triple]:
    """Yield pre-training examples, one per row (`record_rows.triple`)."""
    return _read(path, record_rows.triple, on_bad_row, report)


def read_preferences(
    path: Rows,
    *,
    reference_column: str | None = None,
    on_bad_row: OnBadRow = "error",
    report: ReadReport | None = None,
) -> Iterator[Preference]:
    """Yield preferences in any of the known formats, one or more per row (`formats.preference`).

    Args:
        path: Where the rows are.
        reference_column: The column that holds the reference, if it is not "reference". Formats without a reference
            need it; it may not name one of the answers.
        on_bad_row: Raise at the first bad row, or skip and count it.
        report: Filled while reading.

    Raises:
        InputError: For a bad row or file, or when no row of the input could be used.
    """
    return _read(path, lambda row: formats.preference(row, reference_column), on_bad_row, report)


def read_trajectories(
    path: Rows, *, on_bad_row: OnBadRow = "error", report: ReadReport | None = None
) -> Iterator[Trajectory]:
    """Yield sampled outputs of policies, one per row (`record_rows.trajectory`)."""
    return _read(path, record_rows.trajectory, on_bad_row, report)


def _read(
    path: Rows,
    convert: Callable[[Row], tuple[str, list[Noun]]],
    on_bad_row: OnBadRow,
    report: ReadReport | None,
) -> Iterator[Noun]:
    report = ReadReport() if report is None else report
    known: list[str] = []
    for row, (name, records) in _converted(path, convert, on_bad_row, report):
        if name not in known:
            known.append(name)
            report.format = "; ".join(known)
            log.info("%s: format: %s", row.file, name)
        flat = [one for record in records for one in (record if isinstance(record, tuple) else (record,))]
        preferences = [one for one in flat if isinstance(one, Preference)]
        report.look_for_empty(
            row,
            [one.reference for one in flat if isinstance(one, Comparison | Group | Preference)],
            [answer for one in preferences for answer in one.ranked[:-1]],
        )
        yield from records
    report.tell_doubts(_name(path))
    if not known:
        raise InputError(
            f"{_name(path)}: expected rows to use, found none: all were skipped; the first: {report.first_reasons[0]}"
        )


def rows(path: Rows, *, on_bad_row: OnBadRow = "error", report: ReadReport | None = None) -> Iterator[Row]:
    """Yield the rows of a file, of several files or of a data set, as dictionaries with their place.

    Args:
        path: Where the rows are (see the module).
        on_bad_row: Raise at the first row that is not an object in valid JSON and UTF-8, or skip and count it.
        report: Counts the rows that are skipped here; the readers of records count those that they read.

    Raises:
        InputError: For a bad row, for a file that cannot be read to its end, and when there is no row at all.
    """
    report = ReadReport() if report is None else report
    nothing = True
    found = sources(str(path)) if isinstance(path, str | Path) else [(IN_MEMORY, in_memory(path))]
    for name, source in found:
        empty = True
        for item in source:
            empty = nothing = False
            if isinstance(item, Row):
                yield item
            elif on_bad_row == "skip":
                report.skip(item)
            else:
                raise item
        if empty:
            log.warning("%s: no rows", name)
    if nothing:
        raise InputError(f"{_name(path)}: expected at least one row, found none")


def _name(path: Rows) -> str | Path:
    return path if isinstance(path, str | Path) else IN_MEMORY


def convert_rows(
    path: Rows,
    convert: Callable[[Row], Noun],
    *,
    on_bad_row: OnBadRow = "error",
    report: ReadReport | None = None,
) -> Iterator[Noun]:
    """Yield the results of a function of every row; for rows that no reader of records above knows.

    Args:
        path: Where the rows are.
        convert: Raises `InputError` for a bad row.
        on_bad_row: Raise at the first bad row, or skip and count it.
        report: Filled while reading.

    Raises:
        InputError: For a bad row or file.
    """
    for _, value in _converted(path, convert, on_bad_row, ReadReport() if report is None else report):
        yield value


def _converted(
    path: Rows, convert: Callable[[Row], Noun], on_bad_row: OnBadRow, report: ReadReport
) -> Iterator[tuple[Row, Noun]]:
    """Yield every row with the result of the function; ties are always skipped."""
    for row in rows(path, on_bad_row=on_bad_row, report=report):
        try:
            value = convert(row)
        except InputError as error:
            if on_bad_row != "skip" and not isinstance(error, formats.TieError):
                raise
            report.skip(error)
            continue
        report.read += 1
        yield row, value
