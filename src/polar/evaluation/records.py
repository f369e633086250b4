"""Items, which are scored, and records, the product: everything else is computed from them without a model.

    DIR/manifest.json                    what was evaluated, on what, with what (`polar.evaluation.manifest`)
    DIR/records/<dataset>-00000.parquet  one row per item (`Record`), up to `SHARD_ITEMS` of them in a file, in order
    DIR/summary.json                     what `polar eval` printed; computed from the two above

An item is one group: candidates for one prompt beside one reference. Every list in a record has one entry per
candidate, in the same order. The label of a candidate is one number, its `quality`, higher is better:

| task | quality |
|---|---|
| policy discrimination | 1 for outputs by the reference's own policy, 0 for those by another one |
| preference accuracy | the place in the ranking, K-1 (best of K) to 0 (worst), or a score; ties are equal |
| verifiable correctness | 1 for a right answer, 0 for a wrong one |
| best of N | the true quality: a score by people or a judge, or 1 and 0 for right and wrong |
| sensitivity | three candidates: better (1), worse (0), and one of the two with its text transformed (1 or 0) |

So for every task a reward is right about a pair of candidates of unequal quality when it puts them in the same order,
and a tie of rewards counts one half (`polar.core.metrics`).

In Parquet a record is a row with columns of the same names; `rewards` is a struct with one field per scorer, in the
order of `Manifest.scorers`, each a list of numbers. With DuckDB:

    select dataset, avg((rewards.model[1] > rewards.model[2])::int) from 'DIR/records/*.parquet' group by dataset
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from polar.core.errors import InputError
from polar.core.files import new_file, on_disk
from polar.core.records import Group, Text, prompt_id, text_of
from polar.evaluation.manifest import Task, read_manifest

MODEL = "model"
"""Name of the model among the scorers; the others are baselines."""

WITHOUT_REFERENCE = "no reference"
"""Name of the model with an empty reference among the scorers."""

RECORDS = "records"
"""The directory of the shards."""

SHARD_ITEMS = 1024
"""Items that are scored, kept in memory and written together."""
SHARD_CHARACTERS = 1 << 25
"""Most characters of them, about: candidates may be many and long."""
HASH_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Item:
    """A group with the labels of its candidates; see `Record` for the meaning of the fields."""

    task: Task
    group: Group
    """With the first reference."""
    quality: tuple[float, ...]
    reference_source: str
    policies: tuple[str | None, ...]
    families: tuple[str | None, ...]
    reference_policy: str | None = None
    reference_family: str | None = None
    reference_quality: float | None = None
    domain: str | None = None
    slices: tuple[str, ...] = ()
    further_references: tuple[Text, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The same candidates beside each reference."""
        return (self.group, *(replace(self.group, reference=reference) for reference in self.further_references))

    @property
    def prompt_id(self) -> str:
        """`polar.core.records.prompt_id`; items of one prompt are one cluster."""
        return prompt_id(self.group.prompt)

    @property
    def characters(self) -> int:
        """Length of all its texts."""
        return sum(map(len, self.texts))

    @property
    def texts(self) -> list[str]:
        """Prompt, references and candidates, in this order."""
        group = self.group
        return [text_of(text) for text in (group.prompt, group.reference, *self.further_references, *group.candidates)]

    def digest(self) -> bytes:
        """Return a hash of everything that the item says."""
        group = self.group
        labels = [self.policies, self.families, self.reference_policy, self.reference_family, self.reference_quality]
        texts = [self.texts, len(self.further_references)]
        content = [self.task, *texts, group.id, group.wrapper, self.quality, *labels, self.domain, self.slices]
        payload = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return hashlib.sha256(payload).digest()


def fingerprint(digests: Iterable[bytes]) -> str:
    """Return sixteen hexadecimal digits for a sequence of digests."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:HASH_DIGITS]


def stretches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield what is scored and written together; the same items are always cut at the same places."""
    stretch: list[Item] = []
    characters = 0
    for item in items:
        stretch.append(item)
        characters += item.characters
        if len(stretch) == SHARD_ITEMS or characters >= SHARD_CHARACTERS:
            yield stretch
            stretch, characters = [], 0
    if stretch:
        yield stretch


def sample(items: Iterable[Item], limit: int | None) -> Iterable[Item]:
    """Return at most `limit` items in their order, drawn from the whole stream, always the same ones.

    They are those with the smallest hashes, so two data sets that share items choose alike. Holds `limit` items.
    """
    if limit is None:
        return items
    drawn = heapq.nsmallest(limit, enumerate(items), key=lambda pair: (pair[1].digest(), pair[0]))
    return [item for _, item in sorted(drawn, key=lambda pair: pair[0])]


@dataclass(frozen=True, slots=True)
class Record:
    """One item with its rewards; lists have one entry per candidate."""

    dataset: str
    """Name of the data set in the suite (`DatasetFacts.name`)."""
    number: int
    """Which item of that data set, from 0."""
    task: Task
    domain: str | None
    slices: tuple[str, ...]
    """Parts of the data set, besides the domain, that the item belongs to: "same family", "unseen prompt", "hard"."""
    id: str | None
    """The item's own name in the data, if it has one."""
    prompt_id: str
    """`polar.core.records.prompt_id`: standard errors are clustered by it."""
    reference_source: str
    """Where the reference came from, in words: 'column "reference"', 'file refs.jsonl', 'generated by gpt-4o'."""
    reference_policy: str | None
    reference_family: str | None
    reference_quality: float | None
    """On the scale of `quality`, if known."""
    reference_length: int
    """Characters."""
    quality: tuple[float, ...]
    policies: tuple[str | None, ...]
    families: tuple[str | None, ...]
    lengths: tuple[int, ...]
    """Characters of each candidate."""
    copies_reference: tuple[bool, ...]
    """Whether a candidate is the reference word by word, which any measure of overlap prefers."""
    cut_tokens: tuple[int, ...]
    """Tokens of prompt, reference and candidate that the model did not see; 0 when everything fitted, or no model."""
    rewards: dict[str, tuple[float, ...]]
    """By scorer; with several references, aggregated as the data set says."""
    by_reference: dict[str, tuple[tuple[float, ...], ...]] | None = None
    """By scorer: the rewards against each of several references; None where there is one."""
    prompt: str | None = None
    """The texts, as the model reads them; None when records are read without them."""
    reference: str | None = None
    """The first one, if there are several."""
    further_references: tuple[str, ...] | None = None
    candidates: tuple[str, ...] | None = None


TEXTS = ("prompt", "reference", "further_references", "candidates")
"""Fields that are most of a file and that summaries do not need."""


def shard_path(directory: Path, dataset: str, number: int) -> Path:
    """Return the file for one shard of a data set's records."""
    return directory / RECORDS / f"{dataset}-{number:05}.parquet"


def schema(scorers: Sequence[str]) -> pa.Schema:
    """Columns of a shard."""
    text, number, numbers = pa.string(), pa.int64(), pa.list_(pa.float64())
    return pa.schema(
        {
            "dataset": text,
            "number": number,
            "task": text,
            "domain": text,
            "slices": pa.list_(text),
            "id": text,
            "prompt_id": text,
            "reference_source": text,
            "reference_policy": text,
            "reference_family": text,
            "reference_quality": pa.float64(),
            "reference_length": number,
            "quality": numbers,
            "policies": pa.list_(text),
            "families": pa.list_(text),
            "lengths": pa.list_(number),
            "copies_reference": pa.list_(pa.bool_()),
            "cut_tokens": pa.list_(number),
            "rewards": pa.struct(dict.fromkeys(scorers, numbers)),
            "by_reference": pa.struct(dict.fromkeys(scorers, pa.list_(numbers))),
            "prompt": text,
            "reference": text,
            "further_references": pa.list_(text),
            "candidates": pa.list_(text),
        }
    )


def write_shard(path: Path, records: Sequence[Record], scorers: Sequence[str], fingerprint: str) -> None:
    """Write the records of one shard; the file appears only when it is complete.

    Args:
        path: From `shard_path`.
        records: At least one.
        scorers: The scorers of every record.
        fingerprint: Of the items, kept in the file, to know them again.

    Raises:
        InputError: the disk refuses it.
    """
    table = pa.Table.from_pylist(list(map(asdict, records)), schema=schema(scorers))
    table = table.replace_schema_metadata({"items": fingerprint})
    with new_file(path) as file, on_disk(path):
        pq.write_table(table, file, compression="zstd")


def shard_fingerprint(path: Path) -> str | None:
    """Return the fingerprint of the items of a shard that was written before, or None without one."""
    if not path.exists():
        return None
    with _readable(path):
        metadata = pq.read_schema(path).metadata or {}
    return str(metadata.get(b"items", b"").decode())


def read_records(directory: str | Path, *, texts: bool = False) -> Iterator[Record]:
    """Yield the records of an evaluation in order, data set by data set as in the manifest.

    Args:
        directory: What `polar eval --output` wrote. It may be unfinished.
        texts: Read prompts, references and candidates too; without them a record takes about two kilobytes.

    Raises:
        InputError: a file is damaged, or there is no manifest.
    """
    names = [field.name for field in fields(Record) if texts or field.name not in TEXTS]
    for dataset in read_manifest(directory).datasets:
        for path in shards(Path(directory), dataset.name):
            with _readable(path):
                rows = pq.read_table(path, columns=names).to_pylist()
            yield from map(_record, rows)


def shards(directory: Path, dataset: str) -> list[Path]:
    """Return the files of a data set in order, up to the first gap."""
    found: list[Path] = []
    while (path := shard_path(directory, dataset, len(found))).exists():
        found.append(path)
    return found


def _record(row: dict[str, Any]) -> Record:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    values["rewards"] = {name: tuple(rewards) for name, rewards in row["rewards"].items()}
    if row["by_reference"] is not None:
        values["by_reference"] = {name: tuple(map(tuple, each)) for name, each in row["by_reference"].items()}
    return Record(**values)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as records: {' '.join(str(error).split())[:300]}") from error
