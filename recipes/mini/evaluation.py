"""Make the data sets of `suite.yaml` from public data.

    python recipes/mini/evaluation.py DATA HELD_OUT WORK

DATA holds the Parquet files that `recipes/evaluation/prepare.py` describes, HELD_OUT is the held-out part of
`mixture.py`. Test rows alone; nothing that is written here was trained on.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from polar.data.writers import open_writer

PREFERENCES = {
    "gsm8k-44-models": "zeroeval_gsm_verifiable",
    "gsm8k-openai": "gsm8k_openai_verifiable",
    "mmlu-pro": "mmlu_pro_verifiable",
    "kor-bench": "kor_bench_verifiable",
    "evouna": "evouna",
    "rmb": "rmb",
    "alpaca-eval": "alpaca_eval_gpt4",
    "arena-bench": "arena_bench_gpt4",
    "ragchecker": "ragchecker",
    "prometheus": "prometheus_refs",
    "llmbar": "llmbar",
    "auto-j": "auto_j",
}
"""Data set of the suite -> file of test rows."""

Row = dict[str, Any]


def main(data: str, held_out: str, work: str) -> None:
    """Write all files."""
    source, target = Path(data), Path(work)
    target.mkdir(parents=True, exist_ok=True)
    for name, file in PREFERENCES.items():
        rows = [row for row in read(source / "preferences" / f"{file}.parquet") if row["split"] == "test"]
        if name in ("llmbar", "auto-j"):  # they have no references
            rows = [{**row, "reference": ""} for row in rows]
        rows = [preference(row) for row in shuffled(rows) if row["reference"] is not None]
        if name == "rmb":
            for domain in ("helpfulness", "harmlessness"):
                write(target / f"rmb-{domain}.jsonl", [row for row in rows if row["domain"] == domain])
        else:
            write(target / f"{name}.jsonl", rows)
    graded = shuffled(read(source / "graded" / "verify_bench_hard.parquet"))
    write(target / "verify-bench-hard.jsonl", [judged(row) for row in graded])
    write(target / "gsm8k-best-of-n.jsonl", best_of_n(source))
    made = pq.read_table(held_out).to_pylist()
    write(
        target / "made.jsonl",
        [
            {
                "prompt": row["prompt"],
                "reference": row["reference"],
                "chosen": row["positive"],
                "rejected": row["negative"],
                "domain": row["kind"],
            }
            for row in made
        ],
    )


def best_of_n(source: Path) -> list[Row]:
    """Questions of GSM8K with the answers of several models, beside a person's solution."""
    solutions = {
        (row["prompt"][0]["content"].strip()): row["solution"]
        for row in read(source / "tasks" / "math_tasks.parquet")
        if row["source"] == "gsm8k" and row["split"] == "test"
    }
    found: dict[str, Row] = {}
    for row in shuffled(read(source / "policies" / "zeroeval_gsm.parquet")):
        question = QUESTION.search(row["prompt"][0]["content"])
        answer = ANSWER.findall(row["output"])
        if question is None or not answer or (prompt := question.group(1).strip()) not in solutions:
            continue
        item = found.setdefault(
            prompt, {"prompt": prompt, "reference": solutions[prompt], "candidates": [], "quality": []}
        )
        item["candidates"].append(row["output"])
        item["quality"].append(float(number(answer[-1]) == number(row["meta"]["gold"])))
    items = [item for item in found.values() if len(item["candidates"]) >= CANDIDATES]
    for item in items:
        item["candidates"], item["quality"] = item["candidates"][:CANDIDATES], item["quality"][:CANDIDATES]
    return [item for item in items if 0 < sum(item["quality"]) < CANDIDATES]


CANDIDATES = 16
"""Of a question, by as many models drawn at random; some of them right, some wrong."""
QUESTION = re.compile(r"## Question:(.*?)## Instruction", re.DOTALL)
ANSWER = re.compile(r'"answer"\s*:\s*"?([^"}\n]*)')


def number(value: str) -> float | None:
    """The last number of a text."""
    found = re.findall(r"-?\d+(?:\.\d+)?", value.replace(",", ""))
    return float(found[-1]) if found else None


def read(path: Path) -> list[Row]:
    """Rows of a Parquet file; messages and meta are read."""
    rows: list[Row] = pq.read_table(path).to_pylist()
    for row in rows:
        for field, value in row.items():
            if isinstance(value, str) and value.startswith("{" if field == "meta" else '[{"role"'):
                row[field] = json.loads(value)
    return rows


def shuffled(rows: list[Row]) -> list[Row]:
    """The rows in an order that does not depend on how they came."""
    ordered = sorted(rows, key=lambda row: json.dumps(row, sort_keys=True, default=str))
    Random(0).shuffle(ordered)
    return ordered


def preference(row: Row) -> Row:
    """A preference; every gold alternative of EVOUNA is a reference."""
    fields = {name: row[name] for name in ("prompt", "chosen", "rejected", "domain")}
    references = row["meta"].get("references") if isinstance(row["meta"], dict) else None
    return {**fields, "references": references} if references else {**fields, "reference": row["reference"]}


def judged(row: Row) -> Row:
    """One output with a verdict."""
    return {**{name: row[name] for name in ("prompt", "reference", "output", "domain")}, "quality": row["correct"]}


def write(path: Path, rows: list[Row]) -> None:
    """Write JSON lines."""
    with open_writer(path) as writer:
        for row in rows:
            writer.write(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
