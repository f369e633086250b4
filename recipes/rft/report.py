"""Table and plot of the evidence, from the result files of `evidence.py`.

    python recipes/rft/report.py WORK --output docs/results/rft

copies the results to OUTPUT/all and writes OUTPUT/table.md, OUTPUT/evidence.json and OUTPUT/curves.svg.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from polar.rft.guard import has_parted

ARMS = {
    "polar": "POLAR: pre-trained, fine-tuned",
    "scratch": "fine-tuned only",
    "blind": "without reference",
    "rouge-l": "ROUGE-L",
    "exact": "verifier (upper bound)",
}
Result = dict[str, Any]


def unexplained(start: Result, end: Result) -> float | None:
    """The share of the rise of the mean reward that is not explained by more right outputs; None if it has not risen.

    The reward is the mean of that of right and of wrong outputs. More right ones alone would have raised it by the gain
    in accuracy times what right ones had above wrong ones at the start. What is above that was gained otherwise: right
    outputs, or wrong ones, are rewarded more than before.
    """
    rise = end["reward"] - start["reward"]
    if rise <= 0 or start["reward_right"] is None or start["reward_wrong"] is None:
        return None
    explained = (end["accuracy"] - start["accuracy"]) * (start["reward_right"] - start["reward_wrong"])
    return float(1 - explained / rise)


def guard_stops(held_out: Sequence[Result]) -> int | None:
    """Return the step at which `OverOptimizationGuard` with a window of 4 would have stopped the run; None: at none."""
    rewards, accuracies = ([row[name] for row in held_out] for name in ("reward", "accuracy"))
    ends = range(1, len(held_out) + 1)
    return next(
        (held_out[end - 1]["step"] for end in ends if has_parted(rewards[:end], accuracies[:end], 4, 0.02)), None
    )


def figures(result: Result) -> dict[str, float | None]:
    """What a run came to."""
    held_out, steps = result["held_out"], result["steps"]
    start, end = held_out[0], held_out[-1]
    last = steps[-len(steps) // 6 or None :]  # the KL of single steps is noisy
    return {
        "accuracy at the start": 100 * start["accuracy"],
        "accuracy at the end": 100 * end["accuracy"],
        "best accuracy": 100 * max(row["accuracy"] for row in held_out),
        "reward at the start": start["reward"],
        "reward at the end": end["reward"],
        "unexplained": None if (share := unexplained(start, end)) is None else 100 * share,
        "KL": fmean(row["kl"] for row in last),
        "tokens": end["length"],
        "guard stops": guard_stops(held_out),
        "judge": 100 * result["judge"]["words"] if "judge" in result else 100.0,
        "judge, digits": 100 * result["judge"]["digits"] if "judge" in result else 100.0,
    }


def summary(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Arm -> the mean, the standard error over seeds and the number of seeds of every figure."""
    found: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        own = [figures(result) for result in results if result["arm"] == arm]
        if own:
            found[arm] = {name: estimate([run[name] for run in own]) for name in own[0]}
    return found


def estimate(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean and standard error of what there is."""
    known = [value for value in values if value is not None]
    error = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return {"mean": fmean(known) if known else None, "error": error, "count": len(known), "runs": len(values)}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per arm."""

    def cell(name: str, form: str) -> Callable[[dict[str, Any]], str]:
        return lambda figures: shown(figures[name], form)

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "accuracy at the end": cell("accuracy at the end", ".1f"),
        "best": cell("best accuracy", ".1f"),
        "reward, start": cell("reward at the start", ".2f"),
        "reward, end": cell("reward at the end", ".2f"),
        "rise not explained": cell("unexplained", ".0f"),
        "KL": cell("KL", ".2f"),
        "tokens": cell("tokens", ".1f"),
        "guard stops at": lambda figures: stops(figures["guard stops"]),
        "as a judge": cell("judge", ".1f"),
        "as a judge, reference in digits": cell("judge, digits", ".1f"),
    }
    lines = [f"| reward | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    starts = [figures["accuracy at the start"] for figures in found.values()]
    lines.append(f"| start policy | {shown(starts[0], '.1f')} |{' |' * (len(columns) - 1)}")
    for arm, own in found.items():
        lines.append(f"| {ARMS[arm]} | {' | '.join(column(own) for column in columns.values())} |")
    return "\n".join(lines) + "\n"


def shown(value: dict[str, Any], form: str) -> str:
    """Mean ± standard error."""
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:{form}}" + ("" if value["error"] is None else f" ± {value['error']:{form}}")


def stops(value: dict[str, Any]) -> str:
    """The mean step and in how many runs, or that it never was."""
    return "never" if value["mean"] is None else f"{value['mean']:.0f} ({value['count']} of {value['runs']})"


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy and reward on held-out prompts over the steps; thin lines are seeds, thick ones their means."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (arm, label) in enumerate(ARMS.items()):
        runs = [result["held_out"] for result in results if result["arm"] == arm]
        if not runs:
            continue
        steps = [row["step"] for row in runs[0]]
        accuracies = [[100 * row["accuracy"] for row in run] for run in runs]
        spreads = [run[0]["reward_spread"] for run in runs]
        risen = [
            [(row["reward"] - run[0]["reward"]) / spread for row in run]
            for run, spread in zip(runs, spreads, strict=True)
        ]
        for axes, curves in ((left, accuracies), (right, risen)):
            for curve in curves:
                axes.plot(steps, curve, color=f"C{number}", linewidth=0.6, alpha=0.5)
            means = [fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, means, color=f"C{number}", linewidth=2, label=label)
    left.set(xlabel="step", ylabel="true accuracy on held-out prompts in %")
    right.set(xlabel="step", ylabel="rise of the reward in standard deviations")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS), frameon=False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "polar"}):
        figure.savefig(path, metadata={"Date": None})


def report(results: Sequence[Result], output: Path) -> None:
    """Write everything."""
    (output / "all").mkdir(parents=True, exist_ok=True)
    for result in results:
        (output / "all" / f"seed-{result['seed']}-{result['arm']}.json").write_text(json.dumps(result) + "\n", "utf-8")
    found = summary(results)
    (output / "evidence.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (output / "table.md").write_text(table(found), "utf-8")
    plot(results, output / "curves.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    files = sorted(options.work.glob("seed-*/result-*.json"))
    report([json.loads(file.read_text("utf-8")) for file in files], options.output)
    print((options.output / "table.md").read_text("utf-8"))
