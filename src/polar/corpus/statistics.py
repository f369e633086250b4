"""Statistics of a corpus of trajectories: sizes, duplicates, lengths, and how well trivial features separate policies.

Rows are read once. Hashes of the texts, their lengths and their first `EXCERPT` characters go into a temporary DuckDB
file, about 100 bytes a row, where everything is counted; DuckDB keeps to 1 GB of memory and moves to the disk what does
not fit (the environment variable TMPDIR says where). In memory stay one batch of rows, the sampled subset of prompts
(`Subset`), and the results: a few hundred bytes per policy. The same rows give the same numbers in whatever order they
come.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from polar.core.baselines import chance, first_word, length, unigram_f1, words
from polar.core.errors import InputError
from polar.core.html import Excerpt
from polar.core.metrics import Values, clustered_mean, outcomes
from polar.core.records import Group, Text, Trajectory, Triple, prompt_id, text_of
from polar.core.text import blank
from polar.corpus.pair import pair, temporary_files
from polar.corpus.report import (
    QUANTILES,
    SCHEMA,
    Contrast,
    Contrasts,
    Discrimination,
    Duplicates,
    Example,
    Feature,
    Lengths,
    Overview,
    Policy,
    Repeated,
    Report,
    Unit,
)
from polar.data.fields import Row, optional_string
from polar.data.readers import OnBadRow, ReadReport, convert_rows
from polar.data.record_rows import count_of, trajectory

if TYPE_CHECKING:
    import duckdb

EXCERPT, REPEATED, BATCH = 100, 10, 10_000
"""Characters kept of every output, repeated outputs listed, rows written at a time."""
DATABASE: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": "1GB",
    "preserve_insertion_order": False,
    "autoinstall_known_extensions": False,
}
PROMPTS = 2_000
"""Most prompts of the subset."""
CHARACTERS = 100_000_000
"""Most characters of the subset, prompts and outputs together; this bounds its memory."""
TRIPLES = 10_000
"""Triples, about; fewer when the subset has not so many."""
FEATURES = {"length": length, "first word": first_word, "unigram F1": unigram_f1, "chance": chance}
"""Rewards that need no understanding."""
ENOUGH_TRIPLES, ENOUGH_PROMPTS, LISTED = 20, 10, 10
"""Policies and pairs of them are compared from so many triples of so many prompts on; most that a list has."""
EXAMPLES, POLICIES_SHOWN, OUTPUTS_SHOWN, TEXT_SHOWN = 6, 6, 2, 4_000
"""Prompts to read, policies of each, outputs of each policy, characters of each text."""

EDGES = [0, *sorted({round(2 ** (half / 2)) for half in range(41)})]
"""Edges of the histogram of lengths: 0, then steps of the square root of 2 up to a million characters."""

ROW = pa.schema(
    {
        "prompt": pa.uint64(),
        "policy": pa.string(),
        "text": pa.uint64(),
        "excerpt": pa.string(),
        "characters": pa.uint32(),
        "prompt_characters": pa.uint32(),
        "units": pa.uint32(),
        "prompt_units": pa.uint32(),
        "tokens": pa.bool_(),
        "empty": pa.bool_(),
        "family": pa.string(),
        "step": pa.int64(),
        "wrapper": pa.string(),
        "finish_reason": pa.string(),
    }
)
"""Columns of a trajectory in DuckDB; prompt and text are hashes of 8 bytes, units are tokens or words."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory and what the sampler counted, as far as the row says it."""

    trajectory: Trajectory
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None


def read_samples(
    path: str | Path, *, on_bad_row: OnBadRow = "error", report: ReadReport | None = None
) -> Iterator[Sample]:
    """Trajectories with the fields beside them that a sampler writes: prompt_tokens, output_tokens, finish_reason.

    Args:
        path: Where the rows are (`polar.data.readers`).
        on_bad_row: Raise at the first bad row, or skip and count it.
        report: Filled while reading.

    Raises:
        InputError: For a bad row or file.
    """
    return convert_rows(path, _sample, on_bad_row=on_bad_row, report=report)


def _sample(row: Row) -> Sample:
    _, (record,) = trajectory(row)
    tokens = count_of(row, "prompt_tokens"), count_of(row, "output_tokens")
    return Sample(record, *tokens, optional_string(row, "finish_reason"))


def statistics(samples: Iterable[Sample], *, seed: int = 0, report: ReadReport | None = None) -> Report:
    """Read the samples once and count.

    Args:
        samples: In any order.
        seed: Another seed is another subset for triples and examples.
        report: Where the reader counts rows that it skips.

    Raises:
        InputError: there are no samples.
    """
    import duckdb  # a third of a second at import

    subset = Subset(seed)
    with (
        temporary_files(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="polar-report-") as directory,
        duckdb.connect(Path(directory) / "corpus.duckdb", config=DATABASE) as database,
    ):
        _fill(database, samples, subset)
        return Report(
            SCHEMA,
            seed,
            _overview(database, report.skipped if report else 0),
            _duplicates(database),
            _lengths(database),
            _policies(database),
            subset.discrimination(),
            subset.examples(),
        )


def _fill(database: duckdb.DuckDBPyConnection, samples: Iterable[Sample], subset: Subset) -> None:
    """Tables: trajectories; texts, the different ones of a prompt and policy; cells, the pairs of prompt and policy."""
    identify = lru_cache(maxsize=1024)(prompt_id)
    count_words = lru_cache(maxsize=1024)(lambda prompt: len(words(text_of(prompt))))
    database.from_arrow(ROW.empty_table()).create("trajectories")
    remaining = iter(samples)
    while batch := list(islice(remaining, BATCH)):
        counted = []
        for sample in batch:
            prompt = identify(sample.trajectory.prompt)
            subset.add(prompt, sample.trajectory)
            counted.append(_count(sample, prompt, count_words))
        database.from_arrow(pa.Table.from_pylist(counted, ROW)).insert_into("trajectories")
    database.execute(
        "CREATE TABLE texts AS SELECT prompt, policy, text, count(*) AS copies FROM trajectories GROUP BY ALL;"
        "CREATE TABLE cells AS SELECT prompt, policy, sum(copies)::BIGINT AS samples, count(*) AS different"
        " FROM texts GROUP BY ALL"
    )


def _count(sample: Sample, prompt: str, count_words: Callable[[Text], int]) -> dict[str, object]:
    record, output = sample.trajectory, text_of(sample.trajectory.output)
    tokens = sample.prompt_tokens is not None and sample.output_tokens is not None
    return {
        "prompt": int(prompt, 16),
        "policy": record.policy,
        "text": int.from_bytes(hashlib.blake2b(output.encode(), digest_size=8).digest(), "big"),
        "excerpt": output[:EXCERPT],
        "characters": len(output),
        "prompt_characters": len(text_of(record.prompt)),
        "units": sample.output_tokens if tokens else len(words(output)),
        "prompt_units": sample.prompt_tokens if tokens else count_words(record.prompt),
        "tokens": tokens,
        "empty": blank(output),
        "family": record.family,
        "step": record.step,
        "wrapper": record.wrapper,
        "finish_reason": sample.finish_reason,
    }


def _overview(database: duckdb.DuckDBPyConnection, skipped_rows: int) -> Overview:
    (sums,) = _query(
        database,
        "SELECT count(*) AS trajectories, count(DISTINCT policy) AS policies, count(DISTINCT family) AS families,"
        " sum(prompt_units) AS prompt_units, sum(units) AS output_units, sum(prompt_characters) AS prompt_characters,"
        " sum(characters) AS output_characters, count_if(tokens) AS with_tokens FROM trajectories",
    )
    if not sums["trajectories"]:
        raise InputError("report: expected at least one trajectory, found none")
    with_tokens = sums.pop("with_tokens")
    unit: Unit = "words" if not with_tokens else "tokens" if with_tokens == sums["trajectories"] else "tokens and words"
    (cells,) = _query(
        database,
        "SELECT count(*) AS cells, count_if(different > 1) AS cells_with_two_outputs,"
        " count(DISTINCT prompt) AS prompts FROM cells",
    )
    per_policy = _quantiles("prompts")
    return Overview(
        **sums,
        **cells,
        skipped_rows=skipped_rows,
        unit=unit,
        prompts_with_two_policies=_value(
            database, "SELECT count(*) FROM (SELECT prompt FROM cells GROUP BY prompt HAVING count(*) > 1)"
        ),
        samples_per_cell=_tuples(database, "SELECT samples, count(*) FROM cells GROUP BY 1 ORDER BY 1"),
        prompts_per_policy=tuple(
            _value(database, f"SELECT {per_policy} FROM (SELECT count(*) AS prompts FROM cells GROUP BY policy)")
        ),
        finish_reasons=_tuples(
            database,
            "SELECT finish_reason, count(*) FROM trajectories WHERE EXISTS (FROM trajectories WHERE finish_reason IS"
            " NOT NULL) GROUP BY 1 ORDER BY 2 DESC, 1 NULLS LAST",
        ),
    )


def _duplicates(database: duckdb.DuckDBPyConnection) -> Duplicates:
    (shared,) = _query(
        database,
        "SELECT count(*) AS shared_texts, coalesce(sum(copies), 0) AS shared_trajectories FROM"
        " (SELECT sum(copies) AS copies FROM texts GROUP BY prompt, text HAVING count(*) > 1)",
    )
    repeated = _query(
        database,
        "SELECT any_value(excerpt) AS excerpt, any_value(characters) AS characters, count(*) AS count,"
        " count(DISTINCT prompt) AS prompts, count(DISTINCT policy) AS policies FROM trajectories"
        f" WHERE text IN (SELECT text FROM texts GROUP BY text HAVING sum(copies) > 1"
        f" ORDER BY sum(copies) DESC, text LIMIT {REPEATED}) GROUP BY text ORDER BY count DESC, text",
    )
    return Duplicates(
        within_policy=_value(database, "SELECT sum(samples - different) FROM cells"),
        empty=_value(database, "SELECT count_if(empty) FROM trajectories"),
        most_repeated=tuple(Repeated(**row) for row in repeated),
        **shared,
    )


def _lengths(database: duckdb.DuckDBPyConnection) -> Lengths:
    lengths = _tuples(database, "SELECT characters, count(*) FROM trajectories GROUP BY 1 ORDER BY 1")
    edges = [*EDGES, max(EDGES[-1], lengths[-1][0]) + 1]
    counts, _ = np.histogram([length for length, _ in lengths], edges, weights=[count for _, count in lengths])
    bins = tuple(zip(edges, edges[1:], map(int, counts), strict=False))
    return Lengths(
        quantiles=tuple(_value(database, f"SELECT {_quantiles('characters')} FROM trajectories")),
        histogram=bins[: max(number for number, (*_, count) in enumerate(bins) if count) + 1],
    )


def _policies(database: duckdb.DuckDBPyConnection) -> tuple[Policy, ...]:
    policies = _query(
        database,
        f"""FROM (
            SELECT policy, {_values("family")} AS families, {_values("step")} AS steps,
                {_values("wrapper")} AS wrappers, count(*) AS trajectories, count_if(empty) AS empty,
                count_if(coalesce(finish_reason = 'length', false)) AS cut,
                {_quantiles("characters")} AS lengths, sum(units) AS output_units
            FROM trajectories GROUP BY policy
        ) JOIN (
            SELECT policy, count(*) AS prompts, count_if(different > 1) AS prompts_with_two_outputs,
                sum(different) AS "distinct"
            FROM cells GROUP BY policy
        ) USING (policy) ORDER BY policy""",
    )
    lists = ("families", "steps", "wrappers", "lengths")
    return tuple(Policy(**row | {name: tuple(row[name]) for name in lists}) for row in policies)


def _values(column: str) -> str:
    return f"coalesce(list(DISTINCT {column} ORDER BY {column}) FILTER ({column} IS NOT NULL), [])"


def _quantiles(column: str) -> str:
    return f"[round(value, 2) for value in quantile_cont({column}, {list(QUANTILES)})]"


def _query(database: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    result = database.execute(sql)
    names = [name for name, *_ in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _tuples(database: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    return tuple(database.execute(sql).fetchall())


def _value(database: duckdb.DuckDBPyConnection, sql: str) -> Any:
    ((value,),) = database.execute(sql).fetchall()
    return value


# The subset of prompts with all their texts, for what needs texts: triples and examples to read.


@dataclass(slots=True)
class Subset:
    """The prompts whose hash with the seed is smallest, as many as the limits allow, with all their trajectories."""

    seed: int
    prompts: dict[str, list[Trajectory]] = field(default_factory=lambda: defaultdict(list))
    """Prompt id -> trajectories."""
    characters: int = 0
    _heap: list[tuple[int, str]] = field(default_factory=list)
    """Minus the hash, prompt id: the prompt to drop next is the first."""
    _limit: int = 1 << 64
    """Smallest hash that was dropped. A dropped prompt never returns, so the subset is a prefix of all prompts in the
    order of their hashes, whatever the order of the rows."""

    def add(self, prompt: str, trajectory: Trajectory) -> None:
        """Keep a trajectory if its prompt belongs to the subset; `prompt` is the prompt's id."""
        rank = _hash(self.seed, prompt)
        if rank >= self._limit:
            return
        if prompt not in self.prompts:
            heapq.heappush(self._heap, (-rank, prompt))
        self.prompts[prompt].append(trajectory)
        self.characters += _characters(trajectory)
        while len(self.prompts) > PROMPTS or self.characters > CHARACTERS:
            rank, last = heapq.heappop(self._heap)
            self._limit = -rank
            self.characters -= sum(map(_characters, self.prompts.pop(last)))

    def discrimination(self) -> Discrimination:
        """Draw triples and let the trivial features judge them."""
        shared = {
            prompt: trajectories
            for prompt, trajectories in self.prompts.items()
            if len({trajectory.policy for trajectory in trajectories}) > 1
        }
        per_prompt = math.ceil(TRIPLES / max(1, len(shared)))
        triples = list(pair(chain.from_iterable(shared.values()), per_prompt=per_prompt, seed=self.seed))
        clusters = [prompt_id(triple.prompt) for triple in triples]
        judged = {name: _judge(triples, feature) for name, feature in FEATURES.items()}
        overlap = judged["unigram F1"]
        return Discrimination(
            prompts=len(self.prompts),
            triples=len(triples),
            features=tuple(_feature(name, values, clusters) for name, values in judged.items() if triples),
            policies=_contrasts([(str(t.policy),) for t in triples], overlap, clusters),
            pairs=_contrasts([_pair(t) for t in triples], overlap, clusters),
        )

    def examples(self) -> tuple[Example, ...]:
        """Prompts to read: those with the smallest hashes."""
        smallest = heapq.nsmallest(EXAMPLES, self.prompts, key=partial(_hash, self.seed))
        return tuple(self._example(prompt) for prompt in smallest)

    def _example(self, prompt: str) -> Example:
        outputs: dict[str, set[str]] = defaultdict(set)
        for one in self.prompts[prompt]:
            outputs[one.policy].add(text_of(one.output))
        by_hash = partial(_hash, self.seed)
        shown = heapq.nsmallest(POLICIES_SHOWN, outputs, key=lambda policy: by_hash(prompt + policy))
        drawn = {policy: heapq.nsmallest(OUTPUTS_SHOWN, outputs[policy], key=by_hash) for policy in sorted(shown)}
        chosen = tuple((policy, tuple(map(_excerpt, texts))) for policy, texts in drawn.items())
        # One prompt may be spelt in several ways; which spelling is shown must not depend on the order of the rows.
        return Example(prompt, _excerpt(min(text_of(t.prompt) for t in self.prompts[prompt])), chosen)


def _hash(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha1(f"{seed} {name}".encode(), usedforsecurity=False).digest()[:8], "big")


def _characters(trajectory: Trajectory) -> int:
    return len(text_of(trajectory.prompt)) + len(text_of(trajectory.output))


def _excerpt(text: str) -> Excerpt:
    return Excerpt(text[:TEXT_SHOWN], len(text))


def _judge(triples: Sequence[Triple], feature: Callable[[Group], list[float]]) -> Values:
    """1 where the feature prefers the positive, 0 where the negative, one half for a tie."""
    rewards = [feature(Group(t.prompt, t.reference, (t.positive, t.negative))) for t in triples]
    return outcomes([better for better, _ in rewards], [worse for _, worse in rewards])


def _feature(name: str, values: Values, clusters: Sequence[str]) -> Feature:
    accuracy = clustered_mean(values, clusters)
    return Feature(name, accuracy, replace(accuracy, mean=accuracy.mean - 0.5).verdict())


def _pair(triple: Triple) -> tuple[str, ...]:
    return tuple(sorted((str(triple.policy), str(triple.negative_policy))))


def _contrasts(policies: Sequence[tuple[str, ...]], values: Values, clusters: Sequence[str]) -> Contrasts:
    """Compare those policies (or pairs) that have enough triples; both lists together name none twice."""
    items: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, names in enumerate(policies):
        items[names].append(number)
    contrasts = [
        Contrast(names, clustered_mean(values[numbers], [clusters[number] for number in numbers]))
        for names, numbers in items.items()
        if len(numbers) >= ENOUGH_TRIPLES and len({clusters[number] for number in numbers}) >= ENOUGH_PROMPTS
    ]
    contrasts.sort(key=lambda contrast: (contrast.accuracy.mean, contrast.policies))
    listed = min(LISTED, (len(contrasts) + 1) // 2)
    return Contrasts(len(contrasts), tuple(contrasts[:listed]), tuple(contrasts[listed:][-LISTED:][::-1]))
