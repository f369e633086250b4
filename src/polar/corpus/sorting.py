"""Trajectories sorted by prompt on disk, so that a corpus may be far larger than memory.

DuckDB does the work: a temporary database takes the rows in batches, its sort brings those of one prompt together, and
they come back one prompt at a time. An external sort needs memory in some proportion to what it sorts (with 256 MB and
two threads, DuckDB 2.0 gives up at 4 GB), so prompts are dealt to `PARTS` tables by the beginning of their id, which
are sorted one after the other.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from polar.core.errors import InputError
from polar.core.records import Message, Text, Trajectory, Wrapper, text_of

MEMORY = "768MB"
"""What DuckDB may use before it writes to disk; Python comes on top."""
THREADS = 2
"""Each thread of the sort needs memory of its own."""
PARTS = 64
"""Ids are hexadecimal digits of a hash, so all parts are of about one size. They must divide 256."""
BATCH_ROWS, BATCH_CHARACTERS = 2048, 1 << 20
"""The rows that wait for a table are stored when there are so many, or about so many characters."""

COLUMN_NAMES = ("prompt_id", "wrapper", "policy", "prompt", "output", "text")
COLUMNS = "prompt_id VARCHAR, wrapper VARCHAR, policy INTEGER, prompt VARCHAR, output VARCHAR, text BIGINT"


class Sample(NamedTuple):
    """Prompt and output as they are stored; `decoded` gives them back."""

    prompt: str
    output: str


Outputs = dict[str, dict[str, Sample]]
"""What was sampled for one prompt: policy, text of the output, sample."""


@dataclass(frozen=True, slots=True)
class PromptOutputs:
    """All different outputs for one prompt under one wrapper."""

    prompt_id: str
    wrapper: Wrapper
    outputs: Outputs
    identical: int
    """How many more there were, with a text that the same policy gave before."""


class PromptSorter:
    """Trajectories on disk, to be added first and read by prompt then; made by `open_sorter`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, place: Path) -> None:
        self.connection, self.place = connection, place
        self.policies: dict[str, int] = {}
        """Every policy and its number in the database, in order of appearance."""
        self.waiting: defaultdict[int, list[tuple[str, Wrapper, int, str, str, int]]] = defaultdict(list)
        """For every part that has rows, those that are not in its table yet."""
        self.characters: Counter[int] = Counter()

    def add(self, prompt_id: str, wrapper: Wrapper, trajectory: Trajectory) -> None:
        """Store a trajectory under a prompt id and a wrapper."""
        policy = self.policies.setdefault(trajectory.policy, len(self.policies))
        prompt, output = _encoded(trajectory.prompt), _encoded(trajectory.output)
        part = int(prompt_id[:2], 16) * PARTS // 256
        # The hash of a string differs from process to process; it only tells here whether two texts are the same.
        self.waiting[part].append((prompt_id, wrapper, policy, prompt, output, hash(text_of(trajectory.output))))
        self.characters[part] += len(prompt) + len(output)
        if len(self.waiting[part]) >= BATCH_ROWS or self.characters[part] >= BATCH_CHARACTERS:
            self._store(part)

    def policies_with_two_outputs(self) -> set[str]:
        """The policies with two different outputs for at least one prompt."""
        found: set[int] = set()
        for part in sorted(self.waiting):
            self._store(part)
            with temporary_files(self.place):
                rows = self.connection.execute(
                    f"SELECT DISTINCT policy FROM (SELECT policy FROM part_{part} "
                    "GROUP BY prompt_id, wrapper, policy HAVING min(text) <> max(text))"
                ).fetchall()
            found.update(number for (number,) in rows)
        return {name for name, number in self.policies.items() if number in found}

    def prompts(self) -> Iterator[PromptOutputs]:
        """The prompts in the order of their ids, each with all its outputs (which have to fit into memory)."""
        names = list(self.policies)
        for (prompt_id, wrapper), rows in groupby(self._sorted_rows(), key=itemgetter(0, 1)):
            outputs: Outputs = {}
            identical = 0
            for _, _, number, *stored in rows:
                samples, sample = outputs.setdefault(names[number], {}), Sample(*stored)
                text = text_of(decoded(sample.output))
                identical += text in samples
                # One prompt may be spelt in several ways; which spelling stays must not depend on the order of rows.
                samples[text] = min(samples.get(text, sample), sample)
            yield PromptOutputs(prompt_id, wrapper, outputs, identical)

    def _sorted_rows(self) -> Iterator[tuple[Any, ...]]:
        for part in sorted(self.waiting):
            self._store(part)
            order = f"SELECT prompt_id, wrapper, policy, prompt, output FROM part_{part} ORDER BY prompt_id, wrapper"
            with temporary_files(self.place):
                reader = self.connection.sql(order).to_arrow_reader(BATCH_ROWS)
            while True:
                with temporary_files(self.place):
                    batch = next(reader, None)
                if batch is None:
                    break
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
            self.connection.execute(f"DROP TABLE part_{part}")

    def _store(self, part: int) -> None:
        rows = self.waiting[part]
        if not rows:
            return
        self.waiting[part], self.characters[part] = [], 0
        try:
            batch = pa.table([pa.array(column) for column in zip(*rows, strict=True)], COLUMN_NAMES)
        except UnicodeEncodeError as error:
            raise InputError(
                f"a trajectory holds text that UTF-8 cannot express ({error.reason}); repair it"
            ) from error
        with temporary_files(self.place):
            self.connection.execute(f"CREATE TABLE IF NOT EXISTS part_{part} ({COLUMNS})")
            self.connection.register("batch", batch)
            self.connection.execute(f"INSERT INTO part_{part} SELECT * FROM batch")
            self.connection.unregister("batch")


@contextmanager
def open_sorter(temporary: Path | None = None) -> Iterator[PromptSorter]:
    """Open a sorter whose files lie in a new directory inside `temporary`, which is removed at the end.

    What fits into `MEMORY` is never written.

    Args:
        temporary: An existing directory with room for the texts of the corpus; default: that of the system.

    Raises:
        InputError: The directory cannot be written or has no room; also while the sorter is used.
    """
    place = temporary or Path(tempfile.gettempdir())
    with ExitStack() as stack:
        with temporary_files(place):
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".polar-pair-", dir=place, ignore_cleanup_errors=True)
            )
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "threads": THREADS,
            "temp_directory": directory,
            "preserve_insertion_order": False,
        }
        yield PromptSorter(stack.enter_context(duckdb.connect(":memory:", config=config)), place)


@contextmanager
def temporary_files(place: Path) -> Iterator[None]:
    """A full disk is the matter of the user.

    Raises:
        InputError: In place of what the system or DuckDB raises when it cannot write temporary files to `place`.
    """
    try:
        yield
    except (OSError, duckdb.IOException, duckdb.OutOfMemoryException) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{place}: no room for temporary files ({reason}); make room, or choose another place (--temp or TMPDIR)"
        ) from error


def _encoded(text: Text) -> str:
    """A text as one string: messages as JSON, which begins with "[", any other string behind an "="."""
    if isinstance(text, str):
        return f"={text}"
    return json.dumps([[message.role, message.content] for message in text], ensure_ascii=False)


def decoded(stored: str) -> Text:
    """The text that was stored."""
    if stored.startswith("="):
        return stored[1:]
    return tuple(Message(role, content) for role, content in json.loads(stored))
