"""Encoded examples on disk, read through a memory map: a corpus of any size takes no RAM but its row lengths.

The file is plain Arrow (Feather without compression), written once when a run begins. A run that goes on reads it again
and refuses training data that changed meanwhile, since its position in the stream would mean something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polar.core.errors import InputError
from polar.core.files import new_file, on_disk
from polar.core.template import EncodedGroup, Truncation
from polar.model.tree import row_length
from polar.training.batches import Example

IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("prefix", IDS),
        ("branches", pa.list_(IDS)),
        ("reference", IDS),
        ("pairs", pa.list_(pa.list_(pa.int32()))),
        ("name", pa.string()),
        ("margin", pa.float64()),
        ("length", pa.int64()),
    ]
)
MAX_BATCH_EXAMPLES = 1000
"""Most examples that are written at a time."""
MAX_BATCH_TOKENS = 1 << 18
"""Tokens after which they are written, whatever their number (less than 100 MB of memory)."""
FINGERPRINT, SUMMARY = b"polar", b"summary"


class ExampleStore:
    """A sequence of examples in a file; use `write_examples` or `open_examples`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        table = file.read_all()
        self.fingerprint: dict[str, Any] = json.loads(table.schema.metadata[FINGERPRINT])
        _, last = file.get_batch_with_custom_metadata(file.num_record_batches - 1)
        self.summary: dict[str, Any] = json.loads(last[SUMMARY]) if last else {}
        """Facts collected while the examples were made."""
        self.lengths: NDArray[np.int64] = table["length"].to_numpy()
        """Tokens of every example's row."""
        self._table = table.drop_columns(["length"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Example:
        (row,) = self._table.slice(number, 1).to_pylist()
        # How much was cut is counted when examples are made (`batches.Cut`); training needs no counts.
        cut = [Truncation(0, 0, 0)] * len(row["branches"])
        group = EncodedGroup(row["prefix"], row["branches"], cut, row["reference"])
        return Example(group, tuple((better, worse) for better, worse in row["pairs"]), row["name"], row["margin"])

    def __reduce__(self) -> tuple[type[ExampleStore], tuple[Path]]:
        # Workers of a data loader open the file themselves.
        return ExampleStore, (self.path,)


def write_examples(
    path: Path, examples: Iterable[Example], fingerprint: dict[str, Any], summary: Callable[[], dict[str, Any]] = dict
) -> ExampleStore:
    """Write examples to a file that appears when it is complete, and open it.

    Args:
        path: The file.
        examples: Consumed once.
        fingerprint: Data and settings of the examples, see `fingerprint_of`.
        summary: Returns facts about them; called after the last one.

    Raises:
        InputError: there are no examples, or the disk is full.
    """
    schema = SCHEMA.with_metadata({FINGERPRINT: json.dumps(fingerprint).encode()})
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
            left.unlink()
    with new_file(path) as file, on_disk(path):
        with pa.ipc.new_file(file, schema) as writer:
            for rows in _batches(examples):
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            found = {SUMMARY: json.dumps(summary()).encode()}
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=schema), found)
        if writer.stats.num_record_batches == 1:
            raise InputError("no training examples; expected at least one row to train on")
    return ExampleStore(path)


def open_examples(path: Path, fingerprint: dict[str, Any]) -> ExampleStore | None:
    """Return the examples of an earlier run, or None if there are none.

    Raises:
        InputError: they were made from other data or with other settings.
    """
    if not path.exists():
        return None
    store = ExampleStore(path)
    for name, value in fingerprint.items():
        if store.fingerprint.get(name) != value:
            raise InputError(
                f"{path}: the run that was begun here had other training data or settings ({name}); "
                "go on with the same ones, or choose another output"
            )
    return store


def fingerprint_of(paths: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return names, sizes and times of the data files, and the settings of the template.

    Directories count with their files; patterns and data sets of the hub by their names alone.
    """
    files = {}
    for name in paths:
        path = Path(name)
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files[name] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in inside if file.is_file()]
    return {"files": files, "settings": settings}


def _batches(examples: Iterable[Example]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    tokens = 0
    for example in examples:
        rows.append(_row(example))
        tokens += rows[-1]["length"]
        if len(rows) == MAX_BATCH_EXAMPLES or tokens >= MAX_BATCH_TOKENS:
            yield rows
            rows, tokens = [], 0
    if rows:
        yield rows


def _row(example: Example) -> dict[str, Any]:
    group = example.group
    return {
        "prefix": group.prefix,
        "branches": group.branches,
        "reference": group.reference,
        "pairs": [list(pair) for pair in example.pairs],
        "name": example.name,
        "margin": example.margin,
        "length": row_length(group),
    }
