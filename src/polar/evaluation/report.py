"""The comparison of evaluations, from their records alone: the content of the page, the JSON and the model card.

Records are read twice: first without their texts, one run at a time, to numbers (`polar.evaluation.columns`), and then
once more for the texts of the few mistakes that are shown.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from polar.core.errors import InputError
from polar.core.metrics import FEW_CLUSTERS, Estimate
from polar.core.records import AGGREGATES
from polar.evaluation.analysis import (
    Comparison,
    Diagnosis,
    Mistake,
    Point,
    Run,
    Side,
    WrongPair,
    compare,
    read_mistakes,
)
from polar.evaluation.columns import Outcomes, Part
from polar.evaluation.manifest import Task, read_manifest
from polar.evaluation.records import MODEL, WITHOUT_REFERENCE, read_records
from polar.evaluation.summary import Result, Summary, summary_of, survey_of

SCHEMA = "polar eval report 1"
"""Changes when a key of the JSON goes or means something else."""
OF_A_MODEL = (MODEL, WITHOUT_REFERENCE)
"""Scorers that are different in every run; the others are baselines."""
MAX_SHARE_CUT = 0.1
"""Share of truncated items from which on the report warns."""


@dataclass(frozen=True, slots=True)
class Line:
    """One measure on one part, for every scorer that has rewards there."""

    part: Part
    measure: str
    """accuracy, rank correlation, area under the curve; accuracy before a perturbation, after it, and the change; or a
    number of a benchmark's own rules."""
    items: int
    """Of the run that has most."""
    values: dict[str, Estimate | float]
    """By name of the scorer; a plain number where no standard error is known."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Best of N on one data set by one scorer."""

    dataset: str
    scorer: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Content of the report."""

    runs: tuple[Run, ...]
    scorers: tuple[str, ...]
    """Models, what else their runs have of them, then baselines: the columns of tables."""
    lines: tuple[Line, ...]
    comparisons: tuple[Comparison, ...]
    curves: tuple[Curve, ...]
    diagnoses: tuple[Diagnosis, ...]
    """The scorer is the label of a run."""
    mistakes: tuple[Mistake, ...]
    warnings: tuple[str, ...]
    """Weaknesses of data and runs, which the page shows first."""

    @property
    def models(self) -> tuple[str, ...]:
        """Labels of the runs that have a model."""
        return tuple(run.label for run in self.runs if MODEL in run.manifest.scorers)

    @property
    def baselines(self) -> tuple[str, ...]:
        """Scorers that no model is part of."""
        own = {run.name_of(scorer) for run in self.runs for scorer in OF_A_MODEL}
        return tuple(scorer for scorer in self.scorers if scorer not in own)

    def to_json(self) -> str:
        """All of it as JSON with a final newline; the same records give the same bytes."""
        runs = [
            {"directory": run.directory, "label": run.label, "manifest": run.manifest.model_dump(mode="json")}
            for run in self.runs
        ]
        comparisons = [{**asdict(one), "verdict": one.verdict} for one in self.comparisons]
        content = {"schema": SCHEMA, **asdict(replace(self, runs=())), "runs": runs, "comparisons": comparisons}
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A run with the numbers of its records."""

    run: Run
    summary: Summary
    outcomes: dict[Task, Outcomes]
    worst: list[WrongPair]


def build_report(directories: Sequence[str | Path], *, texts: bool = True) -> Report:
    """Read evaluations and compare them.

    Args:
        directories: What `polar eval --output` wrote; models are compared with that of the first one that has one.
        texts: Show the worst mistakes with their texts; data without a licence to pass them on must not be shown.

    Raises:
        InputError: a directory is no evaluation, or has no records yet.
    """
    surveys = list(map(_surveyed, _runs(directories)))
    runs = tuple(survey.run for survey in surveys)
    lines = tuple(_lines(surveys))
    names = dict.fromkeys(
        run.name_of(scorer)
        for own in (True, False)
        for run in runs
        for scorer in run.manifest.scorers
        if (scorer in OF_A_MODEL) == own
    )
    report = Report(
        runs=runs,
        scorers=tuple(names),
        lines=lines,
        comparisons=(),
        curves=tuple(_curves(surveys)),
        diagnoses=tuple(
            replace(one, scorer=survey.run.label)
            for survey in surveys
            if MODEL in survey.run.manifest.scorers
            for one in survey.summary.diagnoses
        ),
        mistakes=tuple(read_mistakes([(survey.run, survey.worst if texts else []) for survey in surveys])),
        warnings=tuple(_warnings(surveys)),
    )
    return replace(report, comparisons=tuple(_comparisons(surveys, lines, report.baselines)))


def _runs(directories: Sequence[str | Path]) -> Iterator[Run]:
    manifests = [read_manifest(directory) for directory in directories]
    names = [Path(one.model.name).name or one.model.name if one.model else "baselines" for one in manifests]
    labels: list[str] = []
    for directory, name, manifest in zip(directories, names, manifests, strict=True):
        label = name if names.count(name) == 1 else f"{name} ({Path(directory).name})"
        labels.append(label if label not in labels else f"{label} {len(labels) + 1}")
        yield Run(str(directory), labels[-1], manifest)


def _surveyed(run: Run) -> Surveyed:
    found = survey_of(run.manifest, read_records(run.directory))
    if not found.by_task:
        raise InputError(f"{run.directory}: the evaluation has no records yet; run `polar eval` to its end")
    return Surveyed(run, summary_of(found, run.directory), found.by_task, found.worst)


def _lines(surveys: Sequence[Surveyed]) -> Iterator[Line]:
    """Return the results of all runs, those of one part together."""
    found: dict[tuple[Part, str], Line] = {}
    for survey in surveys:
        for part, measure, items, values in _measures(survey.summary):
            named = {survey.run.name_of(scorer): value for scorer, value in values.items()}
            line = found.setdefault((part, measure), Line(part, measure, items, {}))
            found[part, measure] = replace(line, items=max(line.items, items), values=named | line.values)
    return iter(found.values())


def _measures(summary: Summary) -> Iterator[tuple[Part, str, int, dict[str, Estimate] | dict[str, float]]]:
    for result in summary.results:
        part = _part_of(result)
        yield part, "accuracy", result.items, result.accuracy
        if result.rank_correlation is not None:
            yield part, "rank correlation", result.items, result.rank_correlation
        if result.area is not None:
            yield part, "area under the curve", result.items, result.area
    for one in summary.sensitivity:
        part, items = Part("sensitivity", one.dataset, one.probe), next(iter(one.change.values())).count
        yield part, "accuracy before", items, one.before
        yield part, "accuracy after", items, one.after
        yield part, "change", items, one.change
    whole = {result.dataset: result for result in summary.results if _part_of(result).whole}
    for several in summary.several_references:
        for how, accuracy in several.accuracy.items():
            measure = f"accuracy, {how} of several references" if how in AGGREGATES else f"accuracy, {how}"
            yield _part_of(whole[several.dataset]), measure, next(iter(accuracy.values())).count, accuracy
    for official in summary.official:
        numbers = dict.fromkeys(name for scores in official.scores.values() for name in scores)
        result = whole[official.dataset]
        for number in numbers:
            values = {scorer: scores[number] for scorer, scores in official.scores.items() if number in scores}
            yield Part(result.task, official.dataset), f"{official.scoring}: {number}", result.items, values


def _part_of(result: Result) -> Part:
    return Part(result.task, result.dataset, result.domain, result.slice)


def _comparisons(surveys: Sequence[Surveyed], lines: Sequence[Line], baselines: Sequence[str]) -> Iterator[Comparison]:
    """Yield the comparisons of every model with the best baseline of the data set, and with the first model."""
    parts: defaultdict[tuple[Task, str | None], list[Part]] = defaultdict(list)
    best: dict[tuple[Task, str | None], str] = {}
    for line in lines:
        if line.measure == "accuracy":
            group = line.part.task, line.part.dataset
            parts[group].append(line.part)
            known = {name: value.mean for name, value in line.values.items() if isinstance(value, Estimate)}
            if line.part.whole and (candidates := [name for name in baselines if name in known]):
                best[group] = max(candidates, key=known.__getitem__)
    models = [survey for survey in surveys if MODEL in survey.run.manifest.scorers]
    for (task, dataset), own in parts.items():
        sides = [Side(one.run.label, one.outcomes[task], MODEL) for one in models if task in one.outcomes]
        rival = best.get((task, dataset))
        for side in sides:
            # The baseline of its own run first, so that the items are the same.
            places = [side.outcomes, *(one.outcomes[task] for one in surveys if task in one.outcomes)]
            if rival and (there := next((one for one in places if rival in one.shares), None)):
                yield from compare(own, side, Side(rival, there, rival))
        for side in sides[1:]:
            yield from compare(own, side, sides[0])


def _curves(surveys: Sequence[Surveyed]) -> Iterator[Curve]:
    found: dict[tuple[str, str], Curve] = {}
    for survey in surveys:
        for one in survey.summary.best_of_n:
            for scorer, points in one.curves.items():
                name = survey.run.name_of(scorer)
                found.setdefault((one.dataset, name), Curve(one.dataset, name, tuple(points)))
    return iter(found.values())


def _warnings(surveys: Sequence[Surveyed]) -> Iterator[str]:
    """Yield weaknesses of runs and data; those of all runs only once."""
    runs_by_warning: defaultdict[str, list[str]] = defaultdict(list)
    for survey in surveys:
        for warning in _warnings_of(survey):
            runs_by_warning[warning].append(survey.run.label)
    for warning, labels in runs_by_warning.items():
        yield warning if len(labels) == len(surveys) else f"{', '.join(labels)}: {warning}"
    datasets = [dataset for survey in surveys for dataset in survey.run.manifest.datasets]
    for name in dict.fromkeys(dataset.name for dataset in datasets):
        references = dict.fromkeys(dataset.reference for dataset in datasets if dataset.name == name)
        hashes = {dataset.hash for dataset in datasets if dataset.name == name and dataset.hash}
        if len(references) > 1:
            yield f"{name}: the runs took different references: {'; '.join(references)}."
        elif len(hashes) > 1:
            yield f"{name}: the runs have different items; models are compared on those that both have."


def _warnings_of(survey: Surveyed) -> Iterator[str]:
    if not survey.run.manifest.finished:
        yield "The evaluation is not finished; the report is on what is recorded so far."
    if survey.run.manifest.settings.get("reference_free"):
        yield "The model reads no references; the baselines beside it do."
    for dataset in survey.run.manifest.datasets:
        if "gives the answer away" in dataset.reference:
            yield f"{dataset.name}: the reference is the chosen answer itself, so accuracies say little about a model."
        if dataset.skipped:
            first = f"; the first: {dataset.first_reasons[0]}" if dataset.first_reasons else ""
            yield f"{dataset.name}: {dataset.skipped:,} rows could not be used{first}"
    whole = [result for result in survey.summary.results if result.dataset is not None and _part_of(result).whole]
    if cut := [
        f"{one.dataset} ({one.truncated / one.items:.0%})" for one in whole if one.truncated > MAX_SHARE_CUT * one.items
    ]:
        yield f"Items were cut to fit the model: {', '.join(cut)}. Measures of overlap read all of them."
    if copies := [
        f"{one.dataset} ({one.reference_copies:,} of {one.items:,})" for one in whole if one.reference_copies
    ]:
        yield (
            f"A best candidate is the reference word by word: {', '.join(copies)}. Measures of overlap prefer it by "
            "construction."
        )
    if few := [one.dataset or "" for one in whole if next(iter(one.accuracy.values())).clusters < FEW_CLUSTERS]:
        yield f"Fewer than {FEW_CLUSTERS} prompts, so there are no verdicts: {', '.join(few)}."
