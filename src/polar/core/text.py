"""Parts of a policy's text that are not its answer: thinking, and the tokens that ended it.

The text of a reasoning model between <think> and </think> is removed before scoring.

The same rules hold for the candidate and for the reference, so that answers are compared with answers:

| text | answer |
|---|---|
| no tag | the text, unchanged |
| no tag, but the chat template has opened the block in the prompt (`opened`) | none: "" |
| `<think>a</think>b` | `b` |
| `a</think>b` (the block was opened in the prompt) | `b` |
| `<think>a` or `b<think>a` (never closed: the thinking used up all the tokens) | none: "" |
| `a<think>b</think>c<think>d</think>e` (several blocks) | `ace`: everything outside of them |
| `<think>a</think>` (nothing behind it) | none: "" |
| `<think>a<think>b</think>c` (opened twice) | `c`: blocks do not nest |
| `<thinking>`, `<THINK>`, `[THINK]` and other tags | part of the text, unless they are given as `tags` |

Where a tag was found, white space around the answer goes too. A text without an answer is scored as the empty string,
which is far from every reference: the raw chain never reaches the reward, or policies would learn to think without end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from polar.core.records import Message, Text

Tags = tuple[str, str]
"""Opening and closing tag of a block."""
THINK: Tags = ("<think>", "</think>")
"""DeepSeek-R1, Qwen3 and most others."""


def strip_thinking(text: Text, *, opened: bool = False, tags: Tags = THINK) -> Text:
    """Return the answer in a text, "" if it has none, by the rules of the table above.

    Args:
        text: A string, or messages; of those the ones of the assistant are stripped, each on its own.
        opened: The prompt ends with an open block (`opens_thinking`), so that a text that closes none has no answer.
        tags: Opening and closing tag of a block.
    """
    if isinstance(text, str):
        return _answer(text, opened, tags)
    return tuple(
        Message(message.role, _answer(message.content, opened, tags)) if message.role == "assistant" else message
        for message in text
    )


def opens_thinking(prompt: str, tags: Tags = THINK) -> bool:
    """Return whether a prompt, as the chat template has rendered it, ends with an open block."""
    return prompt.rstrip().endswith(tags[0])


def _answer(text: str, opened: bool, tags: Tags) -> str:
    opening, closing = tags
    before, *pieces = re.split(f"({re.escape(opening)}|{re.escape(closing)})", text)
    inside, answer = opened, "" if opened else before
    for tag, piece in zip(pieces[::2], pieces[1::2], strict=True):
        if tag == closing and not inside:
            answer = ""  # the block was opened in the prompt, so that all of this was thinking
        inside = tag == opening
        answer += "" if inside else piece
    if inside:
        return ""
    return answer.strip() if pieces else answer


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
"""End tokens of common policies. OpenRLHF leaves them in the text without naming its policy's; references have none."""


def without_end(text: str, special_tokens: Sequence[str] = ()) -> str:
    """Remove the tokens that ended a response, be they several, and the white space behind them.

    Args:
        text: The response.
        special_tokens: Those of a tokenizer at hand (`Template.special_tokens`), which is often the policy's own; they
            are no text either at the end of a response.
    """
    tokens = {*END_TOKENS, *special_tokens} - {*THINK}
    kept = len(text)
    while True:
        end = kept
        while end and text[end - 1].isspace():
            end -= 1
        token = next((token for token in tokens if text.endswith(token, 0, end)), None)
        if token is None:
            return text[:kept]
        kept = end - len(token)


def blank(text: str) -> bool:
    """Return whether a text shows nothing: no characters, or only white space and invisible ones (U+200B)."""
    return not any(character.isprintable() and not character.isspace() for character in text)
