"""The report on a corpus as one HTML page (`polar.core.html`)."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from polar.core.html import ACCENT, INK, STYLE, label, render, svg
from polar.corpus.report import Lengths, Policy, Report

SHOWN = 60
"""Most policies of the plot; of more, half are those with the shortest and half those with the longest median."""


def page(report: Report) -> str:
    """The page; the same report gives the same bytes."""
    shown = _shown(report.policies)
    with mpl.rc_context(STYLE):
        histogram, bars = _histogram(report.lengths), _bars(shown)
    return render("corpus/page.html.jinja", report=report, histogram=histogram, bars=bars, shown=len(shown))


def _shown(policies: Sequence[Policy]) -> list[Policy]:
    """The policies of the plot, longest median first."""
    ordered = sorted(policies, key=lambda policy: (-policy.median, policy.policy))
    return ordered if len(ordered) <= SHOWN else ordered[: SHOWN // 2] + ordered[-SHOWN // 2 :]


def _histogram(lengths: Lengths) -> Markup:
    figure = Figure((6, 2.4), layout="constrained")
    axes = figure.add_subplot()
    counts = [count for *_, count in lengths.histogram]
    axes.bar(range(len(counts)), counts, width=0.92, color=ACCENT)
    ticks = range(0, len(counts), 4)
    axes.set_xticks(ticks, [f"{lengths.histogram[tick][0]:,}" for tick in ticks])
    axes.set_xlabel("characters, from")
    axes.set_ylabel("outputs")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return svg(figure, "Histogram of the lengths of all outputs in characters, on a logarithmic scale")


def _bars(policies: Sequence[Policy]) -> Markup:
    """A thin line from the 5th to the 95th percentile, a thick one between the quartiles, a dot at the median."""
    figure = Figure((6, 0.7 + 0.19 * len(policies)), layout="constrained")
    axes = figure.add_subplot()
    heights = range(len(policies), 0, -1)
    low, first, median, third, high = zip(*(policy.lengths for policy in policies), strict=True)
    axes.hlines(heights, low, high, color=ACCENT, linewidth=1)
    axes.hlines(heights, first, third, color=ACCENT, linewidth=5, alpha=0.6)
    axes.plot(median, heights, "o", color=INK, markersize=3.5)
    axes.set_yticks(heights, [label(policy.policy) for policy in policies])
    axes.set_ylim(0.4, len(policies) + 0.6)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("characters")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=INK, alpha=0.15)
    return svg(figure, "Lengths of the outputs of each policy in characters: percentiles 5, 25, 50, 75 and 95")
