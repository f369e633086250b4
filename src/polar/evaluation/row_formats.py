"""One row of a benchmark becomes candidates with their quality, higher is better.

The layout is recognised row by row, by its fields, in this order:

| fields | layout | quality |
|---|---|---|
| conversation_input with bon_best, loser_list, or with chosen, reject | RMB | 1 and 0 |
| question, response_A, response_B, label | JudgeBench | 1 and 0 |
| prompt, response_1, response_2, ... with scores or winner | PPE | the scores; 1 and 0 |
| prompt, candidates, quality | this project | as given |
| prompt, chosen and rejected, both lists of strings | RewardBench 2, RM-Bench | 1 for chosen, 0 for rejected |
| prompt or context, completions with quality, score, is_correct or rank | UltraFeedback, Nectar, NeMo-RL | as given |
| prompt, output, quality | this project: consecutive rows of one prompt are one item | as given |
| others | `polar.data.formats.preference`: ranked lists, pairs, transcripts, arena pairs | the place in the ranking |

A quality may be a number, or true and false. All may have id, domain (or subset), policies and wrapper beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from polar.core.errors import InputError
from polar.core.records import Text
from polar.data import formats
from polar.data.fields import (
    Row,
    as_number,
    as_text,
    describe,
    json_object,
    list_at,
    optional_string,
    string_at,
    text_at,
)

PLACEHOLDER = "reference"
GRADES = ("quality", "score", "is_correct", "rank")
RMB_ID = ("bon_uid", "pair_uid")


@dataclass(frozen=True, slots=True)
class Graded:
    """The candidates of one item before it has a reference."""

    prompt: Text
    candidates: tuple[Text, ...]
    quality: tuple[float, ...]
    domain: str | None = None
    id: str | None = None
    policies: tuple[str | None, ...] | None = None


def graded(row: Row) -> list[Graded]:
    """The items of a row.

    Raises:
        InputError: the row has none of the layouts, or a field of it is wrong.
        TieError: the layout cannot express a preference that the row does not have.
    """
    if row.has("conversation_input"):
        found = [_rmb(row)]
    elif row.has("response_A"):
        found = [_judgebench(row)]
    elif row.has("response_1"):
        found = [_ppe(row)]
    elif row.has("candidates") or is_output(row):
        found = [_own(row)]
    elif row.has("prompt") and all(_strings(row.fields.get(name)) for name in ("chosen", "rejected")):
        found = [_several(row)]
    elif row.has("completions"):
        found = [_completions(row)]
    else:
        # References are read apart from the candidates, so the reader gets a column that it can take for one.
        filled = replace(row, fields={**row.fields, PLACEHOLDER: "-"})
        found = [
            Graded(each.prompt, each.ranked, tuple(map(float, reversed(range(len(each.ranked))))), each.domain)
            for each in formats.preference(filled, PLACEHOLDER)[1]
        ]
    return [_labelled(row, each) for each in found]


def is_output(row: Row) -> bool:
    """Whether the row has one output with its quality; other rows of the same prompt have more."""
    return row.has("output") and "quality" in row.fields and not row.has("candidates")


def _labelled(row: Row, item: Graded) -> Graded:
    domain = item.domain or optional_string(row, "domain" if row.has("domain") else "subset")
    name = item.id or (str(row.fields["id"]) if row.has("id") else None)
    policies = item.policies
    if row.has("policies"):
        policies = tuple(None if each is None else str(each) for each in list_at(row, "policies", "a list of names", 1))
        if len(policies) != len(item.candidates):
            raise row.error("policies", f"one name for each of {len(item.candidates)} candidates", f"{len(policies)}")
    return replace(item, domain=domain, id=name, policies=policies)


def _rmb(row: Row) -> Graded:
    best, losers = ("bon_best", "loser_list") if row.has("bon_best") else ("chosen", "reject")
    worse = row.fields.get(losers)
    answers = [row.fields.get(best), *(worse if isinstance(worse, list) else [worse])]
    candidates = []
    for place, answer in enumerate(answers):
        if not isinstance(answer, dict):
            raise row.error(best if place == 0 else losers, "an object with answer and llm_name", describe(answer))
        candidates.append(as_text(row, f"{losers if place else best}.answer", answer.get("answer")))
    policies = tuple(str(answer.get("llm_name")) for answer in answers if isinstance(answer, dict))
    name = next((str(row.fields[field]) for field in RMB_ID if row.has(field)), None)
    return Graded(
        text_at(row, "conversation_input"),
        tuple(candidates),
        (1.0, *(0.0 for _ in candidates[1:])),
        optional_string(row, "category_path"),
        name,
        policies,
    )


def _judgebench(row: Row) -> Graded:
    label = string_at(row, "label")
    if label not in ("A>B", "B>A"):
        raise row.error("label", '"A>B" or "B>A"', describe(label))
    candidates = text_at(row, "response_A"), text_at(row, "response_B")
    quality = (1.0, 0.0) if label == "A>B" else (0.0, 1.0)
    return Graded(text_at(row, "question"), candidates, quality, optional_string(row, "source"), _name(row, "pair_id"))


def _ppe(row: Row) -> Graded:
    count = 1
    while row.has(f"response_{count + 1}"):
        count += 1
    candidates = tuple(text_at(row, f"response_{number}") for number in range(1, count + 1))
    prompt, name = text_at(row, "prompt"), _name(row, "question_id")
    if row.has("scores"):
        return Graded(prompt, candidates, _numbers(row, "scores", count), id=name)
    winner = string_at(row, "winner")
    if winner.startswith("tie"):
        raise formats.TieError(f"{row.place}: a tie prefers no answer")
    if winner not in ("model_a", "model_b") or count != 2:
        raise row.error("winner", '"model_a" or "model_b" beside two responses', describe(winner))
    policies = optional_string(row, "model_a"), optional_string(row, "model_b")
    return Graded(prompt, candidates, (1.0, 0.0) if winner == "model_a" else (0.0, 1.0), id=name, policies=policies)


def _own(row: Row) -> Graded:
    prompt = text_at(row, "prompt")
    if row.has("candidates"):
        texts = list_at(row, "candidates", "a list of texts", 1)
        candidates = tuple(as_text(row, f"candidates[{i}]", text) for i, text in enumerate(texts))
        return Graded(prompt, candidates, _numbers(row, "quality", len(candidates)))
    quality = _number(row, "quality", row.fields.get("quality"))
    return Graded(prompt, (text_at(row, "output"),), (quality,), policies=(optional_string(row, "policy"),))


def _several(row: Row) -> Graded:
    chosen, rejected = (list_at(row, name, "a list of texts", 1) for name in ("chosen", "rejected"))
    candidates = tuple(as_text(row, "chosen", text) for text in chosen)
    candidates += tuple(as_text(row, "rejected", text) for text in rejected)
    quality = (1.0,) * len(chosen) + (0.0,) * len(rejected)
    return Graded(text_at(row, "prompt"), candidates, quality)


def _completions(row: Row) -> Graded:
    candidates, quality = [], []
    for i, value in enumerate(list_at(row, "completions", "a list of completions", 2)):
        completion = json_object(value)
        if completion is None:
            raise row.error(f"completions[{i}]", "an object", describe(value))
        text = next(
            (completion[name] for name in ("text", "response", "completion", "output") if name in completion), None
        )
        grade = next((name for name in GRADES if completion.get(name) is not None), "quality")
        number = _number(row, f"completions[{i}].{grade}", completion.get(grade))
        candidates.append(as_text(row, f"completions[{i}]", text))
        quality.append(-number if grade == "rank" else number)
    prompt = text_at(row, "prompt" if row.has("prompt") else "context")
    return Graded(prompt, tuple(candidates), tuple(quality))


def _name(row: Row, field: str) -> str | None:
    return str(row.fields[field]) if row.has(field) else None


def _numbers(row: Row, field: str, count: int) -> tuple[float, ...]:
    values = list_at(row, field, "a list of numbers", 1)
    if len(values) != count:
        raise row.error(field, f"one number for each of {count} candidates", f"{len(values)}")
    return tuple(_number(row, f"{field}[{i}]", value) for i, value in enumerate(values))


def _number(row: Row, where: str, value: object) -> float:
    return float(value) if isinstance(value, bool) else as_number(row, where, value)


def _strings(value: object) -> Sequence[str] | None:
    return value if isinstance(value, list) and value and all(isinstance(each, str) for each in value) else None


def value_at(row: Row, path: str) -> object:
    """What stands at a place in a row, such as "meta.models.0": fields of objects, places in lists, also in JSON text.

    None when there is nothing.
    """
    value: object = row.fields
    if path in row.fields:
        return row.fields[path]
    for part in path.split("."):
        value = json_object(value) or value
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def with_columns(row: Row, columns: dict[str, str | list[str]]) -> Row:
    """The row with further fields, or others, taken from other places of it."""
    taken: dict[str, object] = {
        field: value_at(row, place) if isinstance(place, str) else [value_at(row, each) for each in place]
        for field, place in columns.items()
    }
    return replace(row, fields={**row.fields, **taken})


def require_order(row: Row, item: Graded) -> None:
    """Raise a `TieError` when no candidate is better than another, so that no reward can be right or wrong."""
    if len(set(item.quality)) < 2:
        raise formats.TieError(f"{row.place}: a tie, all candidates have the same quality")


def require_several(row: Row, item: Graded) -> None:
    """Raise an error when there is nothing to choose from."""
    if len(item.candidates) < 2:
        raise InputError(f"{row.place}: expected at least two candidates, found {len(item.candidates)}")
