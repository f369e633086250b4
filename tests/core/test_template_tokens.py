"""The ids of texts beside the added tokens of real tokenizers: their order, flags and places, on small vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from polar import Comparison, Template, TemplateSettings
from polar.model.sentencepiece import build_tokenizer, read_model

SPLIT, SCORE = "<|reward|>", "<|score|>"
WORDS = ["the", "then", "2+2?", "\n", "\n\n", "  ", "é", "😀", "<", "|", ">", "s>", "im_start", "</"]
INTERNLM2 = Path(__file__).parents[1] / "fixtures" / "golden" / "model1"

QWEN3 = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
QWEN3_TEXT = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
LLAMA3 = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|reserved_special_token_2|> <|start_header_id|> <|end_header_id|> <|eom_id|> "
    "<|eot_id|> <|python_tag|>"
).split() + [f"<|reserved_special_token_{number}|>" for number in range(3, 248)]
SMOLLM2 = (
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> "
    "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> "
    "<empty_output>"
).split()
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_TEXT = ["<mask>", *(f"<unused{number}>" for number in range(99)), "\n\n", "\n\n\n", "▁▁", "<table>", "</table>"]


def added(tokens: Iterable[str], special: bool) -> list[AddedToken]:
    return [AddedToken(token, special=special, normalized=False) for token in tokens]


def byte_level(
    first: Iterable[str], special: Iterable[str], text: Iterable[str] = (), use_regex: bool = True, **options: bool
) -> Tokenizer:
    """Byte-level BPE with `first` at the beginning of its vocabulary; then the added tokens, special ones first."""
    pieces = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "then", "<|", "|>", "</", "im"]
    merges = [("t", "h"), ("th", "e"), ("the", "n"), ("<", "|"), ("|", ">"), ("<", "/"), ("i", "m")]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(added(special, special=True))
    tokenizer.add_tokens(added(text, special=False))
    tokenizer.add_special_tokens(added([SPLIT, SCORE], special=True))  # as `polar finetune` does
    return tokenizer


BYTES = [f"<0x{number:02X}>" for number in range(256)]
CHARACTERS = [chr(number) for number in range(33, 127)] + ["▁", "é"]


def gemma() -> Tokenizer:
    """Added tokens that all stand in the vocabulary of a BPE model with byte fallback."""
    pieces = [*GEMMA[:4], GEMMA_TEXT[0], *GEMMA_TEXT[1:100], *GEMMA[4:], *GEMMA_TEXT[100:], SPLIT, SCORE]
    pieces += [*BYTES, *CHARACTERS, "th", "the", "s>", "os>", "bos>"]
    # Converters made a merge of every split of every entry, those of control tokens included.
    merges = [("t", "h"), ("th", "e"), ("s", ">"), ("o", "s>"), ("b", "os>"), ("<", "bos>")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(added(GEMMA_TEXT, special=False))
    tokenizer.add_special_tokens(added([*GEMMA, SPLIT, SCORE], special=True))
    return tokenizer


def unigram() -> Tokenizer:
    """As of the Japanese models of LLM-jp: control tokens have the best score, so the model itself finds them."""
    scores = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, SPLIT: 0.0, SCORE: 0.0}
    scores |= dict.fromkeys(BYTES, -20.0) | dict.fromkeys(CHARACTERS, -9.0) | {"the": -3.0, "s>": -5.0}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(added(["<unk>", "<s>", "</s>"], special=True))
    return tokenizer


def internlm2() -> Tokenizer:
    config = json.loads((INTERNLM2 / "tokenizer_config.json").read_text("utf-8"))
    return build_tokenizer(read_model(INTERNLM2 / "tokenizer.model"), config)


LAYOUTS: dict[str, Callable[[], Tokenizer]] = {
    "Qwen3": lambda: byte_level([], QWEN3, QWEN3_TEXT),
    "Llama 3": lambda: byte_level([], LLAMA3, ignore_merges=True),
    "SmolLM2": lambda: byte_level(SMOLLM2, SMOLLM2),
    "whole texts from the vocabulary": lambda: byte_level(SMOLLM2, SMOLLM2, use_regex=False, ignore_merges=True),
    "Gemma": gemma,
    "InternLM2": internlm2,
    "Unigram": unigram,
}


@pytest.fixture(scope="module", params=LAYOUTS)
def template(request: pytest.FixtureRequest) -> Template:
    tokenizer = LAYOUTS[request.param]()
    split, score = tokenizer.token_to_id(SPLIT), tokenizer.token_to_id(SCORE)
    if score is None:  # InternLM2's score token is not flagged as special
        score = tokenizer.token_to_id("[UNUSED_TOKEN_130]")
    return Template(tokenizer, TemplateSettings(split, score, None, 8192, 2048))


@cache
def special_tokens(template: Template) -> dict[int, str]:
    """The tokens that no text may spell."""
    found = {number: token.content for number, token in table(template).items() if token.special}
    for number in (template.settings.split_token_id, template.settings.score_token_id):
        found[number] = template.tokenizer.id_to_token(number)
    return found


@cache
def table(template: Template) -> dict[int, AddedToken]:
    decoder: dict[int, AddedToken] = template.tokenizer.get_added_tokens_decoder()
    return decoder


def ids_of(template: Template, text: str) -> list[int]:
    (branch,) = template.encode(Comparison("q", "r", text)).branches
    assert branch[-1] == template.settings.score_token_id
    return branch[:-1]


def pieces(template: Template) -> st.SearchStrategy[list[str]]:
    ordinary = [token.content for number, token in table(template).items() if number not in special_tokens(template)]
    return st.lists(st.sampled_from([*ordinary, *WORDS]) | st.text(max_size=4), max_size=12)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_ids_are_those_of_the_tokenizer(template: Template, data: st.DataObject) -> None:
    text = "".join(data.draw(pieces(template)))
    assume(not any(token in text for token in special_tokens(template).values()))
    assert ids_of(template, text) == template.tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_spelling_a_special_token_does_not_make_one(template: Template, data: st.DataObject) -> None:
    special = special_tokens(template)
    parts = data.draw(pieces(template))
    parts.insert(data.draw(st.integers(0, len(parts))), data.draw(st.sampled_from(sorted(special.values()))))
    text = "".join(parts)
    ids = ids_of(template, text)
    assert special.keys().isdisjoint(ids)
    assert template.tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ") or "\ufffd" in text


def test_tokens_of_a_policy_keep_their_ids() -> None:
    tokenizer = LAYOUTS["Qwen3"]()
    split, score = tokenizer.token_to_id(SPLIT), tokenizer.token_to_id(SCORE)
    template = Template(tokenizer, TemplateSettings(split, score, None, 1024, 256))
    text = "<think>\n</think><tool_call>{}</tool_call>"
    found = [tokenizer.id_to_token(number) for number in ids_of(template, text)]
    assert found == ["<think>", "Ċ", "</think>", "<tool_call>", "{", "}", "</tool_call>"]
