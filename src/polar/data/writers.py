"""Writers of rows to a file that appears only when it is complete.

In Parquet, messages stay lists of {role, content}; any other object becomes
JSON text, because its keys may differ from row to row, which a Parquet column cannot express.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from polar.core.errors import InputError
from polar.core.files import new_file
from polar.core.files import on_disk as on_disk
from polar.core.records import Comparison, Group, Message, Preference, Text, Trajectory, Triple
from polar.data.fields import messages_in

LINES, PARQUET = (".jsonl", ".jsonl.gz", ".jsonl.zst"), ".parquet"
MESSAGE = {"role", "content"}
NAMES = ("id", "policy", "negative_policy", "domain", "family", "strategy", "wrapper")
"""Fields of records that hold a name and not a text of the model."""
ROW_GROUP = 10_000
"""Most rows of a Parquet row group."""
ROW_GROUP_SIZE = 1 << 25
"""Most characters of a Parquet row group, about."""


class Writer(Protocol):
    """Writer of `open_writer`."""

    def write(self, row: dict[str, Any]) -> None:
        """Append one row.

        Raises:
            InputError: If the row cannot be expressed in this file, or the disk refuses it.
        """


@contextlib.contextmanager
def open_writer(path: str | Path, schema: pa.Schema | None = None) -> Iterator[Writer]:
    """Open a file for rows: .jsonl (also .jsonl.gz, .jsonl.zst), .parquet, or "-" for JSONL on standard output.

    An existing file is replaced at the end. A Parquet file has the schema that is given (objects then stay objects), or
    that of its first rows (up to `ROW_GROUP`).

    Raises:
        InputError: For another file name, a row that does not fit, and a disk that is full or may not be written.
    """
    if str(path) == "-":
        yield _Lines("stdout", sys.stdout.buffer)
        with on_disk("stdout"):
            sys.stdout.buffer.flush()
        return
    target = Path(path)
    if not target.name.lower().endswith((*LINES, PARQUET)):
        raise InputError(f"{path}: expected a file name that ends in {', '.join((*LINES, PARQUET))}")
    if target.is_dir():
        raise InputError(f"{path}: expected a file to write, found a directory")
    with new_file(target) as file:
        parquet = target.name.lower().endswith(PARQUET)
        writer = _Parquet(str(path), file, schema) if parquet else _Lines(str(path), _compressed(file, target))
        try:
            yield writer
            with on_disk(path):
                writer.finish()
        finally:
            with contextlib.suppress(OSError):  # finished already, or on a full disk, which refuses once more
                writer.close()


def record_to_dict(record: Trajectory | Triple | Preference | Comparison | Group) -> dict[str, Any]:
    """Return the row of a record, as the readers of `polar.data.readers` take it, without fields that are None.

    A preference of two answers has the common fields chosen and rejected, a longer one has ranked. A plain string that
    spells a list of messages in JSON would be read back as those messages, so it is written as the one message that
    holds it; the text that a model reads stays the same.
    """
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    if isinstance(record, Preference) and len(record.ranked) == 2:
        row["chosen"], row["rejected"] = row.pop("ranked")
    return {
        name: value if name in NAMES else _plain(value, "user" if name == "prompt" else "assistant")
        for name, value in row.items()
        if value is not None
    }


def text_cell(text: Text, role: str) -> str:
    """Return a text as one string, for columns of strings and messages: messages become JSON, which readers know."""
    value = _plain(text, role)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(value: object, role: str) -> object:
    if isinstance(value, Message):
        return {"role": value.role, "content": value.content}
    if isinstance(value, tuple):
        return [_plain(item, role) for item in value]
    if isinstance(value, str) and messages_in(value):
        return [{"role": role, "content": value}]
    return value


def _compressed(file: IO[bytes], target: Path) -> IO[bytes]:
    match target.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0))
        case ".zst":
            return zstandard.ZstdCompressor(write_checksum=True).stream_writer(file, closefd=False)
        case _:
            return open(file.fileno(), "wb", closefd=False)


class _Lines:
    def __init__(self, name: str, stream: IO[bytes]) -> None:
        self.name, self.stream, self.rows = name, stream, 0

    def write(self, row: dict[str, Any]) -> None:
        self.rows += 1
        line = _json(row, f"{self.name}:{self.rows}").encode() + b"\n"
        with on_disk(self.name):
            self.stream.write(line)

    def finish(self) -> None:
        self.close()

    def close(self) -> None:
        self.stream.close()


class _Parquet:
    def __init__(self, name: str, file: IO[bytes], schema: pa.Schema | None) -> None:
        self.name, self.file, self.schema, self.rows = name, file, schema, 0
        self.waiting: list[dict[str, Any]] = []
        self.size = 0
        self.writer: pq.ParquetWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        self.rows += 1
        if self.schema is None:
            row = {key: _cell(value, f"{self.name}:{self.rows}") for key, value in row.items()}
        self.waiting.append(row)
        self.size += _size(row)
        if len(self.waiting) >= ROW_GROUP or self.size >= ROW_GROUP_SIZE:
            self.write_row_group()

    def write_row_group(self) -> None:
        table = self.table() if self.schema is None else pa.Table.from_pylist(self.waiting, self.schema)
        with on_disk(self.name):
            if self.writer is None:
                self.writer = pq.ParquetWriter(self.file, table.schema, compression="zstd")
            self.writer.write_table(table)
        self.waiting, self.size = [], 0

    def table(self) -> pa.Table:
        known = self.writer.schema if self.writer else None
        names = list(dict.fromkeys(name for row in self.waiting for name in row))
        if known is not None:
            new = [name for name in names if name not in known.names]
            if new:
                raise self.unfit(new[0], "no field that the first rows do not have", "a new one")
            names = known.names
        return pa.table(
            {name: self.column(name, known.field(name).type if known is not None else None) for name in names}
        )

    def column(self, name: str, kind: pa.DataType | None) -> pa.Array:
        try:
            column = pa.array([row.get(name) for row in self.waiting])
            if kind is None:
                return column
            if not _fits(column.type, kind):  # Arrow itself would cut 1.5 down to 1
                raise TypeError(f"the type {column.type}")
            return column.cast(kind)
        except (ValueError, TypeError, OverflowError) as error:
            expected = f"values of the type {kind}" if kind else "values of one type"
            raise self.unfit(name, expected, " ".join(str(error).split())[:200]) from error

    def unfit(self, field: str, expected: str, found: str) -> InputError:
        rows = f"rows {self.rows - len(self.waiting) + 1} to {self.rows}"
        return InputError(
            f'{self.name}: {rows}: field "{field}": expected {expected}, found {found}; '
            "write .jsonl for rows of different shapes"
        )

    def finish(self) -> None:
        if self.waiting or self.writer is None:
            self.write_row_group()
        self.close()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _fits(found: pa.DataType, kind: pa.DataType) -> bool:
    """Return whether a column of one type can be written as another one without changing a value."""
    if found == kind or pa.types.is_null(found) or (pa.types.is_integer(found) and pa.types.is_floating(kind)):
        return True
    return pa.types.is_list(found) and pa.types.is_list(kind) and _fits(found.value_type, kind.value_type)


def _cell(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [item if isinstance(item, dict) and item.keys() == MESSAGE else _cell(item, place) for item in value]
    return _json(value, place) if isinstance(value, dict) else value


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 8 + sum(map(_size, parts))


def _json(value: object, place: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as error:  # NaN or infinity; a lone surrogate
        raise InputError(f"{place}: expected values that JSON and UTF-8 can express, found {error}") from error
    return text
