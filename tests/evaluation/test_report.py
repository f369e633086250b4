import json
import re
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from polar import InputError
from polar.cli.main import main
from polar.core.metrics import clustered_mean
from polar.evaluation.analysis import MAX_MISTAKES, bootstrap
from polar.evaluation.columns import Collected, Part
from polar.evaluation.manifest import DatasetFacts, Manifest, ModelFacts, Task, write_manifest
from polar.evaluation.page import model_card, page
from polar.evaluation.records import MODEL, RECORDS, WITHOUT_REFERENCE, Record, shard_path, write_shard
from polar.evaluation.report import Report, build_report
from tests.pages import HOSTILE, assert_safe, browse, needs_browser

SCORERS = (MODEL, WITHOUT_REFERENCE, "unigram F1", "chance")


def record(number: int, dataset: str, task: Task, quality: tuple[float, ...], rewards: dict, **more) -> Record:
    """An item whose texts say where they stand."""
    size = len(quality)
    values = {
        "domain": None,
        "slices": (),
        "id": None,
        "prompt_id": f"{dataset}-{number // 2}",
        "reference_source": 'column "reference"',
        "reference_policy": None,
        "reference_family": None,
        "reference_quality": None,
        "reference_length": 9,
        "policies": (None,) * size,
        "families": (None,) * size,
        "lengths": tuple(range(10, 10 + size)),
        "copies_reference": (False,) * size,
        "cut_tokens": (0,) * size,
        "prompt": f"prompt {number}",
        "reference": f"reference {number}",
        "candidates": tuple(f"candidate {number}-{place}" for place in range(size)),
    }
    return Record(dataset, number, task, quality=quality, rewards=rewards, **{**values, **more})


def rewards_of(quality: tuple[float, ...], skill: float, random: Random) -> dict[str, tuple[float, ...]]:
    model = tuple(skill * each + random.gauss(0, 1) for each in quality)
    noise = tuple(random.gauss(0, 1) for _ in quality)
    return {MODEL: model, WITHOUT_REFERENCE: noise, "unigram F1": noise, "chance": (0.0,) * len(quality)}


def save(directory: Path, name: str, records: list[Record], *, model: str | None = "rm", **facts) -> Path:
    """An evaluation as `polar eval --output` writes it."""
    target = directory / name
    (target / RECORDS).mkdir(parents=True)
    scorers = tuple(records[0].rewards)
    datasets = []
    for dataset in dict.fromkeys(one.dataset for one in records):
        own = [one for one in records if one.dataset == dataset]
        write_shard(shard_path(target, dataset, 0), own, scorers, "items")
        described = {"path": "data.jsonl", "reference": 'column "reference"', "finished": True, "items": len(own)}
        datasets.append(DatasetFacts(name=dataset, task=own[0].task, **{**described, **facts}))
    known = ModelFacts(
        name=model or "",
        hash="0123456789abcdef",
        template_hash="fedcba9876543210",
        parameters=1_000_000,
        engine="polar",
        device="cpu",
        dtype="torch.float32",
        max_length=1024,
        max_response_length=256,
    )
    manifest = Manifest(
        polar="0.1.0",
        commit="c" * 40,
        started="2026-01-01T00:00:00Z",
        suite="house",
        model=None if model is None else known,
        scorers=scorers,
        settings={},
        versions={},
        datasets=tuple(datasets),
    )
    write_manifest(target, manifest)
    return target


def evaluation(directory: Path, name: str, skill: float, seed: int, items: int = 120, **more) -> Path:
    """Preferences in two domains, and best of N."""
    random = Random(seed)
    pairs = [
        record(
            number,
            "pairs",
            "preference accuracy",
            (1.0, 0.0),
            rewards_of((1.0, 0.0), skill, random),
            domain="code" if number % 3 else "chat",
            slices=("hard",) if number % 4 == 0 else (),
        )
        for number in range(items)
    ]
    chosen = Random(1)  # the qualities are the same in every run
    several = []
    for number in range(20):
        quality = (1.0, 0.0, *(float(chosen.random() < 0.5) for _ in range(6)))
        several.append(record(number, "several", "best of N", quality, rewards_of(quality, skill, random)))
    perturbed = [
        record(
            items + number,
            "pairs",
            "sensitivity",
            (1.0, 0.0, 0.0),
            dict.fromkeys(SCORERS, (1.0, 0.0, float(number % 3))),
            domain="doubled",
        )
        for number in range(30)
    ]
    return save(directory, name, pairs + perturbed + several, model=f"models/{name}", **more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("runs")
    return [evaluation(directory, name, skill, seed) for seed, (name, skill) in enumerate((("weak", 0.4), ("good", 3)))]


@pytest.fixture(scope="module")
def report(runs: list[Path]) -> Report:
    return build_report(runs)


@pytest.fixture(scope="module")
def html(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two plain runs and of one in which every text is hostile."""
    return page(build_report([*runs, hostile_evaluation(tmp_path_factory.mktemp("hostile"))]))


def hostile_evaluation(directory: Path) -> Path:
    """Every text field of records and manifest holds something that must stay text."""
    random = Random(0)
    records = [
        record(
            number,
            "hostile",
            "preference accuracy",
            (1.0, 0.0),
            {name: (0.0, random.random()) for name in (MODEL, WITHOUT_REFERENCE, *HOSTILE[:6], "chance", "unigram F1")},
            domain=text,
            slices=(text + " slice",),
            id=text,
            prompt_id=text,
            policies=(text, text),
            prompt=text,
            reference=text,
            candidates=(text + "1", text + "2"),
        )
        for number, text in enumerate(HOSTILE)
    ]
    text = "".join(HOSTILE[:6])
    return save(
        directory,
        "hostile",
        records,
        model=text,
        path=text,
        reference=text,
        skipped=1,
        first_reasons=(text,),
        hash=text,
    )


def test_accuracies_of_all_runs_stand_in_one_line_and_equal_a_count_by_hand(report: Report) -> None:
    assert report.scorers == ("weak", "weak, no reference", "good", "good, no reference", "unigram F1", "chance")
    assert (report.models, report.baselines) == (("weak", "good"), ("unigram F1", "chance"))
    lines = {line.part: line for line in report.lines if line.measure == "accuracy"}
    whole = lines[Part("preference accuracy", "pairs")]
    random, right = Random(1), 0
    for _ in range(120):
        first, second = rewards_of((1.0, 0.0), 3, random)[MODEL]
        right += first > second
    assert whole.values["good"].mean == right / 120  # type: ignore[union-attr]
    assert whole.items == 120
    assert lines[Part("preference accuracy", "pairs", domain="chat")].items == 40
    assert lines[Part("preference accuracy", "pairs", slice="hard")].items == 30
    assert whole.values["chance"].mean == 0.5  # type: ignore[union-attr]
    probe = {line.measure: line.values["good"] for line in report.lines if line.part.task == "sensitivity"}
    means = {measure: value.mean for measure, value in probe.items()}  # type: ignore[union-attr]
    assert means == pytest.approx({"accuracy before": 1.0, "accuracy after": 0.5, "change": -0.5})


def test_models_are_compared_with_the_best_baseline_and_with_the_first_model(report: Report) -> None:
    part = Part("preference accuracy", "pairs")
    verdicts = {(one.first, one.second): one.verdict for one in report.comparisons if one.part == part}
    assert set(verdicts) == {("weak", "unigram F1"), ("good", "unigram F1"), ("good", "weak")} or set(verdicts) == {
        ("weak", "chance"),
        ("good", "chance"),
        ("good", "weak"),
    }
    assert verdicts["good", "weak"] == "better"
    one = next(one for one in report.comparisons if one.part == part and one.first == "good" and one.second == "weak")
    assert one.low < one.difference.mean < one.high
    assert (one.difference.count, one.difference.clusters, one.left_out) == (120, 60, 0)


def test_a_run_compared_with_its_copy_cannot_be_told_apart(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / place, "same", 1.0, seed=5) for place in "ab"]
    found = build_report(runs)
    assert found.models == ("same (same)", "same (same) 2")
    own = [one for one in found.comparisons if {one.first, one.second} == set(found.models)]
    assert own
    assert {(one.verdict, one.low, one.high) for one in own} == {("cannot tell", 0.0, 0.0)}


def test_runs_with_different_items_are_compared_on_those_that_both_have(tmp_path: Path) -> None:
    runs = [
        evaluation(tmp_path, name, 1.0, seed, items, hash=name)
        for seed, (name, items) in enumerate((("many", 120), ("few", 50)))
    ]
    found = build_report(runs)
    part = Part("preference accuracy", "pairs")
    (one,) = [one for one in found.comparisons if (one.part, one.second) == (part, "many")]
    assert (one.difference.count, one.left_out) == (50, 70)
    assert any("the runs have different items" in warning for warning in found.warnings)


def test_the_bootstrap_agrees_with_drawing_whole_prompts_by_hand() -> None:
    random = np.random.default_rng(3)
    clusters = [f"p{number}" for number in random.integers(0, 40, 200)]
    values = random.choice([-1.0, -0.5, 0.0, 0.5, 1.0], 200, p=[0.1, 0.1, 0.3, 0.2, 0.3])
    members = [np.array([c == name for c in clusters]) for name in dict.fromkeys(clusters)]
    sums, sizes = np.array([[values[own].sum(), own.sum()] for own in members]).T
    drawn = random.integers(0, len(members), (20_000, len(members)))
    expected = np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975])
    assert bootstrap(values, clusters) == pytest.approx(expected, abs=0.015)


def test_with_many_prompts_the_interval_is_that_of_the_standard_error() -> None:
    random = np.random.default_rng(4)
    prompts = [str(number // 3) for number in range(6000)]
    values = np.repeat(random.choice([-1.0, 0.0, 1.0], 2000, p=[0.2, 0.5, 0.3]), 3)
    estimate = clustered_mean(values, prompts)
    assert estimate.standard_error is not None
    low, high = bootstrap(values, prompts)
    expected = (estimate.mean - 1.96 * estimate.standard_error, estimate.mean + 1.96 * estimate.standard_error)
    assert (low, high) == pytest.approx(expected, abs=0.1 * estimate.standard_error)


def test_the_worst_mistakes_are_those_with_the_largest_margins(runs: list[Path], report: Report) -> None:
    random, margins = Random(0), []
    for number in range(120):
        first, second = rewards_of((1.0, 0.0), 0.4, random)[MODEL]
        margins.append((second - first, f"prompt {number}"))
    worst = [one for one in report.mistakes if "weak" in one.models]
    assert len(worst) == MAX_MISTAKES
    largest = max(margins)
    found = {one.prompt.text: one for one in worst if one.part.dataset == "pairs"}
    assert largest[1] in found
    one = found[largest[1]]
    assert one.rewards["weak"][1] - one.rewards["weak"][0] == pytest.approx(largest[0])
    assert one.better.text.endswith("-0")
    assert set(one.rewards) == set(report.scorers)
    gaps = [one.rewards["weak"][1] - one.rewards["weak"][0] for one in worst]
    assert gaps == sorted(gaps, reverse=True)


def test_the_best_of_n_and_the_diagnoses_are_those_of_the_runs(report: Report) -> None:
    curves = {curve.scorer: curve.points for curve in report.curves}
    assert set(curves) == set(report.scorers)
    assert [point.draws for point in curves["good"]] == [1, 2, 4, 8]
    assert curves["good"][3].quality.mean > curves["weak"][3].quality.mean
    assert {one.scorer for one in report.diagnoses} == {"weak", "good"}


def test_what_a_reader_must_know_is_said_first(tmp_path: Path) -> None:
    records = [
        record(
            number,
            "few",
            "preference accuracy",
            (1.0, 0.0),
            rewards_of((1.0, 0.0), 1, Random(number)),
            copies_reference=(True, False),
            cut_tokens=(number % 2, 0),
        )
        for number in range(8)
    ]
    leaking = "the chosen answer itself (this gives the answer away)"
    run = save(tmp_path, "run", records, finished=False, skipped=3, first_reasons=("row 7",), reference=leaking)
    other = save(tmp_path, "other", records)
    warnings = build_report([run, other]).warnings
    assert len(set(warnings)) == len(warnings) == 7
    for words in (
        "not finished",
        r"rm \(run\): few: 3 rows could not be used; the first: row 7",
        "the reference is the chosen answer itself",
        "the runs took different references",
        r"cut to fit the model: few \(50%\)",
        r"word by word: few \(8 of 8\)",
        "Fewer than 10 prompts",
    ):
        assert any(re.search(words, warning) for warning in warnings), words
    html = page(build_report([run]))
    assert html.index("Look at this first") < html.index('id="accuracy"')


def test_baselines_alone_make_a_report(tmp_path: Path) -> None:
    records = [
        record(number, "d", "preference accuracy", (1.0, 0.0), {"unigram F1": (1.0, 0.5), "chance": (0.0, 0.0)})
        for number in range(20)
    ]
    found = build_report([save(tmp_path, "run", records, model=None)])
    assert (found.models, found.comparisons, found.mistakes) == ((), (), ())
    assert "unigram F1" in page(found)
    assert model_card(found) == ""


def test_a_directory_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        build_report([tmp_path])
    run = evaluation(tmp_path, "run", 1.0, 0)
    shutil.rmtree(run / RECORDS)
    with pytest.raises(InputError, match="no records yet"):
        build_report([run])


def test_equal_items_have_different_keys_and_the_same_keys_in_every_run() -> None:
    items = [record(n, "d", "preference accuracy", (1.0, 0.0), {}, prompt_id="p") for n in range(3)]
    items += [record(3, "d", "preference accuracy", (1.0, 0.0), {}, prompt_id="q"), items[0]]

    def keys_of(records: list[Record]) -> list[int]:
        collected = Collected()
        collected.add(records[:2])
        collected.add(records[2:])
        found = collected.outcomes("preference accuracy", ())
        assert found is not None
        return found.keys.tolist()

    keys = keys_of(items)
    assert len(set(keys)) == 5
    assert keys == keys_of(items)
    assert set(keys_of(items[2:])) < set(keys)  # whichever of the equal ones are there


def test_the_command_writes_page_json_and_card(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "report.html"
    assert main(["eval", "report", *map(str, runs), "--output", str(target)]) == 0
    found = json.loads(target.with_suffix(".json").read_text("utf-8"))
    assert found["schema"] == "polar eval report 1"
    assert [run["label"] for run in found["runs"]] == ["weak", "good"]
    assert {one["verdict"] for one in found["comparisons"]} <= {"better", "worse", "cannot tell"}
    card = target.with_suffix(".md").read_text("utf-8")
    assert "## Evaluation of good" in card
    assert re.search(r"\| pairs \| preference accuracy \| 120 \| \d+\.\d ± \d+\.\d \|", card)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in card.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    again = build_report(runs)
    assert target.read_text("utf-8") == page(again)
    assert target.with_suffix(".json").read_text("utf-8") == again.to_json()
    shown = r"(candidate|reference|prompt) \d"
    assert re.search(shown, target.read_text("utf-8"))
    assert main(["eval", "report", *map(str, runs), "--output", str(target), "--without-texts"]) == 0
    for suffix in (".html", ".json", ".md"):
        assert not re.search(shown, target.with_suffix(suffix).read_text("utf-8"))
    capsys.readouterr()
    assert main(["eval", "report", str(runs[0]), str(runs[0]), "--output", str(target)]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["eval", "report", str(runs[0]), "--output", "report.pdf"]) == 2
    assert "ends in .html" in capsys.readouterr().err


def test_eval_and_eval_report_are_two_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    assert "polar eval " in capsys.readouterr().out
    assert main(["eval", "report", "--help"]) == 0
    assert "polar eval report" in capsys.readouterr().out
    assert main(["eval"]) == 2
    assert main(["eval", "report"]) == 2


def test_hostile_texts_stay_text(html: str) -> None:
    assert_safe(html, plots=5)


def test_hostile_names_stay_text_in_the_model_card(tmp_path: Path) -> None:
    card = model_card(build_report([hostile_evaluation(tmp_path)]))
    assert "<script" not in card
    assert "<img" not in card
    assert len([line for line in card.splitlines() if line.startswith("## ")]) == 1


DRIVER = """
const seen = [];
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const order = column => Array.from(table.tBodies[0].rows).map(row => value(row, column));
  heads.forEach((head, column) => {
    for (const direction of ["first", "second"]) {
      head.querySelector("button").click();
      const values = order(column).filter(one => one !== "");
      const sign = head.getAttribute("aria-sort") === "descending" ? -1 : 1;
      const sorted = values.every((one, i) => i === 0 || sign * compare(values[i - 1], one) <= 0);
      if (!sorted) seen.push(`${table.id} column ${column} is not sorted`);
      if (table.querySelectorAll("[aria-sort]").length !== 1) seen.push(`${table.id}: several columns are marked`);
    }
  });
}
const search = (id, words) => {
  const input = document.getElementById(`${id}-search`);
  input.value = words; input.dispatchEvent(new Event("input"));
  return document.getElementById(`${id}-found`).textContent;
};
document.body.dataset.rows = search("lines", "CHAT pairs");
document.body.dataset.mistakes = search("pairs", "nothing has these words");
search("lines", ""); search("pairs", "");
document.body.dataset.seen = seen.join("; ") || "sorted";
const plots = Array.from(document.querySelectorAll(".plot svg"));
document.body.dataset.plots = plots.filter(svg => svg.getBoundingClientRect().height > 100).length;
document.body.dataset.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.querySelector("summary").focus();
document.body.dataset.focus = document.activeElement.tagName;
"""


@needs_browser
def test_in_a_browser_tables_sort_plots_are_there_and_nothing_hostile_runs(html: str, tmp_path: Path) -> None:
    dom, errors = browse(html, DRIVER, tmp_path, width=500)
    assert "CONSOLE" not in errors
    assert 'data-seen="sorted"' in dom
    assert 'data-rows="1 of ' in dom
    assert 'data-mistakes="0 of ' in dom
    assert 'data-plots="5"' in dom
    assert 'data-wide="false"' in dom  # the page itself never scrolls sideways
    assert 'data-focus="SUMMARY"' in dom
    assert "<title>Evaluation: weak, good, " in dom
