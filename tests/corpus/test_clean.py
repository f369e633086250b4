"""The rules of cleaning on texts, and the rows that come out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.corpus.clean import (
    CleanReport,
    clean,
    cut_incomplete_ending,
    is_empty,
    is_refusal,
    read_rows,
    seems_to_break_off,
    truncate_loop,
)
from polar.corpus.overlap import NearDuplicates
from polar.data.fields import Row
from polar.data.readers import ReadReport
from polar.data.record_rows import trajectory

LETTERS = st.text("abc de.\n中文，。", max_size=40)

HARMLESS = {
    "a table rule": "Prices:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n|" + "-" * 200 + "|",
    "a separator": "The end of the chapter.\n" + "=" * 300,
    "leaders and blanks": "Name: " + "_" * 350,
    "indented code": "def f():\n" + "    " * 60 + "return 1",
    "a numbered list": "\n".join(f"{n}. Buy milk" for n in range(1, 60)),
    "a count": " ".join(map(str, range(1, 300))),
    "laughter": "He told a joke. " + "haha" * 25,
    "a refrain": "It rained.\n" + "Na na na, hey Jude.\n" * 3 + "Then it stopped.\n" + "Na na na, hey Jude.\n" * 5,
    "a regular expression": "^" + r"(25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)\." * 3 + "$",
    "a Chinese refrain": "春天来了，" + "小燕子，穿花衣，年年春天来这里。" * 4,
    "rows of one table": "| x | y |\n" + "|   |   |\n" * 30,
    "a loop in the middle": "start "
    + "again and again " * 40
    + "but then it recovered and explained the matter at length.",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_text_that_only_repeats_a_little_is_not_touched(name: str) -> None:
    assert truncate_loop(HARMLESS[name]) == HARMLESS[name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The sky is blue. " + "I am happy. " * 30, "The sky is blue. I am happy."),
        # The unit may begin anywhere: "was happy." repeats what follows "am", yet no sentence is cut in two.
        ("She was happy. " + "I am happy. " * 30 + "I a", "She was happy. I am happy."),
        ("yes" + " very" * 100, "yes very"),
        ("0." + "9" * 500, "0.9"),
        ("答案：" + "正确。" * 100, "答案：正确。"),
        ("答案：" + "请你选出一个正确的答案，写在括号之间" * 9 + "请你", "答案：请你选出一个正确的答案，写在括号之间"),
        ("Joi: \n\n" * 20 + "Jo", "Joi:"),
        ("list:\n" + "- a\n- b\n" * 60, "list:\n- a\n- b"),
        ("x" + "的责任" * 90 + "\ufffd\n ", "x的责任"),
        ("A rule: " + "-" * 1000, "A rule: -"),
        ("done" + "\n" * 1000, "done"),
        ("\n" * 1000, ""),
        ("intro " + (("ab" * 70 + "c") * 4 + "d") * 5, "intro " + ("ab" * 70 + "c") * 4 + "d"),
    ],
)
def test_a_loop_is_ended_after_its_first_occurrence(text: str, expected: str) -> None:
    assert truncate_loop(text) == expected


@given(LETTERS, LETTERS.filter(lambda unit: len(unit) > 3 and any(map(str.isalnum, unit))), st.integers(0, 30))
def test_any_long_loop_is_found_and_what_stays_is_its_beginning(start: str, unit: str, more: int) -> None:
    text = start + unit * (3 + more + 200 // len(unit)) + unit[: more % len(unit)]
    found = truncate_loop(text)
    assert text.startswith(found)
    assert len(found) <= len(start) + 2 * len(unit)
    assert truncate_loop(found) == found


@given(st.text(max_size=300))
def test_a_text_is_only_ever_shortened_at_its_end(text: str) -> None:
    assert text.startswith(truncate_loop(text))
    assert text.startswith(cut_incomplete_ending(text) or "")


def test_long_texts_that_nearly_loop_take_linear_time() -> None:
    word, following = "a", "ab"
    while len(following) < 32_000:
        word, following = following, following + word  # Fibonacci: the most repetition without a loop
    assert truncate_loop(following) == following
    near = ("b" * 19 + "a") * 1600
    assert truncate_loop("c" + near) == "c" + near[:20]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two three. Four five six. Sev", "One two three. Four five six."),
        ('He asked me this: "Is it so?" And th', 'He asked me this: "Is it so?"'),
        ("It costs about 3.5 dollars to buy. It al", "It costs about 3.5 dollars to buy."),
        ("Yesterday I met the man again. I told Dr. Smi", "Yesterday I met the man again."),
        ("今天天气很好。我们去了公园，", "今天天气很好。"),
        ("他问：“你好吗？”我回答说", "他问：“你好吗？”"),
        ("Fruit to buy:\n1. Apples\n2. Pears\n3. Ban", "Fruit to buy:\n1. Apples\n2. Pears"),
        ("Fruit to buy:\n1. Apples\n2. Pears\n3.", "Fruit to buy:\n1. Apples\n2. Pears"),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |", "| a | b |\n|---|---|\n| 1 | 2 |"),
        # An open block is cut at a line, sentences in it are none, and it is not closed.
        ("Look:\n```python\nx = 1  # One. Two\nprint(x. y", "Look:\n```python\nx = 1  # One. Two"),
        ("Look at the code that follows here:\n```python\nimp", "Look at the code that follows here:"),
        ("Look:\n```python\nx = 1\n```\nIt sets x. And th", "Look:\n```python\nx = 1\n```\nIt sets x."),
        ("Half a character is dropped. So\ufffd", "Half a character is dropped."),
    ],
)
def test_an_incomplete_ending_is_cut(text: str, expected: str) -> None:
    assert cut_incomplete_ending(text) == expected


@pytest.mark.parametrize("text", ["All is said.", "“好。”", "Code:\n```\nx\n```", "Is it (really?)\n", "**Done!**"])
def test_a_complete_ending_stays(text: str) -> None:
    assert cut_incomplete_ending(text) == text


@pytest.mark.parametrize("text", ["Short. " + "and then " * 30, "one long sentence without an end", "```\nx"])
def test_a_text_without_a_complete_second_half_is_told_apart(text: str) -> None:
    assert cut_incomplete_ending(text) is None


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("He went to the", True),
        ("他去了", True),
        ("First of all,", True),
        ("A sentence.\nAnother o", True),
        ("```python\nprint(1)", True),
        ("He left.", False),
        ("- apples\n- pears", False),
        ("Best wishes 😊", False),
        ("| 1 | 2 |", False),
        (" \n", False),
    ],
)
def test_a_guess_about_breaking_off(text: str, broken: bool) -> None:
    assert seems_to_break_off(text) == broken


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\ufffd ", "\u3000"])
def test_white_space_is_empty(text: str) -> None:
    assert is_empty(text)
    assert not is_empty(text + ".")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "  I’m really sorry, but as an AI language model, I cannot help you.",
        "As an AI assistant, I am unable to provide medical advice.",
        "I cannot fulfill your request. It is illegal.",
        "I won't help with this.",
        "Unfortunately, I am not able to open links.",
        "很抱歉，我无法回答这个问题。",
        "对不起,作为一个人工智能助手,我不能提供这些信息。",
        "作为一个AI语言模型，我不能提供法律意见。",
    ],
)
def test_refusals_are_recognised(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear about your loss.",
        "As an AI language model, I can write German, but I cannot speak it.",
        "As an AI language model, I don't have opinions. Here are both sides.",
        "I'm sorry, but I cannot browse. However, Paris is the capital of France.",
        "I cannot believe how good this is!",
        "He said: I'm sorry, but I can't help you.",
        "I'm sorry, but I can't say it in one line. " + "First, consider the following. " * 60,
        "抱歉让你久等了，答案是三。",
        "作为一个AI语言模型，我不能提供法律意见。但是，一般来说需要赔偿。",
    ],
)
def test_what_only_sounds_like_a_refusal_is_none(text: str) -> None:
    assert not is_refusal(text)


def run(rows: Sequence[dict[str, Any]], **options: Any) -> tuple[list[dict[str, Any]], CleanReport]:
    report = CleanReport()
    pairs = [(row, trajectory(row)[1][0]) for row in (Row("f", n, fields) for n, fields in enumerate(rows, 1))]
    return list(clean(pairs, report=report, **options)), report


def row(output: object = "Yes.", **fields: object) -> dict[str, Any]:
    return {"prompt": "Is it?", "policy": "p", "output": output, **fields}


def test_only_the_output_changes_and_the_order_stays() -> None:
    looping = "Fine. " + "I am happy. " * 30
    messages = [{"role": "assistant", "content": "Hm."}, {"role": "assistant", "content": looping, "name": "x"}]
    rows = [
        row(looping, extra={"a": 1}, finish_reason="length"),
        row("Untouched  ", policy="q", sample=3),
        row(messages, policy="r"),
        row(json.dumps(messages), policy="s"),
    ]
    kept, report = run(rows)
    assert kept[0] == rows[0] | {"output": "Fine. I am happy."}
    assert kept[1] == rows[1]
    assert kept[2]["output"] == [messages[0], messages[1] | {"content": "Fine. I am happy."}]
    assert [message["content"] for message in json.loads(kept[3]["output"])] == ["Hm.", "Fine. I am happy."]
    assert messages[1]["content"] == looping
    assert report.total.loops == 3
    assert report.total.loop_characters == 3 * (len(looping) - len("Fine. I am happy."))


@pytest.mark.parametrize(
    ("mode", "finish_reason", "cut"),
    [
        ("known", "length", True),
        ("known", "stop", False),
        ("known", None, False),
        ("guess", "length", True),
        ("guess", "stop", False),
        ("guess", None, True),
        ("never", "length", False),
        ("never", None, False),
    ],
)
def test_endings_are_cut_where_asked_for(mode: Any, finish_reason: str | None, cut: bool) -> None:
    (kept,), report = run([row("It is so. And th", finish_reason=finish_reason)], cut_endings=mode)
    assert kept["output"] == ("It is so." if cut else "It is so. And th")
    assert report.total.endings == cut
    assert report.total.endings_unknown == (finish_reason is None)


def test_what_cannot_be_cut_is_counted() -> None:
    (kept,), report = run([row("one long sentence without", finish_reason="length")])
    assert kept["output"] == "one long sentence without"
    assert (report.total.endings, report.total.endings_left) == (0, 1)


FAULTY = [
    row(""),
    row("I'm sorry, but I can't help with that."),
    row("Yes."),
    row("Yes."),
    row("Yes.", policy="q"),
    row("Yes.", policy="r"),
    row("Yes.", prompt="is  IT?"),
    row("Yes.", prompt="Was it?"),
]


def test_faults_are_counted_and_stay() -> None:
    kept, report = run(FAULTY)
    assert kept == FAULTY
    total = report.total
    assert (total.rows, total.kept, total.empty, total.refused, total.duplicates) == (8, 8, 1, 1, 2)
    assert total.removed == {}
    assert report.shared_outputs == 1
    assert report.prompts == 2
    assert {name: (counts.rows, counts.duplicates) for name, counts in report.policies.items()} == {
        "p": (6, 2),
        "q": (1, 0),
        "r": (1, 0),
    }


@pytest.mark.parametrize(
    ("drop", "left"),
    [
        (["empty"], [1, 2, 3, 4, 5, 6, 7]),
        (["refused", "duplicate"], [0, 2, 4, 5, 7]),
        (["duplicate"], [0, 1, 2, 4, 5, 7]),
    ],
)
def test_faults_are_removed_on_demand(drop: Any, left: list[int]) -> None:
    kept, report = run(FAULTY, drop=drop)
    assert kept == [FAULTY[n] for n in left]
    assert set(report.total.removed) == set(drop)
    assert report.total.rows == report.total.kept + sum(report.total.removed.values())


def test_only_the_first_of_near_duplicate_prompts_keeps_its_trajectories() -> None:
    question = " ".join(f"word{n}x" for n in range(40))
    rows = [row(prompt=question), row(prompt=question + " please"), row("No.", prompt=question), row()]
    kept, report = run(rows, near_duplicates=NearDuplicates())
    assert kept == [rows[0], rows[2], rows[3]]
    assert report.prompts_removed == report.total.removed == {"near-duplicate prompt": 1}


def test_the_report_is_json_with_totals_and_policies() -> None:
    _, report = run(FAULTY, drop=["empty"])
    found = json.loads(report.to_json())
    assert found["total"]["rows"] == 8
    assert found["total"]["removed"] == {"empty": 1}
    assert list(found["policies"]) == ["p", "q", "r"]
    assert found["policies"]["p"]["kept"] == 5


def test_bad_rows_are_errors_or_are_counted(tmp_path: Any) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(row()) + "\n" + json.dumps({"prompt": "x", "output": "y"}) + "\n")
    with pytest.raises(InputError, match=r'in.jsonl:2: field "policy"'):
        list(read_rows([str(file)]))
    report = ReadReport()
    assert len(list(read_rows([str(file)], on_bad_row="skip", report=report))) == 1
    assert report.skipped == 1
