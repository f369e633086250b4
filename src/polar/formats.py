"""From one row of a data file to records: our own formats and those that people bring.

A row of our own has the fields of the record (`polar.records`). Preference data are recognised row by row, by their
fields, in this order:

| fields | format | source |
|---|---|---|
| ranked | ranked list, best first | this project |
| chosen and rejected without prompt | HH-RLHF transcripts, TRL implicit prompt | Anthropic hh-rlhf, TRL |
| prompt, chosen, rejected | POLAR pairs, RewardBench 1 and 2, TRL explicit prompt | POLAR, allenai, TRL |
| prompt, response_a, response_b, winner_* | arena pairs | lmarena-ai arena-human-preference |
| context, completions with rank, completion | NeMo-RL, lower rank preferred | NVIDIA NeMo-RL |
| prompt, completions with text or response, score | scored answers | UltraFeedback, Nectar |

All may have margin, domain (or subset) and wrapper beside. POLAR scores against a reference: data without one need the
name of the column that holds it, and no answer of a row is ever taken for its reference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from polar.errors import InputError
from polar.fields import (
    TEXT,
    Row,
    as_number,
    as_string,
    as_text,
    describe,
    json_list,
    json_object,
    list_at,
    optional_string,
    string_at,
    text_at,
    texts_at,
)
from polar.records import Comparison, Group, Message, Preference, Text, Trajectory, Triple, Wrapper, text_of
from polar.references import groups_of

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")
ANSWERS = ("output", "candidates", "chosen", "rejected", "ranked", "response_a", "response_b", "completions")

Dialogue = tuple[Message, ...]
Rankings = list[tuple[Text, ...]]
"""The preferences of one row: for each of them its answers, best first."""


class TieError(InputError):
    """The row is sound but prefers no answer (a tie): it is always skipped and counted."""


def comparison(row: Row, reference_column: str | None) -> tuple[str, list[Comparison]]:
    """Read a row with prompt, reference, output [, id, wrapper]."""
    prompt, reference, output = text_at(row, "prompt"), _reference(row, reference_column), text_at(row, "output")
    return "comparison", [Comparison(prompt, reference, output, _id(row), wrapper_of(row))]


def group(row: Row, reference_column: str | None) -> tuple[str, list[Group]]:
    """Read a row with prompt, reference, candidates [, id, wrapper]; a comparison is a group of one."""
    prompt, reference, candidates = text_at(row, "prompt"), _reference(row, reference_column), _candidates(row)
    name = "group" if row.has("candidates") else "comparison"
    return name, [Group(prompt, reference, candidates, _id(row), wrapper_of(row))]


def groups(row: Row) -> tuple[str, list[tuple[Group, ...]]]:
    """Read the same with reference or references, a list: one group per reference, all of one row together."""
    if not row.has("references"):
        name, (one,) = group(row, None)
        return name, [(one,)]
    if row.has("reference"):
        raise row.error("references", "either reference or references", "both")
    prompt, references = text_at(row, "prompt"), texts_at(row, "references", at_least=1)
    return "several references", [groups_of(prompt, references, _candidates(row), _id(row), wrapper_of(row))]


def triple(row: Row) -> tuple[str, list[Triple]]:
    """Read a row with prompt, reference, positive, negative [, policy, negative_policy, wrapper, strategy]."""
    prompt, reference = text_at(row, "prompt"), text_at(row, "reference")
    positive, negative = text_at(row, "positive"), text_at(row, "negative")
    policies = optional_string(row, "policy"), optional_string(row, "negative_policy")
    strategy = optional_string(row, "strategy")
    return "triple", [Triple(prompt, reference, positive, negative, *policies, wrapper_of(row), strategy)]


def trajectory(row: Row) -> tuple[str, list[Trajectory]]:
    """Read a row with prompt, policy, output [, sample, decoding, wrapper, family, step].

    The decoding may also be a JSON object in meta.
    """
    prompt, policy, output = text_at(row, "prompt"), string_at(row, "policy"), text_at(row, "output")
    decoding = json_object(row.fields.get("decoding" if row.has("decoding") else "meta"))
    if decoding is None and row.has("decoding"):
        raise row.wrong("decoding", "an object")
    sample, step, family = count_of(row, "sample"), count_of(row, "step"), optional_string(row, "family")
    return "trajectory", [
        Trajectory(prompt, policy, output, sample or 0, decoding or {}, wrapper_of(row), family, step)
    ]


def preference(row: Row, reference_column: str | None) -> tuple[str, list[Preference]]:
    """Read a row of preference data in any of the formats above: the name of the format and its preferences."""
    if row.has("ranked"):
        name, prompt, rankings = "ranked list", text_at(row, "prompt"), [texts_at(row, "ranked", at_least=2)]
    elif row.has("chosen") or row.has("rejected"):
        name, prompt, rankings = _pair(row, reference_column)
    elif row.has("response_a") or row.has("response_b"):
        name, prompt, rankings = _arena(row)
    elif row.has("completions") and row.has("context"):
        name, prompt, rankings = "NeMo-RL", text_at(row, "context"), _by_rank(row)
    elif row.has("completions"):
        return "scored answers", [
            _preference(row, reference_column, text_at(row, "prompt"), pair, gap) for pair, gap in _by_score(row)
        ]
    else:
        raise InputError(
            f"{row.place}: expected a preference (chosen and rejected, ranked, response_a and response_b, or "
            f"completions), found the fields {json.dumps(sorted(row.fields))}"
        )
    margin = as_number(row, "margin", row.fields["margin"]) if row.has("margin") else None
    return name, [_preference(row, reference_column, prompt, ranked, margin) for ranked in rankings]


def _preference(
    row: Row, reference_column: str | None, prompt: Text, ranked: tuple[Text, ...], margin: float | None
) -> Preference:
    domain = optional_string(row, "domain" if row.has("domain") else "subset")
    return Preference(prompt, _reference(row, reference_column), ranked, margin, domain, wrapper_of(row))


# Fields that several formats share


def _reference(row: Row, reference_column: str | None) -> Text:
    if reference_column in ANSWERS:
        raise row.error(reference_column, "reference_column to name an independent reference", "an answer to be scored")
    if reference_column is None and not row.has("reference"):
        option = "POLAR scores against a reference: name the column that holds it with reference_column"
        raise InputError(f"{row.wrong('reference', TEXT)}; {option}")
    return text_at(row, reference_column or "reference")


def _candidates(row: Row) -> tuple[Text, ...]:
    return texts_at(row, "candidates", at_least=1) if row.has("candidates") else (text_at(row, "output"),)


def wrapper_of(row: Row) -> Wrapper:
    """How prompt and response of a row are joined; "sft" when it does not say."""
    wrapper = row.fields["wrapper"] if row.has("wrapper") else "sft"
    if wrapper not in ("sft", "pretrain"):
        raise row.wrong("wrapper", '"sft" or "pretrain"')
    return wrapper


def count_of(row: Row, field: str) -> int | None:
    """The whole number in a field, or None when the field is absent."""
    value = row.fields.get(field)
    if isinstance(value, bool) or not (value is None or (isinstance(value, int) and value >= 0)):
        raise row.wrong(field, "a whole number from 0")
    return value


def _id(row: Row) -> str | int | None:
    value = row.fields.get("id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, str):
        raise row.wrong("id", "a string or a whole number")
    return as_string(row, "id", value)


# Pairs: POLAR, TRL, RewardBench, HH-RLHF


def _pair(row: Row, reference_column: str | None) -> tuple[str, Text, Rankings]:
    chosen = row.fields.get("chosen")
    if not row.has("prompt"):
        if isinstance(chosen, str) and HH_TURN.match(chosen):
            return "HH-RLHF transcripts", *_split(row, transcript(row, "chosen"), transcript(row, "rejected"))
        return "TRL implicit prompt", *_split(row, _messages(row, "chosen"), _messages(row, "rejected"))
    prompt = text_at(row, "prompt")
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        good, bad = texts_at(row, "chosen", at_least=1), texts_at(row, "rejected", at_least=1)
        return "RewardBench 2", prompt, [(best, worst) for best in good for worst in bad]
    best, worst = text_at(row, "chosen"), text_at(row, "rejected")
    if reference_column is None:
        return "POLAR pairs", prompt, [(best, worst)]
    if isinstance(best, tuple) and isinstance(worst, tuple):
        shared = _shared(best, worst)
        if shared and text_of(best[:shared]) == text_of(prompt):  # as in ultrafeedback_binarized
            return "TRL explicit prompt, repeated in the answers", *_split(row, best, worst)
    return "RewardBench" if row.has("subset") else "TRL explicit prompt", prompt, [(best, worst)]


def _messages(row: Row, field: str) -> Dialogue:
    messages = text_at(row, field)
    if isinstance(messages, str):
        raise row.wrong(field, "a list of messages that begins with the prompt (or a field prompt beside it)")
    return messages


def transcript(row: Row, field: str) -> Dialogue:
    """Turns of an HH-RLHF transcript; empty turns are kept.

    Raises:
        InputError: turns do not alternate from Human to Assistant.
    """
    before, *pieces = HH_TURN.split(string_at(row, field))
    speakers, contents = pieces[::2], pieces[1::2]
    if before or not speakers or speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        found = describe(before) if before else ", ".join(speakers[-4:])
        raise row.error(field, "turns of Human and Assistant in alternation, Assistant last", found)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(speakers, contents, strict=True)
    return tuple(Message(roles[speaker], content.removeprefix(" ")) for speaker, content in turns)


def _shared(first: Dialogue, second: Dialogue) -> int:
    """How many messages both begin with; the last message of each always stays an answer."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return shared


def _split(row: Row, better: Dialogue, worse: Dialogue) -> tuple[Text, Rankings]:
    """Two conversations become their common beginning and the two answers to it."""
    shared = _shared(better, worse)
    if not shared:
        raise InputError(
            f"{row.place}: expected two conversations that begin with the same prompt, found nothing in common"
        )
    return better[:shared], [(better[shared:], worse[shared:])]


# Arena pairs


def _arena(row: Row) -> tuple[str, Text, Rankings]:
    won = [name for name in WINNERS if row.fields.get(name) == 1]
    if len(won) != 1:
        raise row.error("winner_*", f"1 in one of {', '.join(WINNERS)}", f"it in {len(won)}")
    if won == ["winner_tie"]:
        raise TieError(f"{row.place}: a tie prefers no answer")
    prompts = _turns(row, "prompt")
    dialogues = [_dialogue(row, prompts, "response_a"), _dialogue(row, prompts, "response_b")]
    if won == ["winner_model_b"]:
        dialogues.reverse()
    return "arena pairs", *_split(row, *dialogues)


def _dialogue(row: Row, prompts: Sequence[str], field: str) -> Dialogue:
    responses = _turns(row, field)
    if len(responses) != len(prompts):
        raise row.error(field, f"as many turns as the prompt has ({len(prompts)})", str(len(responses)))
    turns = zip(prompts, responses, strict=True)
    return tuple(message for ask, answer in turns for message in (Message("user", ask), Message("assistant", answer)))


def _turns(row: Row, field: str) -> list[str]:
    """A string is one turn, unless it is JSON for a list of strings (a null among them is a missing answer)."""
    turns = row.fields.get(field)
    if isinstance(turns, str):
        listed = json_list(turns)
        turns = listed if listed and all(item is None or isinstance(item, str) for item in listed) else [turns]
    if not isinstance(turns, list) or not turns:
        raise row.wrong(field, "a string or a list of strings, one per turn")
    return [as_string(row, f"{field}[{i}]", turn) for i, turn in enumerate(turns)]


# Several graded answers: NeMo-RL, UltraFeedback, Nectar


def _graded(row: Row, grade: str, *answer_fields: str) -> list[tuple[float, Text]]:
    """Grade and answer of each completion, lowest grade first."""
    graded = []
    for i, item in enumerate(list_at(row, "completions", "a list of completions", at_least=2)):
        where = f"completions[{i}]"
        if not isinstance(item, dict):
            raise row.error(where, "an object", describe(item))
        field = next((name for name in answer_fields if item.get(name) is not None), answer_fields[0])
        answer = as_text(row, f"{where}.{field}", item.get(field))
        graded.append((as_number(row, f"{where}.{grade}", item.get(grade)), answer))
    if len({number for number, _ in graded}) == 1:
        raise TieError(f"{row.place}: a tie, all completions have the same {grade}")
    return sorted(graded, key=lambda pair: pair[0])


def _by_rank(row: Row) -> Rankings:
    """One ranked list, lowest rank first; if ranks are shared, all pairs of different ranks."""
    graded = _graded(row, "rank", "completion")
    if len({rank for rank, _ in graded}) == len(graded):
        return [tuple(answer for _, answer in graded)]
    return [(better, worse) for (low, better), (high, worse) in combinations(graded, 2) if low < high]


def _by_score(row: Row) -> list[tuple[tuple[Text, Text], float]]:
    """All pairs of answers with different scores, better one first, and the gap between their scores."""
    graded = _graded(row, "score", "text", "response")
    return [((better, worse), high - low) for (low, worse), (high, better) in combinations(graded, 2) if low < high]


LABEL = ("prompt", "references")
"""The keys of a label in JSON: what a framework hands on as one string of a row."""


def label_of(prompt: Any, references: Sequence[Any]) -> str:
    """The label that carries a prompt and its references, both as they stand in JSON."""
    return json.dumps(dict(zip(LABEL, (prompt, references), strict=True)), ensure_ascii=False)


def label_fields(label: Any) -> dict[str, Any] | None:
    """The prompt and the references that a label of `label_of` carries, or None if it is another one."""
    fields = json_object(label)
    return fields if fields is not None and set(fields) == set(LABEL) else None
