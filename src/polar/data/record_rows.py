"""Rows with the fields of a record, in files and in memory, and labels that carry a prompt with its references."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polar.core.errors import InputError
from polar.core.records import Comparison, Group, Message, Text, Trajectory, Triple, groups_of
from polar.data.dialogues import split
from polar.data.fields import (
    TEXT,
    Row,
    as_string,
    as_text,
    describe,
    json_object,
    optional_string,
    string_at,
    text_at,
    texts_at,
)
from polar.data.formats import named, reference_at, wrapper_of

ITEM = ("prompt", "reference", "output")
TRIPLE = ("prompt", "reference", "positive", "negative")

Item = Mapping[str, Any] | tuple[Any, Any, Any]
"""{"prompt", "reference", "output" [, "id", "wrapper"]}, (prompt, reference, output), or (prompt, reference, [outputs])
with outputs that share one truncation budget. Texts are strings or lists of {"role", "content"}."""
Scored = Comparison | Item


def comparison(row: Row, reference_column: str | None) -> tuple[str, list[Comparison]]:
    """Read a row with prompt, reference, output [, id, wrapper]."""
    prompt, reference, output = text_at(row, "prompt"), reference_at(row, reference_column), text_at(row, "output")
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
    prompt, reference = text_at(row, "prompt"), reference_at(row, reference_column)
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


def _candidates(row: Row) -> dict[str, Text]:
    if row.has("candidates"):
        return named("candidates", texts_at(row, "candidates", at_least=1))
    return {"output": text_at(row, "output")}


def count_of(row: Row, field: str) -> int | None:
    """Return the whole number in a field, or None when the field is absent."""
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


LABEL = ("prompt", "references")
"""Keys of a label in JSON: one string of a row, which frameworks pass on."""


def label_of(prompt: Any, references: Sequence[Any]) -> str:
    """Return the label that carries a prompt and its references, both as in JSON."""
    return json.dumps(dict(zip(LABEL, (prompt, references), strict=True)), ensure_ascii=False)


def label_fields(label: Any) -> dict[str, Any] | None:
    """Return the prompt and the references of a label of `label_of`, or None if it is another one."""
    fields = json_object(label)
    return fields if fields is not None and set(fields) == set(LABEL) else None
