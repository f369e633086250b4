import json
from dataclasses import replace
from pathlib import Path

import pytest

from polar import Comparison, InputError, Preference, RewardModel, Triple
from polar.cli.evaluate import evaluate as evaluate_command
from polar.evaluation.evaluate import Evaluation, Result, evaluate
from polar.metrics import clustered_mean, outcomes
from polar.records import Message, prompt_id, text_of
from polar.writing import open_writer, record_to_dict

WORDS = [
    "Beijing",
    "Shanghai",
    "model",
    "score",
    "reference",
    "中文",
    "number 7",
    "a capital",
    "the candidate",
    "emoji",
]


def triples(prompts: int = 12, per_prompt: int = 2) -> list[Triple]:
    """The positive repeats most words of the reference, the negative none, except in every third item."""
    made = []
    for number in range(prompts * per_prompt):
        word, other = WORDS[number % 10], WORDS[(number + 3) % 10]
        near, far = f"It is {word} indeed {number}", f"{other}?"
        positive, negative = (far, near) if number % 3 == 2 else (near, far)
        made.append(Triple(f"What? {number // per_prompt}", f"It is {word}", positive, negative, "A", "B"))
    return made


PREFERENCES = [
    Preference("Capital of China?", "It is Beijing", ("Beijing it is", "no", "Shanghai"), domain="QA"),
    Preference("Capital of China?", "It is Beijing", ("It is Beijing", "It is Shanghai"), domain="QA"),
    Preference("写代码", (Message("assistant", "分数"),), ((Message("assistant", "分"),), "答"), domain="Coding"),
    Preference("Why?", "Because", ("same", "same")),
]


def result(evaluation: Evaluation, task: str, domain: str | None = None) -> Result:
    (found,) = (each for each in evaluation.results if each.task == task and each.domain == domain)
    return found


def test_the_model_is_scored_on_every_item(llama: RewardModel) -> None:
    evaluation = evaluate(llama, triples(), PREFERENCES)
    for item in evaluation.items:
        outputs = [
            Comparison(item.group.prompt, item.group.reference, candidate, wrapper=item.group.wrapper)
            for candidate in item.group.candidates
        ]
        assert item.rewards["model"] == pytest.approx(tuple(llama.score(outputs)), abs=1e-4)


def test_the_results_follow_from_the_items(llama: RewardModel) -> None:
    evaluation = evaluate(llama, triples(), PREFERENCES)
    assert [(each.task, each.domain) for each in evaluation.results] == [
        ("policy discrimination", None),
        ("preference accuracy", None),
        ("preference accuracy", "Coding"),
        ("preference accuracy", "QA"),
    ]
    for each in evaluation.results:
        items = [i for i in evaluation.items if i.task == each.task and each.domain in (None, i.domain)]
        prompts = [item.group.id for item in items]
        wins = {
            name: outcomes(*map(list, zip(*(item.rewards[name] for item in items), strict=True)))
            for name in ("model", "unigram F1", "length", "chance")
        }
        assert each.accuracy == {name: clustered_mean(values, prompts) for name, values in wins.items()}
        assert each.difference == clustered_mean(wins["model"] - wins["unigram F1"], prompts)
        assert each.items == len(items)


def test_baselines_without_a_model() -> None:
    evaluation = evaluate(None, triples(), PREFERENCES)
    discrimination = result(evaluation, "policy discrimination")
    assert discrimination.accuracy["unigram F1"].mean == pytest.approx(2 / 3)
    assert discrimination.accuracy["chance"].mean == 0.5
    assert discrimination.accuracy["chance"].standard_error == 0
    assert (discrimination.accuracy["chance"].count, discrimination.accuracy["chance"].clusters) == (24, 12)
    assert discrimination.difference is None
    assert "model" not in discrimination.accuracy
    preferences = result(evaluation, "preference accuracy")
    assert preferences.accuracy["unigram F1"].mean == 3.5 / 4  # the two equal answers tie
    assert (preferences.items, preferences.accuracy["chance"].clusters) == (4, 3)  # two of them share a prompt


def test_better_and_worse_are_not_swapped() -> None:
    evaluation = evaluate(None, triples(1, 1), PREFERENCES[:1])
    triple, preference = evaluation.items
    assert list(map(text_of, triple.group.candidates)) == ["It is Beijing indeed 0", "score?"]
    assert (triple.policy, triple.negative_policy, triple.domain) == ("A", "B", None)
    assert preference.group.candidates == ("Beijing it is", "Shanghai")  # the best and the worst of three
    assert (preference.policy, preference.domain, preference.group.id) == (None, "QA", prompt_id("Capital of China?"))
    assert triple.rewards["unigram F1"] == (pytest.approx(2 * 3 / 8), 0.0)


def test_a_model_that_is_the_rival_in_disguise_is_neither_better_nor_worse(llama: RewardModel) -> None:
    class Double:
        template = llama.template

        def __init__(self, sign: int) -> None:
            self.sign = sign

        def score_groups(self, groups: object, progress: object) -> list[list[float]]:
            items = evaluate(None, triples(), []).items
            return [[self.sign * reward for reward in item.rewards["unigram F1"]] for item in items]

    same, opposite = (evaluate(Double(sign), triples(), []).results[0] for sign in (1, -1))  # type: ignore[arg-type]
    assert same.difference is not None
    assert opposite.difference is not None
    assert (same.difference.mean, same.difference.standard_error) == (0, 0)
    assert same.difference.verdict() == "cannot tell"
    assert opposite.difference.mean == pytest.approx(-1 / 3)
    assert opposite.difference.verdict() == "worse"


def test_items_that_copy_the_reference_or_do_not_fit_are_counted(llama: RewardModel) -> None:
    long = replace(triples()[0], negative="number " * 400)
    evaluation = evaluate(llama, [*triples(), long], PREFERENCES)
    assert result(evaluation, "policy discrimination").truncated == 1
    assert result(evaluation, "policy discrimination").reference_copies == 0
    assert result(evaluation, "preference accuracy").reference_copies == 1
    assert result(evaluation, "preference accuracy").truncated == 0


def test_progress_counts_every_candidate(llama: RewardModel) -> None:
    counts: list[int] = []
    evaluate(llama, triples(3), PREFERENCES, progress=counts.append)
    assert sum(counts) == 2 * (6 + len(PREFERENCES))


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(InputError, match="no items"):
        evaluate(None, [], [])


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    names = str(tmp_path / "triples.jsonl"), str(tmp_path / "preferences.jsonl")
    for name, records in zip(names, (triples(), PREFERENCES), strict=True):
        with open_writer(name) as writer:
            for record in records:
                writer.write(record_to_dict(record))
    return names


def test_the_command_writes_what_it_shows(
    checkpoint: Path, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    evaluate_command(model=str(checkpoint), triples=[files[0]], preferences=[files[1]], output=str(output))
    shown = capsys.readouterr().out
    content = json.loads(output.read_text("utf-8"))
    items = [json.loads(line) for line in output.with_suffix(".items.jsonl").read_text("utf-8").splitlines()]
    evaluation = evaluate(RewardModel.load(checkpoint), triples(), PREFERENCES)
    for written, expected in zip(content["results"], evaluation.results, strict=True):
        assert written["accuracy"]["model"]["mean"] == pytest.approx(expected.accuracy["model"].mean)
        assert written["difference"]["standard_error"] == pytest.approx(expected.difference.standard_error)
        assert written["verdict"] == expected.difference.verdict()
        assert f"{100 * expected.accuracy['model'].mean:.1f}" in shown
    for written, item in zip(items, evaluation.items, strict=True):
        assert written["prompt_id"] == item.group.id
        assert list(written["rewards"]["model"].values()) == pytest.approx(item.rewards["model"], abs=1e-4)
    assert "1 of 4 items the better candidate is the reference itself" in " ".join(shown.split())
    assert content["inputs"][files[0]]["read"] == 24


def test_a_limit_draws_the_same_items_from_the_whole_input(
    checkpoint: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    prompts = []
    for name in ("once.json", "again.json"):
        evaluate_command(
            model=str(checkpoint), triples=[files[0]], preferences=[files[1]], output=str(tmp_path / name), limit=8
        )
        lines = (tmp_path / name).with_suffix(".items.jsonl").read_text("utf-8").splitlines()
        prompts.append([json.loads(line)["prompt_id"] for line in lines])
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 8 + len(PREFERENCES)
    positions = [[prompt_id(f"What? {number}") for number in range(12)].index(each) for each in prompts[0][:8]]
    assert positions == sorted(positions)
    assert positions[-1] >= 6  # not just the beginning of the file


def test_bad_rows_are_an_error_or_are_counted(
    checkpoint: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Path(files[0]).open("a", encoding="utf-8") as file:
        file.write('{"prompt": "no reference"}\n')
    with pytest.raises(InputError, match=r"triples\.jsonl:25"):
        evaluate_command(model=str(checkpoint), triples=[files[0]])
    evaluate_command(model=str(checkpoint), triples=[files[0]], on_bad_row="skip")
    assert "skipped 1 rows, used 24" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing to evaluate"),
        ({"triples": ["t.jsonl"], "limit": 0}, "limit must be at least 1, found 0"),
        ({"triples": ["t.jsonl"], "output": "result.txt"}, "ends in .json"),
        ({"triples": ["t.jsonl"], "output": "missing/result.json"}, "directory that exists"),
    ],
)
def test_wrong_arguments_are_refused_before_the_work(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate_command(**arguments)  # type: ignore[arg-type]
