"""Curves of a run of `polar rft`: reward, true accuracy, KL and length over the steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polar.core.errors import InputError

PANELS = {"reward": "reward", "accuracy": "true accuracy", "kl": "KL from the start policy", "length": "tokens"}


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The rows of steps.jsonl or held-out.jsonl.

    Raises:
        InputError: the file is missing or is not JSONL.
    """
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as the figures of a run ({error})") from error


def plot_run(output: str | Path) -> None:
    """Draw curves.svg and curves.png of a finished run into its directory.

    Raises:
        InputError: the run has no figures.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    directory = Path(output)
    steps = read_figures(directory / "steps.jsonl")
    held_out = read_figures(directory / "held-out.jsonl") if (directory / "held-out.jsonl").is_file() else []
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for rows, style, kind in ((steps, "-", "training"), (held_out, "o-", "held out")):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=kind)
        axes.set(xlabel="step", ylabel=label)
        if axes.lines:
            axes.legend(frameon=False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "polar"}):
        figure.savefig(directory / "curves.svg", metadata={"Date": None})
        figure.savefig(directory / "curves.png", dpi=120)
