"""Scores real examples with the bundled model and prints the rankings.

First the three examples that the POLAR authors published with the rewards of POLAR-7B, then outputs of real LLMs for
prompts that the bundled model never saw (seeing whether the reference's own policy comes out on top).
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from polar import RewardModel
from polar.core.records import text_of
from polar.data.readers import read_groups

HERE = Path(__file__).parent


def ranks(values: list[float]) -> list[int]:
    """1 for the highest value."""
    order = sorted(range(len(values)), key=lambda index: -values[index])
    return [order.index(index) + 1 for index in range(len(values))]


def shorten(text: str, characters: int = 88) -> Text:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return Text(line if len(line) <= characters else line[: characters - 3] + "...")


def show(console: Console, model: RewardModel, name: str, note: str) -> None:
    """Score the groups of a file and print one ranking per group."""
    path = HERE / name
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    groups = list(read_groups(path))
    for row, group, rewards in zip(rows, groups, model.score_groups(groups), strict=True):
        table = Table(title=shorten(text_of(group.prompt), 100), caption=note, title_justify="left", min_width=100)
        table.add_column("rank", justify="right")
        table.add_column("reward", justify="right")
        official = row.get("polar_7b")
        if official:
            table.add_column("POLAR-7B (rank)", justify="right")
        else:
            table.add_column("policy")
        table.add_column("output")
        table.add_row("", "", "reference", shorten(text_of(group.reference)), style="dim", end_section=True)
        official_ranks = ranks(official) if official else []
        for index in sorted(range(len(rewards)), key=lambda index: -rewards[index]):
            if official:
                beside = f"{official[index]:+.2f} ({official_ranks[index]})"
            else:
                own = row["policies"][index] == row["reference_policy"]
                beside = ("* " if own else "") + row["policies"][index]
            table.add_row(
                str(ranks(rewards)[index]), f"{rewards[index]:+.2f}", beside, shorten(text_of(group.candidates[index]))
            )
        console.print(table)
        console.print()


def main() -> None:
    """Run both files."""
    console = Console(width=max(140, Console().width))
    transformers_logging.disable_progress_bar()
    model = RewardModel.load()
    show(console, model, "seed_examples.jsonl", "POLAR-7B: rewards published by the POLAR authors")
    show(console, model, "real_outputs.jsonl", "* the reference's own policy, another sample")


if __name__ == "__main__":
    main()
