import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polar import InputError
from polar.core.baselines import chrf, rouge_l, words
from polar.core.records import Group, Message
from polar.evaluation.scorers import baselines, embedding_similarity

TEXTS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "!", "奖励", "模型"]), max_size=12).map(" ".join)


@settings(deadline=None)  # the first example imports
@given(TEXTS, TEXTS)
def test_rouge_l_is_that_of_the_rouge_score_package(reference: str, candidate: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    expected = scorer.RougeScorer(["rougeL"], tokenizer=Words()).score(reference, candidate)["rougeL"].fmeasure
    if words(reference) or words(candidate):
        assert rouge_l(Group("p", reference, (candidate,)))[0] == pytest.approx(expected)


def test_golden_values() -> None:
    group = Group(
        "p", (Message("assistant", "the cat sat on the mat"),), ("the cat the mat", "the cat sat on the mat", "北京")
    )
    assert rouge_l(group) == pytest.approx([2 * 4 / 10, 1, 0])
    scores = chrf(group)
    assert scores[1:] == [100, 0]
    assert 40 < scores[0] < 80
    assert rouge_l(Group("p", "", ("", "a"))) == [1, 0]


def test_libraries_that_are_missing_are_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(baselines()) == ["unigram F1", "ROUGE-L", "chrF", "length", "chance"]
    monkeypatch.setattr("polar.evaluation.scorers.find_spec", lambda name: None)
    assert list(baselines()) == ["unigram F1", "length", "chance"]
    assert "chrF is left out: pip install 'polar-rm[eval]'" in caplog.text


@pytest.mark.slow
def test_a_real_embedding_model_is_loaded_from_its_directory(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs the extra embeddings")
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

    set_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "北", "京"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **size)
    BertModel(config).eval().save_pretrained(tmp_path / "bert")
    network = Transformer(str(tmp_path / "bert"), max_seq_length=32)
    library.SentenceTransformer(modules=[network, Pooling(16)], device="cpu").save(str(tmp_path / "embedding"))

    groups = [
        Group("p", "the cat sat", ("the cat sat", "on the mat", "北京")),
        Group("p", "", ("the", "", "cat " * 99)),
    ]
    rewards = embedding_similarity(str(tmp_path / "embedding"))(groups)
    assert [row[place] for row, place in zip(rewards, (0, 1), strict=True)] == pytest.approx([1, 1], abs=1e-5)
    assert all(-1 <= reward < 0.9999 for reward in (*rewards[0][1:], rewards[1][0], rewards[1][2]))
    # The cosine as the network itself gives it, without the library: mean over tokens, then the angle.
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path / "bert")
    bert = BertModel.from_pretrained(tmp_path / "bert").eval()
    with torch.no_grad():
        means = [
            bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in ("the cat sat", "on the mat")
        ]
    assert rewards[0][1] == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), abs=1e-5)
    with pytest.raises(InputError, match="nowhere: cannot be loaded as an embedding model"):
        embedding_similarity(str(tmp_path / "nowhere"))


def test_similarity_of_embeddings_is_the_cosine_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    class SentenceTransformer:
        def __init__(self, name: str, model_kwargs: dict[str, bool]) -> None:
            assert model_kwargs == {"use_safetensors": True}
            if name != "small":
                raise OSError("no such\nmodel")

        def encode(self, texts: list[str], **settings: Any) -> Any:
            assert settings["normalize_embeddings"]
            vectors = np.array([[text.count("a"), text.count("b")] for text in texts], np.float64)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    groups = [Group("p", "a", ("aa", "b")), Group("p", "ab", ("ab", "a", "bb"))]
    first, second = embedding_similarity("small")(groups)
    assert first == pytest.approx([1, 0])
    assert second == pytest.approx([1, 0.5**0.5, 0.5**0.5])
    assert next(iter(baselines("small"))) == "embedding"
    with pytest.raises(InputError, match="large: cannot be loaded as an embedding model: no such model"):
        baselines("large")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"pip install 'polar-rm\[embeddings\]'"):
        baselines("small")
