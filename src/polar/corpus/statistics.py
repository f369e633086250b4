"""What a corpus of trajectories is like: sizes, duplicates, lengths, and how easily its policies are told apart.

Rows are read once. Hashes of the texts, their lengths and their first `EXCERPT` characters go into a temporary DuckDB
file, about 100 bytes a row, where everything is counted; DuckDB keeps to 1 GB of memory and moves to the disk what does
not fit (the environment variable TMPDIR says where). In memory stay one batch of rows, the sampled subset of prompts
(`polar.corpus.subset`), and the results: a few hundred bytes per policy. The same rows give the same numbers in
whatever order they come.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from polar.core.baselines import words
from polar.core.errors import InputError
from polar.core.records import Text, Trajectory, prompt_id, text_of
from polar.core.text import blank
from polar.corpus.report import QUANTILES, SCHEMA, Duplicates, Lengths, Overview, Policy, Repeated, Report, Unit
from polar.corpus.sorting import temporary_files
from polar.corpus.subset import Subset
from polar.data.fields import Row, optional_string
from polar.data.formats import count_of, trajectory
from polar.data.readers import OnBadRow, ReadReport, convert_rows

EXCERPT, REPEATED, BATCH = 100, 10, 10_000
"""Characters kept of every output, repeated outputs listed, rows written at a time."""
DATABASE: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": "1GB",
    "preserve_insertion_order": False,
    "autoinstall_known_extensions": False,
}
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
"""What DuckDB keeps of a trajectory; prompt and text are hashes of 8 bytes, units are tokens or words."""


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
