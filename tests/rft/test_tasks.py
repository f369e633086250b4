"""Rows of public data sets become tasks, with the faults of real data."""

from __future__ import annotations

from typing import Any

import pytest

from polar import InputError, Message
from polar.data.fields import Row
from polar.rft.prompts import BOXED, Task, UnusableError, answer_in, boxed, read_task


def task(**fields: Any) -> Task:
    return read_task(Row("rows.jsonl", 3, fields))


def user(*contents: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(roles[number % 2], content) for number, content in enumerate(contents))


# HH-RLHF


@pytest.mark.parametrize(
    ("chosen", "prompt", "reference"),
    [
        ("\n\nHuman: hi\n\nAssistant: hello", user("hi"), "hello"),
        ("\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: c\nd\n\ne", user("hi", "a", "b"), "c\nd\n\ne"),
        # An empty turn does not swallow the next one.
        ("\n\nHuman: hi\n\nAssistant: \n\nHuman: ok\n\nAssistant: bye", user("hi", "", "ok"), "bye"),
        ("\n\nHuman: hi\n\nAssistant:\n\nHuman: ok\n\nAssistant: bye", user("hi", "", "ok"), "bye"),
        ("\n\nHuman: say Human: x\n\nAssistant: Human: x", user("say Human: x"), "Human: x"),
        ("\n\nHuman: hi\n\nAssistant: <think>hm</think>hello", user("hi"), "hello"),
    ],
)
def test_transcripts(chosen: str, prompt: Any, reference: str) -> None:
    found = task(chosen=chosen, rejected="\n\nHuman: hi\n\nAssistant: no")
    assert found == Task("hh-rlhf", "alignment", prompt, (reference,))


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("\n\nHuman: hi", "turns out of order"),
        ("\n\nHuman: hi\n\nHuman: there\n\nAssistant: hello", "turns out of order"),
        ("\n\nHuman: hi\n\nAssistant: a\n\nAssistant: b", "turns out of order"),
        ("\n\nAssistant: hi\n\nHuman: a", "turns out of order"),
        ("\n\nHuman: hi\n\nAssistant: ", "a reference without an answer"),
        ("\n\nHuman: hi\n\nAssistant: <think>hm", "a reference without an answer"),
        ("\n\nHuman: \n\nAssistant: hello", "empty question"),
    ],
)
def test_transcripts_that_are_no_tasks(chosen: str, reason: str) -> None:
    with pytest.raises(UnusableError, match="rows.jsonl:3: ") as caught:
        task(chosen=chosen)
    assert caught.value.reason.startswith(reason)


# AM-DeepSeek-R1-Distilled and other conversations


ANSWERED = "<think>two and two</think>\n<answer>It is 4.</answer>"


@pytest.mark.parametrize(
    "last",
    [
        {"from": "assistant", "value": ANSWERED},
        {"from": "gpt", "value": "two and two</think>It is 4."},
        {"from": "assistant", "value": ANSWERED, "info": {"answer_content": "It is 4.", "think_content": "two"}},
        {"from": "assistant", "value": ANSWERED, "info": None},
        {"from": "assistant", "value": ANSWERED, "info": {"source": "x", "answer_content": None}},
        {"role": "assistant", "content": ANSWERED},
    ],
)
def test_conversations(last: Any) -> None:
    found = task(conversations=[{"from": "human", "value": "2+2?"}, last], system="none")
    assert found == Task("conversations", "general", user("2+2?"), ("It is 4.",))


def test_messages_with_a_system_message_and_earlier_thinking() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?", "info": {"source": "x"}},
        {"role": "assistant", "content": "<think>hm</think>4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "<think>hm</think><answer>6</answer>"},
    ]
    found = task(messages=messages)
    assert found.prompt == (Message("system", "Be brief."), *user("2+2?", "4", "3+3?"))
    assert found.references == ("6",)


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([{"from": "human", "value": "a"}], "no answer at the end"),
        ([{"from": "system", "value": "a"}], "no answer at the end"),
        ([{"from": "gpt", "value": "a"}], "turns out of order"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "<think>hm"}], "a reference without an answer"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "<answer></answer>"}], "a reference without"),
    ],
)
def test_conversations_that_are_no_tasks(conversation: Any, reason: str) -> None:
    with pytest.raises(UnusableError) as caught:
        task(conversations=conversation)
    assert caught.value.reason.startswith(reason)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conversations": [{"from": "tool", "value": "a"}]}, r"conversations\[0\].from"),
        ({"conversations": [{"from": "human", "value": 4}]}, r"conversations\[0\].content"),
        ({"conversations": []}, "conversations"),
        ({"messages": "hello"}, "messages"),
        ({"prompt": "a"}, 'field "reference"'),
        ({"text": "a"}, 'field "prompt"'),
        ({"problem": "a"}, 'field "solution"'),
    ],
)
def test_rows_of_no_known_format_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        task(**fields)
    assert not isinstance(caught.value, UnusableError)


# Mathematics


def test_a_problem_of_math() -> None:
    found = task(problem="How much is 1/2?", solution="It is $\\boxed{\\frac{1}{2}}$.", level="Level 1", type="Algebra")
    reference = "It is $\\boxed{\\frac{1}{2}}$."
    assert found == Task("math", "math", user(f"How much is 1/2? {BOXED}"), (reference,), "\\frac{1}{2}")


@pytest.mark.parametrize("answer", ["36", 36])
def test_the_answer_beside_a_solution_is_kept(answer: Any) -> None:
    assert task(problem="12*3?", solution="Twelve times three is thirty-six.", answer=answer).answer == "36"
    assert task(problem="12*3?", solution="So $\\boxed{36.0}$.", answer=answer).answer == "36"
    assert task(prompt="12*3?", reference="It is 36.", answer=answer).answer == "36"


def test_a_question_of_gsm8k() -> None:
    answer = "She sold 48/2 = <<48/2=24>>24 in May.\nTogether 48+24 = <<48+24=1072>>1,072.\n#### 1,072"
    found = task(question="How many?", answer=answer)
    reference = "She sold 48/2 = 24 in May.\nTogether 48+24 = 1,072.\nThe final answer is \\boxed{1,072}."
    assert found == Task("gsm8k", "math", user(f"How many? {BOXED}"), (reference,), "1072")


def test_another_question_and_answer() -> None:
    assert task(question="Who?", answer="I.") == Task("questions", "general", user("Who?"), ("I.",))


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\text{a {b} c}}", "\\text{a {b} c}"),
        ("\\boxed{1", None),
        ("no box", None),
        ("\\boxed{ 3 }", "3"),
    ],
)
def test_boxed(solution: str, answer: str | None) -> None:
    assert boxed(solution) == answer


# Our own rows


@pytest.mark.parametrize(
    ("fields", "references"),
    [
        ({"reference": "4"}, ("4",)),
        ({"reference": [{"role": "assistant", "content": "<think>hm</think>4"}]}, ("4",)),
        ({"reference": '[{"role": "assistant", "content": "4"}]'}, ("4",)),
        ({"references": ["4", "four", "hm</think>IV"]}, ("4", "four", "IV")),
        ({"references": [[{"role": "assistant", "content": "4"}], "four"]}, ("4", "four")),
    ],
)
def test_rows_with_references(fields: Any, references: tuple[str, ...]) -> None:
    found = task(prompt="2+2?", answer="4", ability="arithmetic", data_source="sums", **fields)
    assert found == Task("sums", "arithmetic", user("2+2?"), references, "4")


def test_another_column_holds_the_reference() -> None:
    row = Row("rows.jsonl", 3, {"prompt": "2+2?", "solution": "4"})
    assert read_task(row, reference_column="solution").references == ("4",)


def test_references_can_be_left_out() -> None:
    for fields in ({"prompt": "a"}, {"problem": "a"}, {"question": "a"}, {"prompt": "a", "reference": ""}):
        assert read_task(Row("rows.jsonl", 3, dict(fields)), with_references=False).references == ()


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("2+2?\n<think>\n", user("2+2?")),
        ([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\n"}], user("2+2?")),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well <think>"}], user("a", "Well")),
        ("What does <think> do?", user("What does <think> do?")),
    ],
)
def test_a_block_that_the_prompt_opens_is_left_to_the_chat_template(prompt: Any, messages: Any) -> None:
    assert task(prompt=prompt, reference="4").prompt == messages


def test_a_row_needs_every_reference_to_have_an_answer() -> None:
    with pytest.raises(UnusableError, match="a reference without an answer"):
        task(prompt="2+2?", references=["4", "<think>hm"])


def test_answer_in() -> None:
    assert answer_in("<answer> 4 </answer>") == "4"
    assert answer_in("<answer>4") == "<answer>4"
