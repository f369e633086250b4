"""What each part of polar-mini's recipe is worth: trainings at a small equal budget with one part left out, two seeds.

    python recipes/mini/ablations.py BASE mixture.parquet triples.parquet SETS WORK [--steps 40] [--seeds 1 2]
    python recipes/mini/ablations.py ... --curve

BASE is the cut language model, the two files are those of `run.sh`, SETS is what `evaluation.py` made. Comparisons of
few characters alone are trained on, so that a run takes minutes. With `--curve` the number of comparisons to fine-tune
on varies instead, with and without a pre-training on policies before it. Every run goes on where it was stopped; what
is finished is read from WORK. Writes WORK/ablations.md or WORK/curve.md, accuracies on all sets by run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

import polar
from polar.evaluation.suites import read_suite

CHARACTERS = 900
"""Most of a comparison with its prompt and reference."""
MADE = {"copy", "changed", "cut", "empty", "repeated", "other", "key", "loop", "keywords", "injected"}
POLICIES = {"policy", "closer", "strength"}
SIZES = (0, 100, 300, 1000, 3000)
SETS = ("gsm8k-44-models", "mmlu-pro", "kor-bench", "evouna", "rmb-harmlessness", "made", "discrimination")
SETTINGS: dict[str, Any] = {
    "batch_size": 1,
    "batch_tokens": 4096,
    "max_length": 1024,
    "max_response_length": 256,
    "learning_rate": 2e-4,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "warmup_ratio": 0.05,
    "schedule": "cosine",
    "lexical_weight": 0.3,
    "log_steps": 10,
    "bf16": True,
}
Row = dict[str, str]


def main() -> None:
    """Train and evaluate what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "mixture", "policies", "sets", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit", type=int, default=100, help="items of each set")
    parser.add_argument("--curve", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    mixture = short(pq.read_table(arguments.mixture).to_pylist())
    policies = short(pq.read_table(arguments.policies).to_pylist())
    results = {}
    for seed in arguments.seeds:
        rows = Random(seed).sample(mixture, len(mixture))
        runs = curve(rows, arguments.steps) if arguments.curve else ablations(rows, arguments.steps)
        for name, (start, phases, blind) in runs.items():
            directory = arguments.work / f"{name.replace(' ', '-')}-{seed}"
            model = arguments.base if start == "language model" else random_start(arguments.base, directory, seed)
            for number, (data, steps) in enumerate(phases, start=1):
                output = directory / f"phase-{number}"
                if not (output / "polar.json").exists():
                    given = policies if data is None else data
                    polar.pretrain(model, given, output=output, max_steps=steps, seed=seed, **SETTINGS)
                model = output
            if phases:
                results[name, seed] = measured(model, arguments.sets, directory / "results", arguments.limit, blind)
    table(results, arguments.work / ("curve.md" if arguments.curve else "ablations.md"))


def short(rows: Iterable[Row]) -> list[Row]:
    """Comparisons of few characters, as triples."""
    sides = ("prompt", "reference", "positive", "negative")
    return [row for row in rows if sum(len(row[side]) for side in sides) <= CHARACTERS]


def ablations(rows: list[Row], steps: int) -> dict[str, Any]:
    """Start, phases of data with their steps, and whether references are hidden, by the name of the run."""
    first = max(1, steps * 3 // 10)
    whole = [(None, first), (rows, steps - first)]
    hidden = [{**row, "reference": "-"} for row in rows]
    return {
        "all of it": ("language model", whole, False),
        "random start": ("random", whole, False),
        "no policies": (
            "language model",
            [([row for row in rows if row["kind"] not in POLICIES], steps)],
            False,
        ),
        "no made cases": (
            "language model",
            [(None, first), ([row for row in rows if row["kind"] not in MADE], steps - first)],
            False,
        ),
        "no reference": ("language model", [(None, first), (hidden, steps - first)], True),
    }


def curve(rows: list[Row], steps: int) -> dict[str, Any]:
    """The same for growing numbers of comparisons; a batch holds about 30."""
    compared = [row for row in rows if row["kind"] not in POLICIES]
    runs: dict[str, Any] = {}
    for size in (*SIZES, len(compared)):
        tuned = [(compared[:size], max(1, size // 30))] if size else []
        runs[f"{size} after policies"] = ("language model", [(None, steps), *tuned], False)
        runs[f"{size} alone"] = ("language model", tuned, False)
    return runs


def random_start(base: Path, directory: Path, seed: int) -> Path:
    """The same architecture and tokenizer with random weights."""
    target = directory / "start"
    if not (target / "model.safetensors").exists():
        set_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(target)
        AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


def measured(model: Path, sets: Path, output: Path, limit: int, blind: bool) -> dict[str, dict[str, float]]:
    """Accuracy and its standard error of each set."""
    suite = read_suite(str(Path(__file__).parent / "suite.yaml"), data=str(sets))
    suite = suite.model_copy(update={"datasets": tuple(one for one in suite.datasets if one.name in SETS)})
    kept = output / "accuracy.json"
    if not kept.exists():
        summary = polar.evaluate(model, suite, output=output, limit=limit, reference_free=blind, dtype="bfloat16")
        whole = [one for one in summary.results if one.dataset and one.domain is None and one.slice is None]
        found = {
            one.dataset: {
                name: getattr(one.accuracy[scorer], part)
                for name, scorer, part in (
                    ("mean", "model", "mean"),
                    ("error", "model", "standard_error"),
                    ("f1", "unigram F1", "mean"),
                )
            }
            for one in whole
        }
        kept.write_text(json.dumps(found))
    read: dict[str, dict[str, float]] = json.loads(kept.read_text())
    return read


def table(results: dict[tuple[str, int], dict[str, dict[str, float]]], target: Path) -> None:
    """Accuracies in %, the mean over seeds with the larger of their standard errors; F1 in the last row."""
    names = list(dict.fromkeys(name for name, _ in results))
    lines = [f"| training | {' | '.join(SETS)} |", "|---" * (len(SETS) + 1) + "|"]
    for name in names:
        own = [result for (run, _), result in results.items() if run == name]
        lines.append(f"| {name} ({len(own)} seeds) | {' | '.join(cell([one[data] for one in own]) for data in SETS)} |")
    if results:
        first = next(iter(results.values()))
        words = " | ".join(f"{100 * first[data]['f1']:.1f}" for data in SETS)
        lines.append(f"| unigram F1 | {words} |")
    target.write_text("\n".join(lines) + "\n")


def cell(seeds: list[dict[str, float]]) -> str:
    """The mean accuracy of several seeds, with the larger standard error."""
    mean = sum(one["mean"] for one in seeds) / len(seeds)
    return f"{100 * mean:.1f} ± {100 * max(one['error'] for one in seeds):.1f}"


if __name__ == "__main__":
    main()
