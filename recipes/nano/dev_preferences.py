"""Draw the preferences of the dev split: at most 300 rows with a reference per source, from each file's test split.

    python recipes/nano/dev_preferences.py DIRECTORY dev-preferences.jsonl

The directory holds one Parquet file per source with prompt, reference, chosen, rejected (message lists as JSON text),
prompt_id and split. The sources are public repositories: Arena-Hard, AlpacaEval, RewardBench, LLMZoo, just-eval,
HalluQA, LawBench, grade-school-math and ZeroEval; they are used for evaluation alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import pyarrow.parquet as pq

from polar.data.writers import open_writer

SOURCES = [
    "arena_bench_gpt4",
    "alpaca_eval_gpt4",
    "alpaca_eval_gpt4_baseline",
    "rewardbench_bon_gpt4",
    "llmzoo_reviews_en_zh",
    "just_eval_safety",
    "halluqa_zh",
    "lawbench_zh_verifiable",
    "gsm8k_openai_verifiable",
    "zeroeval_gsm_verifiable",
]
FIELDS = ("prompt", "reference", "chosen", "rejected")
PER_SOURCE = 300


def main(directory: str, target: str) -> None:
    """Draw and write the rows; the domain of a row is its source."""
    with open_writer(target) as writer:
        for source in SOURCES:
            rows = pq.read_table(Path(directory) / f"{source}.parquet").to_pylist()
            rows = [row for row in rows if row["split"] == "test" and row["reference"] is not None]
            rows.sort(key=lambda row: (row["prompt_id"], row["chosen"], row["rejected"]))
            Random(0).shuffle(rows)
            for row in rows[:PER_SOURCE]:
                writer.write({**{field: json.loads(row[field]) for field in FIELDS}, "domain": source})


if __name__ == "__main__":
    main(*sys.argv[1:])
