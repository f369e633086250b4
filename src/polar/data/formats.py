"""From one row of a data file to records: our own formats and those that people bring.

A row of our own has the fields of the record (`polar.core.records`). Preference data are recognised row by row, by
their fields, in this order:

| fields | format | source |
|---|---|---|
| ranked | ranked list, best first | this project |
| chosen and rejected without prompt | HH-RLHF transcripts, TRL implicit prompt | Anthropic hh-rlhf, TRL |
| prompt, chosen, rejected | POLAR pairs, RewardBench 1 and 2, TRL explicit prompt | POLAR, allenai, TRL |
| prompt, response_a, response_b, winner_* | arena pairs | lmarena-ai arena-human-preference |
| context, completions with rank, completion | NeMo-RL, lower rank preferred | NVIDIA NeMo-RL |
| prompt, completions with text or response, score | scored answers | UltraFeedback, Nectar |

All may have margin, domain (or subset) and wrapper beside. POLAR scores against a reference: data without one need the
name of the column that holds it, and no answer of a row is ever taken for its reference. Where answers repeat the
prompt, it is taken out of them (`polar.data.dialogues`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from polar.core.errors import InputError
from polar.core.records import Comparison, Group, Message, Preference, Text, Trajectory, Triple, Wrapper, groups_of
from polar.data.dialogues import HH_TURN, Dialogue, has_question, split, transcript
from polar.data.fields import (
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

WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")
ITEM = ("prompt", "reference", "output")
TRIPLE = ("prompt", "reference", "positive", "negative")
ANSWERS = ("output", "candidates", "chosen", "rejected", "ranked", "response_a", "response_b", "completions")

Item = Mapping[str, Any] | tuple[Any, Any, Any]
"""{"prompt", "reference", "output" [, "id", "wrapper"]}, (prompt, reference, output), or (prompt, reference, [outputs])
with outputs that share one truncation budget. Texts are strings or lists of {"role", "content"}."""
Scored = Comparison | Item
Ranked = dict[str, Text]
"""The answers of a preference by their places in the row, best first."""


class TieError(InputError):
    """The row is sound but prefers no answer (a tie): it is always skipped and counted."""


def comparison(row: Row, reference_column: str | None) -> tuple[str, list[Comparison]]:
    """Read a row with prompt, reference, output [, id, wrapper]."""
    prompt, reference, output = text_at(row, "prompt"), _reference(row, reference_column), text_at(row, "output")
    prompt, (reference, output) = split(row, prompt, {"reference": reference, "output": output})
    return "comparison", [Comparison(prompt, reference, output, _id(row), wrapper_of(row))]


def comparisons(items: Scored | Iterable[Scored]) -> list[Comparison]:
    """Return the comparisons in what `groups_of_items` takes; a group is one comparison per candidate."""
    return [
        Comparison(group.prompt, group.reference, candidate, group.id, group.wrapper)
        for group in groups_of_items(items)
        for candidate in group.candidates
    ]


def groups_of_items(items: Scored | Iterable[Scored]) -> list[Group]:
    """Return what is to be scored as groups; a comparison is a group of one, and a single item is a list of one.

    Raises:
        InputError: an item is not of that form; the message has its number.
    """
    several: object = [items] if isinstance(items, Comparison | Mapping) or _is_item(items) else items
    if not isinstance(several, Iterable) or isinstance(several, str):
        raise InputError(
            "expected comparisons, dictionaries of prompt, reference and output, or tuples of these three, "
            f"found {several!r:.40}"
        )
    return [_group_of_item(one, number) for number, one in enumerate(several)]


def _is_item(value: object) -> bool:
    """Return whether a value is one tuple (prompt, reference, output) and not a tuple of several items."""
    if not isinstance(value, tuple) or not value:
        return False
    return isinstance(value[0], str | list) or (isinstance(value[0], tuple) and all(map(_is_message, value[0])))


def _is_message(value: object) -> bool:
    return isinstance(value, Message | Mapping)


def _group_of_item(item: object, number: int) -> Group:
    if isinstance(item, Comparison):
        return Group(item.prompt, item.reference, (item.output,), item.id, item.wrapper)
    if isinstance(item, tuple) and len(item) == len(ITEM):
        row = Row("item", number, dict(zip(ITEM, item, strict=True)))
    elif isinstance(item, Mapping):
        row = Row("item", number, dict(item))
    else:
        expected = "a Comparison, a dictionary of prompt, reference and output, or a tuple of these three"
        raise InputError(f"item:{number}: expected {expected}, found {describe(item)}")
    for field in ITEM:
        if not row.has(field):
            raise row.wrong(field, TEXT)
    prompt, reference, output = (row.fields[field] for field in ITEM)
    answers = {"reference": reference, "output": output}
    if isinstance(item, tuple) and isinstance(output, list | tuple) and not all(map(_is_message, output)):
        answers = {"reference": reference, **{f"output[{i}]": text for i, text in enumerate(output)}}
    texts = {place: _literal(row, place, text) for place, text in answers.items()}
    prompt, (reference, *candidates) = split(row, _literal(row, "prompt", prompt), texts)
    return Group(prompt, reference, tuple(candidates), _id(row), wrapper_of(row))


def _literal(row: Row, where: str, value: object) -> Text:
    """Return a text whose strings are taken as they are; in files they may spell messages."""
    return as_string(row, where, value) if isinstance(value, str) else as_text(row, where, value)


def group(row: Row, reference_column: str | None) -> tuple[str, list[Group]]:
    """Read a row with prompt, reference, candidates [, id, wrapper]; a comparison is a group of one."""
    prompt, reference = text_at(row, "prompt"), _reference(row, reference_column)
    prompt, (reference, *candidates) = split(row, prompt, {"reference": reference, **_candidates(row)})
    name = "group" if row.has("candidates") else "comparison"
    return name, [Group(prompt, reference, tuple(candidates), _id(row), wrapper_of(row))]


def groups(row: Row) -> tuple[str, list[tuple[Group, ...]]]:
    """Read the same with reference or references, a list: one group per reference, all of one row together."""
    if not row.has("references"):
        name, (one,) = group(row, None)
        return name, [(one,)]
    if row.has("reference"):
        raise row.error("references", "either reference or references", "both")
    prompt, references = text_at(row, "prompt"), named("references", texts_at(row, "references", at_least=1))
    prompt, answers = split(row, prompt, references | _candidates(row))
    several, candidates = answers[: len(references)], answers[len(references) :]
    return "several references", [groups_of(prompt, several, candidates, _id(row), wrapper_of(row))]


def triple(row: Row) -> tuple[str, list[Triple]]:
    """Read a row with prompt, reference, positive, negative [, policy, negative_policy, wrapper, strategy]."""
    prompt, *answers = (text_at(row, field) for field in TRIPLE)
    prompt, (reference, positive, negative) = split(row, prompt, dict(zip(TRIPLE[1:], answers, strict=True)))
    policies = optional_string(row, "policy"), optional_string(row, "negative_policy")
    strategy = optional_string(row, "strategy")
    return "triple", [Triple(prompt, reference, positive, negative, *policies, wrapper_of(row), strategy)]


def trajectory(row: Row) -> tuple[str, list[Trajectory]]:
    """Read a row with prompt, policy, output [, sample, decoding, wrapper, family, step].

    The decoding may also be a JSON object in meta.
    """
    prompt, policy, output = text_at(row, "prompt"), string_at(row, "policy"), text_at(row, "output")
    prompt, (output,) = split(row, prompt, {"output": output})
    decoding = json_object(row.fields.get("decoding" if row.has("decoding") else "meta"))
    if decoding is None and row.has("decoding"):
        raise row.wrong("decoding", "an object")
    sample, step, family = count_of(row, "sample"), count_of(row, "step"), optional_string(row, "family")
    return "trajectory", [
        Trajectory(prompt, policy, output, sample or 0, decoding or {}, wrapper_of(row), family, step)
    ]


def preference(row: Row, reference_column: str | None) -> tuple[str, list[Preference]]:
    """Read a row of preference data in any of the formats above: the name of the format and its preferences."""
    name, prompt, rankings = _rankings(row, reference_column)
    found = [_preference(row, reference_column, prompt, ranked, margin) for ranked, margin in rankings]
    if prompt is not None and any(one.prompt is not prompt for one in found):
        name += ", repeated in the answers"
    return name, found


def _rankings(row: Row, reference_column: str | None) -> tuple[str, Text | None, list[tuple[Ranked, float | None]]]:
    """The name of the format, the prompt of the row if it has one, and rankings with their margins."""
    prompt: Text | None
    if row.has("ranked"):
        name, prompt = "ranked list", text_at(row, "prompt")
        rankings = [named("ranked", texts_at(row, "ranked", at_least=2))]
    elif row.has("chosen") or row.has("rejected"):
        name, prompt, rankings = _pair(row, reference_column)
    elif row.has("response_a") or row.has("response_b"):
        name, prompt, rankings = "arena pairs", None, [_arena(row)]
    elif row.has("completions") and row.has("context"):
        name, prompt, rankings = "NeMo-RL", text_at(row, "context"), _by_rank(row)
    elif row.has("completions"):
        return "scored answers", text_at(row, "prompt"), _by_score(row)
    else:
        raise InputError(
            f"{row.place}: expected a preference (chosen and rejected, ranked, response_a and response_b, or "
            f"completions), found the fields {json.dumps(sorted(row.fields))}"
        )
    margin = as_number(row, "margin", row.fields["margin"]) if row.has("margin") else None
    if margin is not None and margin < 0:
        raise row.error("margin", "0 or more (chosen is the better answer)", f"{margin:g}")
    return name, prompt, [(ranked, margin) for ranked in rankings]


def _preference(
    row: Row, reference_column: str | None, prompt: Text | None, ranked: Ranked, margin: float | None
) -> Preference:
    answers = {"reference": _reference(row, reference_column), **ranked}
    prompt, (reference, *best_first) = split(row, prompt, answers)
    domain = optional_string(row, "domain" if row.has("domain") else "subset")
    return Preference(prompt, reference, tuple(best_first), margin, domain, wrapper_of(row))


# Fields that several formats share


def _reference(row: Row, reference_column: str | None) -> Text:
    if reference_column in ANSWERS:
        raise row.error(reference_column, "reference_column to name an independent reference", "an answer to be scored")
    if reference_column is None and not row.has("reference"):
        option = "POLAR scores against a reference: name the column that holds it with reference_column"
        raise InputError(f"{row.wrong('reference', TEXT)}; {option}")
    return text_at(row, reference_column or "reference")


def _candidates(row: Row) -> dict[str, Text]:
    if row.has("candidates"):
        return named("candidates", texts_at(row, "candidates", at_least=1))
    return {"output": text_at(row, "output")}


def named(field: str, texts: Sequence[Text]) -> dict[str, Text]:
    """The texts of a list by their places in the row."""
    return {f"{field}[{number}]": text for number, text in enumerate(texts)}


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


def _pair(row: Row, reference_column: str | None) -> tuple[str, Text | None, list[Ranked]]:
    chosen, rejected = row.fields.get("chosen"), row.fields.get("rejected")
    prompt = text_at(row, "prompt") if row.has("prompt") else None
    if isinstance(chosen, str) and HH_TURN.match(chosen) and (prompt is None or HH_TURN.match(str(rejected))):
        pair: Ranked = {field: transcript(row, field) for field in ("chosen", "rejected")}
        return "HH-RLHF transcripts", prompt, [pair]
    if prompt is None:
        return "TRL implicit prompt", None, [{field: _conversation(row, field) for field in ("chosen", "rejected")}]
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        good, bad = (named(field, texts_at(row, field, at_least=1)) for field in ("chosen", "rejected"))
        return "RewardBench 2", prompt, [dict(pair) for pair in product(good.items(), bad.items())]
    name = "POLAR pairs" if reference_column is None else "RewardBench" if row.has("subset") else "TRL explicit prompt"
    return name, prompt, [{field: text_at(row, field) for field in ("chosen", "rejected")}]


def _conversation(row: Row, field: str) -> Text:
    messages = text_at(row, field)
    if not has_question(messages):
        raise row.wrong(field, "a list of messages that begins with the prompt (or a field prompt beside it)")
    return messages


# Arena pairs


def _arena(row: Row) -> Ranked:
    won = [name for name in WINNERS if row.fields.get(name) == 1]
    if len(won) != 1:
        raise row.error("winner_*", f"1 in one of {', '.join(WINNERS)}", f"it in {len(won)}")
    if won == ["winner_tie"]:
        raise TieError(f"{row.place}: a tie prefers no answer")
    prompts = _turns(row, "prompt")
    best, worst = ("response_a", "response_b") if won == ["winner_model_a"] else ("response_b", "response_a")
    return {best: _dialogue(row, prompts, best), worst: _dialogue(row, prompts, worst)}


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


def _graded(row: Row, grade: str, *answer_fields: str) -> list[tuple[float, Ranked]]:
    """Grade and answer of each completion, lowest grade first."""
    graded = []
    for i, item in enumerate(list_at(row, "completions", "a list of completions", at_least=2)):
        where = f"completions[{i}]"
        if not isinstance(item, dict):
            raise row.error(where, "an object", describe(item))
        field = next((name for name in answer_fields if item.get(name) is not None), answer_fields[0])
        answer = {f"{where}.{field}": as_text(row, f"{where}.{field}", item.get(field))}
        graded.append((as_number(row, f"{where}.{grade}", item.get(grade)), answer))
    if len({number for number, _ in graded}) == 1:
        raise TieError(f"{row.place}: a tie, all completions have the same {grade}")
    return sorted(graded, key=lambda one: one[0])


def _by_rank(row: Row) -> list[Ranked]:
    """One ranked list, lowest rank first; if ranks are shared, all pairs of different ranks."""
    graded = _graded(row, "rank", "completion")
    if len({rank for rank, _ in graded}) == len(graded):
        return [{place: text for _, answer in graded for place, text in answer.items()}]
    return [better | worse for (low, better), (high, worse) in combinations(graded, 2) if low < high]


def _by_score(row: Row) -> list[tuple[Ranked, float | None]]:
    """All pairs of answers with different scores, better one first, and the gap between their scores."""
    graded = _graded(row, "score", "text", "response")
    return [(better | worse, high - low) for (low, worse), (high, better) in combinations(graded, 2) if low < high]


LABEL = ("prompt", "references")
"""The keys of a label in JSON: what a framework hands on as one string of a row."""


def label_of(prompt: Any, references: Sequence[Any]) -> str:
    """The label that carries a prompt and its references, both as they stand in JSON."""
    return json.dumps(dict(zip(LABEL, (prompt, references), strict=True)), ensure_ascii=False)


def label_fields(label: Any) -> dict[str, Any] | None:
    """The prompt and the references that a label of `label_of` carries, or None if it is another one."""
    fields = json_object(label)
    return fields if fields is not None and set(fields) == set(LABEL) else None
