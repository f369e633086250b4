"""The report on a corpus: records that `polar.corpus.statistics` fills, and one HTML page of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from markupsafe import Markup

from polar.core.html import ACCENT, INK, STYLE, Excerpt, label, render, svg
from polar.core.metrics import Estimate, Verdict

SCHEMA = "polar corpus report 1"
"""Changes when a key of the JSON goes or means something else."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEW, MANY_REPEATED, MANY_EMPTY, MANY_CUT, TELLING = 0.5, 0.1, 0.01, 0.1, 0.7
"""Shares from which on the report warns, and the accuracy of a trivial feature."""
MAX_POLICIES_PLOTTED = 60
"""Most policies of the plot; of more, half are those with the shortest and half those with the longest median."""

Quantiles = tuple[float, ...]
"""At `QUANTILES`."""
Unit = Literal["tokens", "words", "tokens and words"]


@dataclass(frozen=True, slots=True)
class Overview:
    """The size and the shape of the corpus. A cell is a prompt and a policy that answered it."""

    trajectories: int
    skipped_rows: int
    """Rows that could not be read."""
    prompts: int
    policies: int
    families: int
    unit: Unit
    """Of the two numbers below: tokens of rows that tell both, words (`polar.core.baselines.words`) of the others."""
    prompt_units: int
    """Summed over trajectories, so a prompt counts once for each of its outputs."""
    output_units: int
    prompt_characters: int
    output_characters: int
    cells: int
    cells_with_two_outputs: int
    """Cells with two different outputs: only they can give reference and positive."""
    prompts_with_two_policies: int
    """Prompts that can give a negative."""
    samples_per_cell: tuple[tuple[int, int], ...]
    """Number of samples, cells that have so many."""
    prompts_per_policy: Quantiles
    finish_reasons: tuple[tuple[str | None, int], ...]
    """Reasons for which sampling ended, with trajectories; empty when no row has one."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """One text that occurs often."""

    excerpt: str
    characters: int
    count: int
    prompts: int
    policies: int


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Outputs that say nothing new."""

    within_policy: int
    """Trajectories whose policy gave the same text for the same prompt before."""
    shared_texts: int
    """Texts that several policies gave for one prompt."""
    shared_trajectories: int
    """The trajectories with such texts."""
    empty: int
    """Outputs in which nothing is to be seen (`blank`)."""
    most_repeated: tuple[Repeated, ...]
    """Over all prompts, most frequent first."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of the outputs in characters."""

    quantiles: Quantiles
    histogram: tuple[tuple[int, int, int], ...]
    """From this length, to below this one, trajectories."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy."""

    policy: str
    families: tuple[str, ...]
    """One, unless the rows disagree; none when they do not tell."""
    steps: tuple[int, ...]
    wrappers: tuple[str, ...]
    prompts: int
    prompts_with_two_outputs: int
    trajectories: int
    distinct: int
    """Trajectories without duplicates within the policy."""
    empty: int
    cut: int
    """Trajectories whose finish_reason is "length"."""
    lengths: Quantiles
    """Of the outputs, in characters."""
    output_units: int
    """As in the overview."""

    @property
    def duplicates(self) -> int:
        """Trajectories that repeat another one of this policy and prompt."""
        return self.trajectories - self.distinct

    @property
    def median(self) -> float:
        """Median length in characters."""
        return self.lengths[QUANTILES.index(0.5)]


@dataclass(frozen=True, slots=True)
class Feature:
    """How often a trivial feature tells the policy of the reference from another one."""

    name: str
    accuracy: Estimate
    verdict: Verdict
    """Against chance (0.5)."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """How often unigram F1 tells a policy from all others, or two policies from each other.

    Of two policies either one may have given the reference.
    """

    policies: tuple[str, ...]
    accuracy: Estimate


@dataclass(frozen=True, slots=True)
class Contrasts:
    """Policies, or pairs of policies, with enough triples to be compared."""

    compared: int
    hardest: tuple[Contrast, ...]
    """Hardest first."""
    easiest: tuple[Contrast, ...]
    """Easiest first."""


@dataclass(frozen=True, slots=True)
class Discrimination:
    """Accuracies of trivial features on triples of a sampled subset of the prompts."""

    prompts: int
    """Prompts of the subset."""
    triples: int
    features: tuple[Feature, ...]
    """Empty when there are no triples."""
    policies: Contrasts
    pairs: Contrasts


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and some outputs of some policies."""

    prompt_id: str
    prompt: Excerpt
    outputs: tuple[tuple[str, tuple[Excerpt, ...]], ...]
    """Policy and its outputs."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that the report says."""

    schema: str
    seed: int
    overview: Overview
    duplicates: Duplicates
    lengths: Lengths
    policies: tuple[Policy, ...]
    """By name."""
    discrimination: Discrimination
    examples: tuple[Example, ...]

    def to_json(self) -> str:
        """All of it and the warnings, as JSON with a final newline; the same corpus gives the same bytes."""
        return json.dumps({**asdict(self), "warnings": self.warnings()}, ensure_ascii=False, indent=1) + "\n"

    def why_no_triples(self) -> str | None:
        """Return why no triple can be drawn, in plain words; None when there are triples."""
        if self.discrimination.triples:
            return None
        if not self.overview.cells_with_two_outputs:
            once = all(samples == 1 for samples, _ in self.overview.samples_per_cell)
            who = f"each of the {self.overview.policies:,} policies has only one sample per prompt"
            return (
                f"No reference with a positive: {who if once else 'no policy has two different outputs for a prompt'}. "
                "This corpus gives negatives only, so no triple can be drawn. Sample every policy at least twice per "
                "prompt, at a temperature above 0."
            )
        if not self.overview.prompts_with_two_policies:
            return (
                "No negatives: every prompt was answered by one policy only, so no triple can be drawn. Sample the "
                "same prompts from two policies or more."
            )
        return (
            f"No triple could be drawn from the {self.discrimination.prompts:,} sampled prompts: none of them has two "
            "different outputs of one policy and another output of another policy."
        )

    def warnings(self) -> tuple[str, ...]:
        """Return the faults of the corpus, in plain words, worst first."""
        overview, duplicates = self.overview, self.duplicates
        total = overview.trajectories
        cut = sum(policy.cut for policy in self.policies)
        telling = [feature for feature in self.discrimination.features if feature.accuracy.mean >= TELLING]
        mixed = [policy.policy for policy in self.policies if len(policy.families) > 1]
        found = [
            self.why_no_triples(),
            0 < overview.cells_with_two_outputs < FEW * overview.cells
            and f"Only {_share(overview.cells_with_two_outputs, overview.cells)} of the pairs of prompt and policy "
            "have two different outputs; the others cannot give a reference with a positive.",
            0 < overview.prompts_with_two_policies < FEW * overview.prompts
            and f"Only {_share(overview.prompts_with_two_policies, overview.prompts)} of the prompts were answered by "
            "two policies or more; the others give no triples.",
            duplicates.within_policy > MANY_REPEATED * total
            and f"{_share(duplicates.within_policy, total)} of the trajectories repeat a text that their policy gave "
            "for the same prompt before. A higher temperature makes samples differ.",
            duplicates.empty > MANY_EMPTY * total
            and f"{_share(duplicates.empty, total)} of the outputs are empty, or invisible.",
            cut > MANY_CUT * total
            and f"{_share(cut, total)} of the outputs were cut at the limit of tokens, so their length says nothing "
            "about their policy. A higher limit lets them end.",
            *(
                f"{feature.name.capitalize()} alone tells the policies apart in {feature.accuracy.mean:.0%} of the "
                "triples: a reward model may learn it instead of the policies."
                for feature in telling
            ),
            overview.unit == "tokens and words"
            and "Some rows do not say their numbers of tokens; their words are counted instead, so sums mix both.",
            mixed and f"The rows of {', '.join(mixed[:5])} disagree about the family.",
            overview.skipped_rows and f"{overview.skipped_rows:,} rows could not be read and are not in the report.",
        ]
        return tuple(warning for warning in found if warning)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} ({part:,} of {whole:,})"


def page(report: Report) -> str:
    """Return the report as one HTML page; the same report gives the same bytes."""
    import matplotlib as mpl  # a second at import, which only this page is worth

    shown = _shown(report.policies)
    with mpl.rc_context(STYLE):
        histogram, bars = _histogram(report.lengths), _bars(shown)
    return render("corpus/page.html.jinja", report=report, histogram=histogram, bars=bars, shown=len(shown))


def _shown(policies: Sequence[Policy]) -> list[Policy]:
    """The policies of the plot, longest median first."""
    ordered = sorted(policies, key=lambda policy: (-policy.median, policy.policy))
    half = MAX_POLICIES_PLOTTED // 2
    return ordered if len(ordered) <= 2 * half else ordered[:half] + ordered[-half:]


def _histogram(lengths: Lengths) -> Markup:
    from matplotlib.figure import Figure

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
    from matplotlib.figure import Figure

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
