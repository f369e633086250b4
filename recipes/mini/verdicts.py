"""Measure how well rewards tell right from wrong outputs of different prompts: the area under the ROC curve.

    python recipes/mini/verdicts.py MODEL verify-bench-hard.jsonl [--limit N] [--dtype bfloat16]

Rows have prompt, reference, one output, and its verdict in `quality`. Prints the area of the model beside those of the
measures that count words, with standard errors clustered by prompt.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice

from polar import RewardModel
from polar.core.baselines import chrf, rouge_l, unigram_f1
from polar.core.metrics import area_under_curve
from polar.core.records import Group


def main() -> None:
    """Score all rows and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--last-characters", type=int, help="score the end of long outputs alone, where verdicts hang")
    arguments = parser.parse_args()
    with open(arguments.file, encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, arguments.limit)]
    groups = [
        Group(text(row["prompt"]), text(row["reference"]), (text(row["output"], arguments.last_characters),))
        for row in rows
    ]
    model = RewardModel.load(arguments.model, dtype=arguments.dtype)
    rewards = {"model": [own for (own,) in model.score_groups(groups)]}
    for name, measure in (("unigram F1", unigram_f1), ("ROUGE-L", rouge_l), ("chrF", chrf)):
        rewards[name] = [measure(group)[0] for group in groups]
    rewards["length"] = [float(len(group.candidates[0])) for group in groups]
    right = [bool(row["quality"]) for row in rows]
    prompts = [json.dumps(row["prompt"]) for row in rows]
    print(f"{len(rows)} outputs, {sum(right)} of them right\n\n| scorer | area under the curve |\n|---|---|")
    for name, values in rewards.items():
        area = area_under_curve(right, values, prompts)
        print(f"| {name} | {100 * area.mean:.1f} ± {100 * (area.standard_error or 0):.1f} |")


def text(messages: list[dict[str, str]], characters: int | None = None) -> str:
    """What the template makes of messages, or the last characters of it."""
    whole = "\n".join(message["content"] for message in messages)
    return whole if characters is None else whole[-characters:]


if __name__ == "__main__":
    main()
