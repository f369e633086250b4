"""Sampled trajectories become a clean corpus (paper D.1.1: repetition loops are truncated, incomplete endings are cut).

`clean` applies the rules of `polar.corpus.rules` row by row, in this order: the prompt is in an evaluation
set, the prompt nearly repeats an earlier one, the output loops, it breaks off, it is in an evaluation set, it is empty,
it is a refusal, the policy gave it before. A row that goes is counted for the first of the reasons alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

from polar.core.errors import InputError
from polar.core.records import Message, Text, Trajectory, prompt_id, text_of
from polar.corpus.overlap import Decontaminator, NearDuplicates
from polar.corpus.rules import cut_incomplete_ending, is_empty, is_refusal, seems_to_break_off, truncate_loop
from polar.data import formats
from polar.data.fields import Row, optional_string
from polar.data.readers import OnBadRow, ReadReport, convert_rows
from polar.data.writers import text_cell

CutEndings = Literal["known", "guess", "never"]
Drop = Literal["empty", "refused", "duplicate"]

EXAMPLES = 20
"""How many shared n-grams a report shows."""


@dataclass(slots=True)
class Counts:
    """What was found in the trajectories of one policy, or of all of them."""

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
    """What `clean` counted, complete once its rows are consumed."""

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
    """Why contaminated rows are gone: the first n-gram that each shares with an evaluation set, and how often."""

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
    _, (trajectory,) = formats.trajectory(row)
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
    """Why the trajectories of a new prompt are removed ("" if they are not), and the n-gram that it shares."""
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
