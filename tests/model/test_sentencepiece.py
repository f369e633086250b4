"""Fast tokenizers made from `tokenizer.model`, against golden ids and against sentencepiece itself."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from polar.core.errors import InputError
from polar.model.sentencepiece import build_tokenizer, read_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"
MODEL1, DUMMY_PREFIX = FIXTURES / "model1", FIXTURES / "tokenizer_dummy_prefix"
CASES = json.loads((FIXTURES / "golden.json").read_text("utf-8"))["tokenizer_cases"]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def sentencepiece_tokenizer(directory: Path):
    return build_tokenizer(read_model(directory / "tokenizer.model"), read_json(directory / "tokenizer_config.json"))


@pytest.mark.parametrize("directory", [MODEL1, DUMMY_PREFIX], ids=lambda directory: directory.name)
def test_tokenizer_cases(directory):
    tokenizer = sentencepiece_tokenizer(directory)
    different = set()
    for case in CASES[directory.name]:
        ids = tokenizer.encode(case["text"]).ids
        if case["strict"]:
            assert ids == case["input_ids"], case["text"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]
        elif ids != case["input_ids"]:
            different.add(case["text"])
    # The documented limits of a fast tokenizer: old names of renamed slots, and a dummy prefix at user-defined pieces.
    limits = {"[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_146]"}
    assert different == limits | ({"[UNUSED_TOKEN_130]", "a[UNUSED_TOKEN_7] b"} if directory == DUMMY_PREFIX else set())


PIECES = [piece.piece.replace("▁", " ") for piece in read_model(MODEL1 / "tokenizer.model").pieces if piece.type == 1]
SPECIAL = [token["content"] for token in read_json(MODEL1 / "tokenizer_config.json")["added_tokens_decoder"].values()]
TEXTS = (
    st.lists(st.sampled_from([*PIECES, " ", "▁", "é", "😀"]) | st.text(max_size=3), max_size=30)
    .map("".join)
    .filter(lambda value: not any(token in value for token in SPECIAL))  # sentencepiece itself does not know them
)


@pytest.mark.parametrize("directory", [MODEL1, DUMMY_PREFIX], ids=lambda directory: directory.name)
def test_ids_equal_those_of_sentencepiece(directory):
    tokenizer = sentencepiece_tokenizer(directory)
    original = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(value):
        ids = tokenizer.encode(value, add_special_tokens=False).ids
        assert ids == original.encode(value)
        if directory == MODEL1:
            assert tokenizer.decode(ids) == value.replace("▁", " ")

    check()


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 16000), position=st.integers(0, 16000), byte=st.integers(0, 255))
def test_damaged_sentencepiece_model_is_an_input_error_or_readable(cut, position, byte, tmp_path_factory):
    data = bytearray((MODEL1 / "tokenizer.model").read_bytes())
    data[position] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(data[: len(data) - cut])
    with contextlib.suppress(InputError):  # any other exception fails the test
        assert read_model(path).pieces


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (b"\x12\x02\x18\x01", "BPE"),  # trainer_spec.model_type = unigram
        (b"\x1a\x03\x12\x01x", "identity normalisation"),  # normalizer_spec.precompiled_charsmap
        (b"\x1a\x02\x20\x01", "remove_extra_whitespaces"),
        (b"\x1a\x02\x28\x00", "escape_whitespaces"),
        (b"\x0a\x05\x0a\x01z\x18\x05", "no unused ones"),  # a piece of type unused
    ],
)
def test_sentencepiece_models_of_another_kind_are_refused(field, expected, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes((MODEL1 / "tokenizer.model").read_bytes() + field)
    with pytest.raises(InputError, match=expected):
        read_model(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"added_tokens_decoder": {"653": {"content": "<|reward|>"}}}, "added_tokens_decoder"),
        ({"pad_token": "<pad>"}, "'<pad>', which is not in the vocabulary"),
        ({"bos_token": None}, "no bos_token"),
        ({"add_eos_token": True}, "add_eos_token"),
    ],
)
def test_tokenizer_config_that_does_not_fit(changes, expected):
    config = read_json(MODEL1 / "tokenizer_config.json") | changes
    with pytest.raises(InputError, match=expected):
        build_tokenizer(read_model(MODEL1 / "tokenizer.model"), config)


def test_two_ids_of_one_token_are_refused():
    config = read_json(MODEL1 / "tokenizer_config.json")
    config["added_tokens_decoder"]["654"] = config["added_tokens_decoder"]["653"]
    with pytest.raises(InputError, match=r"'<\|reward\|>' has two ids"):
        build_tokenizer(read_model(MODEL1 / "tokenizer.model"), config)


def test_without_bos():
    config = read_json(MODEL1 / "tokenizer_config.json") | {"add_bos_token": False}
    assert build_tokenizer(read_model(MODEL1 / "tokenizer.model"), config).encode("a").ids == [512]
