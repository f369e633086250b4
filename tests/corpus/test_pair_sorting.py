import os
import resource
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.core.records import Message, Text, Trajectory, prompt_id, text_of
from polar.corpus.pair import open_sorter, pair
from polar.corpus.strategies import decoded

TEXTS = st.text(max_size=12) | st.text("\0 =[]a\n\U0010ffff", max_size=4)
DIALOGUES = st.lists(st.builds(Message, TEXTS, TEXTS), min_size=1, max_size=3).map(tuple)


def large_corpus(prompts: int = 6000) -> Iterator[Trajectory]:
    """About 36 MB that do not compress."""
    random = Random(0)
    for prompt in range(prompts):
        for policy in "AAB":
            yield Trajectory(f"prompt {prompt}", policy, random.randbytes(1000).hex())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(TEXTS | DIALOGUES, TEXTS, TEXTS | DIALOGUES), min_size=1, max_size=8))
def test_any_text_comes_back_as_it_was(rows: list[tuple[Text, str, Text]]) -> None:
    with open_sorter() as sorter:
        for prompt, policy, output in rows:
            sorter.add(prompt_id(prompt), "sft", Trajectory(prompt, policy, output))
        prompts = list(sorter.prompts())
    assert [p.prompt_id for p in prompts] == sorted({prompt_id(prompt) for prompt, _, _ in rows})
    found = {
        (p.prompt_id, policy, text): (decoded(sample.prompt), decoded(sample.output))
        for p in prompts
        for policy, samples in p.outputs.items()
        for text, sample in samples.items()
    }
    given_rows = {(prompt_id(prompt), policy, text_of(output)) for prompt, policy, output in rows}
    assert found.keys() == given_rows
    assert all((prompt, policy, output) in rows for (_, policy, _), (prompt, output) in found.items())
    assert sum(p.identical for p in prompts) == len(rows) - len(found)


def test_policies_with_two_outputs_differ_for_one_prompt_and_wrapper() -> None:
    with open_sorter() as sorter:
        for prompt, wrapper, policy, output in (
            ("p", "sft", "twice", "1"),
            ("p", "sft", "twice", "2"),
            ("p", "sft", "same", "1"),
            ("p", "sft", "same", (Message("assistant", "1"),)),
            ("p", "sft", "two prompts", "1"),
            ("q", "sft", "two prompts", "2"),
            ("p", "sft", "two wrappers", "1"),
            ("p", "pretrain", "two wrappers", "2"),
        ):
            sorter.add(prompt_id(prompt), wrapper, Trajectory(prompt, policy, output))  # type: ignore[arg-type]
        assert sorter.policies_with_two_outputs() == {"twice"}


def test_a_lone_surrogate_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="text that UTF-8 cannot express"):
        list(pair([Trajectory("p", "A", "\ud800"), Trajectory("p", "B", "x")]))


def test_what_does_not_fit_into_memory_goes_to_disk_and_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar.corpus.pair.MEMORY", "20MB")
    triples = pair(large_corpus(), temporary=tmp_path)
    first = next(triples)
    (directory,) = tmp_path.iterdir()
    assert sum(file.stat().st_size for file in directory.iterdir()) > 5e6
    monkeypatch.undo()
    expected = pair(large_corpus(), temporary=tmp_path)
    assert first == next(expected)
    assert sum(first == second for first, second in zip(triples, expected, strict=True)) == 5999
    assert os.listdir(tmp_path) == []


def test_the_temporary_files_are_removed_when_reading_fails_or_the_caller_stops(tmp_path: Path) -> None:
    def failing() -> Iterator[Trajectory]:
        yield from large_corpus(10)
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        list(pair(failing(), temporary=tmp_path))
    assert os.listdir(tmp_path) == []
    triples = pair(large_corpus(10), temporary=tmp_path)
    next(triples)
    assert len(os.listdir(tmp_path)) == 1
    triples.close()  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar.corpus.pair.MEMORY", "20MB")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the kernel refuses writes from here on
    try:
        with pytest.raises(InputError, match="no room for temporary files.*File too large") as caught:
            list(pair(large_corpus(), temporary=tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert os.listdir(tmp_path) == []


def test_a_missing_temporary_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no room for temporary files.*No such file or directory"):
        list(pair(large_corpus(1), temporary=tmp_path / "nowhere"))
