"""A sampling job on disk: what is left of it after SIGKILL is always a state to go on from.

    corpus/
      shard-00000.parquet    finished rows, in the order of the plan
      _manifest.json         what is in the shards
      _job/job.json          what decides the corpus; another pool or seed is refused
      _job/prompts.parquet   the prompts, one row group per shard
      _job/parts/00001/      results of the batches of a shard that is not complete

Every file appears complete (`polar.core.files`). A part holds the results of one batch. A shard is
written when all its batches are settled, and its footer says how many of its samples are missing: it is complete when
that is none, and its parts go away. Readers of a corpus skip names that begin with an underscore.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from polar.core.errors import InputError
from polar.core.files import new_file, on_disk, write_json
from polar.core.records import Message, Wrapper
from polar.corpus.engines import Completion
from polar.corpus.plan import Batch, Prompt
from polar.data.writers import text_cell

log = logging.getLogger(__name__)

PROMPTS = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("messages", pa.bool_()), ("wrapper", pa.string())])
PART = pa.schema(
    [
        ("row", pa.int64()),
        ("output", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
    ]
)
SHARD = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("wrapper", pa.string()),
        ("policy", pa.string()),
        ("family", pa.string()),
        ("step", pa.int64()),
        ("sample", pa.int64()),
        ("seed", pa.int64()),
        ("output", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("decoding", pa.string()),
    ]
)
SUMMARY = b"polar"
"""Key of a shard's summary in its Parquet footer."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Samples and their tokens."""

    samples: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    uncounted: int = 0
    """Samples whose server did not say how many tokens they took."""

    @classmethod
    def of(cls, completion: Completion) -> Totals:
        """Those of one sample."""
        counts = (completion.prompt_tokens, completion.output_tokens)
        return cls(1, counts[0] or 0, counts[1] or 0, int(None in counts))

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Journal:
    """The directory of one sampling job; use `open_journal`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.job = directory / "_job"
        self.parts = self.job / "parts"
        self._prompts = pq.ParquetFile(self.job / "prompts.parquet")
        self.prompts: int = self._prompts.metadata.num_rows
        self.shards: int = self._prompts.num_row_groups if self.prompts else 0

    def prompts_of(self, shard: int) -> list[Prompt]:
        """The prompts of a shard."""
        return [
            Prompt(row["id"], _text(row["prompt"], row["messages"]), row["wrapper"])
            for row in self._prompts.read_row_group(shard).to_pylist()
        ]

    def wrappers(self) -> Counter[Wrapper]:
        """How many prompts there are for each kind of policy."""
        counts: Counter[Wrapper] = Counter()
        for shard in range(self.shards):
            counts.update(self._prompts.read_row_group(shard, ["wrapper"])["wrapper"].to_pylist())
        return counts

    def shard_file(self, shard: int) -> Path:
        """Where the finished rows of a shard are."""
        return self.directory / f"shard-{shard:05d}.parquet"

    def complete(self, shard: int) -> bool:
        """Return whether all samples of a shard are in its file; a damaged file counts as none."""
        file = self.shard_file(shard)
        if not file.exists():
            return False
        try:
            return not _summary(pq.read_metadata(file))["missing"]
        except (pa.ArrowException, OSError, KeyError) as error:
            log.warning("%s: damaged, it is written again (%s)", file, error)
            return False

    def open_shards(self) -> list[int]:
        """The shards that are not complete; parts that a crash left of the others are removed."""
        shards = []
        for shard in range(self.shards):
            if self.complete(shard):
                self._remove_parts(shard)
            else:
                shards.append(shard)
        return shards

    def results(self, batch: Batch) -> dict[int, Completion]:
        """Return the saved samples of a batch by their rows in the shard; a torn part counts as none."""
        file = self._part(batch)
        if not file.exists():
            return {}
        try:
            rows = pq.ParquetFile(file).read().to_pylist()
        except (pa.ArrowException, OSError) as error:
            log.warning("%s: damaged, its %d samples are drawn again (%s)", file, len(batch.items), error)
            return {}
        return {row.pop("row"): Completion(**row) for row in rows}

    def save(self, batch: Batch, results: Mapping[int, Completion]) -> None:
        """Save the results of a batch in place of what was saved before.

        Raises:
            InputError: the disk is full or may not be written.
        """
        rows = [{"row": row, **asdict(results[row])} for row in sorted(results)]
        file = self._part(batch)
        with on_disk(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, pa.Table.from_pylist(rows, PART), sync=False)  # there are many, and a torn one is drawn again

    def finish(self, shard: int, batches: Iterable[Batch]) -> None:
        """Write the file of a shard from its parts; the parts go away if no sample is missing.

        Raises:
            InputError: the disk is full or may not be written.
        """
        columns: dict[int, dict[str, Any]] = {}
        per_policy: dict[str, Totals] = {}
        missing = 0
        for batch in batches:
            results = self.results(batch)
            missing += len(batch.items) - len(results)
            policy = batch.policy
            decoding = json.dumps(policy.decoding.model_dump())
            for item in batch.items:
                if (result := results.get(item.row)) is None:
                    continue
                columns[item.row] = {
                    "prompt_id": item.prompt.id,
                    "prompt": text_cell(item.prompt.text, "user"),
                    "wrapper": item.prompt.wrapper,
                    "policy": policy.name,
                    "family": policy.family,
                    "step": policy.step,
                    "sample": item.sample,
                    "seed": item.seed,
                    **asdict(result),
                    "output": text_cell(result.output, "assistant"),
                    "decoding": decoding,
                }
                per_policy[policy.name] = per_policy.get(policy.name, Totals()) + Totals.of(result)
        summary = {"missing": missing, "policies": {name: asdict(totals) for name, totals in per_policy.items()}}
        schema = SHARD.with_metadata({SUMMARY: json.dumps(summary).encode()})
        _write(self.shard_file(shard), pa.Table.from_pylist([columns[row] for row in sorted(columns)], schema))
        if not missing:
            self._remove_parts(shard)

    def manifest(self) -> dict[str, Any]:
        """Write `_manifest.json` from the footers of the shards, and give its content."""
        job = json.loads((self.job / "job.json").read_text("utf-8"))
        shards, policies, missing = [], dict[str, Totals](), 0
        for shard in range(self.shards):
            file = self.shard_file(shard)
            metadata = pq.read_metadata(file)
            summary = _summary(metadata)
            missing += summary["missing"]
            shards.append({"file": file.name, "rows": metadata.num_rows, "bytes": file.stat().st_size})
            for name, totals in summary["policies"].items():
                policies[name] = policies.get(name, Totals()) + Totals(**totals)
        manifest = {
            **job,
            "missing": missing,
            "totals": asdict(sum(policies.values(), Totals())),
            "per_policy": {name: asdict(policies[name]) for name in sorted(policies)},
            "shards": shards,
        }
        write_json(self.directory / "_manifest.json", manifest)
        return manifest

    def _parts_of(self, shard: int) -> Path:
        return self.parts / f"{shard:05d}"

    def _part(self, batch: Batch) -> Path:
        return self._parts_of(batch.shard) / f"{batch.number:06d}.parquet"

    def _remove_parts(self, shard: int) -> None:
        shutil.rmtree(self._parts_of(shard), ignore_errors=True)


def _summary(metadata: pq.FileMetaData) -> dict[str, Any]:
    """Return the summary that `Journal.finish` wrote."""
    summary: dict[str, Any] = json.loads((metadata.metadata or {})[SUMMARY])
    return summary


@contextlib.contextmanager
def open_journal(
    directory: str | Path, prompts: Iterable[Prompt], identity: dict[str, Any], shard_prompts: int
) -> Iterator[Journal]:
    """Begin a job in a new or empty directory, or go on with the one that was begun there.

    The prompts are stored with the job, without those that repeat an earlier one. When the job goes on they are read
    again, to make sure that they are the same.

    Args:
        directory: Where the corpus goes.
        prompts: What the policies are asked.
        identity: Everything else that decides the corpus; plain values for JSON.
        shard_prompts: Prompts per shard.

    Raises:
        InputError: another process works there, the directory holds something else, or the job there is another one.
    """
    directory = Path(directory)
    job = directory / "_job"
    if directory.exists() and not job.is_dir() and any(directory.iterdir()):
        raise InputError(f"{directory}: expected a new or empty directory, or one of an earlier polar sample")
    with on_disk(directory):
        job.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{directory}: another polar sample is writing there; wait for it, or stop it") from error
    try:
        for leftover in (*directory.glob(".*.tmp"), *job.rglob(".*.tmp")):  # of a run that was killed
            leftover.unlink()
        _begin(job, prompts, {**identity, "shard_prompts": shard_prompts}, shard_prompts)
        yield Journal(directory)
    finally:
        lock.release()


def _begin(job: Path, prompts: Iterable[Prompt], identity: dict[str, Any], shard_prompts: int) -> None:
    """Store the prompts of a new job; refuse to go on with an old one that differs."""
    digest, seen, repeated = hashlib.sha256(), set[tuple[str, str]](), 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal repeated
        for prompt in prompts:
            if (prompt.id, prompt.wrapper) in seen:
                repeated += 1
                continue
            seen.add((prompt.id, prompt.wrapper))
            row = {"id": prompt.id, "prompt": _stored(prompt), "messages": not isinstance(prompt.text, str)}
            digest.update(repr((row["prompt"], row["messages"], prompt.wrapper)).encode())
            yield {**row, "wrapper": prompt.wrapper}

    old = json.loads((job / "job.json").read_text("utf-8")) if (job / "job.json").exists() else None
    if old is None:
        _write_prompts(job / "prompts.parquet", rows(), shard_prompts)
    else:
        deque(rows(), maxlen=0)  # for the digest alone
    if not seen:
        raise InputError("no prompts to sample; expected at least one row with a prompt")
    new = {**identity, "prompts": len(seen), "repeated_prompts": repeated, "prompts_digest": digest.hexdigest()}
    if old is None:
        write_json(job / "job.json", new)
        return
    for name in new.keys() - {"polar"}:
        if old.get(name) != new[name]:
            raise InputError(
                f"{job.parent}: the job that was begun here has other {_difference(name, old.get(name), new[name])}; "
                "go on with the same command, or choose another output directory"
            )


def _difference(name: str, old: object, new: object) -> str:
    if name in ("prompts", "prompts_digest"):
        return "prompts"
    if isinstance(old, list) and isinstance(new, list):  # policies: name the first that differs
        pairs = zip(old, new, strict=False)
        first = next((b["name"] for a, b in pairs if a != b), "the number of them")
        return f"{name} ({first})"
    return f"{name} ({old} there, {new} now)"


def _stored(prompt: Prompt) -> str:
    if isinstance(prompt.text, str):
        return prompt.text
    return json.dumps([[message.role, message.content] for message in prompt.text], ensure_ascii=False)


def _text(stored: str, messages: bool) -> str | tuple[Message, ...]:
    return tuple(Message(*message) for message in json.loads(stored)) if messages else stored


def _write_prompts(file: Path, rows: Iterator[dict[str, Any]], shard_prompts: int) -> None:
    """Write prompts, one row group per shard."""
    with new_file(file) as stream, on_disk(file), pq.ParquetWriter(stream, PROMPTS, compression="zstd") as writer:
        while group := list(islice(rows, shard_prompts)):
            writer.write_table(pa.Table.from_pylist(group, PROMPTS))


def _write(file: Path, table: pa.Table, *, sync: bool = True) -> None:
    with new_file(file, sync=sync) as stream, on_disk(file):
        pq.write_table(table, stream, compression="zstd")
