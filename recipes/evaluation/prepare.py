"""Make the files of `suite.yaml`, and those of the fine-tunings beside it, from public data.

    python recipes/evaluation/prepare.py DATA WORK

DATA holds Parquet files that were made from public repositories, with texts as strings or JSON lists of messages:

| file | columns | from |
|---|---|---|
| policies/oasst_model_eval | prompt, policy, output | Open-Assistant/oasst-model-eval |
| policies/alpaca_eval | prompt, policy, output | tatsu-lab/alpaca_eval |
| policies/zeroeval_gsm | prompt, policy, output, meta: gold, task_prompt_id | WildEval/ZeroEval |
| policies/qwen_math_cot100 | prompt, output, meta: is_correct | QwenLM/Qwen2.5-Math |
| policy_index | source, policy, family | the same |
| tasks/math_tasks | prompt_id, solution | openai/grade-school-math, the MATH test set |
| preferences/SOURCE | prompt, reference, chosen, rejected, split, meta | named as in `polar eval`'s table |

Samples are drawn by a seed, so the same data give the same files. Everything that is trained on is of a training split
and under a permissive licence; everything that is evaluated on is not.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import pyarrow.parquet as pq

from polar.data.writers import open_writer

HERE = Path(__file__).parent
TRAINED_ON = ("arena_bench_gpt4", "halluqa_zh", "just_eval_safety", "llmzoo_reviews_en_zh")
TESTED_ON = ("alpaca_eval_gpt4", "halluqa_zh", "lawbench_zh_verifiable", "zeroeval_gsm_verifiable")
MOST, PERTURBED, GSM_PROMPTS = 400, 100, 60
"""Items that are drawn of each data set, at most; of them for the perturbations; questions for best of N on GSM8K."""
STRONG = ("gpt4_1106_preview", "claude-3-opus-20240229", "Meta-Llama-3-70B-Instruct")
"""Whose AlpacaEval outputs are references for RM-Bench's chat prompts; the first one alone for the official numbers."""
EASY = 0.9
"""Questions of which more answers are right say little about choosing among them, and are left out."""

Row = dict[str, Any]
STEP = re.compile(r"[-_](\d+(?:\.\d+)?)(k)?(?:-steps)?$")


def main(data: str, work: str) -> None:
    """Write all files."""
    source, target = Path(data), Path(work)
    target.mkdir(parents=True, exist_ok=True)
    write(target / "seen.jsonl", seen())
    families = [row for row in rows(source / "policy_index") if row["source"] == "oasst_model_eval"]
    write(target / "families.jsonl", ({"policy": row["policy"], "family": row["family"]} for row in families))
    write(target / "runs.jsonl", training_runs([row["policy"] for row in families]))
    training: list[Row] = []
    for name in TRAINED_ON:
        training += (plain(row) for row in rows(source / "preferences" / name) if usable(row, "train"))
    training = drawn(training, len(training))
    write(target / "train.jsonl", training)
    write(target / "train-without-reference.jsonl", ({**row, "reference": ""} for row in training))
    for name in TESTED_ON:
        usable_rows = [row for row in rows(source / "preferences" / name) if usable(row, "test")]
        write(target / f"{name}.jsonl", (plain(row, known_quality=True) for row in drawn(usable_rows, MOST)))
    perturbed = [json.loads(line) for line in (target / "alpaca_eval_gpt4.jsonl").read_text("utf-8").splitlines()]
    write(target / "probes.jsonl", perturbed[:PERTURBED])
    judged = rows(source / "preferences" / "judgebench")
    write(target / "judgebench.jsonl", (plain({**row, "reference": ""}) for row in drawn(judged, MOST)))
    write(target / "judgebench-references.jsonl", judgebench_references(judged))
    write_rm_bench(source, target)
    write_math(source, target)


def rows(path: Path) -> list[Row]:
    """The rows of a Parquet file; meta is read."""
    found = pq.read_table(path.with_name(path.name + ".parquet")).to_pylist()
    return [{**row, "meta": json.loads(row["meta"])} if row.get("meta") else row for row in found]


def write(path: Path, found: Any) -> None:
    """Write JSON lines."""
    with open_writer(path) as writer:
        for row in found:
            writer.write(row)


def usable(row: Row, split: str) -> bool:
    """Whether a row is of this split and has a reference."""
    return row["split"] == split and row["reference"] is not None


def drawn(found: list[Row], most: int) -> list[Row]:
    """Some of the rows, in an order that does not depend on how they came."""
    ordered = sorted(found, key=lambda row: json.dumps(row, sort_keys=True))
    Random(0).shuffle(ordered)
    return ordered[:most]


def plain(row: Row, known_quality: bool = False) -> Row:
    """A preference as `polar` reads it."""
    fields = {name: text(row[name]) for name in ("prompt", "reference", "chosen", "rejected")}
    scores = row.get("meta", {}).get("scores")
    quality = {"reference_quality": scores[0]} if known_quality and scores else {}
    return {**fields, "domain": row["domain"], **quality}


def text(value: str) -> Any:
    """Messages that are written as JSON, or a string."""
    return json.loads(value) if value.startswith('[{"role"') else value


def seen() -> Iterator[Row]:
    """Prompts and policies that polar-nano was trained on."""
    nano = HERE.parent / "nano"
    for field, name in (("prompt_id", "train-prompts.txt"), ("policy", "train-policies.txt")):
        yield from ({field: line} for line in (nano / name).read_text("utf-8").splitlines() if line)


def training_runs(policies: list[str]) -> Iterator[Row]:
    """For `polar pair --strategy checkpoint`: policies that are checkpoints of one run, by their names."""
    found = [(policy, match) for policy in policies if (match := STEP.search(policy))]
    runs = [policy[: match.start()] for policy, match in found]
    for run, (policy, match) in zip(runs, found, strict=True):
        if runs.count(run) > 1:
            yield {"policy": policy, "family": run, "step": round(float(match[1]) * (100_000 if match[2] else 100))}


def judgebench_references(judged: list[Row]) -> Iterator[Row]:
    """Pairs by two models have the same question: the right answer of one is the reference of the other's pair."""
    by_question: dict[str, dict[str, Row]] = {}
    for row in judged:
        by_question.setdefault(row["prompt"], {})[row["meta"]["response_model"]] = row
    for pairs in by_question.values():
        for model, row in pairs.items():
            for other, reference in pairs.items():
                if other != model:
                    yield {**plain({**row, "reference": reference["chosen"]}), "policies": [model, model]}


def write_rm_bench(source: Path, target: Path) -> None:
    """Three styles of each answer together, as RM-Bench has them; its code and safety parts get another layout."""
    items: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows(source / "preferences" / "rm_bench"):
        item = items.setdefault((row["meta"]["subset"], row["prompt"]), {"chosen": {}, "rejected": {}})
        for side, styles in item.items():
            styles[row["meta"][f"{side}_style"]] = row[side]
    whole = {key: item for key, item in items.items() if all(len(styles) == 3 for styles in item.values())}
    outputs: dict[str, dict[str, str]] = {}
    for prompt, policy, output in duckdb.execute(
        "select prompt, policy, output from read_parquet(?) where policy in ?",
        [str(source / "policies" / "alpaca_eval.parquet"), STRONG],
    ).fetchall():
        outputs.setdefault(prompt, {})[policy] = output
    chat, others = [], []
    for (subset, prompt), item in whole.items():
        sides = {
            side: [content(styles[style]) for style in ("concise", "detailed_plain", "detailed_markdown")]
            for side, styles in item.items()
        }
        if subset == "chat" and all(policy in outputs.get(prompt, {}) for policy in STRONG):
            references = [content(outputs[prompt][policy]) for policy in STRONG]
            chat.append({"prompt": text(prompt), "domain": subset, "references": references, **sides})
        elif subset != "chat":
            reference, *chosen = sides["chosen"]
            row = {"prompt": text(prompt), "domain": subset, "reference": reference, "chosen": chosen}
            others.append({**row, "rejected": sides["rejected"]})
    write(target / "rm-bench-chat-references.jsonl", drawn(chat, MOST))
    alone = [{name: value for name, value in row.items() if name != "references"} for row in chat]
    write(
        target / "rm-bench-chat.jsonl",
        ({**row, "reference": several["references"][0]} for row, several in zip(alone, chat, strict=True)),
    )
    for subset in ("code", "safety-refuse", "safety-response"):
        part = drawn([row for row in others if row["domain"] == subset], MOST)
        write(target / f"rm-bench-{subset}.jsonl", part)


def content(value: str) -> str:
    """The characters of an answer that is one message."""
    found = text(value)
    return found if isinstance(found, str) else "\n".join(message["content"] for message in found)


def write_math(source: Path, target: Path) -> None:
    """Answers to GSM8K by 44 models and to MATH by one, right or wrong, with the solution by people as reference."""
    solutions = {row["prompt_id"]: row["solution"] for row in rows(source / "tasks" / "math_tasks")}
    questions: dict[str, list[Row]] = {}
    for row in rows(source / "policies" / "zeroeval_gsm"):
        questions.setdefault(row["meta"]["task_prompt_id"], []).append(row)
    hard = (key for key, found in questions.items() if sum(map(is_right, found)) <= EASY * len(found))
    some = [questions[key] for key in sorted(hard)]
    Random(0).shuffle(some)
    write(
        target / "best-of-n-gsm8k.jsonl",
        (candidates(question, solutions[question[0]["meta"]["task_prompt_id"]]) for question in some[:GSM_PROMPTS]),
    )
    problems: dict[str, list[Row]] = {}
    for row in rows(source / "policies" / "qwen_math_cot100"):
        problems.setdefault(row["prompt_id"], []).append(row)
    write(
        target / "best-of-n-math.jsonl",
        (candidates(problem, solutions[key]) for key, problem in problems.items() if len(problem) > 1),
    )


def candidates(outputs: list[Row], solution: str) -> Row:
    """One row with all answers to a question."""
    return {
        "prompt": text(outputs[0]["prompt"]),
        "reference": re.sub(r"<<.*?>>", "", solution),
        "candidates": [content(row["output"]) for row in outputs],
        "quality": [is_right(row) for row in outputs],
        "policies": [row["policy"] for row in outputs],
    }


def is_right(row: Row) -> bool:
    """Whether the final number is the gold one; an answer without one is wrong."""
    if "is_correct" in row["meta"]:
        return bool(row["meta"]["is_correct"])
    field = re.search(r'"answer"\s*:\s*"?([^"\n}]*)', row["output"])
    numbers = re.findall(r"-?\d+(?:\.\d+)?", field[1].replace(",", "")) if field else []
    gold = float(row["meta"]["gold"].lstrip("# ").replace(",", ""))
    return len(numbers) == 1 and float(numbers[0]) == gold


if __name__ == "__main__":
    main(*sys.argv[1:])
