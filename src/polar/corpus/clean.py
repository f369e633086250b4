"""Sampled trajectories become a clean corpus (paper D.1.1: repetition loops are truncated, incomplete endings are cut).

`clean` applies its rules row by row, in this order: the prompt is in an evaluation set, the prompt nearly repeats an
earlier one, the output loops, it breaks off, it is in an evaluation set, it is empty, it is a refusal, the policy gave
it before. A row that goes is counted for the first of the reasons alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

from polar.core.errors import InputError
from polar.core.records import Message, Text, Trajectory, prompt_id, text_of
from polar.corpus.overlap import Decontaminator, NearDuplicates
from polar.data import record_rows
from polar.data.fields import Row, optional_string
from polar.data.readers import OnBadRow, ReadReport, convert_rows
from polar.data.writers import text_cell

CutEndings = Literal["known", "guess", "never"]
Drop = Literal["empty", "refused", "duplicate"]

EXAMPLES = 20
"""How many shared n-grams a report shows."""


@dataclass(slots=True)
class Counts:
    """Counts of one policy, or of all of them."""

    rows: int = 0
    kept: int = 0
    loops: int = 0
    """Outputs that were ended in a repetition loop."""
    loop_characters: int = 0
    """How much was cut there."""
    endings: int = 0
    """Outputs whose incomplete ending was cut."""
    ending_characters: int = 0
    endings_left: int = 0
    """Outputs that break off but have no complete sentence or line in their second half: left as they were."""
    endings_unknown: int = 0
    """Outputs without a finish_reason, so that nobody knows whether they break off."""
    empty: int = 0
    refused: int = 0
    duplicates: int = 0
    """Outputs that the same policy gave for the same prompt before."""
    removed: dict[str, int] = field(default_factory=dict)
    """Rows that are gone, per reason; each for the first reason only. Those whose prompt is the reason are counted
    nowhere else."""


NUMBERS = [item.name for item in fields(Counts) if item.name != "removed"]


@dataclass(slots=True)
class CleanReport:
    """Counts of `clean`; complete once its rows are consumed."""

    policies: dict[str, Counts] = field(default_factory=dict)
    shared_outputs: int = 0
    """Different outputs that several policies gave for the same prompt."""
    prompts: int = 0
    prompts_removed: dict[str, int] = field(default_factory=dict)
    """Prompts whose trajectories are all gone, per reason."""
    evaluation_ngrams: dict[str, int] = field(default_factory=dict)
    """Different n-grams of each evaluation file."""
    evaluation_boilerplate: int = 0
    """Those of them that do not count, since they are templates and phrases."""
    evaluation_short_questions: int = 0
    """Questions that are too short for an n-gram and were compared as a whole."""
    shared_ngrams: dict[str, int] = field(default_factory=dict)
    """The first n-gram that each contaminated row shares with an evaluation set, and how often."""

    @property
    def total(self) -> Counts:
        """The sum over all policies."""
        total = Counts()
        for counts in self.policies.values():
            for name in NUMBERS:
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            for reason, number in counts.removed.items():
                _add(total.removed, reason, number)
        return total

    def to_json(self) -> str:
        """All numbers, for files; of the shared n-grams only the most frequent."""
        values = {"total": asdict(self.total), **asdict(self)}
        values["shared_ngrams"] = dict(Counter(self.shared_ngrams).most_common(EXAMPLES))
        values["policies"] = {name: asdict(self.policies[name]) for name in sorted(self.policies)}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_rows(
    paths: Iterable[str], *, on_bad_row: OnBadRow = "error", report: ReadReport | None = None
) -> Iterator[tuple[Row, Trajectory]]:
    """Rows as they are in the files, with the trajectory in each of them.

    Raises:
        InputError: for a bad row or file, or when there are only bad rows.
    """
    report = ReadReport() if report is None else report
    for path in paths:
        yield from convert_rows(path, _with_trajectory, on_bad_row=on_bad_row, report=report)
    if not report.read:
        raise InputError(f"{', '.join(paths)}: expected trajectories, found none; the first: {report.first_reasons[0]}")


def _with_trajectory(row: Row) -> tuple[Row, Trajectory]:
    _, (trajectory,) = record_rows.trajectory(row)
    return row, trajectory


def clean(
    corpus: Iterable[tuple[Row, Trajectory]],
    *,
    cut_endings: CutEndings = "known",
    drop: Collection[Drop] = (),
    near_duplicates: NearDuplicates | None = None,
    evaluation: Decontaminator | None = None,
    report: CleanReport | None = None,
) -> Iterator[dict[str, Any]]:
    """Clean trajectories, in one pass and in the order of the input.

    Memory: about 200 bytes per trajectory (two 8-byte hashes in Python sets) and 150 per prompt, besides what the
    two arguments below say.

    Args:
        corpus: What `read_rows` gives.
        cut_endings: Which outputs may have an incomplete ending: "known" those whose finish_reason is "length",
            "guess" also those without a finish_reason that seem to break off, "never" none.
        drop: What is removed and not only counted.
        near_duplicates: Removes the trajectories of prompts that nearly repeat an earlier one.
        evaluation: Removes the trajectories whose prompt or output shares an n-gram with an evaluation set.
        report: Filled on the way.

    Yields:
        The rows that stay. Only the output is changed; if it is a list of messages, only the last one.
    """
    report = CleanReport() if report is None else report
    if evaluation:
        report.evaluation_ngrams = evaluation.ngrams
        report.evaluation_boilerplate = evaluation.boilerplate
        report.evaluation_short_questions = evaluation.short_questions
    removing = {"contaminated output", *drop}
    prompts: dict[str, tuple[str, str]] = {}
    seen: set[int] = set()
    owners: dict[int, str] = {}  # the policy that gave an output for a prompt; "" when there are several
    for row, trajectory in corpus:
        counts = report.policies.setdefault(trajectory.policy, Counts())
        counts.rows += 1
        prompt = _prompt_id(trajectory.prompt)
        if prompt not in prompts:
            prompts[prompt] = _judge_prompt(trajectory.prompt, near_duplicates, evaluation)
            report.prompts += 1
            if prompts[prompt][0]:
                _add(report.prompts_removed, prompts[prompt][0])
        reason, ngram = prompts[prompt]
        if not reason:
            output = _shortened(row, trajectory.output, cut_endings, counts)
            text = text_of(output)
            ngram = (evaluation.shared(text) if evaluation else None) or ""
            same, own = _hash(prompt, text), _hash(prompt, text, trajectory.policy)
            faults = {
                "contaminated output": bool(ngram),
                "empty": is_empty(text),
                "refused": is_refusal(text),
                "duplicate": own in seen,
            }
            counts.empty += faults["empty"]
            counts.refused += faults["refused"]
            counts.duplicates += faults["duplicate"]
            reason = next((fault for fault, found in faults.items() if found and fault in removing), "")
        if reason:
            _add(counts.removed, reason)
            if ngram:
                _add(report.shared_ngrams, ngram)
            continue
        seen.add(own)
        owner = owners.setdefault(same, trajectory.policy)
        if owner not in ("", trajectory.policy):
            owners[same] = ""
            report.shared_outputs += 1
        counts.kept += 1
        yield row.fields if output is trajectory.output else row.fields | {"output": _cell(row, output)}


_prompt_id = lru_cache(prompt_id)  # the rows of a prompt mostly follow one another


def _judge_prompt(
    prompt: Text, near_duplicates: NearDuplicates | None, evaluation: Decontaminator | None
) -> tuple[str, str]:
    """Return why the trajectories of a new prompt are removed ("" if they are not), and the n-gram that it shares."""
    ngram = evaluation.shared(text_of(prompt), prompt=True) if evaluation else None
    if ngram:
        return "contaminated prompt", ngram
    # After that, so that a prompt that stays never loses its trajectories to one that goes.
    return "near-duplicate prompt" if near_duplicates and near_duplicates.seen(prompt) else "", ""


def _shortened(row: Row, output: Text, cut_endings: CutEndings, counts: Counts) -> Text:
    """The output (of messages the last one) without loop and incomplete ending; the same object if it has neither."""
    before = output if isinstance(output, str) else output[-1].content
    text = truncate_loop(before)
    if len(text) < len(before):
        counts.loops += 1
        counts.loop_characters += len(before) - len(text)
    finish_reason = optional_string(row, "finish_reason")
    counts.endings_unknown += finish_reason is None
    guessed = finish_reason is None and cut_endings == "guess" and seems_to_break_off(text)
    if guessed or (finish_reason == "length" and cut_endings != "never"):
        complete = cut_incomplete_ending(text)
        if complete is None:
            counts.endings_left += 1
        elif len(complete) < len(text):
            counts.endings += 1
            counts.ending_characters += len(text) - len(complete)
            text = complete
    if text == before:
        return output
    return text if isinstance(output, str) else (*output[:-1], Message(output[-1].role, text))


def _cell(row: Row, output: Text) -> object:
    """A changed output in the form that the column had."""
    old = row.fields["output"]
    if isinstance(old, list):
        return [*old[:-1], {**old[-1], "content": text_of(output[-1:])}]
    return text_cell(output, "assistant")


def _add(counts: dict[str, int], name: str, number: int = 1) -> None:
    counts[name] = counts.get(name, 0) + number


def _hash(*parts: str) -> int:
    return int.from_bytes(blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


# Rules: what is wrong with a sampled text, from the text alone (paper D.1.1). Thresholds were set by reading real
# outputs: base models that ramble to their token limit, and chat models whose tables, lists, refrains and code must
# stay as they are.

LOOP_TIMES = 3
"""A unit that occurs this often in a row, the last time perhaps not to its end, is a loop, if ..."""
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
