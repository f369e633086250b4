"""The rules of thinking, as one table, for strings and for messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.core.records import Message
from polar.core.text import opens_thinking, strip_thinking

TABLE = [
    # text, answer, answer when the prompt has opened the block
    ("The answer is 4.", "The answer is 4.", ""),
    ("  spaces stay \n", "  spaces stay \n", ""),
    ("", "", ""),
    ("<think>two and two</think>4", "4", "4"),
    ("<think>two and two</think>\n\n4\n", "4", "4"),
    ("<think>\n\n</think>\n\n4", "4", "4"),
    ("Well.<think>two and two</think> It is 4.", "Well. It is 4.", "It is 4."),
    ("two and two</think>\n4", "4", "4"),
    ("<think>two and two, or", "", ""),
    ("It is 4.<think>or is it", "", ""),
    ("<think>a</think>4<think>or is it", "", ""),
    ("a</think>4<think>or is it", "", ""),
    ("<think>two and two</think>", "", ""),
    ("two and two</think>  \n", "", ""),
    ("a<think>b</think>c<think>d</think>e", "ace", "ce"),
    ("a</think>b</think>c", "c", "c"),
    ("<think>a</think>b</think>c", "c", "c"),
    ("<think>a<think>b</think>c", "c", "c"),
    ("<think></think></think>4", "4", "4"),
    ("<thinking>a</thinking>4", "<thinking>a</thinking>4", ""),
    ("<THINK>a</THINK>4", "<THINK>a</THINK>4", ""),
    ("[THINK]a[/THINK]4", "[THINK]a[/THINK]4", ""),
    ("<think>二加二</think>是四。", "是四。", "是四。"),
]


@pytest.mark.parametrize(("text", "answer", "answer_if_opened"), TABLE)
def test_strip_thinking(text: str, answer: str, answer_if_opened: str) -> None:
    assert strip_thinking(text) == answer
    assert strip_thinking(text, opened=True) == answer_if_opened
    assert strip_thinking((Message("assistant", text),)) == (Message("assistant", answer),)


def test_other_tags_are_stripped_when_they_are_given() -> None:
    tags = ("[THINK]", "[/THINK]")
    assert strip_thinking("[THINK]a[/THINK] 4 <think>", tags=tags) == "4 <think>"
    assert strip_thinking("a[/THINK]4", tags=tags) == "4"


def test_only_messages_of_the_assistant_are_stripped() -> None:
    messages = (
        Message("user", "What does <think> do?"),
        Message("assistant", "<think>a tag</think>It opens a block."),
        Message("tool", "<think>"),
        Message("assistant", "done"),
    )
    assert strip_thinking(messages) == (
        Message("user", "What does <think> do?"),
        Message("assistant", "It opens a block."),
        Message("tool", "<think>"),
        Message("assistant", "done"),
    )


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("What does <think> do?<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_opens_thinking(prompt: str, opens: bool) -> None:
    assert opens_thinking(prompt) == opens


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n"]), max_size=12).map("".join)


@given(PIECES, st.booleans())
def test_no_tag_and_no_thought_is_left(text: str, opened: bool) -> None:
    answer = strip_thinking(text, opened=opened)
    assert isinstance(answer, str)
    assert "<think>" not in answer
    assert "</think>" not in answer
    assert strip_thinking(answer) == answer
    assert strip_thinking(f"{text}</think>secret<think>", opened=opened) == ""
    assert strip_thinking(f"{text}</think><think>secret</think>done", opened=opened).endswith("done")
    assert "secret" not in strip_thinking(f"{text}<think>secret</think>", opened=opened)
