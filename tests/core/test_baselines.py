import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.core.baselines import BASELINES, chance, first_word, length, unigram_f1, words
from polar.core.records import Group, Message


def f1(candidate: str, reference: str) -> float:
    return unigram_f1(Group("p", reference, (candidate,)))[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", ["hello", ",", "world", "!"]),
        ("巴黎是首都。", ["巴", "黎", "是", "首", "都", "。"]),
        ("GPT4模型is好", ["gpt4", "模", "型", "is", "好"]),
        ("カタカナ 漢字", ["カ", "タ", "カ", "ナ", "漢", "字"]),
        ("서울은 수도", ["서울은", "수도"]),
        ("Übergröße naïve_1", ["übergröße", "naïve_1"]),
        ("𠀀𠀁", ["𠀀", "𠀁"]),
        (" \n\t", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT", "the cat", 1.0),
        ("dog", "cat", 0.0),
        ("the cat", "the cat sat down", 2 * 2 / 6),
        ("the the the cat", "the cat", 2 * 2 / 6),  # a repeated word counts as often as the reference has it
        ("首都是巴黎", "巴黎是首都", 1.0),
        ("首都是北京", "巴黎是首都", 2 * 3 / 10),
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
    ],
)
def test_unigram_f1(candidate: str, reference: str, expected: float) -> None:
    assert f1(candidate, reference) == pytest.approx(expected)


@given(st.text("aB ,\n中é"), st.text("aB ,\n中é"))
def test_unigram_f1_is_symmetric_and_between_0_and_1(first: str, second: str) -> None:
    assert 0 <= f1(first, second) == f1(second, first) <= 1
    assert f1(first, first) == 1


def test_length_is_highest_at_the_length_of_the_reference() -> None:
    group = Group("p", "abcd", ("wxyz", "ab", "abcdefgh", ""))
    same, half, double, empty = length(group)
    assert same == 0
    assert half == pytest.approx(math.log(3 / 5))
    assert double == pytest.approx(-math.log(9 / 5))
    assert empty == pytest.approx(-math.log(5))
    assert length(Group("p", "", ("",))) == [0.0]


def test_first_word_prefers_the_same_opening() -> None:
    assert first_word(Group("p", "Sure, here", ("sure thing", "Surely", "\n\n**Sure", ""))) == [1, 0, 0, 0]
    assert first_word(Group("p", "巴黎", ("巴 黎", "黎巴"))) == [1, 0]
    assert first_word(Group("p", " ", ("", "a"))) == [1, 0]


def test_chance_ties_everything() -> None:
    assert len(set(chance(Group("p", "a", ("a", "b", "c"))))) == 1


def test_messages_are_read_as_their_text() -> None:
    group = Group(
        "p", (Message("assistant", "the cat"),), ((Message("assistant", "the"), Message("user", "cat")), "dog")
    )
    assert unigram_f1(group) == [1.0, 0.0]
    assert length(group) == [0.0, pytest.approx(math.log(4 / 8))]


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_gives_one_reward_per_candidate(name: str) -> None:
    assert len(BASELINES[name](Group("p", "reference", ("a", "b", "c")))) == 3
