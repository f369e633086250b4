"""The tokens that policies end an answer with: where they are left in the text, they are taken out before scoring."""

from __future__ import annotations

END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)
"""Of common policies. OpenRLHF leaves them in the text; a reference has none."""


def without_end(text: str) -> str:
    """A response without the token that ended it."""
    ends = [end for end in END_TOKENS if text.rstrip().endswith(end)]
    return text.rstrip().removesuffix(ends[0]) if ends else text
