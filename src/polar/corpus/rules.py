"""What is wrong with a sampled text: small functions of the text alone (paper D.1.1).

Thresholds were set by reading real outputs: base models that ramble to their token limit, and chat models whose tables,
lists, refrains and code must stay as they are.
"""

from __future__ import annotations

import re

LOOP_TIMES = 3
"""A unit that stands this often in a row, the last time perhaps not to its end, is a loop, if ..."""
LOOP_LENGTH = 120
"""... all but its first occurrence have this many characters. Refrains and blank table rows have less."""
WORDLESS_LOOP_LENGTH = 400
"""The same for units without letters and digits: rules, leaders, rows of empty cells, drawings."""
REFUSAL_LENGTH = 1000
"""Refusals of more characters go on to say something."""
_BLANK = " \t\r\n\f\v\u00a0\u200b\u3000\ufeff\ufffd"
"""What may follow the end of a text: white space, and the halves of characters that a token limit leaves."""
_ANCHOR = 20
_CLOSING = r"""["'”’)\]}』」】）》*_`]*"""
_END = re.compile(rf"[.!?]+{_CLOSING}(?=\s|\Z)|[。！？…]+{_CLOSING}|\n")
"""The end of a sentence or of a line."""
_REST_OF_WORD = re.compile(r"(?<=[^\W_])[^\W_\u3040-\u9fff]*")
_NO_END = re.compile(r"(?:(?:\A|\n)[ \t]*\(?(?:\d+|\w)|\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e))\.\Z")
"""A dot behind the number of a list item or behind an abbreviation."""
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_GOES_ON = ",;:、，；：([{（「“‘-"

_CANNOT = r"(?:can(?:no|')?t|can not|won't|will not|am (?:un|not )able to|'m (?:un|not )able to|must decline)"
_HELP = (
    r"(?:help|assist|provide|give|create|write|generate|fulfill?|comply|engage|answer|support|discuss|do that|offer|"
    r"suggest|encourage|endorse|promote|condone|in good conscience)"
)
_ANSWER = re.compile(r"\b(?:however|that said|nevertheless|here (?:are|is))\b|但是|不过|然而", re.IGNORECASE)
"""A text with this may go on to answer, or may not."""
_AI = r"as an? (?:\w+ )?(?:ai|artificial intelligence|language model|assistant)[^.,\n]{0,60}?,? "
_SORRY = r"(?:i(?:'m| am) (?:really |very |so |deeply )?sorry|sorry|i apologi[sz]e|my apologies|unfortunately)"
_REFUSAL = re.compile(
    rf"(?:{_SORRY}[,.!]? (?:but )?(?:{_AI})?i ?{_CANNOT}|{_AI}i ?{_CANNOT}|i ?{_CANNOT} {_HELP})\b"
    r"|(?:(?:非常|很|十分)?(?:抱歉|对不起|遗憾)|不好意思)[，,。！!]?(?:但是?)?"
    r"(?:作为(?:一个|一名|一款)?[^，,。\n]{2,20}[，,])?我(?:们)?(?:暂时|目前|还)?(?:无法|不能|不可以|没有办法|没办法)"
    r"|作为(?:一个|一名|一款)?(?:ai|人工智能|(?:大型)?语言模型)[^，,。\n]{0,20}[，,]我(?:无法|不能|不可以)",
    re.IGNORECASE,
)


def truncate_loop(text: str) -> str:
    """End a text that falls into a repetition loop after the first occurrence of what it repeats.

    The loop must last to the end of the text, white space and broken characters aside, and be long enough
    (`LOOP_TIMES`, `LOOP_LENGTH`). Where the unit begins is arbitrary, so the first occurrence is kept to the end of
    its sentence or line if it has one, or else of its word.

    Returns:
        The text itself when there is no loop. The time is linear in its length.
    """
    body = text.rstrip(_BLANK)
    if len(text) - len(body) >= WORDLESS_LOOP_LENGTH:
        text = body
    loop = _loop(body)
    if loop is None:
        return text
    start, period = loop
    first = start + period
    ends = [end.end() for end in (_END.search(body, first - 1), _REST_OF_WORD.match(body, first)) if end]
    end = next((end for end in ends if end < first + period), first)
    # What is left may end in a loop itself: in the unit of a larger loop.
    return truncate_loop(body[:end].rstrip(_BLANK))


def _loop(text: str) -> tuple[int, int] | None:
    """Start and period of the longest loop at the end of a text."""
    # Every loop that is long enough holds its last few characters at least three times.
    if len(text) < LOOP_LENGTH or text.count(text[-_ANCHOR:]) < LOOP_TIMES:
        return None
    longest = best = 0
    for period, same in enumerate(_self_matches(text[::-1], len(text) // LOOP_TIMES)):
        length = period + same
        if same >= LOOP_LENGTH and length >= LOOP_TIMES * period and length > longest:
            longest, best = length, period
    start = len(text) - longest
    wordless = not any(character.isalnum() for character in text[start : start + best])
    if not best or (wordless and longest - best < WORDLESS_LOOP_LENGTH):
        return None
    return start, best


def _self_matches(text: str, limit: int) -> list[int]:
    """The Z-function up to a limit: how many characters from each position on equal those from the beginning on."""
    matches = [0] * (limit + 1)
    left = right = 0
    for i in range(1, limit + 1):
        same = min(right - i, matches[i - left]) if i < right else 0
        while i + same < len(text) and text[same] == text[i + same]:
            same += 1
        matches[i] = same
        if i + same > right:
            left, right = i, i + same
    return matches


def cut_incomplete_ending(text: str) -> str | None:
    """Cut a text that breaks off back to its last complete sentence or line.

    In an open code block that is its last complete line; the block stays open, as nothing is ever added. A block
    without a complete line goes as a whole.

    Returns:
        The text itself if its end is complete, and None if no complete end is in its second half.
    """
    body = text.rstrip(_BLANK)
    fences = [fence.start() for fence in _FENCE.finditer(body)]
    if len(fences) % 2:
        first_line = body.find("\n", fences[-1]) + 1
        last_line = body.rfind("\n", first_line) if first_line else -1
        end = last_line if last_line > 0 else len(body[: fences[-1]].rstrip(_BLANK))
    elif fences and body.rfind("\n") < fences[-1]:
        return text
    else:
        end = 0
        for match in _END.finditer(body, max(0, len(body) // 2 - 1)):
            if match[0] == "\n":
                end = match.start()
            elif not _NO_END.search(body, max(0, match.end() - 12), match.end()):
                end = match.end()
        if end == len(body):
            return text
    kept = body[:end].rstrip(_BLANK)
    return kept if 2 * len(kept) >= len(body) and kept else None


def seems_to_break_off(text: str) -> bool:
    """Whether a text ends in the middle of a sentence, as far as one can tell from the text alone.

    It does when its last character is a letter, a digit or a mark after which something must follow, or when a code
    block is open. It does not when the line before ends in a letter or digit too, as in lists, verses and tables.
    """
    body = text.rstrip(_BLANK)
    if len(_FENCE.findall(body)) % 2:
        return True
    *before, last = [line for line in (line.rstrip() for line in body.splitlines()) if line] or [""]
    return last[-1:] in tuple(_GOES_ON) or (last[-1:].isalnum() and not (before and before[-1][-1].isalnum()))


def is_empty(text: str) -> bool:
    """Whether there is nothing but white space (and broken or invisible characters)."""
    return not text.strip().strip(_BLANK)


def is_refusal(text: str) -> bool:
    """Whether a short text begins by refusing, in English or Chinese ("I'm sorry, but I can't", "很抱歉，我无法").

    It errs on the side of no: a text with a "however" in it may have answered after all.
    """
    text = text.strip()
    if len(text) > REFUSAL_LENGTH or not _REFUSAL.match(text[:300].replace("’", "'")):
        return False
    return not _ANSWER.search(text)
