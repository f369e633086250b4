"""The report as a section for a model card, in Markdown."""

from __future__ import annotations

import html
from collections.abc import Iterator

from polar.core.metrics import Estimate
from polar.evaluation.columns import Part
from polar.evaluation.compare import Comparison, Run
from polar.evaluation.report import Report

MARKUP = frozenset("\\|`*_[]#~")


def model_card(report: Report) -> str:
    """For every model a section: its accuracies beside those of the baselines, and what they were measured on."""
    return "\n".join(line for run in report.runs if run.label in report.models for line in _section(report, run))


def _section(report: Report, run: Run) -> Iterator[str]:
    manifest, facts = run.manifest, run.manifest.model
    assert facts is not None
    yield f"## Evaluation of {_plain(run.label)}"
    yield ""
    yield (
        "Accuracy in % ± its standard error (clustered by prompt) beside baselines that need no model; ties count one "
        "half, so chance is 50. The last column is a paired bootstrap against the best baseline: difference in "
        "percentage points, 95 % interval."
    )
    yield ""
    yield f"| data set | task | items | model | {' | '.join(map(_plain, report.baselines))} | than the best baseline |"
    yield "|---|---|---:|" + "---:|" * (len(report.baselines) + 1) + "---|"
    for line in report.lines:
        if line.measure == "accuracy" and line.part.whole and line.part.dataset and run.label in line.values:
            numbers = [_percent(line.values.get(name)) for name in (run.label, *report.baselines)]
            verdict = _verdict(_against_baseline(report, run.label, line.part))
            cells = [_plain(line.part.dataset), line.part.task, f"{line.items:,}", *numbers, verdict]
            yield f"| {' | '.join(cells)} |"
    yield ""
    yield "References:"
    yield ""
    for dataset in manifest.datasets:
        yield f"- {_plain(dataset.name)}: {_plain(dataset.reference)}"
    yield ""
    commit = f" at {_plain(manifest.commit)}" if manifest.commit else ""
    yield (
        f"Suite {_plain(manifest.suite)}, polar {_plain(manifest.polar)}{commit}; "
        f"{_plain(facts.computed)}; {_plain(facts.hashes)}."
    )
    yield ""


def _against_baseline(report: Report, model: str, part: Part) -> Comparison | None:
    return next(
        (
            one
            for one in report.comparisons
            if (one.part, one.first) == (part, model) and one.second in report.baselines
        ),
        None,
    )


def _verdict(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    low, high = 100 * comparison.low, 100 * comparison.high
    difference = f"{100 * comparison.difference.mean:+.1f}, {low:+.1f} to {high:+.1f}"
    return f"{comparison.verdict} ({difference}; {_plain(comparison.second)})"


def _percent(value: Estimate | float | None) -> str:
    if not isinstance(value, Estimate):
        return ""
    error = f" ± {100 * value.standard_error:.1f}" if value.standard_error else ""
    return f"{100 * value.mean:.1f}{error}"


def _plain(text: str) -> str:
    """A text on one line that Markdown shows as it is."""
    line = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{character}" if character in MARKUP else character for character in line)
