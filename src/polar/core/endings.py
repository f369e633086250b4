"""The tokens that policies end an answer with: where they are left in the text, they are taken out before scoring."""

from __future__ import annotations

END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|eot|>",
    "<|eom|>",
    "<|EOT|>",
    "<|end|>",
    "<|return|>",
    "<|endofturn|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
    "<turn|>",
    "<|user|>",
    "<|observation|>",
    "<eos>",
    "<seed:eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)
"""Of common policies. OpenRLHF leaves them in the text and does not say which its policy has; a reference has none."""


def without_end(text: str) -> str:
    """A response without the tokens that ended it, be they several, and the white space behind them."""
    kept = len(text)
    while True:
        end = kept
        while end and text[end - 1].isspace():
            end -= 1
        token = next((token for token in END_TOKENS if text.endswith(token, 0, end)), None)
        if token is None:
            return text[:kept]
        kept = end - len(token)
