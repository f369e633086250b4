from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar.cli.main import main
from polar.core.errors import InputError
from polar.core.records import Message
from polar.corpus.plan import load_tokenizer, prefixes, read_prompts
from polar.data.readers import ReadReport, rows
from polar.data.writers import open_writer

TOKENIZER = load_tokenizer(None)


def tokens(text: str) -> int:
    return len(TOKENIZER.encode(text, add_special_tokens=False).ids)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=80), max_size=5), st.integers(1, 20), st.integers(0, 3))
def test_a_prefix_is_the_beginning_of_its_document_and_leaves_something(
    documents: list[str], longest: int, seed: int
) -> None:
    cuts = iter(prefixes(documents, TOKENIZER, max_tokens=longest, seed=seed))
    for document in documents:
        if tokens(document) > 1:
            cut = next(cuts)
            assert document.startswith(cut)
            assert cut
    assert next(cuts, None) is None


def test_lengths_are_uniform_up_to_the_limit() -> None:
    documents = [f"{number} " + " the" * 60 for number in range(2000)]
    lengths = Counter(tokens(cut) for cut in prefixes(documents, TOKENIZER, max_tokens=40))
    assert set(lengths) == set(range(1, 41))
    assert all(20 <= count <= 90 for count in lengths.values())  # 50 expected, standard deviation 7


def test_no_character_is_cut() -> None:
    documents = [f"{number} 👩🏽‍🚀🇨🇳 深度学习模型" * 4 for number in range(200)]
    for document, cut in zip(documents, prefixes(documents, TOKENIZER), strict=True):
        assert document.startswith(cut)
        assert "\ufffd" not in cut


def test_a_draw_depends_on_document_and_seed_alone() -> None:
    documents = [f"document {number} " * 20 for number in range(50)]
    forward = list(prefixes(documents, TOKENIZER, seed=1))
    assert forward == list(prefixes(documents[::-1], TOKENIZER, seed=1))[::-1]
    assert forward != list(prefixes(documents, TOKENIZER, seed=2))


def test_prompts_are_strings_or_messages_with_a_wrapper(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with open_writer(path) as writer:
        writer.write({"prompt": "Hello?"})
        writer.write({"prompt": [{"role": "user", "content": "Hello?"}], "wrapper": "sft"})
        writer.write({"prompt": "Once upon", "wrapper": "pretrain"})
    first, second, third = read_prompts([str(path)])
    assert (first.text, first.wrapper) == ("Hello?", "sft")
    assert (second.text, second.id) == ((Message("user", "Hello?"),), first.id)
    assert third.wrapper == "pretrain"


def test_messages_cannot_be_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with open_writer(path) as writer:
        writer.write({"prompt": [{"role": "user", "content": "Hello?"}], "wrapper": "pretrain"})
        writer.write({"prompt": "fine"})
    with pytest.raises(InputError, match=r'prompts.jsonl:1: field "prompt": expected a string, since'):
        list(read_prompts([str(path)]))
    report = ReadReport()
    assert len(list(read_prompts([str(path)], on_bad_row="skip", report=report))) == 1
    assert (report.read, report.skipped) == (1, 1)


def test_an_unknown_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="expected a tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_the_command_writes_prefixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, output = tmp_path / "texts.jsonl", tmp_path / "prefixes.parquet"
    with open_writer(texts) as writer:
        for text in ("A long document about nothing at all. " * 9, "", "Another document, somewhat shorter."):
            writer.write({"text": text})
    assert main(["corpus", "prompts", str(texts), "--output", str(output)]) == 0
    assert "wrote 2 prefixes" in capsys.readouterr().err
    assert all(row.fields["wrapper"] == "pretrain" for row in rows(output))
    assert main(["corpus", "prompts", str(texts), "--output", str(output), "--column", "body"]) == 2
    assert 'field "body"' in capsys.readouterr().err
