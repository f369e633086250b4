"""Near-duplicate prompts and texts of evaluation sets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.core.records import Message
from polar.corpus.overlap import Decontaminator, NearDuplicates

PASSAGE = (
    "The old lighthouse keeper climbed the winding stairs every evening to light the lamp, and he counted each "
    "of the steps aloud so that he would never lose his way in the dark of a stormy winter night."
)
CHINESE = "老灯塔看守人每天晚上都爬上蜿蜒的楼梯去点亮那盏灯，他大声数着每一级台阶，以免在冬夜的风暴中迷路。"


def seen(*prompts: str, threshold: float = 0.8) -> list[bool]:
    index = NearDuplicates(threshold)
    return [index.seen(prompt) for prompt in prompts]


def test_a_long_prompt_with_one_word_more_is_a_near_duplicate() -> None:
    assert seen(PASSAGE, PASSAGE + " Why?", PASSAGE.upper().replace(",", ";")) == [False, True, True]
    assert seen(CHINESE, CHINESE + "为什么") == [False, True]


def test_other_prompts_are_not() -> None:
    words = PASSAGE.split()
    assert seen(PASSAGE, " ".join(words[:20]), " ".join(reversed(words)), CHINESE) == [False] * 4


def test_templates_that_differ_in_a_number_are_different_tasks() -> None:
    assert seen(f"{PASSAGE} There are 120 steps.", f"{PASSAGE} There are 130 steps.") == [False, False]


def test_short_prompts_are_never_near_duplicates() -> None:
    template = "Determine the number of ways to arrange the letters of the word {}."
    assert seen(template.format("GAMMAS"), template.format("TEPEE"), template.format("TEPEE")) == [False] * 3


def test_messages_count_like_their_text() -> None:
    index = NearDuplicates()
    assert not index.seen(PASSAGE)
    assert index.seen((Message("user", PASSAGE + " Why?"),))


def test_a_prompt_is_compared_with_those_that_stayed() -> None:
    """A chain of small changes does not remove what is far from all that is kept."""
    words = [f"w{n}x" for n in range(60)]
    chain = [" ".join(words[n : n + 40]) for n in range(0, 20, 2)]
    found = seen(*chain)
    assert found[:2] == [False, True]
    assert False in found[2:]


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_the_threshold_is_checked(threshold: float) -> None:
    with pytest.raises(InputError, match="above 0 and at most 1"):
        NearDuplicates(threshold)


def evaluation(path: Path, *rows: object, ngram: int = 13) -> Decontaminator:
    file = path / "eval.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return Decontaminator([str(file)], ngram)


THIRTEEN = "lighthouse keeper climbed the winding stairs every evening to light the lamp and"


def test_thirteen_words_in_a_row_are_shared_under_other_case_and_punctuation(tmp_path: Path) -> None:
    found = evaluation(tmp_path, {"prompt": PASSAGE})
    assert found.shared(f"So: {THIRTEEN.upper()}?!") == THIRTEEN
    assert found.shared(" ".join(THIRTEEN.split()[1:])) is None
    assert found.shared(THIRTEEN.replace("stairs", "stair")) is None
    assert found.shared("") is None


@pytest.mark.parametrize("field", ["prompt", "question", "reference", "chosen", "rejected", "output", "answer", "text"])
@pytest.mark.parametrize("shape", ["string", "messages", "json", "list", "parts"])
def test_texts_are_found_in_every_field_and_form(tmp_path: Path, field: str, shape: str) -> None:
    messages = [{"role": "user", "content": "Hello."}, {"role": "user", "content": PASSAGE}]
    parts = [{"role": "user", "content": [{"type": "text", "text": PASSAGE}]}]
    forms = {
        "string": PASSAGE,
        "messages": messages,
        "json": json.dumps(messages),
        "list": ["a", PASSAGE],
        "parts": parts,
    }
    assert evaluation(tmp_path, {field: forms[shape], "score": 1, "gold": None}).shared(PASSAGE)


def test_a_list_of_candidates_and_a_text_that_looks_like_json(tmp_path: Path) -> None:
    numbers = "[" + ", ".join(map(str, range(40))) + "]"
    found = evaluation(tmp_path, {"prompt": "p", "candidates": [[{"role": "assistant", "content": PASSAGE}], numbers]})
    assert found.shared(PASSAGE)
    assert found.shared(" ".join(map(str, range(5, 30))))


def test_chinese_needs_twice_as_many_characters(tmp_path: Path) -> None:
    found = evaluation(tmp_path, {"prompt": CHINESE})
    plain = CHINESE.replace("，", "").replace("。", "")
    assert found.shared("他说" + plain[:26] + "吗") is not None
    assert found.shared("他说" + plain[:25] + "吗") is None


def test_phrases_under_three_prompts_do_not_count(tmp_path: Path) -> None:
    phrase = "I hope this helps and please let me know if you have any further questions at all."
    rows = [{"prompt": f"Question about {topic}", "chosen": f"{topic}. {phrase}"} for topic in ("ants", "bees", "cats")]
    assert evaluation(tmp_path, *rows).shared(phrase) is None
    assert evaluation(tmp_path, *rows).boilerplate > 0
    assert evaluation(tmp_path, *rows[:2]).shared(phrase)
    # Three answers to one prompt are one prompt.
    assert evaluation(tmp_path, *[rows[0]] * 3).shared(phrase)


def test_short_questions_are_compared_as_a_whole(tmp_path: Path) -> None:
    found = evaluation(tmp_path, {"question": "What is 2 + 2?", "answer": "It is four."})
    assert found.shared("what is 2 2", prompt=True)
    assert found.shared("What is 2 + 2? Explain.", prompt=True) is None
    assert found.shared("What is 2 + 2?") is None
    assert found.shared("It is four.", prompt=True) is None
    assert found.short_questions == 1


def test_the_report_names_what_each_file_gave(tmp_path: Path) -> None:
    found = evaluation(tmp_path, {"prompt": PASSAGE}, {"prompt": PASSAGE})
    assert list(found.ngrams.values()) == [len(PASSAGE.split()) - 12]


def test_a_file_without_texts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"eval.jsonl: expected texts of an evaluation set in one of the fields prompt"
    ):
        evaluation(tmp_path, {"messages": "x", "score": 3})
    with pytest.raises(InputError, match="2 words or more"):
        evaluation(tmp_path, {"prompt": PASSAGE}, ngram=1)


WORDS = st.lists(st.sampled_from(["a", "b", "法", "律", "c1"]), max_size=25)


@settings(max_examples=60)
@given(st.lists(WORDS, min_size=1, max_size=2), WORDS)
def test_it_agrees_with_sets_of_ngrams(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], probe: list[str]
) -> None:
    n = 4

    def ngrams(words: list[str]) -> set[tuple[str, ...]]:
        found = set()
        for i in range(len(words) - n + 1):
            size = 2 * n if sum(word in "法律" for word in words[i : i + n]) > n // 2 else n
            if i + size <= len(words):
                found.add(tuple(words[i : i + size]))
        return found

    path = tmp_path_factory.mktemp("eval")
    rows = [{"prompt": f"{name} " * 3, "text": " ".join(words)} for name, words in zip("xy", texts, strict=False)]
    found = evaluation(path, *rows, ngram=n).shared(" ".join(probe))
    assert (found is not None) == bool(ngrams(probe) & set().union(*map(ngrams, texts)))


def test_the_same_texts_are_removed_in_every_process(tmp_path: Path) -> None:
    """Python's own hashes differ from process to process."""
    found = evaluation(tmp_path, {"prompt": PASSAGE})
    program = (
        "from polar.corpus.overlap import Decontaminator\n"
        f"print(Decontaminator([{str(tmp_path / 'eval.jsonl')!r}])._hashes.tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == found._hashes.tolist()
