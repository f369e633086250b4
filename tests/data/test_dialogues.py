"""The prompt is told apart from the answers in the same way for training, scoring, evaluation and rft-data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polar import InputError
from polar.core.records import text_of
from polar.data.fields import Row
from polar.data.readers import ReadReport, read_comparisons, read_groups_by_reference, read_preferences
from polar.evaluation.datasets import read_items
from polar.evaluation.suites import Dataset
from polar.model.calibration import read_samples
from polar.rft.prompts import read_task
from polar.rft.reward import read_sample


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


U, A, S = (lambda content, role=role: say(role, content) for role in ("user", "assistant", "system"))
REFERENCE = "It is 4."
Read = tuple[str, str, list[str]]
"""Prompt, reference and answers, best first, as they are scored."""


def write(directory: Path, row: dict[str, Any]) -> Path:
    path = directory / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def in_training(path: Path) -> Read:
    (one,) = read_preferences(path)
    return text_of(one.prompt), text_of(one.reference), list(map(text_of, one.ranked))


def in_calibration(path: Path) -> Read:
    (one,) = read_samples(str(path))
    return text_of(one.group.prompt), text_of(one.group.reference), list(map(text_of, one.group.candidates))


def in_evaluation(path: Path) -> Read:
    (item,) = read_items(Dataset(name="d", path=str(path), task="preference accuracy"), "error", ReadReport())
    best_first = sorted(zip(item.quality, map(text_of, item.group.candidates), strict=True), reverse=True)
    return text_of(item.group.prompt), text_of(item.group.reference), [text for _, text in best_first]


READERS = [in_training, in_calibration, in_evaluation]
ROWS = {
    "answers alone": ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?"),
    "answers as messages": ({"prompt": [U("2+2?")], "chosen": [A("4")], "rejected": [A("5")]}, "2+2?"),
    "the whole conversation": (
        {"prompt": "2+2?", "chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")]},
        "2+2?",
    ),
    "other white space": (
        {"prompt": "2+2? \n", "chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")]},
        "2+2?",
    ),
    "an empty prompt": ({"prompt": "", "chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")]}, "2+2?"),
    "a prompt of messages": (
        {"prompt": [U("2+2?")], "chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")]},
        "2+2?",
    ),
    "a system message in the answers": (
        {
            "prompt": "2+2?",
            "chosen": [S("Be brief."), U("2+2?"), A("4")],
            "rejected": [S("Be brief."), U("2+2?"), A("5")],
        },
        "Be brief.\n2+2?",
    ),
    "a system message in the prompt": (
        {"prompt": [S("Be brief."), U("2+2?")], "chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")]},
        "Be brief.\n2+2?",
    ),
    "a system message in both": (
        {"prompt": [S("s"), U("q")], "chosen": [S("s"), U("q"), A("4")], "rejected": [S("s"), U("q"), A("5")]},
        "s\nq",
    ),
    "only one answer repeats it": ({"prompt": "2+2?", "chosen": [U("2+2?"), A("4")], "rejected": "5"}, "2+2?"),
    "the last question of several turns": (
        {
            "prompt": "2+2?",
            "chosen": [U("hi"), A("hello"), U("2+2?"), A("4")],
            "rejected": [U("hi"), A("hello"), U("2+2?"), A("5")],
        },
        "hi\nhello\n2+2?",
    ),
    "no prompt": ({"chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")]}, "2+2?"),
    "transcripts": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        "2+2?",
    ),
    "transcripts beside a prompt": (
        {"prompt": "2+2?", "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        "2+2?",
    ),
    "JSON text": (
        {"prompt": "2+2?", "chosen": json.dumps([U("2+2?"), A("4")]), "rejected": json.dumps([U("2+2?"), A("5")])},
        "2+2?",
    ),
    "the reference too": (
        {
            "prompt": "2+2?",
            "reference": [U("2+2?"), A(REFERENCE)],
            "chosen": [U("2+2?"), A("4")],
            "rejected": [U("2+2?"), A("5")],
        },
        "2+2?",
    ),
    "only the reference": (
        {"prompt": "2+2?", "reference": [U("2+2?"), A(REFERENCE)], "chosen": "4", "rejected": "5"},
        "2+2?",
    ),
    "a ranked list": ({"prompt": "2+2?", "ranked": [[U("2+2?"), A("4")], [U("2+2?"), A("5")]]}, "2+2?"),
    "graded completions": (
        {
            "prompt": "2+2?",
            "completions": [{"text": [U("2+2?"), A("5")], "score": 1}, {"text": [U("2+2?"), A("4")], "score": 9}],
        },
        "2+2?",
    ),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ROWS)
def test_answers_are_scored_without_the_prompt(tmp_path: Path, read: Callable[[Path], Read], name: str) -> None:
    row, prompt = ROWS[name]
    assert read(write(tmp_path, {"reference": REFERENCE, **row})) == (prompt, REFERENCE, ["4", "5"])


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"prompt": "3+3?", "chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")]},
            'field "[^"]+": expected an answer, or a conversation that begins with the prompt, found the string "2',
        ),
        (
            {"prompt": "2+2?", "chosen": [U("2+2?"), A("4")], "rejected": [U("2+3?"), A("5")]},
            "expected conversations that begin with the same prompt, found nothing in common",
        ),
        (
            {"chosen": [U("2+2?"), A("4"), U("thanks")], "rejected": [U("2+2?"), A("5"), U("no")]},
            'field "chosen": expected a last turn of the assistant, found one of role user',
        ),
        ({"prompt": "2+2?", "chosen": [U("2+2?")], "rejected": [U("2+2?")]}, "a last turn of the assistant"),
        (
            {"prompt": "q", "chosen": [S("s"), U("q"), A("4")], "rejected": [S("t"), U("q"), A("5")]},
            "expected one system message, found another one in",
        ),
        (
            {"chosen": [U("q"), A("a"), U("x"), A("4")], "rejected": [U("q"), A("a"), U("y"), A("5")]},
            'field "chosen": expected another answer to the same turns of the user',
        ),
        (
            {"prompt": "[{'role': 'user', 'content': '2+2?'}]", "chosen": "4", "rejected": "5"},
            'field "prompt": expected .* as JSON\\), found messages as Python prints them',
        ),
        (
            {
                "prompt": "q",
                "chosen": "[{'content': 'a', 'role': 'x'}\n {'content': 'b', 'role': 'y'}]",
                "rejected": "5",
            },
            'field "chosen": expected .* found messages as Python prints them',
        ),
    ],
)
def test_rows_that_contradict_themselves(
    tmp_path: Path, read: Callable[[Path], Read], row: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=f"rows.jsonl:1: .*{problem}") as caught:
        read(write(tmp_path, {"reference": REFERENCE, **row}))
    assert "\n" not in str(caught.value)


def test_outputs_are_scored_without_the_prompt(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "reference": "r", "output": [U("2+2?"), A("4"), U("sure?"), A("yes")]}
    (one,) = read_comparisons(write(tmp_path, row))
    assert (text_of(one.prompt), text_of(one.output)) == ("2+2?", "4\nsure?\nyes")
    several = {"prompt": "2+2?", "references": [[U("2+2?"), A("r")], "s"], "candidates": [[U("2+2?"), A("4")], "5"]}
    ((first, second),) = read_groups_by_reference(write(tmp_path, several))
    assert (text_of(first.prompt), text_of(first.reference), text_of(second.reference)) == ("2+2?", "r", "s")
    assert list(map(text_of, first.candidates)) == ["4", "5"]


def test_references_for_reinforcement_fine_tuning_are_read_without_the_prompt() -> None:
    row = {"prompt": "2+2?", "chosen": [S("Be brief."), U("2+2?"), A("<think>hm</think>4")], "rejected": "5"}
    task = read_task(Row("rows.jsonl", 1, row), reference_column="chosen")
    assert (text_of(task.prompt), task.references) == ("Be brief.\n2+2?", ("4",))
    sample = read_sample(row, "an output", prompt="prompt", references=("chosen",), source="TRL")
    assert (text_of(sample.prompt), list(map(text_of, sample.references))) == (
        "Be brief.\n2+2?",
        ["<think>hm</think>4"],
    )


@pytest.mark.parametrize("read", [read_preferences, lambda path, report: read_samples(str(path), report=report)])
def test_empty_references_and_preferred_answers_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, read: Callable[..., Any]
) -> None:
    pair = {"prompt": "q", "reference": REFERENCE, "chosen": "4", "rejected": ""}
    rows = [pair, {**pair, "reference": " \n"}, {**pair, "chosen": ""}, {**pair, "chosen": [A("")], "reference": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ReadReport()
    with caplog.at_level(logging.WARNING):
        assert len(list(read(path, report=report))) == 4
    assert report.doubtful == {"an empty reference": 2, "an empty answer that is preferred": 2}
    assert caplog.messages == [
        f"{path}:2: an empty reference; such rows are used, and counted",
        f"{path}:3: an empty answer that is preferred; such rows are used, and counted",
        f"{path}: 2 of 4 rows have an empty reference",
        f"{path}: 2 of 4 rows have an empty answer that is preferred",
    ]


def test_evaluation_counts_empty_references_unless_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "q", "reference": "", "chosen": "4", "rejected": "5"})
    for source, counted in (({}, 1), ({"absent": True}, 0)):
        report = ReadReport()
        dataset = Dataset(name="d", path=str(path), task="preference accuracy", reference=source)
        assert len(list(read_items(dataset, "error", report))) == 1
        assert report.doubtful["an empty reference"] == counted
