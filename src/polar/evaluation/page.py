"""The report as one HTML page that needs nothing else, and as a section for a model card in Markdown.

The rules of `polar.core.html` hold: every text is escaped, and the browser runs our one script alone, by its hash.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from polar.core.html import INK, STYLE, label, render, svg
from polar.core.metrics import Estimate
from polar.evaluation.analysis import Bin, Comparison, Diagnosis, Run
from polar.evaluation.columns import Part
from polar.evaluation.report import Curve, Line, Report

COLOURS = ("#2a6fbb", "#c2571a", "#2e8b57", "#8e5bb5", "#b03a5b", "#7a7416")
"""Of models; each can be seen on white and on black."""
GREY = "#7d8790"
"""Of all other scorers."""
MARKERS, OTHER_MARKERS = "osD^vP", "x+|123_"
LEGEND_COLUMNS = 2
MAX_ROWS_PLOTTED = 40
"""Most rows of a plot; tables have all."""
MARKDOWN_SYNTAX = frozenset("\\|`*_[]#~")
"""Characters that Markdown interprets."""


def page(report: Report) -> str:
    """Return the page; the same report gives the same bytes."""
    whole = [line for line in report.lines if line.measure == "accuracy" and line.part.whole and line.part.dataset]
    against = [one for one in report.comparisons if one.part.whole and one.part.dataset]
    datasets = dict.fromkeys(curve.dataset for curve in report.curves)
    diagnosed = bool(report.diagnoses)
    with mpl.rc_context(STYLE):
        plots = {
            "accuracy": _accuracies(report, whole[:MAX_ROWS_PLOTTED]),
            "differences": _differences(report, against[:MAX_ROWS_PLOTTED]) if against else None,
            "curves": [
                (name, _best_of_n(report, [one for one in report.curves if one.dataset == name])) for name in datasets
            ],
            "confidence": _confidence(report) if diagnosed else None,
            "lengths": _lengths(report) if diagnosed else None,
        }
    bins = [(one, name, bins) for one in report.diagnoses for name, bins in _bins_of(one)]
    return render(
        "evaluation/report.html.jinja", report=report, plots=plots, whole=whole, bins=bins, shown=MAX_ROWS_PLOTTED
    )


def _bins_of(diagnosis: Diagnosis) -> Iterable[tuple[str, Sequence[Bin]]]:
    yield "length of the better answer over that of the worse one", diagnosis.by_length
    yield "quality of the reference", diagnosis.by_reference_quality
    yield "sigmoid(|margin|)", diagnosis.by_confidence


def _accuracies(report: Report, lines: Sequence[Line]) -> Markup:
    figure, axes = _figure(7, 0.9 + 0.4 * len(lines), len(report.scorers))
    others = [scorer for scorer in report.scorers if scorer not in report.models]
    for scorer in (*others, *report.models):  # models on top
        rows = [(row, line.values[scorer]) for row, line in enumerate(lines) if scorer in line.values]
        estimates = [(row, value) for row, value in rows if isinstance(value, Estimate)]
        means = [value.mean for _, value in estimates]
        if scorer in others:
            marker = OTHER_MARKERS[others.index(scorer) % len(OTHER_MARKERS)]
            axes.plot(means, [row for row, _ in estimates], marker, color=GREY, label=label(scorer))
        else:
            count = len(report.models)
            shift = 0.5 * (report.models.index(scorer) - (count - 1) / 2) / count
            errors = [2 * (value.standard_error or 0) for _, value in estimates]
            _bars(axes, report, scorer, means, [row + shift for row, _ in estimates], xerr=errors, linestyle="none")
    _rows(axes, [f"{label(line.part.dataset or '')}\n{line.part.task}" for line in lines])
    axes.axvline(0.5, color=INK, alpha=0.3, linewidth=1)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -0.02), min(high, 1.02))  # bars of few items may be longer than what there is
    axes.set_xlabel("accuracy; bars are two standard errors to each side")
    _legend(figure)
    return svg(figure, "Accuracy of every model and baseline on every data set")


def _differences(report: Report, comparisons: Sequence[Comparison]) -> Markup:
    figure, axes = _figure(7, 0.8 + 0.36 * len(comparisons))
    for row, one in enumerate(comparisons):
        axes.hlines(row, one.low, one.high, color=_colour(report, one.first), linewidth=2)
        axes.plot(one.difference.mean, row, _marker(report, one.first), color=_colour(report, one.first))
    names = [f"{label(one.part.dataset or '')}\n{label(one.first)} - {label(one.second)}" for one in comparisons]
    _rows(axes, names)
    axes.axvline(0, color=INK, alpha=0.5, linewidth=1)
    axes.set_xlabel("difference of accuracies\nlines are 95 % intervals of the bootstrap")
    return svg(figure, "Differences between models, and between models and the best baseline")


def _best_of_n(report: Report, curves: Sequence[Curve]) -> Markup:
    figure, axes = _figure(7, 3, len(curves) + 1)
    for curve in curves:
        draws, quality = [one.draws for one in curve.points], [one.quality.mean for one in curve.points]
        if curve.scorer in report.models:
            errors = [2 * (one.quality.standard_error or 0) for one in curve.points]
            _bars(axes, report, curve.scorer, draws, quality, yerr=errors)
        else:
            marker = OTHER_MARKERS[report.scorers.index(curve.scorer) % len(OTHER_MARKERS)]
            axes.plot(draws, quality, marker=marker, color=GREY, linewidth=0.8, label=label(curve.scorer))
    longest = max(curves, key=lambda curve: len(curve.points)).points
    axes.plot([one.draws for one in longest], [one.best for one in longest], ":", color=INK, label="best possible")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("N")
    axes.set_ylabel("true quality of the chosen one")
    axes.grid(color=INK, alpha=0.12)
    _legend(figure)
    return svg(figure, "True quality of the candidate with the highest reward of N")


def _confidence(report: Report) -> Markup:
    figure, axes = _diagnosis(report, lambda one: one.by_confidence)
    axes.plot([0.5, 1], [0.5, 1], color=INK, alpha=0.4, linewidth=1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("expected from the margin, sigmoid(|margin|)")
    return svg(figure, "Reliability: how often pairs are in the right order, by the margin of their rewards")


def _lengths(report: Report) -> Markup:
    figure, axes = _diagnosis(report, lambda one: one.by_length)
    axes.axhline(0.5, color=INK, alpha=0.3, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("length of the better answer over that of the worse one")
    return svg(figure, "Accuracy by the lengths of the two answers")


def _diagnosis(report: Report, bins_of: Callable[[Diagnosis], Sequence[Bin]]) -> tuple[Figure, Axes]:
    """Accuracy of every model over all its data sets, by bins."""
    figure, axes = _figure(5, 3, len(report.models))
    for model in report.models:
        bins = _merged(found for one in report.diagnoses if one.scorer == model for found in bins_of(one))
        errors = [2 * (one.accuracy.standard_error or 0) for one in bins]
        _bars(axes, report, model, [one.mean for one in bins], [one.accuracy.mean for one in bins], yerr=errors)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("in the right order")
    axes.grid(color=INK, alpha=0.12)
    _legend(figure)
    return figure, axes


def _merged(bins: Iterable[Bin]) -> list[Bin]:
    """The bins of several data sets between the same limits as one: means weighted by items, independent errors."""
    between: defaultdict[tuple[float | None, float | None], list[Bin]] = defaultdict(list)
    for one in bins:
        between[one.low, one.high].append(one)
    found = []
    for limits, several in between.items():
        count = sum(one.accuracy.count for one in several)
        shares = [one.accuracy.count / count for one in several]
        errors = [share * (one.accuracy.standard_error or 0) for share, one in zip(shares, several, strict=True)]
        accuracy = Estimate(
            sum(share * one.accuracy.mean for share, one in zip(shares, several, strict=True)),
            sum(error**2 for error in errors) ** 0.5,
            count,
            sum(one.accuracy.clusters for one in several),
        )
        found.append(Bin(*limits, sum(share * one.mean for share, one in zip(shares, several, strict=True)), accuracy))
    return sorted(found, key=lambda one: one.mean)


def _bars(axes: Axes, report: Report, model: str, x: Sequence[float], y: Sequence[float], **errors: object) -> None:
    """Points of a model with error bars."""
    style = {"marker": _marker(report, model), "color": _colour(report, model), "markersize": 5, "linewidth": 1.3}
    axes.errorbar(x, y, label=label(model), **style, **errors)  # type: ignore[arg-type]


def _colour(report: Report, model: str) -> str:
    return COLOURS[report.models.index(model) % len(COLOURS)]


def _marker(report: Report, model: str) -> str:
    return MARKERS[report.models.index(model) % len(MARKERS)]


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Named rows from top to bottom, and percentages along them."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=INK, alpha=0.15)


def _figure(width: float, height: float, names: int = 0) -> tuple[Figure, Axes]:
    """A figure in inches, with room for a legend of so many names above it."""
    figure = Figure((width, height + 0.2 * (-(-names // LEGEND_COLUMNS))), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", ncols=LEGEND_COLUMNS, frameon=False, labelcolor=INK)


def model_card(report: Report) -> str:
    """Return a section for every model: accuracies beside those of the baselines, and the data."""
    return "\n".join(line for run in report.runs if run.label in report.models for line in _card(report, run))


def _card(report: Report, run: Run) -> Iterator[str]:
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
            verdict = _card_verdict(_against_baseline(report, run.label, line.part))
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


def _card_verdict(comparison: Comparison | None) -> str:
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
    return "".join(f"\\{character}" if character in MARKDOWN_SYNTAX else character for character in line)
