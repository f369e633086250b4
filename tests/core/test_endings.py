from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.core.text import END_TOKENS, without_end

GLM, GEMMA, SEED, COHERE = "<|user|>", "<turn|>", "<seed:eos>", "<|END_OF_TURN_TOKEN|>"


@pytest.mark.parametrize(
    "ending",
    [
        *("<|im_end|>", "<|im_end|>\n", "<|im_end|><|endoftext|>", "<|im_end|>\n<|endoftext|>", "</s></s></s>"),
        *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|endofturn|>", "<|EOT|>", GLM, GEMMA, SEED, COHERE),
    ],
)
def test_end_tokens_are_taken_out(ending: str) -> None:
    assert without_end(f"It is\n4.{ending}") == "It is\n4."


@given(
    text=st.text(max_size=9),
    endings=st.lists(st.sampled_from(END_TOKENS), max_size=4),
    space=st.sampled_from(["", "\n", "  "]),
)
def test_all_of_them_go_and_nothing_else(text: str, endings: list[str], space: str) -> None:
    assert without_end(f"{text}x{space.join(endings)}{space if endings else ''}") == f"{text}x"


def test_tokens_inside_a_text_and_its_white_space_stay() -> None:
    assert without_end("a <|im_end|> b \n") == "a <|im_end|> b \n"
    assert without_end("4 \n</s>") == "4 \n"
    assert without_end("</s>") == ""


def test_special_tokens_of_a_tokenizer_at_hand_are_no_text_at_the_end() -> None:
    assert without_end("4<turn_of_x><pad>\n<|im_end|>", ["<pad>", "<turn_of_x>"]) == "4"
    assert without_end("<pad>4<turn_of_x>", ["<pad>"]) == "<pad>4<turn_of_x>"
    assert without_end("4<think>", ["<think>", "</think>"]) == "4<think>"  # a thought that was cut off is no answer
