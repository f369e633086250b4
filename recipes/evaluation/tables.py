"""Print the tables of docs/results/evaluation/README.md from the JSON of a report.

python recipes/evaluation/tables.py docs/results/evaluation/report.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "polar-nano": "polar-nano",
    "finetuned": "fine-tuned",
    "without-pretraining": "without pre-training",
    "without-pretraining-and-reference": "without pre-training and reference",
    "embedding": "embedding",
    "unigram F1": "unigram F1",
    "ROUGE-L": "ROUGE-L",
    "chrF": "chrF",
    "length": "length",
}
"""Scorers of the report, and the headings of their columns."""
SETS = {
    "policy discrimination": "all policy discrimination",
    "preference accuracy": "all preferences",
    "verifiable correctness": "all right and wrong answers",
    "best of N": "all best of N",
}
DRAWS = (1, 2, 4, 8, 16, 32)
REFERENCES = {
    "accuracy, the first reference alone": "the first reference alone",
    "accuracy, max of several references": "max",
    "accuracy, mean of several references": "mean",
    "accuracy, softmax of several references": "softmax",
}

Line = dict[str, Any]


def main(path: str) -> None:
    """Write all tables."""
    report = json.loads(Path(path).read_text("utf-8"))
    tables = {
        "Accuracy": accuracy(report["lines"]),
        "Best of N": best_of_n(report["curves"]),
        "Several references": several_references(report["lines"]),
        "Sensitivity": sensitivity(report["lines"]),
        "Differences in points, 95 % intervals": differences(report["comparisons"]),
    }
    for name, rows in tables.items():
        sys.stdout.write("\n".join([f"## {name}", "", *rows, "", ""]))


def accuracy(lines: Sequence[Line]) -> Iterator[str]:
    """Every data set under its task."""
    yield from heading("data set", "items")
    for task, name in SETS.items():
        for line in lines:
            part = line["part"]
            whole = part["domain"] is None and part["slice"] is None
            if part["task"] == task and whole and line["measure"] == "accuracy":
                yield row(part["dataset"] or f"**{name}**", line, percent)


def several_references(lines: Sequence[Line]) -> Iterator[str]:
    """One row for each aggregate."""
    yield from heading("rewards", "items")
    yield from (row(REFERENCES[line["measure"]], line, percent) for line in lines if line["measure"] in REFERENCES)


def sensitivity(lines: Sequence[Line]) -> Iterator[str]:
    """One row for each perturbation."""
    yield from heading("change", "items")
    yield from (row(line["part"]["domain"], line, points) for line in lines if line["measure"] == "change")


def best_of_n(curves: Sequence[Line]) -> Iterator[str]:
    """One row for each scorer, on the first data set that has curves."""
    own = {curve["scorer"]: curve["points"] for curve in curves if curve["dataset"] == curves[0]["dataset"]}
    yield f"| scorer | {' | '.join(f'N = {draws}' for draws in DRAWS)} |"
    yield f"|---|{'---:|' * len(DRAWS)}"
    for scorer, name in NAMES.items():
        yield f"| {name} | {' | '.join(of_draws(own[scorer], lambda point: point['quality']['mean']))} |"
    yield f"| the best possible | {' | '.join(of_draws(curves[0]['points'], lambda point: point['best']))} |"


def of_draws(points: Sequence[Line], value: Callable[[Line], float]) -> list[str]:
    """Percentages at the draws that the table shows."""
    return [f"{100 * value(point):.1f}" for point in points if point["draws"] in DRAWS]


def differences(comparisons: Sequence[Line]) -> Iterator[str]:
    """All comparisons on whole data sets and tasks."""
    yield "| task | data set | model | than | difference | from | to | verdict |"
    yield "|---|---|---|---|---:|---:|---:|---|"
    for one in comparisons:
        part = one["part"]
        if part["domain"] is None and part["slice"] is None:
            numbers = [f"{100 * value:+.1f}" for value in (one["difference"]["mean"], one["low"], one["high"])]
            cells = [part["task"], part["dataset"] or "all", one["first"], one["second"], *numbers, one["verdict"]]
            yield f"| {' | '.join(cells)} |"


def heading(first: str, second: str) -> Iterator[str]:
    """The two lines above the rows of a table with a column for each scorer."""
    yield f"| {first} | {second} | {' | '.join(NAMES.values())} |"
    yield f"|---|---:|{'---:|' * len(NAMES)}"


def row(name: str, line: Line, shown: Callable[[Line], str]) -> str:
    """A line of the report."""
    values = [shown(line["values"][scorer]) for scorer in NAMES]
    return f"| {name} | {line['items']:,} | {' | '.join(values)} |"


def percent(value: Line) -> str:
    """A share with its standard error, if it has one."""
    error = f" ± {100 * value['standard_error']:.1f}" if value["standard_error"] else ""
    return f"{100 * value['mean']:.1f}{error}"


def points(value: Line) -> str:
    """A difference of shares."""
    return f"{100 * value['mean']:+.1f} ± {100 * (value['standard_error'] or 0):.1f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
