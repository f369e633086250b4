"""Sources of rows: files of several kinds, standard input, Hugging Face data sets, rows in memory; one at a time.

A source yields a `Row` for each row that can be parsed, and an `InputError` for one that cannot but can be passed over
(a line that is not JSON). It raises `InputError` when it cannot go on: a missing, truncated or damaged file.
"""

from __future__ import annotations

import glob
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from polar.core.errors import InputError
from polar.core.records import Comparison, Group, Preference, Trajectory, Triple
from polar.data.fields import Row, describe
from polar.data.writers import record_to_dict

LINES, ARRAY, PARQUET = (".jsonl", ".ndjson"), ".json", ".parquet"
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
ACCEPTED = f"{', '.join((*LINES, ARRAY))} (each also with .gz or .zst), {PARQUET}"
BOM = b"\xef\xbb\xbf"

PARQUET_BATCH = 64
"""Rows that are decoded at a time; few, because one row may hold megabytes."""
IN_MEMORY = "row"
"""Name of rows in memory, for messages."""
CHUNK_SIZE = 1 << 20
"""Characters of a JSON array that are read at a time."""

Source = Iterator[Row | InputError]


def in_memory(items: Iterable[object]) -> Source:
    """Yield the rows of dictionaries and records; numbers count from 1."""
    for number, item in enumerate(items, 1):
        if isinstance(item, Mapping):
            yield Row(IN_MEMORY, number, dict(item))
        elif isinstance(item, Triple | Preference | Trajectory | Comparison | Group):
            yield Row(IN_MEMORY, number, record_to_dict(item))
        else:
            yield InputError(f"{IN_MEMORY}:{number}: expected a dictionary or a record, found {describe(item)}")


def sources(path: str) -> Iterator[tuple[str, Source]]:
    """Yield the sources of a path, with their names; none is opened before it is iterated.

    Raises:
        InputError: If the path names no file, or only files of unknown kinds.
    """
    try:
        if path == "-":
            yield "stdin", _lines(sys.stdin.buffer, "stdin")
        elif path.startswith("hf:") or _saved_to_disk(Path(path)):
            yield path, _data_set(path)
        else:
            for file in _files(path):
                yield file, _file(file)
    except OSError as error:
        raise _unreadable(path, error) from error


def _files(path: str) -> list[str]:
    if Path(path).is_dir():
        inside = sorted(str(file) for file in Path(path).iterdir() if not file.name.startswith((".", "_")))
        found = [file for file in inside if _kind(file)[0] and Path(file).is_file()]
        if not found:
            raise InputError(f"{path}: expected files in this directory that end in {ACCEPTED}; found none")
        return found
    if glob.has_magic(path) and not Path(path).exists():
        found = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
        if not found:
            raise InputError(f"{path}: expected files that match this pattern, found none")
        return found
    return [path]


def _kind(file: str) -> tuple[str, str | None]:
    """Return the kind of a file by its name ("" when unknown) and its compression."""
    *_, inner, outer = ("", "", *Path(file.lower()).suffixes)
    compression = COMPRESSION.get(outer)
    kind = inner if compression else outer
    known = kind in (*LINES, ARRAY) or (kind == PARQUET and not compression)
    return (kind if known else ""), compression


def _file(file: str) -> Source:
    kind, compression = _kind(file)
    if not kind:
        raise InputError(f"{file}: expected a file name that ends in {ACCEPTED}")
    try:
        if kind == PARQUET:
            with pq.ParquetFile(file, buffer_size=CHUNK_SIZE, pre_buffer=False) as parquet:
                yield from _parquet(parquet, file)
        else:
            with io.BufferedReader(pa.input_stream(file, compression=compression)) as stream:
                is_array = kind == ARRAY and stream.peek(64).removeprefix(BOM).lstrip().startswith(b"[")
                yield from _array(stream, file) if is_array else _lines(stream, file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _unreadable(place: str, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{place}: expected a file, a directory or a pattern; found no such file")
    return InputError(f"{place}: cannot be read: {' '.join(str(error).split())}")


def _lines(stream: Iterable[bytes], name: str) -> Source:
    number = 0
    try:
        for line in stream:
            number += 1
            content = line.removeprefix(BOM) if number == 1 else line
            if content.strip():
                yield _parsed(content, name, number)
    except OSError as error:
        raise _unreadable(f"{name}:{number + 1}", error) from error


def _parsed(line: bytes, name: str, number: int) -> Row | InputError:
    try:
        return _row(json.loads(line.decode(), object_pairs_hook=_object), name, number)
    except UnicodeDecodeError as error:
        found = f"invalid UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        found = f"invalid JSON at character {error.pos + 1}: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number too long, a value nested too deeply
        found = str(error)
    return InputError(f"{name}:{number}: expected a JSON object on one line, found {found}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{describe(max(names, key=names.count))} twice in one object")
    return fields


def _row(value: object, name: str, number: int) -> Row | InputError:
    if isinstance(value, dict):
        return Row(name, number, value)
    return InputError(f"{name}:{number}: expected a JSON object, found {describe(value)}")


FIRST, NEXT = re.compile(r"\s*\[\s*(?!\])"), re.compile(r"\s*,\s*")
LAST_OF_NONE, LAST = re.compile(r"\s*\[\s*\]"), re.compile(r"\s*\]")


def _array(stream: IO[bytes], name: str) -> Source:
    """Yield the elements of a JSON array, which is never in memory as a whole."""
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    buffer, at, number = "", 0, 0
    try:
        while not (end := (LAST if number else LAST_OF_NONE).match(buffer, at)):
            problem, curable = "the end of the file", True
            if start := (NEXT if number else FIRST).match(buffer, at):
                try:
                    value, at = decode(buffer, start.end())
                    number += 1
                    yield _row(value, name, number)
                    continue
                except json.JSONDecodeError as error:
                    problem = error.msg
                    # Only at the end of what was read so far can more text help.
                    curable = error.pos + 16 > len(buffer) or error.msg.startswith("Unterminated string")
                except ValueError as error:  # a name twice, a number too long
                    raise InputError(f"{name}:{number + 1}: expected a JSON object, found {error}") from error
            elif buffer[at:].strip():
                problem, curable = "no comma after the last element", False
            more = reader.read(max(CHUNK_SIZE, len(buffer) - at)) if curable else ""
            if not more:
                raise InputError(f"{name}:{number + 1}: expected the next element of a JSON array, found {problem}")
            buffer, at = buffer[at:] + more, 0
        if (buffer[end.end() :] + reader.read(CHUNK_SIZE)).strip():
            raise InputError(f"{name}:{number + 1}: expected nothing after the JSON array, found more text")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: expected UTF-8, found an invalid byte in row {number + 1} or later") from error
    except RecursionError as error:
        raise InputError(f"{name}:{number + 1}: expected a JSON object, found one that is nested too deeply") from error
    except OSError as error:
        raise _unreadable(f"{name}:{number + 1}", error) from error


def _parquet(parquet: pq.ParquetFile, name: str) -> Source:
    names = parquet.schema_arrow.names
    if len(set(names)) < len(names):
        raise InputError(f"{name}: expected columns of different names, found {max(names, key=names.count)!r} twice")
    number = 0
    for batch in parquet.iter_batches(PARQUET_BATCH):
        for fields in _dictionaries(batch):
            number += 1
            if isinstance(fields, str):
                yield InputError(f"{name}:{number}: {fields}")
            else:
                yield Row(name, number, fields)


def _dictionaries(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """Return the rows of a batch; in place of a row with an unreadable value, the reason."""
    try:
        columns = [_values(column) for column in batch.columns]
    except (UnicodeDecodeError, UnreadableError) as error:
        if len(batch) == 1:
            expected = "expected UTF-8 in every string, found invalid bytes"
            return [expected if isinstance(error, UnicodeDecodeError) else str(error)]
        return [row for i in range(len(batch)) for row in _dictionaries(batch.slice(i, 1))]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


class UnreadableError(ValueError):
    """A value that Python cannot express."""


def _values(column: pa.Array) -> list[Any]:
    """The values of a column; dates that Python cannot express (after 9999, in a zone it does not know) are text."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError, LookupError) as error:
        kind = column.type
        try:
            naive = column.cast(pa.timestamp(kind.unit)) if pa.types.is_timestamp(kind) else column
            texts: list[Any] = naive.cast(pa.string()).to_pylist()
        except pa.ArrowException:  # a list or an object
            raise UnreadableError(f"expected values that Python can express, found a {kind} ({error})") from error
        return texts


def _saved_to_disk(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _data_set(path: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{path}: reading data sets needs the package datasets: pip install 'polar-rm[train]'"
        ) from error
    name, *config = path.removeprefix("hf:").split(":")
    if path.startswith("hf:") and not (name and len(config) in (1, 2) and all(config)):
        raise InputError(f"{path}: expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    try:
        if path.startswith("hf:"):
            *config, split = config
            # Of a Parquet file, Arrow reads up to about 1 GB ahead, however long the file is.
            data = datasets.load_dataset(name, *config, split=split, streaming=True)
        else:
            data = datasets.load_from_disk(path)
        splits = sorted(data) if isinstance(data, datasets.DatasetDict) else []
        for number, fields in enumerate([] if splits else data, 1):
            yield Row(path, number, dict(fields))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if splits:
        raise InputError(
            f"{path}: expected one data set, found splits: choose {' or '.join(f'{path}/{s}' for s in splits)}"
        )
