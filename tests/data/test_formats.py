"""Every format of rows through training, evaluation and rft-data: the same prompt, the same answers, the same order."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from polar import InputError
from polar.core.records import text_of
from polar.data import formats
from polar.data.fields import Row
from polar.data.readers import ReadReport, read_preferences
from polar.evaluation.datasets import read_items
from polar.evaluation.suites import Dataset
from polar.rft.prompts import read_task

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("4", "5"))
ARENA = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0, "response_a": "5", "response_b": "4"}
FORMATS: dict[str, tuple[dict[str, Any], list[tuple[str, float]]]] = {
    "RMB": (
        {
            "conversation_input": [USER],
            "bon_best": {"answer": "4", "llm_name": "A"},
            "loser_list": [{"answer": "5", "llm_name": "B"}, {"answer": "6", "llm_name": "C"}],
        },
        [("4", 1), ("5", 0), ("6", 0)],
    ),
    "JudgeBench": (
        {"question": "2+2?", "response_A": "5", "response_B": "4", "label": "B>A"},
        [("5", 0), ("4", 1)],
    ),
    "PPE": (
        {"prompt": "2+2?", "response_1": "5", "response_2": "4", "response_3": "6", "scores": [False, True, False]},
        [("5", 0), ("4", 1), ("6", 0)],
    ),
    "graded candidates": (
        {"prompt": "2+2?", "candidates": ["5", "4", "6"], "quality": [0.5, 1, 0]},
        [("5", 0.5), ("4", 1), ("6", 0)],
    ),
    "ranked list": ({"prompt": "2+2?", "ranked": ["4", "5", "6"]}, [("4", 2), ("5", 1), ("6", 0)]),
    "HH-RLHF transcripts": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        [("4", 1), ("5", 0)],
    ),
    "TRL implicit prompt": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [("4", 1), ("5", 0)]),
    "RewardBench 2": (
        {"prompt": "2+2?", "chosen": ["4", "four"], "rejected": ["5"]},
        [("4", 1), ("four", 1), ("5", 0)],
    ),
    "POLAR pairs": ({"prompt": [USER], "chosen": [GOOD], "rejected": "5"}, [("4", 1), ("5", 0)]),
    "POLAR pairs, repeated in the answers": (
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": json.dumps([USER, BAD])},
        [("4", 1), ("5", 0)],
    ),
    "arena pairs": ({"prompt": "2+2?", **ARENA, "winner_model_b": 1}, [("4", 1), ("5", 0)]),
    "scored answers": (
        {"prompt": "2+2?", "completions": [{"text": "5", "score": 1.5}, {"output": "4", "score": 8}]},
        [("5", 1.5), ("4", 8)],
    ),
    "graded completions": (
        {
            "prompt": "2+2?",
            "completions": [{"completion": "5", "is_correct": False}, {"text": "4", "is_correct": True}],
        },
        [("5", 0), ("4", 1)],
    ),
    "NeMo-RL": (
        {"context": "2+2?", "completions": [{"completion": "5", "rank": 2}, {"response": "4", "rank": 0}]},
        [("5", -2), ("4", 0)],
    ),
}
SINGLE: dict[str, dict[str, Any]] = {
    "graded output": {"prompt": "2+2?", "output": "4", "quality": 1},
    "conversations": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "messages": {"messages": [USER, GOOD]},
    "problem and solution": {"problem": "2+2?", "solution": "4"},
    "question and answer": {"question": "2+2?", "answer": "4"},
    "prompt": {"prompt": "2+2?"},
}


def written(tmp_path: Path, row: dict[str, Any]) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**row, "reference": "It is 4."}) + "\n")
    return str(path)


def evaluated(path: str) -> Any:
    return next(read_items(Dataset(name="data", path=path, task="preference accuracy"), "error", ReadReport()))


@pytest.mark.parametrize("name", FORMATS)
def test_training_evaluation_and_rft_data_read_a_row_the_same_way(tmp_path: Path, name: str) -> None:
    row, answers = FORMATS[name]
    path, report = written(tmp_path, row), ReadReport()
    quality = dict(answers)
    preferences = list(read_preferences(path, report=report))
    item = evaluated(path)
    task = read_task(Row("data", 1, {**row, "reference": "It is 4."}))
    assert report.format == name
    assert [text_of(text) for text in item.group.candidates] == [text for text, _ in answers]
    assert list(item.quality) == [value for _, value in answers]
    ranked = [tuple(map(text_of, preference.ranked)) for preference in preferences]
    assert all(quality[better] > quality[worse] for one in ranked for better, worse in pairwise(one))
    pairs = {(one[i], one[j]) for one in ranked for i in range(len(one)) for j in range(i + 1, len(one))}
    assert pairs == {(a, b) for a, high in answers for b, low in answers if high > low}
    assert {text_of(one.prompt) for one in (*preferences, item.group, task)} == {"2+2?"}
    references = {text_of(one.reference) for one in (*preferences, item.group)}
    assert references == {"It is 4."}
    assert task.references == (("4",) if name == "HH-RLHF transcripts" else ("It is 4.",))


@pytest.mark.parametrize("name", SINGLE)
def test_rows_without_two_answers_are_tasks_only(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, SINGLE[name])
    assert formats.recognise(Row("data", 1, SINGLE[name])).format == name
    for read in (lambda: list(read_preferences(path)), lambda: evaluated(path)):
        with pytest.raises(InputError, match=rf"data.jsonl:1: expected two answers or more .*found [01] \({name}\)"):
            read()
    assert text_of(read_task(Row("data", 1, {**SINGLE[name], "reference": "4"})).prompt).startswith("2+2?")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", **ARENA, "winner_tie": 1},
        {"prompt": "2+2?", "response_1": "4", "response_2": "5", "winner": "tie (both bad)"},
        {"prompt": "2+2?", "completions": [{"text": "5", "score": 1}, {"text": "4", "score": 1}]},
    ],
)
def test_ties_are_prompts_for_rft_data_and_skipped_elsewhere(tmp_path: Path, row: dict[str, Any]) -> None:
    path = written(tmp_path, row)
    for read in (lambda: list(read_preferences(path)), lambda: evaluated(path)):
        with pytest.raises(InputError, match="found none.*a tie: all answers have the same quality"):
            read()
    assert text_of(read_task(Row("data", 1, {**row, "reference": "4"})).prompt) == "2+2?"


def test_completions_have_one_kind_of_grade(tmp_path: Path) -> None:
    completions = [{"text": "5", "score": 1}, {"text": "4", "rank": 0}]
    path = written(tmp_path, {"prompt": "2+2?", "completions": completions})
    for read in (lambda: list(read_preferences(path)), lambda: evaluated(path)):
        with pytest.raises(InputError, match=r"completions\[1\].score.*found null"):
            read()


@pytest.mark.parametrize("column", ["response_A", "response_12", "reject", "bon_best", "positive"])
def test_no_column_of_answers_is_a_reference(column: str) -> None:
    with pytest.raises(InputError, match="expected reference_column to name an independent reference"):
        formats.reference_at(Row("data", 1, {column: "4", "reference": "4"}), column)
